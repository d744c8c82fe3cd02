"""Patient permutation: do released tiles lie nearer to the patients who trained than to those who did not?

D[s, p] is the distance of released tile s to the nearest tile of patient p. If the release does not depend on which
patients were in training, the labels training/holdout are exchangeable, and permuting them gives an exact test
of any statistic of D (Pitman 1937); no tile is assumed independent of its neighbours.

Legend: S released tiles, P patients, B permutations, R kept ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from pixcell_core.cli.progress import progress
from privacy_audit.intervals import clopper_pearson_lower
from privacy_audit.policy import PatientPolicy
from privacy_audit.subject import Cohort

TAIL_EYE = "patient tail asymmetry (second eye)"
TAIL_SHAPE = "patient tail asymmetry (shape)"
TAIL_GIVEN = "patient tail asymmetry (given embeddings)"
CLOSEST = "patient membership (closest tile)"
KEPT_RANKS = 32
_BLOCK = 256
_FLOOR = (
    0.05  # of the median distance: one bit-exact copy (distance 0) must not outweigh the rest of the tail
)


@dataclass(frozen=True)
class Permuted:
    """Observed value of a statistic, its permutation distribution and one-sided p-value."""

    observed: float
    null: npt.NDArray[np.float64]

    @property
    def p(self) -> float:
        """(1 + #permuted >= observed) / (B + 1)."""
        return float((1 + np.count_nonzero(self.null >= self.observed - 1e-12)) / (len(self.null) + 1))


@dataclass(frozen=True)
class NearestPatients:
    """Each released tile's nearest patients in order: (S, R) each."""

    distance: npt.NDArray[np.float64]
    patient: npt.NDArray[np.int64]

    @classmethod
    def of(cls, distances: npt.NDArray[np.float64]) -> NearestPatients:
        """Keep the R nearest patients of each row of D (S, P)."""
        keep = min(KEPT_RANKS, distances.shape[1])
        order = np.argsort(distances, axis=1, kind="stable")[:, :keep]
        return cls(np.take_along_axis(distances, order, axis=1), order)


@dataclass(frozen=True)
class RankedDistances:
    """Each released tile's nearest patients in order, with log distances: (S, R) each."""

    log_distance: npt.NDArray[np.float64]
    patient: npt.NDArray[np.int64]

    @classmethod
    def of(cls, distances: npt.NDArray[np.float64]) -> RankedDistances:
        """Rank the rows of D (S, P)."""
        return cls.between(NearestPatients.of(distances), float(np.median(distances)))

    @classmethod
    def between(cls, near: NearestPatients, median: float) -> RankedDistances:
        """Rank what was sorted already, among distances of that median."""
        return cls(np.log(np.maximum(near.distance, max(_FLOOR * median, 1e-12))), near.patient)

    def log_ratio(self, labels: npt.NDArray[np.bool_]) -> npt.NDArray[np.float64]:
        """log d(s, holdout) − log d(s, train) for each labelling.

        Args:
            labels: (B, P), true for training.

        Returns:
            (B, S). A side with none of its patients among the R nearest counts as lying at the last of them.
        """
        sides = np.ascontiguousarray(labels.T)  # (P, B): a patient's labels lie together
        ranks = self.patient.shape[1]
        nearest = sides[self.patient[:, 0]]  # (S, B)
        # One side is at rank 0; the other at the first rank that is labelled otherwise, counted here byte by byte.
        same = np.ones(nearest.shape, dtype=bool)
        other = np.ones(nearest.shape, dtype=np.uint8)
        for rank in range(1, ranks):
            same &= sides[self.patient[:, rank]] == nearest
            if not same.any():
                break
            other += same
        np.minimum(other, ranks - 1, out=other)
        farther = np.take_along_axis(self.log_distance, other.astype(np.intp), axis=1)
        farther -= self.log_distance[:, :1]
        np.negative(farther, where=~nearest, out=farther)
        return np.ascontiguousarray(farther.T)


def tail_asymmetry(log_ratio: npt.NDArray[np.float64], tail: int) -> npt.NDArray[np.float64]:
    """Mean of the `tail` largest log(d(s,H)/d(s,T)) minus the same for log(d(s,T)/d(s,H)); (B, S) to (B,).

    Large when a few released tiles lie far nearer to training than any lies to the holdout. Means over all
    tiles (distance-to-closest-record shares) do not see 1 % of copies; this tail does.
    """
    ordered = np.partition(log_ratio, [tail - 1, log_ratio.shape[1] - tail], axis=1)
    return np.asarray(ordered[:, -tail:].mean(axis=1) + ordered[:, :tail].mean(axis=1))


def closest_auc(distances: npt.NDArray[np.float64], labels: npt.NDArray[np.bool_]) -> npt.NDArray[np.float64]:
    """AUC of telling training from holdout patients by their smallest distance to any released tile; (B,).

    .5 is chance; 1 means that every training patient lies nearer to the release than every holdout patient.
    """
    order = np.argsort(np.argsort(-distances.min(axis=0), kind="stable"), kind="stable") + 1.0
    train = labels.sum(axis=1)
    ranks = (labels * order).sum(axis=1)
    return np.asarray((ranks - train * (train + 1) / 2) / (train * (labels.shape[1] - train)))


def permutations(cohort: Cohort, count: int, rng: np.random.Generator) -> npt.NDArray[np.bool_]:
    """Draw (B, P) labellings that keep the number of training patients in every stratum."""
    labels = np.empty((count, cohort.patients), dtype=bool)
    for value in np.unique(cohort.stratum):
        members = np.flatnonzero(cohort.stratum == value)
        shuffled = np.tile(cohort.is_train[members], (count, 1))
        labels[:, members] = rng.permuted(shuffled, axis=1)
    return labels


def permutation_tail(
    ranked: RankedDistances, observed: npt.NDArray[np.bool_], labels: npt.NDArray[np.bool_], tail: int
) -> Permuted:
    """Tail asymmetry under the observed (P,) and the permuted (B, P) labels."""
    value = float(tail_asymmetry(ranked.log_ratio(observed[None]), tail)[0])
    null = [
        tail_asymmetry(ranked.log_ratio(labels[start : start + _BLOCK]), tail)
        for start in range(0, len(labels), _BLOCK)
    ]
    return Permuted(value, np.concatenate(null))


def tail_size(released: int, policy: PatientPolicy) -> int:
    """How many released tiles make the tail."""
    return min(max(int(np.ceil(policy.tail_share * released)), policy.min_tail_tiles), released)


def draws_for(family: int, policy: PatientPolicy) -> int:
    """Permutations of a simulated release: the smallest p there is, times the family, lies well under the limit."""
    return max(policy.power_permutations, int(np.ceil(2.0 * family / policy.p_review)))


def copies_planted(released: int, policy: PatientPolicy) -> int:
    """How many near copies a simulated leak holds.

    Copies of k patients cannot push a permutation p below 2^-k (all k labelled `training` by chance), so a handful
    of copies is beyond this test whatever its statistic; the near-copy screen looks for those.
    """
    return min(max(int(np.ceil(policy.power_copy_share * released)), policy.power_min_copies), released)


@dataclass(frozen=True)
class View:
    """D of the released (S, P) and of the planted tiles (K, P), seen by one kind of distance."""

    released: npt.NDArray[np.float64]
    planted: npt.NDArray[np.float64]

    def leak(self, victims: npt.NDArray[np.int64], planted: npt.NDArray[np.int64]) -> RankedDistances:
        """The release in which planted tiles stand in the place of the `victims`, ranked."""
        whole = self.released.copy()
        whole[victims] = self.planted[planted]
        # Sorting is done once a tile, not once a simulation.
        ours, theirs = self._sorted
        near = NearestPatients(ours.distance.copy(), ours.patient.copy())
        near.distance[victims] = theirs.distance[planted]
        near.patient[victims] = theirs.patient[planted]
        return RankedDistances.between(near, float(np.median(whole)))

    @cached_property
    def _sorted(self) -> tuple[NearestPatients, NearestPatients]:
        return NearestPatients.of(self.released), NearestPatients.of(self.planted)


@dataclass(frozen=True)
class PatientTests:
    """The statistics of the patient test, before adjustment for multiplicity."""

    tails: dict[str, Permuted]
    closest: Permuted
    power: float
    power_lower: float
    copies: int

    @property
    def p_values(self) -> dict[str, float]:
        """Every p-value by the name of its test."""
        return {**{name: tail.p for name, tail in self.tails.items()}, CLOSEST: self.closest.p}


def patient_tests(
    views: dict[str, View],
    cohort: Cohort,
    policy: PatientPolicy,
    rng: np.random.Generator,
    *,
    planted_patient: npt.NDArray[np.int64],
    unflagged: npt.NDArray[np.bool_],
    family: int,
    given: npt.NDArray[np.float64] | None = None,
) -> PatientTests:
    """Run the permutation test in every view and measure its power with planted copies.

    Args:
        views: `TAIL_EYE` and `TAIL_SHAPE`; the closest-tile statistic looks through the first.
        cohort: patients, labels and strata.
        policy: sizes and thresholds.
        rng: source of the permutations.
        planted_patient: (K,) the patient each planted tile was taken from.
        unflagged: (S,) released tiles that are no copies themselves; simulated leaks start from these.
        family: how many p-values are adjusted together; the power counts with Bonferroni over them.
        given: D (S, P) by embeddings from outside; planted copies have none, so the power leaves this view out.
    """
    labels = permutations(cohort, policy.permutations, rng)
    eye = next(iter(views.values())).released
    size = tail_size(len(eye), policy)
    tails = {
        name: permutation_tail(RankedDistances.of(view.released), cohort.is_train, labels, size)
        for name, view in views.items()
    }
    if given is not None:
        tails[TAIL_GIVEN] = permutation_tail(RankedDistances.of(given), cohort.is_train, labels, size)
    closest = Permuted(float(closest_auc(eye, cohort.is_train[None])[0]), closest_auc(eye, labels))
    innocent = {name: View(view.released[unflagged], view.planted) for name, view in views.items()}
    caught = count_caught(innocent, planted_patient, cohort, policy, rng, family, policy.power_simulations)
    power = caught / policy.power_simulations
    return PatientTests(
        tails,
        closest,
        power,
        clopper_pearson_lower(caught, policy.power_simulations),
        copies_planted(len(eye), policy),
    )


def count_caught(
    views: dict[str, View],
    planted_patient: npt.NDArray[np.int64],
    cohort: Cohort,
    policy: PatientPolicy,
    rng: np.random.Generator,
    family: int,
    simulations: int,
    least: int = 0,
) -> int:
    """How many of so many simulated leaks the test catches; see `patient_tests` for the arguments.

    With `least` it stops as soon as that many are caught, or no longer can be: then only the comparison is known.
    """
    caught = 0
    with progress("measuring the power of the patient test", simulations, "releases") as bar:
        for left in range(simulations, 0, -1):
            if least and (caught >= least or caught + left < least):
                break
            caught += _simulate(views, planted_patient, cohort, policy, rng, family)
            bar.advance()
    return caught


def _simulate(
    views: dict[str, View],
    planted_patient: npt.NDArray[np.int64],
    cohort: Cohort,
    policy: PatientPolicy,
    rng: np.random.Generator,
    family: int,
) -> bool:
    """One simulated leak: shuffle the labels (an innocent world), plant copies of `training` patients, test."""
    world = permutations(cohort, 1, rng)[0]
    usable = np.flatnonzero(world[planted_patient])
    released = len(next(iter(views.values())).released)
    if not released:
        return False
    count = copies_planted(released, policy)
    if len(usable) < count:
        return False
    victims = rng.choice(released, size=count, replace=False)
    copies = rng.choice(usable, size=count, replace=False)
    labels = permutations(cohort, draws_for(family, policy), rng)
    best = 1.0
    for view in views.values():
        test = permutation_tail(view.leak(victims, copies), world, labels, tail_size(released, policy))
        best = min(best, test.p)
    return best * family <= policy.p_review
