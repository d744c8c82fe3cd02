"""The blinded queue for a pathologist: suspect items among innocent ones, and what the decisions say.

A pair is a released tile beside its nearest training tile. A decoy is a holdout tile beside its nearest training tile:
two patients, so never one field. After them come single tiles: released ones on which the detectors saw text, ink or a
label, among holdout tiles on which they saw none. Suspect and innocent items look alike in the queue; which is which
stands in a key file of its own. Ids come from the audit's blinding key, so that the queue of a repeated audit has the
same ids.

Queue, key and pictures stay at the site. Decisions are a signed document (DSSE) that names the queue by its digest.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator
from scipy.stats import fisher_exact

from pixcell_core.contracts import Digest, Document, canonical_bytes, digest, load_document, parse_document
from pixcell_core.errors import BadInputError
from pixcell_core.trust.dsse import Envelope, sign_envelope, verify_envelope
from pixcell_core.trust.keys import SigningKey, VerifyKey
from privacy_audit.blinding import Blinding
from privacy_audit.evidence_parts import HumanEvidence, MarkEvidence
from privacy_audit.policy import Policy, ReviewPolicy
from privacy_audit.report import SITE_MARK
from privacy_audit.result import Status, TestResult, not_tested
from privacy_audit.review_candidates import ASKS, Candidate, Kind, Question

NAME = "human review of nearest pairs"
QUEUE, KEY = "site/review-queue.json", "site/review-key.json"
DECISIONS_TYPE = "application/vnd.pixcell.review-decisions+json"
MAX_QUEUE_BYTES = 512 * 1024 * 1024
_CLAIM = "A pathologist who does not know which pairs are suspect finds no more 'same field' among them than among decoys."
_STATISTIC = "nearest pairs called the same field of tissue"

ItemId = Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]
Picture = Annotated[str, Field(pattern=r"^data:image/png;base64,[A-Za-z0-9+/=]+$")]
Call = Literal["same field", "different", "marked", "clean", "unsure"]
CALLS: dict[Question, tuple[Call, ...]] = {
    "field": ("same field", "different", "unsure"),
    "mark": ("marked", "clean", "unsure"),
}
"""The answers to each question."""


class QueueItem(Document):
    """Two pictures side by side, or one alone; nothing says where they come from."""

    id: ItemId
    asks: Question
    left: Picture
    right: Picture | None = None

    @model_validator(mode="after")
    def _one_or_two_pictures(self) -> Self:
        if (self.right is None) != (self.asks == "mark"):
            raise ValueError("a pair shows two pictures, a single tile one")
        return self


class Questions(Document):
    """What is asked of a pair, and what of a single tile."""

    field: str = "Do both pictures show the same field of tissue of the same patient?"
    mark: str = "Does this tile bear text, ink or a label?"


class ReviewQueue(Document):
    """What a reviewer sees: pairs, then single tiles, each among decoys in an order drawn by chance."""

    schema_version: Literal["review-queue/v2"] = "review-queue/v2"
    mark: str = SITE_MARK
    questions: Questions = Questions()
    items: Annotated[tuple[QueueItem, ...], Field(max_length=2000)]


class KeyItem(Document):
    """What stands behind one item."""

    id: ItemId
    kind: Kind
    left: str
    training_tile: str
    score: float


class ReviewKey(Document):
    """Which items are suspect and which are decoys; opened when the decisions are in."""

    schema_version: Literal["review-key/v2"] = "review-key/v2"
    mark: str = SITE_MARK
    queue: Digest
    items: Annotated[tuple[KeyItem, ...], Field(max_length=2000)]


class Decision(Document):
    """One call of the reviewer."""

    id: ItemId
    call: Call


class ReviewDecisions(Document):
    """All calls of one reviewer about one queue."""

    schema_version: Literal["review-decisions/v2"] = "review-decisions/v2"
    queue: Digest
    decisions: Annotated[tuple[Decision, ...], Field(max_length=2000)]


class ReviewError(BadInputError):
    """Decisions that cannot be counted: unsigned, of another queue, or about items that are not in it."""

    default_code = "bad-review"


@dataclass(frozen=True)
class Reading:
    """What a reviewer's decisions say of the pairs, and of the single tiles where the queue has any."""

    human: HumanEvidence
    marks: MarkEvidence | None


def item_id(candidate: Candidate, blinding: Blinding) -> str:
    """Sixteen hexadecimal digits under the site's key: equal in a repeated audit, meaningless elsewhere."""
    beside = candidate.training_digest or "alone"
    return blinding.name(f"{candidate.left_digest}|{beside}").removeprefix("sha256:")[:16]


def write(
    out: Path,
    chosen: list[Candidate],
    pictures: list[tuple[str, str | None]],
    blinding: Blinding,
) -> ReviewQueue:
    """Write queue and key into the site's part of the output, both readable by the owner alone.

    Args:
        pictures: data URIs of the left and right tile of each chosen candidate; none at the right of a single tile.
    """
    seen: dict[str, tuple[Candidate, tuple[str, str | None]]] = {}
    for candidate, both in zip(chosen, pictures, strict=True):
        seen.setdefault(item_id(candidate, blinding), (candidate, both))
    queue = ReviewQueue(
        items=tuple(
            QueueItem(id=name, asks=ASKS[one.kind], left=both[0], right=both[1])
            for name, (one, both) in seen.items()
        )
    )
    key = ReviewKey(
        queue=digest(canonical_bytes(queue)),
        items=tuple(
            KeyItem(
                id=name,
                kind=one.kind,
                left=one.left,
                training_tile=one.training_tile,
                score=round(one.score, 6),
            )
            for name, (one, _) in seen.items()
        ),
    )
    _write_private(out / QUEUE, canonical_bytes(queue))
    _write_private(out / KEY, json.dumps(key.model_dump(mode="json"), indent=1, sort_keys=True).encode())
    return queue


def load_queue(out: Path) -> ReviewQueue:
    """Read the queue of an audit's output folder."""
    return load_document(ReviewQueue, out / QUEUE, MAX_QUEUE_BYTES)


def load_key(out: Path) -> ReviewKey:
    """Read the key of an audit's queue."""
    return load_document(ReviewKey, out / KEY, MAX_QUEUE_BYTES)


def sign_decisions(queue: ReviewQueue, calls: dict[str, Call], key: SigningKey) -> Envelope:
    """The reviewer's decisions in a signed envelope.

    Raises:
        ReviewError: a call about an item that is not in the queue, or one that answers another question.
    """
    asks = {item.id: item.asks for item in queue.items}
    if strange := sorted(set(calls) - set(asks)):
        raise ReviewError(
            f"The queue has no item {strange[0]}.", hint="Decide about the items of this queue alone."
        )
    for name, call in calls.items():
        require_answer(asks[name], call)
    decisions = ReviewDecisions(
        queue=digest(canonical_bytes(queue)),
        decisions=tuple(Decision(id=name, call=calls[name]) for name in sorted(calls)),
    )
    return sign_envelope(DECISIONS_TYPE, canonical_bytes(decisions), [key])


def require_answer(asks: Question, call: Call) -> None:
    """Refuse a call that answers the other question.

    Raises:
        ReviewError: with the calls that fit.
    """
    if call not in CALLS[asks]:
        raise ReviewError(
            f"'{call}' is no answer to what is asked of this item.",
            hint=f"Answer one of: {', '.join(CALLS[asks])}.",
            code="call-of-another-question",
        )


def read_decisions(out: Path, envelope: Envelope, trusted: VerifyKey) -> Reading:
    """Verify signed decisions and count them against the key.

    Raises:
        EnvelopeError, SignatureRefusedError: not signed by the trusted key.
        ReviewError: about another queue, an item twice, an unknown item, or an answer to another question.
    """
    data = verify_envelope(envelope, [trusted], payload_type=DECISIONS_TYPE)
    found = parse_document(ReviewDecisions, data, name="review decisions")
    key = load_key(out)
    if found.queue != key.queue or key.queue != digest(canonical_bytes(load_queue(out))):
        raise ReviewError(
            "These decisions are about another queue than the one of this audit.",
            hint="Review the queue that lies in this audit's folder.",
            code="review-of-another-queue",
        )
    kinds = {item.id: item.kind for item in key.items}
    calls = {decision.id: decision.call for decision in found.decisions}
    if len(calls) < len(found.decisions) or not set(calls) <= set(kinds):
        raise ReviewError(
            "The decisions name an item twice, or one that is not in the queue.",
            hint="Sign the decisions again from the queue.",
        )
    for name, call in calls.items():
        require_answer(ASKS[kinds[name]], call)

    def count(kind: Kind, call: Call | None = None) -> int:
        return sum(
            1 for name, of in kinds.items() if of == kind and (call is None or calls.get(name) == call)
        )

    def left(asks: Question) -> int:
        return sum(1 for name, of in kinds.items() if ASKS[of] == asks and name not in calls)

    human = HumanEvidence(
        queue=key.queue,
        reviewer=trusted.key_id,
        pair_same=count("pair", "same field"),
        pair_unsure=count("pair", "unsure"),
        pairs=count("pair"),
        decoy_same=count("decoy", "same field"),
        decoy_unsure=count("decoy", "unsure"),
        decoys=count("decoy"),
        open=left("field"),
    )
    if "mark" not in {ASKS[kind] for kind in kinds.values()}:
        return Reading(human, None)
    marks = MarkEvidence(
        queue=key.queue,
        reviewer=trusted.key_id,
        marked=count("mark", "marked"),
        unsure=count("mark", "unsure"),
        shown=count("mark"),
        decoy_marked=count("clean", "marked"),
        decoy_unsure=count("clean", "unsure"),
        decoys=count("clean"),
        open=left("mark"),
    )
    return Reading(human, marks)


def result(evidence: HumanEvidence | None, policy: Policy) -> TestResult:
    """The test, or what stands in its place until decisions are in."""
    if evidence is None:
        return not_tested(
            NAME,
            "near copies",
            claim=_CLAIM,
            statistic=_STATISTIC,
            threshold=0.0,
            direction="lower is safer",
            missing=f"nobody has read the queue yet ({QUEUE}; then pixcell audit decide).",
            required="human" in policy.required,
        )
    p = excess_p(evidence)
    status, why = _decide(evidence, p, policy.review)
    return TestResult(
        name=NAME,
        section="near copies",
        claim=_CLAIM,
        statistic=_STATISTIC,
        value=float(evidence.pair_same),
        null=f"{evidence.decoys} decoys: holdout tiles beside their nearest training tiles, shown in the same way",
        p=p,
        threshold=0.0,
        direction="lower is safer",
        status=status,
        why=why,
        cannot_show="Pairs that the search did not bring up, and likenesses that no eye sees.",
        details={
            "pairs": evidence.pairs,
            "decoys": evidence.decoys,
            "decoys_called_same": evidence.decoy_same,
            "unsure": evidence.pair_unsure + evidence.decoy_unsure,
            "open": evidence.open,
            "reviewer": evidence.reviewer,
            "queue": evidence.queue,
        },
    )


def excess_p(evidence: HumanEvidence) -> float:
    """Fisher's exact test, one-sided: is "same field" said more often of pairs than of decoys?"""
    table = [
        [evidence.pair_same, evidence.pairs - evidence.pair_same],
        [evidence.decoy_same, evidence.decoys - evidence.decoy_same],
    ]
    return float(fisher_exact(table, alternative="greater").pvalue)


def _decide(evidence: HumanEvidence, p: float, policy: ReviewPolicy) -> tuple[Status, str]:
    agreement = (
        f"{evidence.decoys - evidence.decoy_same} of {evidence.decoys} decoys were recognised as innocent"
    )
    if evidence.pair_same and (not evidence.decoy_same or p < policy.max_p):
        return Status.FAIL, (
            f"The reviewer called {evidence.pair_same} of {evidence.pairs} nearest pairs the same field; {agreement}."
        )
    if evidence.open:
        return Status.REVIEW, f"{evidence.open} pairs of the queue have no decision yet."
    if evidence.pair_same or evidence.pair_unsure or evidence.decoy_same:
        return Status.REVIEW, (
            f"The reviewer called {evidence.pair_same} pairs and {evidence.decoy_same} decoys the same field and was unsure "
            f"of {evidence.pair_unsure} pairs: a second reader has to look."
        )
    return (
        Status.PASS,
        f"The reviewer called none of {evidence.pairs} nearest pairs the same field; {agreement}.",
    )


def _write_private(path: Path, data: bytes) -> None:
    partial = path.with_name(path.name + ".partial")
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as handle:
        handle.write(data)
    partial.replace(path)
