"""The ledger as training uses it: refuse what passes the cap, charge before noise is drawn, never give back.

    with Ledger.open(folder, key, BudgetCap(8.0, 1e-5), site="north") as ledger:
        with ledger.reserve(RoundCharge("study-1", 1, 1.0, 8.5, 20, 0.1, code_digest)) as steps:
            run_private_steps(..., reserve=steps)

`reserve` checks the whole round against the cap before anything is drawn. Calling the result with a step's
index writes the charge and returns when it is on disk. A step that is taken again after a crash is a new
charge.

The cap holds per patient. A charge to the cohort `all` uses every patient; a charge to another cohort uses that
cohort alone (`site_client.ledger.cohorts` keeps cohorts disjoint), and every patient's own sequence of charges has
to stay under the cap.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import TypedDict

from pixcell_core.errors import BadInputError, RefusedError
from pixcell_core.private.accounting import Epsilon, GaussianEvent, check_delta
from pixcell_core.private.filters import BudgetExceededError, BudgetFilter
from pixcell_core.private.ledger_record import (
    EVERY_PATIENT,
    FIRST_HASH,
    PURPOSES,
    AnyRecord,
    LedgerHead,
    OpenedRecord,
    ReserveRecord,
    Signer,
    SpentRecord,
    encode_line,
    encode_public_key,
    head_of,
)
from site_client.ledger.clock import LedgerClock
from site_client.ledger.journal import Journal
from site_client.ledger.mending import mend
from site_client.ledger.reserved_steps import ReservedSteps
from site_client.ledger.spending import Spending
from site_client.ledger.view import BudgetCap, LedgerCheck, LedgerView, read_ledger
from site_client.ledger.witness import WitnessedHeads

__all__ = ["BudgetExceededError", "ForeignLedgerError", "Ledger", "RoundCharge"]


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
        code_digest: digest of the code that uses the patients.
        purpose: what the mechanism releases: the weights of ``training``, or private ``conditions``.
        cohort: whose patients; ``all`` is every patient of the site.
    """

    study: str
    round: int
    sample_rate: float
    noise_multiplier: float
    steps: int
    max_grad_norm: float
    code_digest: str
    purpose: str = "training"
    cohort: str = EVERY_PATIENT

    @property
    def event(self) -> GaussianEvent:
        """The accountant's form."""
        return GaussianEvent(self.sample_rate, self.noise_multiplier, self.steps)


class ForeignLedgerError(RefusedError):
    """The ledger was made by another site."""

    default_code = "ledger-of-another-site"


class Ledger:
    """A site's ledger, open for charging, by one process at a time. `read_ledger` looks without charging."""

    def __init__(
        self,
        journal: Journal,
        signer: Signer,
        view: LedgerView,
        clock: Callable[[], datetime],
        witness: WitnessedHeads | None,
    ) -> None:
        self._journal = journal
        self._signer = signer
        self._records = list(view.records)
        self._check = view.check
        self._head = view.head
        self._cap = view.cap
        self._clock = LedgerClock(clock)
        self._witness = witness
        self._site = view.site or ""
        self._plan: ReservedSteps | None = None

    @classmethod
    def open(
        cls,
        folder: Path,
        signer: Signer,
        cap: BudgetCap | None = None,
        *,
        site: str | None = None,
        patients: int | None = None,
        wait_seconds: float = 0.0,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
        correct_clock: bool = False,
        witness: WitnessedHeads | None = None,
    ) -> Ledger:
        """Take the writer's lock, verify everything, mend what a crash left, make the ledger when it is new.

        Args:
            folder: the ledger's folder.
            signer: the site's ledger key.
            cap: the site owner's cap. A change is recorded. None keeps the recorded one.
            site: the site's name, recorded when the ledger is made; a ledger of another name is refused.
            patients: N, where it is known: the cap's delta has to be at most 1 / (10 N).
            wait_seconds: how long to wait for another process to finish.
            clock: the time written into records.
            correct_clock: the owner says that the clock is right and the last record's time was wrong.
            witness: heads kept in another folder; all must stand in the ledger, and new ones are noted there.

        Raises:
            LedgerBusyError: another process has it.
            LedgerBrokenError: it does not verify; names the first bad record.
            LedgerRewoundError: a head that `witness` remembers is gone.
            ForeignLedgerError: it is another site's.
            ClockBackwardsError: the clock is behind the last record.
            LedgerWriteError: the disk refused to mend what a crash left, or to take the opening record.
            BadInputError: a new ledger needs a cap; the cap or its delta is none that can be promised.
        """
        if cap is not None:
            check_delta(cap.delta, patients)
            if not (math.isfinite(cap.epsilon) and cap.epsilon > 0.0):
                raise _bad_cap(f"A cap of epsilon {cap.epsilon:g} is not a finite number above 0.")
        folder = Path(folder)
        journal = Journal.lock(folder, wait_seconds=wait_seconds)
        try:
            view = read_ledger(folder, signer.verify_key).require_whole()
            if witness is not None:
                witness.require_contains(view)
            if site is not None and view.site not in (None, site):
                raise _foreign(str(view.site), site)
            if cap is None and view.cap is not None:
                check_delta(view.cap.delta, patients)
            ledger = cls(journal, signer, view, clock, witness)
            went_back = correct_clock and ledger._clock.is_behind(ledger._last)
            if not correct_clock:
                # Before anything is mended: a refusal changes nothing.
                ledger._clock.require_after(ledger._last)
            recovered = mend(journal, view)
            if not view.records:
                if cap is None:
                    raise _bad_cap("This site has no privacy ledger yet, and no cap was given to make one.")
                ledger._site = site or "site"
                ledger._record_opening("created", cap)
            if went_back:
                ledger._record_opening("clock-corrected", ledger.cap)
            if cap is not None and cap != ledger.cap:
                ledger._record_opening("cap-changed", cap)
            elif recovered:
                ledger._record_opening("recovered", ledger.cap)
            ledger._note_witness()
        except BaseException:
            journal.close()
            raise
        return ledger

    @property
    def cap(self) -> BudgetCap:
        """The cap in force."""
        if self._cap is None:
            raise _bad_cap("This ledger records no cap.")
        return self._cap

    @property
    def head(self) -> LedgerHead:
        """The last record; exchange it with others, so that the past cannot be rewritten unseen."""
        if self._head is None:
            raise _bad_cap("This ledger has no record yet.")
        return self._head

    @property
    def records(self) -> tuple[AnyRecord, ...]:
        """All records, oldest first."""
        return tuple(self._records)

    @property
    def view(self) -> LedgerView:
        """What a reader would see now, without reading the file again."""
        return LedgerView(self.records, self._check, self._signer.verify_key, self._head)

    def totals(self, cohort: str | None = None) -> tuple[GaussianEvent, ...]:
        """Return what was charged so far, grouped by (q, sigma); see `LedgerView.totals`."""
        return self.view.totals(cohort)

    def epsilon(self, delta: float, cohort: str | None = None) -> Epsilon:
        """Return the epsilon so far, per patient of `cohort`, or of the cohort that paid most (None)."""
        return self.view.epsilon(delta, cohort)

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
            ClockBackwardsError: the clock was set back since the last record.
            BadInputError: settings that no record can hold.
        """
        if at_a_time < 1:
            raise BadInputError(
                f"Steps cannot be reserved {at_a_time} at a time.",
                hint="Give 1 or more.",
                code="privacy-setting",
            )
        if charge.purpose not in PURPOSES:
            raise BadInputError(
                f"Patients cannot be charged for {charge.purpose!r}.",
                hint=f"A charge is for one of: {', '.join(PURPOSES)}.",
                code="privacy-setting",
            )
        if self._plan is not None:
            self._plan.close()
        self._clock.require_after(self._last)
        self._require_room(charge)
        # Whatever the records would refuse (a name, a digest) is refused here, before the round begins.
        self._reserve_record(charge, charge.steps)

        def charged(steps: int) -> int:
            self._clock.require_after(self._last)
            record = self._reserve_record(charge, steps)
            self._append(record)
            return record.sequence

        self._plan = ReservedSteps(
            charge.steps, at_a_time, charged, lambda *counts: self._note_spent(charge, *counts)
        )
        return self._plan

    def close(self) -> None:
        """Finish the round in hand and free the lock. Harmless when done twice."""
        try:
            if self._plan is not None:
                self._plan.close()
        finally:
            self._journal.close()

    def __enter__(self) -> Ledger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _require_room(self, charge: RoundCharge) -> None:
        allowed = BudgetFilter(self.cap.epsilon, self.cap.delta)
        for events in Spending.of(self._records).sequences_after([charge.event], charge.cohort):
            allowed.require(events, spent=events[:-1])

    def _note_spent(self, charge: RoundCharge, first: int, reserved: int, taken: int) -> None:
        """Note for the reader how many steps were taken. Charges nothing, so a clock that ran back cannot stop it."""
        if not self._journal.usable:
            return  # the error that stopped the journal is on its way to the caller; this must not hide it
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
        self._note_witness()

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
                cohort=charge.cohort,
            )
        except ValueError as error:
            first = str(error).splitlines()[1:2]
            raise BadInputError(
                f"This round cannot be charged: its {first[0] if first else 'settings'} cannot be recorded.",
                hint="Correct the study's privacy settings; nothing was drawn and nothing was charged.",
                code="privacy-setting",
            ) from error

    def _record_opening(self, reason: str, cap: BudgetCap) -> None:
        corrects = reason == "clock-corrected"
        self._append(
            OpenedRecord.model_validate(
                {
                    **self._place(),
                    **({"time": self._clock.corrected_time()} if corrects else {}),
                    "reason": reason,
                    "cap_epsilon": cap.epsilon,
                    "cap_delta": cap.delta,
                    "public_key": encode_public_key(self._signer.verify_key),
                }
            )
        )

    @property
    def _last(self) -> AnyRecord | None:
        return self._records[-1] if self._records else None

    def _place(self) -> _Place:
        head = self._head
        return {
            "sequence": 0 if head is None else head.sequence + 1,
            "previous_hash": FIRST_HASH if head is None else head.hash,
            "site": self._site,
            "time": self._clock.time_after(self._last),
        }

    def _append(self, record: AnyRecord) -> None:
        head = head_of(record)
        self._journal.append(encode_line(record, self._signer), head)
        self._records.append(record)
        self._head = head
        if isinstance(record, OpenedRecord):
            self._cap = BudgetCap(record.cap_epsilon, record.cap_delta)

    def _note_witness(self) -> None:
        if self._witness is not None and self._head is not None:
            self._witness.note(self._head)


class _Place(TypedDict):
    """Where the next record stands in the chain."""

    sequence: int
    previous_hash: str
    site: str
    time: str


def _foreign(recorded: str, site: str) -> ForeignLedgerError:
    return ForeignLedgerError(
        f"This privacy ledger was made by the site {recorded!r}; this is {site!r}.",
        hint="Put this site's own ledger back. A ledger that was copied does not say what these patients paid.",
    )


def _bad_cap(message: str) -> BadInputError:
    return BadInputError(
        message,
        hint="Give the site's cap as epsilon and delta, such as epsilon 8 at delta 1e-5.",
        code="budget-cap",
    )
