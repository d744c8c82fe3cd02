"""What training has cost: epsilon of composed Gaussian mechanisms, per patient.

The official number comes from the privacy loss distribution accountant of dp-accounting (Doroshenko et al.
2022, "Connect the dots", whose discretisation is pessimistic). Renyi accounting (Mironov 2017) is looser by
construction and runs beside it: should it ever come out smaller, one of the two is wrong and nothing is
reported.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Final

from pixcell_core.errors import BadInputError, RefusedError

UNIT: Final = "patient"
ADJACENCY: Final = "add-or-remove-one"
ACCOUNTANT = "dp-accounting PLD"
UPPER_BOUND = "Renyi upper bound"
LARGEST_DELTA = 1e-5

COVERS = "the weights released by training on this site's patients, over every recorded round and study"
DOES_NOT_COVER = (
    "tiles conditioned on private embeddings, statistics released without noise, "
    "and patients who are also at another site"
)

_GRID = 1e-3
_FINE_GRID = 1e-4
_AGREE = 1e-9
_MEANINGLESS = 200.0
_LARGEST_TARGET = 50.0
_SIGMA_RANGE = (1e-2, 1e6)


@dataclass(frozen=True)
class GaussianEvent:
    """`steps` uses of a Gaussian mechanism of noise multiplier sigma on a Poisson(q) sample of the patients."""

    sample_rate: float
    noise_multiplier: float
    steps: int

    def __post_init__(self) -> None:
        if not 0.0 < self.sample_rate <= 1.0:
            raise _bad(f"A sample rate of {self.sample_rate} is not a probability above 0.")
        if not (math.isfinite(self.noise_multiplier) and self.noise_multiplier > 0.0):
            raise _bad(
                f"A noise multiplier of {self.noise_multiplier} gives no privacy that could be stated."
            )
        if self.steps < 1:
            raise _bad(f"An event of {self.steps} steps charges nothing.")


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


def largest_delta(patients: int) -> float:
    """Return the largest delta a cohort of `patients` may be reported with: min(1e-5, 1 / (10 N))."""
    return min(LARGEST_DELTA, 1.0 / (10.0 * max(1, patients)))


def check_delta(delta: float, patients: int | None = None) -> None:
    """Raise `BadInputError` unless 0 < delta <= min(1e-5, 1 / (10 N))."""
    limit = LARGEST_DELTA if patients is None else largest_delta(patients)
    if not 0.0 < delta <= limit:
        raise BadInputError(
            f"A delta of {delta:g} cannot be used; it must lie above 0 and be at most {limit:g}.",
            hint="Delta is the chance that the statement fails; keep it under a tenth of 1/N.",
            code="delta",
        )


def group_events(events: Sequence[GaussianEvent]) -> list[GaussianEvent]:
    """Return one event per (q, sigma) with the steps added up; composition does not depend on order."""
    steps: dict[tuple[float, float], int] = {}
    for event in events:
        key = (event.sample_rate, event.noise_multiplier)
        steps[key] = steps.get(key, 0) + event.steps
    return [GaussianEvent(q, sigma, count) for (q, sigma), count in sorted(steps.items())]


def epsilon(events: Sequence[GaussianEvent], delta: float, *, patients: int | None = None) -> Epsilon:
    """Return the epsilon of all `events` together, for an adaptive sequence with settings fixed beforehand.

    Args:
        events: everything one cohort was used for; no events cost nothing.
        delta: at most min(1e-5, 1 / (10 N)).
        patients: N, when it may be used to check delta; it is not part of the result.

    Raises:
        BadInputError: delta is too large.
        AccountantsDisagreeError: the cross-check failed; no number is given.
    """
    check_delta(delta, patients)
    grouped = group_events(events)
    if not grouped:
        return Epsilon(value=0.0, delta=delta)
    renyi = _rdp_epsilon(grouped, delta)
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
    tolerance: float = 1e-3,
) -> float:
    """Return the smallest noise multiplier that keeps `steps` steps within `epsilon`, on the safe side.

    Args:
        sample_rate: q.
        steps: T, over all rounds that are planned.
        epsilon: the target, per patient, for everything together.
        delta: as for `epsilon`.
        already_spent: what these patients were used for before; it counts towards the target.
        tolerance: relative width of the answer.

    Raises:
        RefusedError: what was spent already leaves no room.
    """
    check_delta(delta)
    if not 0.0 < epsilon <= _LARGEST_TARGET:
        raise _bad(f"A target epsilon of {epsilon:g} is not above 0 and at most {_LARGEST_TARGET:g}.")

    def spent(sigma: float) -> float:
        return _pld_epsilon(
            group_events([*already_spent, GaussianEvent(sample_rate, sigma, steps)]), delta, _GRID
        )

    low, high = _SIGMA_RANGE
    guess = 1.0
    if already_spent and _pld_epsilon(group_events(already_spent), delta, _GRID) >= epsilon:
        raise _no_room(epsilon)
    while spent(guess) > epsilon:
        low, guess = guess, guess * 2.0
        if guess > high:
            raise _no_room(epsilon)
    high = guess
    while low * 2.0 < high and spent(high / 2.0) <= epsilon:
        high /= 2.0
    low = max(low, high / 2.0)
    while high / low > 1.0 + tolerance:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if spent(middle) <= epsilon else (middle, high)
    sigma = float(f"{high:.6g}")
    return sigma if spent(sigma) <= epsilon else high


def _checked_epsilon(grouped: Sequence[GaussianEvent], delta: float, renyi: float) -> float:
    """Return the PLD value after the Renyi cross-check; a finer grid is tried before it is a bug."""
    official = _pld_epsilon(grouped, delta, _GRID)
    if renyi < official - _AGREE:
        official = min(official, _pld_epsilon(grouped, delta, _FINE_GRID))
    if renyi < official - _AGREE:
        raise AccountantsDisagreeError(
            f"Renyi accounting gives epsilon {renyi:.6g}, below {official:.6g} by privacy loss distributions "
            f"(delta {delta:g}, events {list(grouped)}). It can only be larger; no number is reported."
        )
    return official


def _pld_epsilon(grouped: Sequence[GaussianEvent], delta: float, grid: float) -> float:
    with _quiet_library() as library:
        from dp_accounting.pld import PLDAccountant

        account = PLDAccountant(
            library.NeighboringRelation.ADD_OR_REMOVE_ONE, value_discretization_interval=grid
        )
        return float(_composed(account, library, grouped).get_epsilon(delta))


def _rdp_epsilon(grouped: Sequence[GaussianEvent], delta: float) -> float:
    with _quiet_library() as library:
        from dp_accounting.rdp import RdpAccountant

        account = RdpAccountant(neighboring_relation=library.NeighboringRelation.ADD_OR_REMOVE_ONE)
        return float(_composed(account, library, grouped).get_epsilon(delta))


def _composed(account: Any, library: ModuleType, grouped: Sequence[GaussianEvent]) -> Any:
    for event in grouped:
        mechanism: Any = library.GaussianDpEvent(event.noise_multiplier)
        if event.sample_rate < 1.0:
            mechanism = library.PoissonSampledDpEvent(event.sample_rate, mechanism)
        account.compose(library.SelfComposedDpEvent(mechanism, event.steps))
    return account


@contextmanager
def _quiet_library() -> Iterator[ModuleType]:
    """Give dp_accounting, imported when first needed, without its warnings about its own internals."""
    names = ("absl", "dp_accounting")
    levels = {name: logging.getLogger(name).level for name in names}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in names:
            logging.getLogger(name).setLevel(logging.ERROR)
        try:
            import dp_accounting

            yield dp_accounting
        finally:
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)


def _bad(message: str) -> BadInputError:
    return BadInputError(
        message, hint="Correct the privacy settings; nothing was charged.", code="privacy-setting"
    )


def _no_room(target: float) -> RefusedError:
    return RefusedError(
        f"No noise keeps these steps within epsilon {target:g} per patient: the budget is already spent.",
        hint="Plan fewer steps, or ask the site's owner whether a larger cap is acceptable.",
        code="budget-spent",
    )
