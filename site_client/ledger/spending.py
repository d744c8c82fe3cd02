"""What a chain of records has charged, and to whom: per cohort, per study, in the order in which it was charged.

A charge to the cohort `all` used every patient of the site. A charge to any other cohort used that cohort's patients
alone, and cohorts are disjoint (`site_client.ledger.cohorts`). What one patient paid is therefore the sequence of
charges to `all` and to the patient's own cohort, in the order of the ledger; sequences of two cohorts never add up.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from pixcell_core.private.accounting import (
    DOES_NOT_COVER,
    Epsilon,
    GaussianEvent,
    epsilon,
    group_events,
)
from pixcell_core.private.ledger_record import EVERY_PATIENT, BaseRecord, ReserveRecord

DOES_NOT_COVER_BESIDE_VOTES = DOES_NOT_COVER.replace(
    "tiles conditioned on private embeddings",
    "tiles conditioned on private embeddings (policies own and blend)",
)


@dataclass(frozen=True)
class Spending:
    """The charges of a ledger, oldest first; records that charge nothing are left out."""

    charges: tuple[ReserveRecord, ...]

    @classmethod
    def of(cls, records: Iterable[BaseRecord], *, study: str | None = None) -> Spending:
        """Return what `records` charged, or only what they charged for one study (its digest)."""
        return cls(
            tuple(r for r in records if isinstance(r, ReserveRecord) and (study is None or r.study == study))
        )

    @cached_property
    def cohorts(self) -> tuple[str, ...]:
        """The cohorts that were ever charged; `all` comes first."""
        found = {r.cohort for r in self.charges}
        return tuple(sorted(found, key=lambda name: (name != EVERY_PATIENT, name)))

    def events(self, cohort: str | None = None) -> tuple[GaussianEvent, ...]:
        """Return the charges a patient of `cohort` took part in, in order; None: every charge to anybody.

        Neighbours of one (q, sigma) are put together, which changes no sum and no order.
        """
        merged: list[GaussianEvent] = []
        for r in self.charges:
            if cohort is not None and r.cohort not in (EVERY_PATIENT, cohort):
                continue
            last = merged[-1] if merged else None
            if last and (last.sample_rate, last.noise_multiplier) == (r.sample_rate, r.noise_multiplier):
                merged[-1] = GaussianEvent(r.sample_rate, r.noise_multiplier, last.steps + r.steps)
            else:
                merged.append(GaussianEvent(r.sample_rate, r.noise_multiplier, r.steps))
        return tuple(merged)

    def totals(self, cohort: str | None = None) -> tuple[GaussianEvent, ...]:
        """Return `events(cohort)` grouped by (q, sigma)."""
        return tuple(group_events(self.events(cohort)))

    def sequences_after(
        self, events: Sequence[GaussianEvent], cohort: str
    ) -> list[tuple[GaussianEvent, ...]]:
        """Return, per group of patients that further charges to `cohort` touch, all its charges in order.

        A charge to `all` touches every cohort and the patients that are in none of the others.
        """
        touched: Sequence[str] = [cohort]
        if cohort == EVERY_PATIENT:
            touched = [EVERY_PATIENT, *(name for name in self.cohorts if name != EVERY_PATIENT)]
        found = {(*self.events(name), *events): None for name in touched}
        return list(found)

    def epsilon(self, delta: float, cohort: str | None = None) -> Epsilon:
        """Return the epsilon of the patients of `cohort`, or of the cohort that paid most (None).

        Where private conditions were charged, the statement says that tiles of the other policies are not covered.
        """
        names = [cohort] if cohort is not None else [*self._other_cohorts(), EVERY_PATIENT]
        # Cohorts with the same charges have the same number; it is computed once.
        sequences = {self.totals(name): None for name in names}
        worst = max((epsilon(list(totals), delta) for totals in sequences), key=lambda found: found.value)
        if any(r.purpose == "conditions" for r in self.charges):
            return replace(worst, does_not_cover=DOES_NOT_COVER_BESIDE_VOTES)
        return worst

    def _other_cohorts(self) -> tuple[str, ...]:
        return tuple(name for name in self.cohorts if name != EVERY_PATIENT)
