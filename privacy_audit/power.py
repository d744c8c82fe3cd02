"""What would give the patient test its power: simulated again with more released tiles, or with more patients.

A test short of power cannot pass a release, and a site that reads so wants to know what to bring. More tiles are drawn
from the released ones; more patients are built from those there are: a further patient keeps how near each tile lies to
patients on the whole, and takes the rest from one patient's distances in another order. Forecasts, then, of the same
simulation that measured the power; they hold for tiles and patients like these.

Legend: S released tiles, K planted tiles, P patients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from privacy_audit.patients import View, count_caught
from privacy_audit.policy import PatientPolicy
from privacy_audit.subject import Cohort

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
TIMES = (1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0)
"""How many times as many tiles, or patients, are tried: the most first, then in turn up to the first that is enough."""
_SIMULATIONS = 30  # at most: the forecast is rounder than the power itself
_MOST_TILES = 20_000


@dataclass(frozen=True)
class Enough:
    """The least that was enough in the simulation; None where nothing tried was. `tried` is the most of each."""

    tiles: int | None
    patients: int | None
    tried_tiles: int
    tried_patients: int

    def words(self, min_power: float) -> str:
        """One sentence for the report; patients are those of both sides together, rounded up to tens."""
        found = []
        if self.tiles is not None:
            found.append(f"about {self.tiles} released tiles of these patients")
        if self.patients is not None:
            found.append(f"these tiles with about {self.patients} patients, training and holdout together")
        if found:
            return f"Simulated with more of the same, {', or '.join(found)} would reach {min_power:.0%}."
        return (
            f"Simulated with more of the same, neither {self.tried_tiles} released tiles nor {self.tried_patients} "
            f"patients would reach {min_power:.0%}."
        )


def enough(
    views: dict[str, View],
    planted_patient: Integers,
    cohort: Cohort,
    policy: PatientPolicy,
    rng: np.random.Generator,
    family: int,
) -> Enough:
    """Look for the least number of released tiles, and of patients, that gives the power the policy asks for.

    Args:
        views: what `patients.patient_tests` simulates with: released tiles that are no copies, and planted ones.
        planted_patient: (K,) the patient each planted tile was taken from. family: p-values adjusted together.
    """
    released = len(next(iter(views.values())).released)
    count = min(policy.power_simulations, _SIMULATIONS)
    least = int(np.ceil(policy.min_power * count))

    def reaches(larger: dict[str, View], owners: Integers, patients: Cohort) -> bool:
        # Twice: of several sizes tried once, one would reach it by luck.
        return all(
            count_caught(larger, owners, patients, policy, rng, family, count, least) >= least
            for _ in range(2)
        )

    def by_tiles(times: float) -> bool:
        return reaches(more_tiles(views, round(times * released), rng), planted_patient, cohort)

    def by_patients(times: float) -> bool:
        return reaches(*more_patients(views, planted_patient, cohort, times, rng))

    sizes = [times for times in TIMES if round(times * released) <= _MOST_TILES]
    tiles, patients = _first(sizes, by_tiles), _first(TIMES, by_patients)
    return Enough(
        tiles=None if tiles is None else round(tiles * released),
        patients=None if patients is None else _tens(patients * cohort.patients),
        tried_tiles=round(max(sizes, default=1.0) * released),
        tried_patients=_tens(TIMES[-1] * cohort.patients),
    )


def _first(sizes: Sequence[float], reaches: Callable[[float], bool]) -> float | None:
    """The first size that is enough; none where the largest is not, for then no smaller one is worth the time."""
    if not sizes or not reaches(sizes[-1]):
        return None
    return next((size for size in sizes[:-1] if reaches(size)), sizes[-1])


def more_tiles(views: dict[str, View], count: int, rng: np.random.Generator) -> dict[str, View]:
    """All released tiles and as many drawn again as make `count`; the same ones in every view."""
    released = len(next(iter(views.values())).released)
    rows = np.concatenate([np.arange(released), rng.integers(released, size=count - released)])
    return {name: View(view.released[rows], view.planted) for name, view in views.items()}


def more_patients(
    views: dict[str, View], planted_patient: Integers, cohort: Cohort, times: float, rng: np.random.Generator
) -> tuple[dict[str, View], Integers, Cohort]:
    """Views, sources and cohort with further patients, each modelled on one of those there are.

    Planted tiles are handed on to the further patients by chance, so that copies come from all of them.
    """
    more = max(round((times - 1.0) * cohort.patients), 1)
    # In turn, so that sides and strata keep their shares.
    models = np.concatenate([rng.permutation(cohort.patients) for _ in range(more // cohort.patients + 1)])[
        :more
    ]
    larger = Cohort(
        cohort.of_train,
        cohort.of_holdout,
        np.concatenate([cohort.is_train, cohort.is_train[models]]),
        np.concatenate([cohort.stratum, cohort.stratum[models]]),
    )
    owners = planted_patient.copy()
    for patient in np.unique(planted_patient):
        heirs = np.concatenate([[patient], cohort.patients + np.flatnonzero(models == patient)])
        mine = np.flatnonzero(planted_patient == patient)
        owners[mine] = rng.choice(heirs, size=len(mine))
    found = {}
    for name, view in views.items():
        released = np.concatenate([view.released, _reordered(view.released, models, rng)], axis=1)
        # A planted tile is near to its own patient alone: to everybody else it lies as tiles of others do.
        others = _others(view.planted, planted_patient, rng)
        planted = np.concatenate([others, _reordered(others, models, rng)], axis=1)
        rows = np.arange(len(planted))
        planted[rows, owners] = view.planted[rows, planted_patient]
        found[name] = View(released, planted)
    return found, owners, larger


def _reordered(distances: Floats, models: Integers, rng: np.random.Generator) -> Floats:
    """Columns of further patients: the tile's own level, and what a model patient adds to it for some other tile."""
    log = np.log(_positive(distances))
    level = np.median(log, axis=1, keepdims=True)
    return np.asarray(np.exp(level + rng.permuted((log - level)[:, models], axis=0)))


def _others(planted: Floats, planted_patient: Integers, rng: np.random.Generator) -> Floats:
    """Planted distances in which each tile's own patient is replaced by what a tile of somebody else has there."""
    out = planted.copy()
    for patient in np.unique(planted_patient):
        mine, theirs = np.flatnonzero(planted_patient == patient), np.flatnonzero(planted_patient != patient)
        if len(theirs):
            out[mine, patient] = planted[rng.choice(theirs, size=len(mine)), patient]
    return out


def _positive(distances: Floats) -> Floats:
    """Distances that have a logarithm: nothing below a thousandth of their median."""
    return np.asarray(np.maximum(distances, max(1e-3 * float(np.median(distances)), 1e-12)))


def _tens(count: float) -> int:
    return int(np.ceil(count / 10.0)) * 10
