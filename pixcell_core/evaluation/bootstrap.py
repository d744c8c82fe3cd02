"""Confidence intervals by resampling patients: tiles of one patient are no independent draws, patients are.

A bootstrap over tiles takes a patient's hundred tiles for a hundred observations; its intervals are too narrow by
about the square root of the design effect 1 + (tiles per patient - 1) * intraclass correlation (Kish 1965). Here whole
patients are drawn with replacement (Efron & Tibshirani 1993, section 8; Field & Welsh 2007 on clusters), a patient's
real and synthetic tiles together, because they share what the patient looks like.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pixcell_core.errors import BadInputError
from pixcell_core.evaluation.feature_set import UNKNOWN, Floats

Ints = npt.NDArray[np.int64]
FEW_PATIENTS = 20  # below it 95 % intervals of simulated cohorts held the truth in under 90 of 100
LOOSE_GROUPS = 1000


@dataclass(frozen=True)
class Interval:
    """A confidence interval.

    Attributes:
        low, high: its ends.
        level: confidence, such as 0.95.
        draws: resamples it rests on (those whose statistic was defined).
        clusters: patients (or rows of unknown patient) that were resampled.
        bias: mean of the resamples minus the value; large when the statistic depends on the sample size.
    """

    low: float
    high: float
    level: float
    draws: int
    clusters: int
    bias: float


@dataclass(frozen=True)
class PatientClusters:
    """Which rows of which set move together when patients are resampled.

    Attributes:
        codes: per set, the cluster number of each row (n,).
        strata: cluster numbers that are drawn among themselves: patients in every set that names them together, those
            of one set alone apart, so that no resample empties a set.
        count: number of clusters.
    """

    codes: tuple[Ints, ...]
    strata: tuple[Ints, ...]
    count: int

    @classmethod
    def of(cls, *groups: Sequence[str]) -> PatientClusters:
        """Clusters of the sets whose rows carry these patients.

        A row without a patient is a cluster of its own; beyond `LOOSE_GROUPS` such rows they are dealt into that many
        random groups (the grouped bootstrap), which bounds the work.
        """
        number: dict[tuple[int, str], int] = {}
        codes, members = [], []
        for index, names in enumerate(groups):
            loose = [i for i, name in enumerate(names) if name == UNKNOWN]
            dealt = np.random.default_rng(0).permutation(len(loose)) % LOOSE_GROUPS
            group_of = dict(zip(loose, dealt.tolist(), strict=True))
            # (-1, patient) is shared by all sets; (set, group) belongs to one.
            keys = [(-1, n) if n != UNKNOWN else (index, str(group_of[i])) for i, n in enumerate(names)]
            codes.append(np.array([number.setdefault(key, len(number)) for key in keys], dtype=np.int64))
            members.append(set(codes[-1].tolist()))
        held_by: dict[tuple[bool, ...], list[int]] = {}
        for cluster in range(len(number)):
            held_by.setdefault(tuple(cluster in m for m in members), []).append(cluster)
        strata = tuple(np.array(s, dtype=np.int64) for s in held_by.values())
        return cls(tuple(codes), strata, len(number))

    def draw(self, generator: np.random.Generator) -> Ints:
        """How often each cluster is in one resample (count,); every stratum keeps its size."""
        weights = np.zeros(self.count, dtype=np.int64)
        for stratum in self.strata:
            weights[stratum] = np.bincount(
                generator.integers(len(stratum), size=len(stratum)), minlength=len(stratum)
            )
        return weights

    def bootstrap(
        self,
        statistic: Callable[[Ints], Sequence[float] | Floats],
        *,
        draws: int,
        seed: int,
        level: float = 0.95,
        around_value: bool = False,
        on_draw: Callable[[], None] = lambda: None,
    ) -> list[Interval | None]:
        """Percentile intervals of every number `statistic` returns, from `draws` resamples of patients.

        Args:
            statistic: takes cluster weights (count,), all ones for the data as they are; row weights of set s are
                `weights[codes[s]]`. NaN where it is undefined for a resample.
            around_value: shift the resamples so that their mean is the value. For distances between sets: a resample
                holds fewer distinct patients, which moves such a statistic by its bias at a smaller sample; the
                shifted interval is about the value at this sample size.
            on_draw: called after each resample, for progress.

        Returns:
            One interval per number; None where fewer than two clusters, or fewer than half of the resamples defined.

        Raises:
            BadInputError: draws or level out of range.
        """
        if draws < 20:
            raise BadInputError(
                f"{draws} bootstrap resamples say nothing about an interval; at least 20 are expected.",
                hint="Use 200 for a look and 1000 or more for a report; 0 on the command line asks for no interval.",
                code="too-few-draws",
            )
        if not 0.5 <= level < 1:
            raise BadInputError(
                f"A confidence level of {level} was asked for; one in [0.5, 1) is expected.",
                hint="Use 0.95.",
                code="bad-level",
            )
        value = np.asarray(statistic(np.ones(self.count, dtype=np.int64)), dtype=np.float64)
        if max(len(s) for s in self.strata) < 2:
            return [None] * len(value)
        generator = np.random.default_rng(seed)
        resamples = np.empty((draws, len(value)))
        for index in range(draws):
            resamples[index] = statistic(self.draw(generator))
            on_draw()
        return [self._interval(float(v), resamples[:, i], level, around_value) for i, v in enumerate(value)]

    def _interval(self, value: float, resamples: Floats, level: float, around: bool) -> Interval | None:
        defined = resamples[np.isfinite(resamples)]
        if len(defined) * 2 < len(resamples):
            return None
        bias = float(defined.mean() - value)
        tail = (1 - level) / 2
        low, high = np.quantile(defined - (bias if around else 0.0), [tail, 1 - tail])
        return Interval(float(low), float(high), level, len(defined), self.count, bias)
