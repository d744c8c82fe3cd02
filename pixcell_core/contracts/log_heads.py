"""What parties say to each other about their logs: proofs, offers of a head, and receipts for an anchored one.

A party's log is a tree (RFC 6962). A head names its size and root. Whoever holds a head can be shown, without the log,
that an event lies under it (:class:`InclusionProof`) or that a newer head only appended (:class:`ConsistencyProof`).
A party offers its head to the coordinator (:class:`HeadOffer`), who makes it an event of the coordinator's own log and
answers with the proof of that (:class:`AnchorReceipt`). Checking them is the work of `pixcell_core.trust.log_proof`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from pixcell_core.contracts.canonical import Document
from pixcell_core.contracts.study import SiteName
from pixcell_core.trust.dsse import Envelope
from pixcell_core.trust.log import LogEntry
from pixcell_core.trust.merkle import MAX_PROOF_HASHES

OFFER_PAYLOAD_TYPE = "application/vnd.pixcell.log-offer.v1+json"
MAX_PROOF_BYTES = 512 * 1024
RECEIPT_FILE = "anchor.json"
"""In a party's log folder: the newest receipt it accepted."""
COORDINATOR_KEY_FILE = "coordinator.pub"
"""In a party's log folder: the key of the coordinator's log."""
ANCHORED = "log.anchored"
"""Kind of the event by which a coordinator's log holds another party's head."""

HashText = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
ProofPath = Annotated[tuple[HashText, ...], Field(max_length=MAX_PROOF_HASHES)]
KeyText = Annotated[str, StringConstraints(max_length=4096, pattern=r"^[\n\r -~]*$")]
"""A public key in PEM."""
TreeSize = Annotated[int, Field(ge=0, lt=2**53)]


class InclusionProof(Document):
    """That one event lies in the log whose head is `head`: the hashes beside its way up (RFC 6962, 2.1.1)."""

    schema_version: Literal["pixcell.log-inclusion/v1"] = "pixcell.log-inclusion/v1"
    entry: LogEntry
    path: ProofPath
    head: Envelope


class ConsistencyProof(Document):
    """That the log of `newer` begins with the whole log of `older` (RFC 6962, 2.1.2)."""

    schema_version: Literal["pixcell.log-consistency/v1"] = "pixcell.log-consistency/v1"
    older: Envelope
    newer: Envelope
    path: ProofPath


class HeadOffer(Document):
    """A party's newest head, for the coordinator to anchor; travels in an envelope signed by the party's approval key.

    `since` is the size of the head that was anchored last (0: none), and `path` the consistency proof from there.
    `seen` is the coordinator's own head that this party was shown last: the coordinator must still have that past, and
    the receipt proves growth from there.
    """

    schema_version: Literal["pixcell.log-offer/v1"] = "pixcell.log-offer/v1"
    party: SiteName
    log_key: KeyText
    head: Envelope
    since: TreeSize = 0
    path: ProofPath = ()
    seen: Envelope | None = None


class AnchorReceipt(Document):
    """That the coordinator's log holds a party's head, and that this log only grew since the party last saw it."""

    schema_version: Literal["pixcell.log-anchor/v1"] = "pixcell.log-anchor/v1"
    party: SiteName
    head: Envelope
    anchored: InclusionProof
    grown: ConsistencyProof | None = None


class AnchorNews(Document):
    """What the coordinator tells a site with a question: its log's key, the size it anchored last, and the receipt."""

    schema_version: Literal["pixcell.anchor-news/v1"] = "pixcell.anchor-news/v1"
    log_key: KeyText
    anchored: TreeSize = 0
    receipt: AnchorReceipt | None = None
