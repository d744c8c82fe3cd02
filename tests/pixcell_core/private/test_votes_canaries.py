"""The vote audited as an attacker would: a thousand canary patients through the real code, and faults planted in it.

Each canary is a patient whose tiles lie on a candidate of its own, under all labels, put in or left out by a coin. Its
score is the inner product of the noisy histograms with its own vote. Under the claimed mechanism the scores of those
inside and outside are mu = sqrt(T) / sigma standard deviations apart at most; a separation whose lower bound (alpha
0.001, fixed before any run) is above that proves that votes reach further or noise hides less than was charged. Half of
the canaries come and go: noise that is drawn once and used again cancels in their alternating sums.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import pytest
import torch

from pixcell_core.private import votes
from pixcell_core.private.canaries import separation
from pixcell_core.private.noise import NoiseSource, SystemNoiseSource, UnsafeFixedKeySource
from pixcell_core.private.votes import NoisyVotes, PatientTiles

from .test_votes import LABELS

CANARIES, SIGMA, ITERATIONS, ALPHA = 1000, 1.0, 4, 0.001
CLAIMED = math.sqrt(ITERATIONS) / SIGMA
Array = npt.NDArray[np.float64]


class Canaries:
    """Patients by number; those inside are present, the odd ones in every second iteration."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(5)
        self.candidates = torch.randn(CANARIES, 1, 48, generator=generator)
        self.inside = (torch.rand(CANARIES, generator=generator) < 0.5).numpy()
        self.odd = np.arange(CANARIES) % 2 == 1
        self.iteration = 0

    @property
    def patients(self) -> Sequence[str]:
        there = self.inside & ~(self.odd & (self.iteration % 2 == 1))
        return [str(i) for i in np.flatnonzero(there)]

    def tiles(self, patient: str) -> PatientTiles:
        return PatientTiles(self.candidates[int(patient)][None].repeat(6, 1, 1), LABELS * 2)

    def at(self, iteration: int) -> None:
        self.iteration = iteration


def audit(source: NoiseSource | None = None) -> float:
    """The largest lower bound of the separations of steady and alternating canaries, in standard deviations."""
    canaries = Canaries()
    ask = NoisyVotes(
        lambda: canaries,
        LABELS,
        noise_multiplier=SIGMA,
        source=source or UnsafeFixedKeySource(),
        reserve=canaries.at,
    )
    noisy = [ask(canaries.candidates, i).sum(axis=0) / math.sqrt(len(LABELS)) for i in range(ITERATIONS)]
    found = []
    for group, signs in (
        (~canaries.odd, (1.0,) * ITERATIONS),
        (canaries.odd, (1.0, -1.0) * (ITERATIONS // 2)),
    ):
        scores = sum(sign * scores for sign, scores in zip(signs, noisy, strict=True))
        assert isinstance(scores, np.ndarray)
        _, bound = separation(scores[group & canaries.inside], scores[group & ~canaries.inside], ALPHA / 2)
        found.append(bound)
    return max(found)


class Changed(UnsafeFixedKeySource):
    """A source with a fault."""

    def __init__(self, change: Callable[[int, Array], Array]) -> None:
        super().__init__()
        self._change, self._draws = change, 0

    def gaussian(self, count: int) -> Array:
        self._draws += 1
        return self._change(self._draws - 1, super().gaussian(count))


def test_the_vote_leaks_no_more_than_it_is_charged_and_the_measurement_is_sharp() -> None:
    assert 0.75 * CLAIMED < audit() <= CLAIMED
    assert audit(SystemNoiseSource()) <= CLAIMED * 1.1, "with the source of real use"


def repeated(draw: int, numbers: Array) -> Array:
    return UnsafeFixedKeySource().gaussian(len(numbers))


def one_for_all(draw: int, numbers: Array) -> Array:
    return np.full(len(numbers), numbers[0])


FAULTS: dict[str, Callable[[int, Array], Array]] = {
    "0.8 of the noise": lambda draw, numbers: 0.8 * numbers,
    "half of the noise": lambda draw, numbers: 0.5 * numbers,
    "the same noise in every iteration": repeated,
    "the same noise in every bin": one_for_all,
    "noise in the first iteration alone": lambda draw, numbers: numbers * (draw == 0),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_noise_that_hides_less_than_was_charged_is_caught(fault: str) -> None:
    assert audit(Changed(FAULTS[fault])) > CLAIMED


@pytest.mark.parametrize("fault", ["a vote per tile", "a unit for each label"])
def test_a_vote_that_reaches_further_is_caught(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    real = votes._vote

    def reaching(
        tiles: PatientTiles, directions: torch.Tensor, labels: Sequence[str]
    ) -> npt.NDArray[np.int64]:
        vote = real(tiles, directions, labels)
        if fault == "a vote per tile":
            return vote * len(tiles.labels)
        per_label = np.sqrt((vote.astype(np.float64) ** 2).sum(axis=1, keepdims=True))
        return (vote / np.maximum(per_label, 1.0) * 2.0**votes.VOTE_UNIT_BITS).astype(np.int64)

    monkeypatch.setattr(votes, "_vote", reaching)
    assert audit() > CLAIMED
