"""What hub and sites say to each other in a round, and what the coordinator commits after it.

Messages carry one tensor record (the adapter going out, the update coming back) and one text record with a document
of this module. A reply says nothing about the data behind it: no counts, losses or norms, only public constants.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from pixcell_core.contracts.canonical import Digest, Document, Moment
from pixcell_core.contracts.log_heads import AnchorNews
from pixcell_core.contracts.masking import MaskedRequest
from pixcell_core.contracts.remedies import remedy_of
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

HISTORY = 100
"""Committed rounds that a run's state shows: it is rewritten at every change and must stay small."""

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
    """Hub to site: are you ready for this study? Carries the study in full; the site compares digests.

    `heads` says what the coordinator anchored of the site's log, where it exchanges heads.
    """

    schema_version: Literal["prepare-request/v1"] = "prepare-request/v1"
    study: dict[str, object]
    study_digest: Digest
    heads: AnchorNews | None = None


class PrepareReply(Document):
    """Site to hub: its signed approval (canonical envelope text), and whether its trainer stands ready.

    `log_offer` is the newest head of the site's log (the canonical text of a signed `HeadOffer`), where it has one.
    """

    schema_version: Literal["prepare-reply/v1"] = "prepare-reply/v1"
    study_digest: Digest
    approval: Annotated[str, StringConstraints(max_length=100_000)] = ""
    configured: bool = False
    code: RefusalCode = "ok"
    reason: Reason = ""
    log_offer: Annotated[str, StringConstraints(max_length=100_000)] = ""


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

    @property
    def remedy(self) -> str:
        """What to do about it."""
        return remedy_of(self.code)


class SiteTraffic(Document):
    """What one round cost one site on the wire, and when its reply was there: quantities the hub sees anyway.

    `bytes_out` went to the site and `bytes_in` came back, without headers. `reply_s` counts from the question, in
    tenths of a second; replies leave on the study's public grid. None where no reply came.
    """

    site: SiteName
    bytes_out: Annotated[int, Field(ge=0)] = 0
    bytes_in: Annotated[int, Field(ge=0)] = 0
    reply_s: Annotated[float, Field(ge=0)] | None = None


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
    traffic: tuple[SiteTraffic, ...] = ()
    started_at: Moment
    committed_at: Moment

    @property
    def bytes_out(self) -> int:
        """Bytes sent to all sites."""
        return sum(site.bytes_out for site in self.traffic)

    @property
    def bytes_in(self) -> int:
        """Bytes that came back from all sites."""
        return sum(site.bytes_in for site in self.traffic)

    @property
    def seconds(self) -> float:
        """From the first question to the commit."""
        return max(0.0, (self.committed_at - self.started_at).total_seconds())


class SiteState(Document):
    """What the coordinator knows of one site of a run; each column may be true without the next.

    `code` says why the site did not count when it was last asked ("ok" where it did); `note` says it in words. Bytes
    are those of all committed rounds and of the round in hand.
    """

    site: SiteName
    registered: bool = False
    approved: bool = False
    configured: bool = False
    training: bool = False
    rounds_counted: int = 0
    last_reply_at: Moment | None = None
    bytes_out: Annotated[int, Field(ge=0)] = 0
    bytes_in: Annotated[int, Field(ge=0)] = 0
    code: RefusalCode = "ok"
    note: Reason = ""


class RunState(Document):
    """The state of a run, rewritten at every change for those who watch it.

    `history` holds the last `HISTORY` committed rounds; all of them are in the run's store. `replies` counts the sites
    whose reply counts in the round in hand.
    """

    schema_version: Literal["run/v1"] = "run/v1"
    study_id: StudyId
    study_digest: Digest
    state: Literal["submitted", "waiting", "running", "completed", "failed", "stopped"]
    reason: Reason = ""
    round: int = 0
    rounds: int
    committed: int = 0
    replies: int = 0
    process: int | None = None
    started_at: Moment
    updated_at: Moment
    deadline_at: Moment | None = None
    sites: tuple[SiteState, ...]
    history: tuple[RoundRecord, ...] = ()
