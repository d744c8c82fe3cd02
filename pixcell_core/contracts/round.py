"""What hub and sites say to each other in a round, and what the coordinator commits after it.

Messages carry one tensor record (the adapter going out, the update coming back) and one text record with a document
of this module. A reply says nothing about the data behind it: no counts, losses or norms, only public constants.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AwareDatetime, Field, StringConstraints

from pixcell_core.contracts.canonical import Digest, Document
from pixcell_core.contracts.masking import MaskedRequest
from pixcell_core.contracts.study import SiteName, StudyId

ARRAYS = "arrays"
"""Name of the tensor record of a message."""

CONTROL = "control"
"""Name of the text record of a message; its one entry `DOCUMENT` holds canonical JSON."""

DOCUMENT = "document"

PREPARE = "prepare"
"""Name of the query by which the hub asks a site whether it is approved and configured for a study."""

FLAT = "flat"
"""Name of the one tensor of a message: every tensor of the adapter in the order of its layout, end to end."""

MAX_CONTROL_BYTES = 1 << 20

Reason = Annotated[str, StringConstraints(max_length=500)]
RefusalCode = Annotated[str, StringConstraints(pattern=r"^[a-z0-9-]{1,60}$")]


class KnownHead(Document):
    """The last record of a site's privacy ledger as somebody outside of it knows it: its number, and its hash.

    Heads are exchanged in every round, so that a ledger that was put back to an earlier day, or written anew, is met
    by somebody who remembers. A head holds no settings and no counts of patients.
    """

    sequence: Annotated[int, Field(ge=0)]
    hash: Digest


class TensorPlace(Document):
    """One tensor of the adapter: its name and shape, and by its place in the layout where it lies in the flat one."""

    name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.\-]{1,300}$")]
    shape: Annotated[tuple[Annotated[int, Field(ge=1, le=1 << 30)], ...], Field(min_length=1, max_length=4)]


class PrepareRequest(Document):
    """Hub to site: are you ready for this study? Carries the study in full; the site compares digests."""

    schema_version: Literal["prepare-request/v1"] = "prepare-request/v1"
    study: dict[str, object]
    study_digest: Digest


class PrepareReply(Document):
    """Site to hub: its signed approval (canonical envelope text), and whether its trainer stands ready."""

    schema_version: Literal["prepare-reply/v1"] = "prepare-reply/v1"
    study_digest: Digest
    approval: Annotated[str, StringConstraints(max_length=100_000)] = ""
    configured: bool = False
    code: RefusalCode = "ok"
    reason: Reason = ""


class TrainRequest(Document):
    """Hub to site: train one round, starting from the adapter in the tensor record.

    `ledger_head` is the last one this site sent: the site's ledger must still hold it. `masking` stands in every round
    of a study that masks: who shared secrets with whom, and the shares for this site.
    """

    schema_version: Literal["train-request/v1"] = "train-request/v1"
    study_digest: Digest
    round: Annotated[int, Field(ge=1)]
    input_digest: Digest
    layout: Annotated[tuple[TensorPlace, ...], Field(min_length=1, max_length=20_000)]
    ledger_head: KnownHead | None = None
    masking: MaskedRequest | None = None


class TrainReply(Document):
    """Site to hub: the update in the tensor record, or a refusal with its reason. Public constants only."""

    schema_version: Literal["train-reply/v1"] = "train-reply/v1"
    study_digest: Digest
    round: Annotated[int, Field(ge=1)]
    input_digest: Digest
    status: Literal["ok", "refused"]
    code: RefusalCode = "ok"
    reason: Reason = ""
    ledger_head: KnownHead | None = None


class Exclusion(Document):
    """One site that does not count in one round, and why."""

    site: SiteName
    code: RefusalCode
    reason: Reason


class RoundRecord(Document):
    """One committed round. Chained by digest, so that a missing or altered round is noticed.

    `state_digest` names the server optimiser's own tensors after the round, where it has any.
    """

    schema_version: Literal["round/v1"] = "round/v1"
    study_id: StudyId
    study_digest: Digest
    round: Annotated[int, Field(ge=0)]
    previous: Digest | None
    adapter_digest: Digest
    state_digest: Digest | None = None
    included: tuple[SiteName, ...]
    excluded: tuple[Exclusion, ...]
    started_at: AwareDatetime
    committed_at: AwareDatetime


class SiteState(Document):
    """What the coordinator knows of one site of a run; each column may be true without the next."""

    site: SiteName
    registered: bool = False
    approved: bool = False
    configured: bool = False
    training: bool = False
    rounds_counted: int = 0
    last_reply_at: AwareDatetime | None = None
    note: Reason = ""


class RunState(Document):
    """The state of a run, rewritten at every change for those who watch it."""

    schema_version: Literal["run/v1"] = "run/v1"
    study_id: StudyId
    study_digest: Digest
    state: Literal["submitted", "waiting", "running", "completed", "failed"]
    reason: Reason = ""
    round: int = 0
    rounds: int
    committed: int = 0
    process: int | None = None
    started_at: AwareDatetime
    updated_at: AwareDatetime
    deadline_at: AwareDatetime | None = None
    sites: tuple[SiteState, ...]
    history: tuple[RoundRecord, ...] = ()
