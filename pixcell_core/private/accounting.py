"""What training has cost: epsilon of composed Gaussian mechanisms, per patient.

The official number comes from the privacy loss distribution accountant of dp-accounting (Doroshenko et al.
2022, "Connect the dots", whose discretisation is pessimistic). Renyi accounting (Mironov 2017) is looser by
construction and runs beside it: should it ever come out smaller, one of the two is wrong and nothing is
reported.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from pixcell_core.errors import RefusedError
from pixcell_core.private.composition import pld_epsilon, rdp_epsilon
from pixcell_core.private.events import GaussianEvent as GaussianEvent
from pixcell_core.private.events import group_events as group_events
from pixcell_core.private.events import total_mu_squared
from pixcell_core.private.filters import BudgetFilter
from pixcell_core.private.limits import LARGEST_DELTA as LARGEST_DELTA
from pixcell_core.private.limits import check_cohort, check_target
from pixcell_core.private.limits import check_delta as check_delta
from pixcell_core.private.limits import largest_delta as largest_delta

UNIT: Final = "patient"
ADJACENCY: Final = "add-or-remove-one"
ACCOUNTANT = "dp-accounting PLD"
UPPER_BOUND = "Renyi upper bound"

COVERS = (
    "the weights released by training on this site's patients and the noisy votes of private conditions, "
    "over every recorded round and study"
)
DOES_NOT_COVER = (
    "tiles conditioned on private embeddings, statistics released without noise, "
    "and patients who are also at another site"
)

_AGREE = 1e-4
_NARROW = 0.1
_FINER_GRIDS = (1e-4, 1e-5, 1e-6)
_MEANINGLESS = 200.0
_SIGMA_RANGE = (1e-2, 1e6)


@dataclass(frozen=True)
class Epsilon:
    """A privacy statement that cannot be read without its unit, delta and limits.

    Attributes:
        value: epsilon; for every pair of cohorts that differ in one patient, the released weights'
            distributions are (value, delta)-indistinguishable.
        unit: whose data is protected as a whole: all slides and all tiles of one patient.
        delta: the probability left out of the statement.
        adjacency: how neighbouring cohorts differ.
        accountant: what computed the value.
        covers, does_not_cover: the statement's scope, in words.
    """

    value: float
    delta: float
    unit: str = UNIT
    adjacency: str = ADJACENCY
    accountant: str = ACCOUNTANT
    covers: str = COVERS
    does_not_cover: str = DOES_NOT_COVER

    def __str__(self) -> str:
        # Rounded up: a statement may not promise more than was computed.
        shown = math.ceil(self.value * 100.0) / 100.0
        return (
            f"epsilon {shown:.2f} per {self.unit} (all slides and tiles of one {self.unit}) "
            f"at delta {self.delta:g}; "
            f"neighbouring cohorts: {self.adjacency}; accountant: {self.accountant}; "
            f"covers {self.covers}; does not cover {self.does_not_cover}"
        )


class AccountantsDisagreeError(RuntimeError):
    """Renyi accounting came out below the privacy loss distribution: a bug, here or in a library."""


def epsilon(events: Sequence[GaussianEvent], delta: float, *, patients: int | None = None) -> Epsilon:
    """Return the epsilon of all `events` together, for an adaptive sequence with settings fixed beforehand.

    Args:
        events: everything one cohort was used for; no events cost nothing.
        delta: at most min(1e-5, 1 / (10 N)).
        patients: N, when it may be used to check delta; it is not part of the result.

    Raises:
        BadInputError: delta is not above 0 or too large, or the cohort is one person.
        AccountantsDisagreeError: the cross-check failed; no number is given.
    """
    check_delta(delta, patients)
    if patients is not None:
        check_cohort(patients)
    grouped = group_events(events)
    if not grouped:
        return Epsilon(value=0.0, delta=delta)
    renyi = rdp_epsilon(grouped, delta)
    if renyi > _MEANINGLESS:
        # So large a number protects nobody; a privacy loss distribution of that width would only fill the memory.
        return Epsilon(value=renyi, delta=delta, accountant=UPPER_BOUND)
    return Epsilon(value=_checked_epsilon(grouped, delta, renyi), delta=delta)


def calibrate_noise(
    sample_rate: float,
    steps: int,
    epsilon: float,
    delta: float,
    *,
    already_spent: Sequence[GaussianEvent] = (),
    planned_beside: Sequence[GaussianEvent] = (),
    tolerance: float = 1e-3,
) -> float:
    """Return the smallest noise multiplier with which a `BudgetFilter` admits the whole plan, on the safe side.

    Args:
        sample_rate: q.
        steps: T, over all rounds that are planned.
        epsilon: the target, per patient, for everything together.
        delta: as for `epsilon`.
        already_spent: what these patients were used for before, oldest first; it counts towards the target.
        planned_beside: other charges of the same plan, such as the votes of private conditions.
        tolerance: relative width of the answer.

    Raises:
        BadInputError: a target or a setting that cannot be.
        RefusedError: what is spent or planned already leaves no room.
    """
    check_delta(delta)
    check_target(epsilon)
    budget = BudgetFilter(epsilon, delta)

    def fits(sigma: float) -> bool:
        return budget.admits([*already_spent, GaussianEvent(sample_rate, sigma, steps), *planned_beside])

    low, high = _SIGMA_RANGE
    beside = [*already_spent, *planned_beside]
    if beside and pld_epsilon(beside, delta) >= epsilon:
        raise _no_room(epsilon)
    guess = _first_guess(budget, sample_rate, steps, already_spent, planned_beside)
    step = 1.0 + tolerance
    while not fits(guess):
        low, guess, step = guess, guess * step, step * step
        if guess > high:
            raise _no_room(epsilon)
    high, step = guess, 1.0 + tolerance
    while low * step < high and fits(high / step):
        high, step = high / step, step * step
    low = max(low, high / step)
    while high / low > 1.0 + tolerance:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if fits(middle) else (middle, high)
    sigma = float(f"{high:.6g}")
    return sigma if fits(sigma) else high


def _first_guess(
    budget: BudgetFilter,
    sample_rate: float,
    steps: int,
    already_spent: Sequence[GaussianEvent],
    planned_beside: Sequence[GaussianEvent],
) -> float:
    """Where to begin the search: the closed form where everybody takes part, else what Renyi accounting would ask."""
    if sample_rate == 1.0 and all(e.sample_rate == 1.0 for e in already_spent):
        room = budget.mu_squared - total_mu_squared([*already_spent, *planned_beside])
        return math.sqrt(steps / room) * (1.0 + 1e-6) if room > 0.0 else 1.0
    low, high = 0.1, _SIGMA_RANGE[1]
    while high > 1.01 * low:
        middle = math.sqrt(low * high)
        plan = [*already_spent, GaussianEvent(sample_rate, middle, steps), *planned_beside]
        low, high = (low, middle) if budget.renyi_fits(plan) else (middle, high)
    if high > 1e5:
        return 1.0
    # Repetitions alone may spend more than Renyi accounting allows. Epsilon falls almost as a power of sigma, so
    # that a few secant steps in logarithms find where.
    return high if already_spent or planned_beside else _secant(budget, sample_rate, steps, high)


def _secant(budget: BudgetFilter, sample_rate: float, steps: int, start: float) -> float:
    def excess(log_sigma: float) -> float:
        spent = pld_epsilon([GaussianEvent(sample_rate, math.exp(log_sigma), steps)], budget.repetition_delta)
        return math.log(max(spent, 1e-12) / budget.epsilon)

    before, now = math.log(start), math.log(start) - 0.15
    f_before, f_now = excess(before), excess(now)
    for _ in range(4):
        if abs(f_now) < 1e-5 or f_now == f_before:
            break
        step = max(-1.0, min(1.0, f_now * (now - before) / (f_now - f_before)))
        before, now, f_before = now, now - step, f_now
        f_now = excess(now)
    return math.exp(now) * (1.0 + 1e-4)


def _checked_epsilon(grouped: Sequence[GaussianEvent], delta: float, renyi: float) -> float:
    """Return the PLD value after the Renyi cross-check.

    Where next to nothing was spent the discretisation can weigh more than the spending: before a contradiction counts,
    finer grids are tried, which such narrow distributions permit at little cost.
    """
    official = pld_epsilon(grouped, delta)
    for grid in _FINER_GRIDS:
        if renyi >= official or official > _NARROW:
            break
        official = min(official, pld_epsilon(grouped, delta, grid))
    if not (math.isfinite(official) and renyi >= official - _AGREE):
        raise AccountantsDisagreeError(
            f"Renyi accounting gives epsilon {renyi:.6g}, below {official:.6g} by privacy loss distributions "
            f"(delta {delta:g}, events {list(grouped)}). It can only be larger; no number is reported."
        )
    return official


def _no_room(target: float) -> RefusedError:
    return RefusedError(
        f"No noise keeps these steps within epsilon {target:g} per patient: the budget is already spent.",
        hint="Plan fewer steps, or ask the site's owner whether a larger cap is acceptable.",
        code="budget-spent",
    )
