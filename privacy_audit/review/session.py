"""One reviewer's sitting over one queue: every call on disk at once, all of them signed at the end.

Until the signature is made, nothing here opens the key file that tells pairs from decoys. What the reviewer said of
decoys is counted afterwards: a reader who calls innocent pairs the same field, or is never sure, says little by
calling nothing the same.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AwareDatetime, Field, StringConstraints, ValidationError

from pixcell_core.contracts import Digest, Document, canonical_bytes, digest, load_document
from pixcell_core.errors import BadInputError, RefusedError
from pixcell_core.trust.dsse import Envelope, sign_envelope
from pixcell_core.trust.durable import write_whole
from pixcell_core.trust.keys import SigningKey
from pixcell_core.trust.log import EventLog
from privacy_audit.intervals import two_sided
from privacy_audit.report import SITE_MARK
from privacy_audit.review_queue import (
    QUEUE,
    Call,
    Decision,
    ReviewQueue,
    load_queue,
    read_decisions,
    require_answer,
    sign_decisions,
)

DECISIONS = "site/review-decisions.json"
RECORD = "site/review-record.json"
RECORD_TYPE = "application/vnd.pixcell.review-record.v2+json"
MAX_SESSION_BYTES = 1 << 20

UserName = Annotated[str, StringConstraints(min_length=1, max_length=80, pattern=r"^[^\x00-\x1f\x7f]+$")]


class SavedReview(Document):
    """The calls so far. A later sitting of the same reviewer goes on from here."""

    schema_version: Literal["review-session/v1"] = "review-session/v1"
    mark: str = SITE_MARK
    queue: Digest
    user: UserName
    reviewer: Digest
    began_at: AwareDatetime
    calls: Annotated[tuple[Decision, ...], Field(max_length=2000)] = ()


class Counts(Document):
    """What was said of one kind of item."""

    same: Annotated[int, Field(ge=0)]
    different: Annotated[int, Field(ge=0)]
    unsure: Annotated[int, Field(ge=0)]

    @property
    def total(self) -> int:
        """All items of the kind."""
        return self.same + self.different + self.unsure


class MarkCounts(Document):
    """What was said of one kind of single tile."""

    marked: Annotated[int, Field(ge=0)]
    clean: Annotated[int, Field(ge=0)]
    unsure: Annotated[int, Field(ge=0)]

    @property
    def total(self) -> int:
        """All tiles of the kind."""
        return self.marked + self.clean + self.unsure


class ReviewRecord(Document):
    """Who decided, when, and how the decoys were read; signed with the key that signed the decisions.

    `decoy_agreement` is the share of decoys called different, with its two-sided 95 % Clopper–Pearson interval. `marks`
    and `clean` are the single tiles that the detectors brought up and those among them that they did not; None where
    the queue has no single tile.
    """

    schema_version: Literal["review-record/v2"] = "review-record/v2"
    mark: str = SITE_MARK
    queue: Digest
    decisions: Digest
    user: UserName
    reviewer: Digest
    began_at: AwareDatetime
    signed_at: AwareDatetime
    pairs: Counts
    decoys: Counts
    decoy_agreement: Annotated[float, Field(ge=0.0, le=1.0)] | None
    decoy_interval: tuple[float, float]
    marks: MarkCounts | None
    clean: MarkCounts | None


class SessionError(RefusedError):
    """This review may not go on as asked: open elsewhere, signed already, unfinished, or another reviewer's."""

    default_code = "review-refused"


def _now() -> datetime:
    return datetime.now(UTC).replace(microsecond=0)


class ReviewSession:
    """Calls of one reviewer (one key) about the queue in `out`. One process at a time holds it; `close` lets go."""

    def __init__(
        self,
        out: Path,
        user: str,
        key: SigningKey,
        *,
        decisions: Path | None = None,
        log: Path | None = None,
        clock: Callable[[], datetime] = _now,
    ) -> None:
        """Open the queue and what this reviewer decided before.

        Raises:
            BadInputError: no queue, an empty one, a name that cannot be recorded, a damaged session.
            SessionError: `review-open`, `review-signed`, `review-of-another-user`.
        """
        self.out, self._key, self._clock, self._log = out, key, clock, log
        self.queue = _queue(out)
        self._decisions = decisions or out / DECISIONS
        self._record = out / RECORD if decisions is None else decisions.with_suffix(".record.json")
        self._path = out / "site" / f"review-session-{key.key_id.removeprefix('sha256:')[:16]}.json"
        self._lock = self._taken()
        try:
            self._require_unsigned()
            self._saved = self._restored(user)
        except BaseException:
            self.close()
            raise
        self.calls: dict[str, Call] = {decision.id: decision.call for decision in self._saved.calls}
        self.signed: ReviewRecord | None = None

    @property
    def user(self) -> str:
        """The reviewer's name, as it is recorded."""
        return self._saved.user

    @property
    def decisions_file(self) -> Path:
        """Where the signed decisions go."""
        return self._decisions

    @property
    def record_file(self) -> Path:
        """Where the signed record goes."""
        return self._record

    @property
    def open(self) -> int:
        """Items without a call."""
        return len(self.queue.items) - len(self.calls)

    def decide(self, item: str, call: Call) -> None:
        """Set the call of one item, in place of an earlier one; on the disk when this returns.

        Raises:
            BadInputError: the queue has no such item, or asks something else of it. SessionError: signed already.
        """
        if self.signed is not None:
            raise SessionError(
                "This review is signed; calls cannot change any more.",
                hint="A second look is a second review, with a key of its own.",
                code="review-signed",
            )
        asks = {one.id: one.asks for one in self.queue.items}
        if item not in asks:
            raise BadInputError("The queue has no such item.", hint="Reload the page.", code="no-such-item")
        require_answer(asks[item], call)
        calls = {**self.calls, item: call}
        saved = self._saved.model_copy(update={"calls": _decisions(calls)})
        self._save(saved)
        self.calls = calls

    def sign(self) -> ReviewRecord:
        """Sign all calls, then open the key and count; writes decisions and record. Twice gives the same record.

        Raises:
            SessionError: items are open.
        """
        if self.signed is not None:
            return self.signed
        if self.open:
            raise SessionError(
                f"{self.open} items have no call yet.",
                hint="Decide them; `cannot tell` is an answer too.",
                code="review-unfinished",
            )
        decisions = sign_decisions(self.queue, self.calls, self._key)
        record = self._count(decisions)
        envelope = sign_envelope(RECORD_TYPE, record.to_bytes(), [self._key])
        if self._log is not None:
            # The event first: a signature that stands nowhere in the signer's log must not exist.
            facts = {"queue": record.queue, "decisions": record.decisions, "record": record.digest}
            EventLog(self._log, self._key).append("review.signed", facts, now=record.signed_at)
        write_whole(self._record, envelope.to_bytes(), mode=0o600)
        write_whole(self._decisions, decisions.to_bytes(), mode=0o600)
        self.signed = record
        return record

    def close(self) -> None:
        """Let another process take the session."""
        os.close(self._lock)

    def _count(self, decisions: Envelope) -> ReviewRecord:
        read = read_decisions(self.out, decisions, self._key.verify_key)
        found, marks = read.human, read.marks
        pairs = Counts(
            same=found.pair_same,
            unsure=found.pair_unsure,
            different=found.pairs - found.pair_same - found.pair_unsure,
        )
        decoys = Counts(
            same=found.decoy_same,
            unsure=found.decoy_unsure,
            different=found.decoys - found.decoy_same - found.decoy_unsure,
        )
        return ReviewRecord(
            queue=self._saved.queue,
            decisions=digest(decisions.to_bytes()),
            user=self._saved.user,
            reviewer=self._key.key_id,
            began_at=self._saved.began_at,
            signed_at=self._clock(),
            pairs=pairs,
            decoys=decoys,
            decoy_agreement=decoys.different / decoys.total if decoys.total else None,
            decoy_interval=two_sided(decoys.different, decoys.total),
            marks=_marks(marks.marked, marks.unsure, marks.shown) if marks else None,
            clean=_marks(marks.decoy_marked, marks.decoy_unsure, marks.decoys) if marks else None,
        )

    def _require_unsigned(self) -> None:
        for path in (self._decisions, self._record):
            if path.exists():
                raise SessionError(
                    f"{path.name} is there already: this queue was decided and signed.",
                    hint="A second reader names another file: --decisions FILE. Nothing is written over.",
                    code="review-signed",
                )
        if not self._decisions.parent.is_dir():
            raise BadInputError(
                f"{self._decisions.parent} is no folder.", hint="Give --decisions in a folder that exists."
            )

    def _restored(self, user: str) -> SavedReview:
        queue = digest(canonical_bytes(self.queue))
        if not self._path.is_file():
            try:
                saved = SavedReview(queue=queue, user=user, reviewer=self._key.key_id, began_at=self._clock())
            except ValidationError as error:
                raise BadInputError(
                    "This name cannot be recorded.",
                    hint="Give --user with 1 to 80 printable characters.",
                    code="bad-user",
                ) from error
            self._save(saved)
            return saved
        saved = load_document(SavedReview, self._path, MAX_SESSION_BYTES)
        known = {item.id for item in self.queue.items}
        if (saved.queue, saved.reviewer) != (queue, self._key.key_id) or not {
            decision.id for decision in saved.calls
        } <= known:
            raise SessionError(
                f"{self._path.name} is about another queue than the one of this audit.",
                hint="The audit was run again. Move that file away to begin anew.",
                code="review-of-another-queue",
            )
        if saved.user != user:
            raise SessionError(
                f"With this key {saved.user} began the review, not {user}.",
                hint="One key is one person. Use your own key, or the name it began with.",
                code="review-of-another-user",
            )
        return saved

    def _save(self, saved: SavedReview) -> None:
        write_whole(self._path, saved.to_bytes(), mode=0o600)
        self._saved = saved

    def _taken(self) -> int:
        descriptor = os.open(self._path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(descriptor)
            raise SessionError(
                "This review is open in another process.",
                hint="Go on there, or stop it first.",
                code="review-open",
            ) from error
        return descriptor


def _queue(out: Path) -> ReviewQueue:
    if not (out / QUEUE).is_file():
        raise BadInputError(
            f"{out} holds no queue for a reviewer.",
            hint="Give the folder of a finished audit with its site/ part: pixcell audit run … --out DIR",
            code="no-review-queue",
        )
    queue = load_queue(out)
    if not queue.items:
        raise BadInputError(
            "The queue of this audit is empty: there is nothing to review.",
            hint="See the report; the policy says how many pairs a reviewer is shown.",
            code="no-review-queue",
        )
    return queue


def _marks(marked: int, unsure: int, total: int) -> MarkCounts:
    return MarkCounts(marked=marked, unsure=unsure, clean=total - marked - unsure)


def _decisions(calls: dict[str, Call]) -> tuple[Decision, ...]:
    return tuple(Decision(id=name, call=call) for name, call in calls.items())
