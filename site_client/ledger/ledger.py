"""The ledger as training uses it: refuse what passes the cap, charge before noise is drawn, never give back.

    with Ledger.open(folder, key, BudgetCap(8.0, 1e-5), site="north") as ledger:
        with ledger.reserve(RoundCharge("study-1", 1, 1.0, 8.5, 20, 0.1, code_digest)) as steps:
            run_private_steps(..., reserve=steps)

`reserve` checks the whole round against the cap before anything is drawn. Calling the result with a step's
index writes the charge and returns when it is on disk. A step that is taken again after a crash is a new
charge.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import TypedDict

import pixcell_core.private
from pixcell_core.contracts.canonical import canonical_bytes
from pixcell_core.errors import BadInputError, RefusedError
from pixcell_core.private.accounting import Epsilon, GaussianEvent, check_delta, epsilon
from site_client.ledger.journal import LEDGER_FILE, Journal, no_observer, read_lines
from site_client.ledger.record import (
    FIRST_HASH,
    BaseRecord,
    LedgerHead,
    OpenedRecord,
    ReserveRecord,
    Signer,
    SpentRecord,
    encode_line,
    encode_public_key,
    head_of,
)
from site_client.ledger.view import AnyRecord, BudgetCap, LedgerCheck, LedgerView, read_ledger


@dataclass(frozen=True)
class RoundCharge:
    """What a round of private training will use the patients for.

    Attributes:
        study: the study's name or digest.
        round: its number.
        sample_rate: q.
        noise_multiplier: sigma.
        steps: T of this round.
        max_grad_norm: C.
        code_digest: digest of the code that trains, see `private_code_digest`.
        purpose: what the mechanism releases: ``training``, or another use of the Gaussian mechanism.
    """

    study: str
    round: int
    sample_rate: float
    noise_multiplier: float
    steps: int
    max_grad_norm: float
    code_digest: str
    purpose: str = "training"

    @property
    def event(self) -> GaussianEvent:
        """The accountant's form."""
        return GaussianEvent(self.sample_rate, self.noise_multiplier, self.steps)


class BudgetExceededError(RefusedError):
    """The round would pass the site's cap; nothing was drawn and nothing was charged."""

    default_code = "budget-exceeded"


class StepNotReservedError(RefusedError):
    """A step was asked for that the round does not have, or a second time."""

    default_code = "step-not-reserved"


class ReservedSteps:
    """The steps of one round. Called with each step's index, from 0; returns when it is charged on disk."""

    def __init__(self, ledger: Ledger, charge: RoundCharge, at_a_time: int) -> None:
        self.charge = charge
        self._ledger = ledger
        self._at_a_time = at_a_time
        self._taken = 0
        self._reserved = 0
        self._first: int | None = None
        self._closed = False

    @property
    def steps_reserved(self) -> int:
        """Steps of this round charged so far."""
        return self._reserved

    def __call__(self, step_index: int) -> None:
        """Charge step `step_index`, waiting for the disk where it is the first of a block."""
        if self._closed or step_index != self._taken or step_index >= self.charge.steps:
            raise StepNotReservedError(
                f"Step {step_index} was not reserved: step {self._taken} of {self.charge.steps} is next, "
                "each step is charged once, and a finished round gives no more.",
                hint="Reserve a new round for further steps; a repeated step is a new charge.",
            )
        if self._taken == self._reserved:
            block = min(self._at_a_time, self.charge.steps - self._reserved)
            sequence = self._ledger._charge(self.charge, block)
            self._first = sequence if self._first is None else self._first
            self._reserved += block
        self._taken += 1

    def close(self) -> None:
        """Record how many reserved steps were taken. Gives nothing back; harmless when done twice."""
        if self._closed:
            return
        self._closed = True
        if self._first is not None:
            self._ledger._note_spent(self.charge, self._first, self._reserved, self._taken)

    def __enter__(self) -> ReservedSteps:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Ledger:
    """A site's ledger, open for charging, by one process at a time. `read_ledger` looks without charging."""

    def __init__(
        self, journal: Journal, signer: Signer, view: LedgerView, clock: Callable[[], datetime]
    ) -> None:
        self._journal = journal
        self._signer = signer
        self._view = view
        self._clock = clock
        self._site = view.site or ""
        self._plan: ReservedSteps | None = None

    @classmethod
    def open(
        cls,
        folder: Path,
        signer: Signer,
        cap: BudgetCap | None = None,
        *,
        site: str = "site",
        wait_seconds: float = 0.0,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
        on_point: Callable[[str], None] = no_observer,
    ) -> Ledger:
        """Take the writer's lock, verify everything, mend what a crash left, make the ledger when it is new.

        Args:
            folder: the ledger's folder.
            signer: the site's ledger key.
            cap: the site owner's cap. A change is recorded. None keeps the recorded one.
            site: the site's name, recorded when the ledger is made.
            wait_seconds: how long to wait for another process to finish.
            clock: the time written into records.
            on_point: see `Journal.lock`.

        Raises:
            LedgerBusyError: another process has it.
            LedgerBrokenError: it does not verify; names the first bad record.
            BadInputError: a new ledger needs a cap.
        """
        if cap is not None:
            check_delta(cap.delta)
            if not (math.isfinite(cap.epsilon) and cap.epsilon > 0.0):
                raise _bad_cap(f"A cap of epsilon {cap.epsilon:g} is not a finite number above 0.")
        folder = Path(folder)
        journal = Journal.lock(folder, wait_seconds=wait_seconds, on_point=on_point)
        try:
            view = read_ledger(folder, signer.verify_key).require_whole()
            recovered = _mend(journal, view)
            ledger = cls(journal, signer, view, clock)
            if not view.records:
                if cap is None:
                    raise _bad_cap("This site has no privacy ledger yet, and no cap was given to make one.")
                ledger._site = site
                ledger._record_opening("created", cap)
            elif cap is not None and cap != view.cap:
                ledger._record_opening("cap-changed", cap)
            elif recovered:
                ledger._record_opening("recovered", ledger.cap)
        except BaseException:
            journal.close()
            raise
        return ledger

    @property
    def cap(self) -> BudgetCap:
        """The cap in force."""
        cap = self._view.cap
        if cap is None:
            raise _bad_cap("This ledger records no cap.")
        return cap

    @property
    def head(self) -> LedgerHead:
        """The last record; exchange it with others, so that the past cannot be rewritten unseen."""
        head = self._view.head
        if head is None:
            raise _bad_cap("This ledger has no record yet.")
        return head

    @property
    def records(self) -> tuple[AnyRecord, ...]:
        """All records, oldest first."""
        return self._view.records

    def totals(self) -> tuple[GaussianEvent, ...]:
        """Return what was charged so far, grouped by (q, sigma)."""
        return self._view.totals()

    def epsilon(self, delta: float) -> Epsilon:
        """Return the epsilon of everything charged so far, per patient."""
        return self._view.epsilon(delta)

    def verify(self) -> LedgerCheck:
        """Read the file again and verify every record."""
        return read_ledger(self._journal.folder, self._signer.verify_key).check

    def reserve(self, charge: RoundCharge, *, at_a_time: int = 1) -> ReservedSteps:
        """Check that the whole round fits under the cap and return its steps, each charged when it is taken.

        Args:
            charge: the round.
            at_a_time: steps written together. More writes less often, and a crash costs up to as many steps.

        Raises:
            BudgetExceededError: before anything is drawn or charged.
        """
        if at_a_time < 1:
            raise BadInputError(
                f"Steps cannot be reserved {at_a_time} at a time.",
                hint="Give 1 or more.",
                code="privacy-setting",
            )
        if self._plan is not None:
            self._plan.close()
        self._require_room(charge.event)
        # Whatever the records would refuse (a name, a digest) is refused here, before the round begins.
        self._reserve_record(charge, charge.steps)
        self._plan = ReservedSteps(self, charge, at_a_time)
        return self._plan

    def close(self) -> None:
        """Finish the round in hand and free the lock."""
        if self._plan is not None:
            self._plan.close()
        self._journal.close()

    def __enter__(self) -> Ledger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _require_room(self, event: GaussianEvent) -> None:
        cap = self.cap
        after = epsilon([*self.totals(), event], cap.delta)
        if after.value > cap.epsilon:
            before = self.epsilon(cap.delta)
            raise BudgetExceededError(
                f"This round would bring the site to {_short(after)}, over its cap of {cap.epsilon:g}; "
                f"{_short(before)} is spent already. Nothing was drawn and nothing was charged.",
                hint="Plan fewer steps or more noise. Only the site's owner can raise the cap.",
            )

    def _charge(self, charge: RoundCharge, steps: int) -> int:
        """Append a reserve record; return its sequence number once it is on disk."""
        record = self._reserve_record(charge, steps)
        self._append(record)
        return record.sequence

    def _note_spent(self, charge: RoundCharge, first: int, reserved: int, taken: int) -> None:
        self._append(
            SpentRecord(
                **self._place(),
                study=charge.study,
                round=charge.round,
                purpose=charge.purpose,
                first_reserve=first,
                steps_reserved=reserved,
                steps_taken=taken,
            )
        )

    def _reserve_record(self, charge: RoundCharge, steps: int) -> ReserveRecord:
        try:
            return ReserveRecord(
                **self._place(),
                study=charge.study,
                round=charge.round,
                purpose=charge.purpose,
                sample_rate=charge.sample_rate,
                noise_multiplier=charge.noise_multiplier,
                steps=steps,
                max_grad_norm=charge.max_grad_norm,
                code_digest=charge.code_digest,
            )
        except ValueError as error:
            first = str(error).splitlines()[1:2]
            raise BadInputError(
                f"This round cannot be charged: its {first[0] if first else 'settings'} cannot be recorded.",
                hint="Correct the study's privacy settings; nothing was drawn and nothing was charged.",
                code="privacy-setting",
            ) from error

    def _record_opening(self, reason: str, cap: BudgetCap) -> None:
        self._append(
            OpenedRecord.model_validate(
                {
                    **self._place(),
                    "reason": reason,
                    "cap_epsilon": cap.epsilon,
                    "cap_delta": cap.delta,
                    "public_key": encode_public_key(self._signer.verify_key),
                }
            )
        )

    def _place(self) -> _Place:
        head = self._view.head
        return {
            "sequence": 0 if head is None else head.sequence + 1,
            "previous_hash": FIRST_HASH if head is None else head.hash,
            "site": self._site,
            "time": self._clock().astimezone(UTC).isoformat(timespec="seconds"),
        }

    def _append(self, record: BaseRecord) -> None:
        assert isinstance(record, OpenedRecord | ReserveRecord | SpentRecord)
        head = head_of(record)
        self._journal.append(encode_line(record, self._signer), head)
        records = (*self._view.records, record)
        self._view = LedgerView(records, self._view.check, self._signer.verify_key, head)


class _Place(TypedDict):
    """Where the next record stands in the chain."""

    sequence: int
    previous_hash: str
    site: str
    time: str


def private_code_digest() -> str:
    """Return the digest of the installed code that computes, clips, noises and accounts private gradients."""
    folder = Path(pixcell_core.private.__file__).parent
    files = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.glob("*.py"))}
    return "sha256:" + hashlib.sha256(canonical_bytes(files)).hexdigest()


def _mend(journal: Journal, view: LedgerView) -> bool:
    """Set right what a crash may leave; True when a torn last line was dropped."""
    lines, tail = read_lines(journal.folder)
    dropped = False
    if tail and len(view.records) > len(lines):
        journal.complete_tail()
    elif tail:
        journal.drop_torn_tail((journal.folder / LEDGER_FILE).stat().st_size - len(tail))
        dropped = bool(view.records)
    if view.head is not None and view.head != view.recorded_head:
        journal.restore_head(view.head)
    return dropped


def _short(spent: Epsilon) -> str:
    return f"epsilon {math.ceil(spent.value * 100.0) / 100.0:.2f} per {spent.unit} at delta {spent.delta:g}"


def _bad_cap(message: str) -> BadInputError:
    return BadInputError(
        message,
        hint="Give the site's cap as epsilon and delta, such as epsilon 8 at delta 1e-5.",
        code="budget-cap",
    )
