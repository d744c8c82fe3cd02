"""The patient test in simulated cohorts: how often it rejects a perfect generator, and how often it sees a leak.

Hierarchical Gaussians: patients around their own centres, tiles around their patient; 60 + 60 patients of 20 tiles and 600
released tiles. Well separated patients make it optimistic; the rejection of a perfect generator does not depend on that.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from privacy_audit.neighbours import patient_minima
from privacy_audit.patients import RankedDistances, permutation_tail, permutations, tail_size
from privacy_audit.policy import load_policy
from privacy_audit.subject import Cohort

WIDTH, TILES = 16, 20


@dataclass(frozen=True)
class World:
    """A release of `released` tiles: `copies` of them are training tiles with noise, `imitations` follow a patient."""

    patients: int = 60
    holdout: int = 60
    released: int = 600
    copies: float = 0.0
    imitations: float = 0.0

    def draw(self, rng: np.random.Generator) -> tuple[npt.NDArray[np.float64], Cohort]:
        """D (S, P) and the cohort."""
        count = self.patients + self.holdout
        centres = rng.normal(size=(count, WIDTH))
        tiles = centres[:, None] + rng.normal(0, 0.5, (count, TILES, WIDTH))
        # A perfect generator draws new patients of the same kind, with favourites among them.
        fresh = rng.normal(size=(40, WIDTH))[rng.integers(40, size=self.released)]
        release = fresh + rng.normal(0, 0.5, (self.released, WIDTH))
        order = rng.permutation(self.released)
        copied = round(self.copies * self.released)
        for row in order[:copied]:
            release[row] = tiles[rng.integers(self.patients), rng.integers(TILES)] + rng.normal(
                0, 0.05, WIDTH
            )
        for row in order[copied : copied + round(self.imitations * self.released)]:
            release[row] = centres[rng.integers(self.patients)] + rng.normal(0, 0.5, WIDTH)
        owner = torch.from_numpy(np.repeat(np.arange(count), TILES))
        base = torch.from_numpy(tiles.reshape(-1, WIDTH)).float()
        distances = patient_minima(torch.from_numpy(release).float(), base, owner, count)
        empty = np.empty(0, dtype=np.int64)
        is_train = np.arange(count) < self.patients
        return distances.double().numpy(), Cohort(empty, empty, is_train, np.zeros(count, dtype=np.int64))


def rejection(world: World, worlds: int, seed: int, draws: int = 199, family: int = 1) -> float:
    """Share of simulated releases that the test rejects at 5 %, Bonferroni over `family` tests."""
    rng = np.random.default_rng(seed)
    policy = load_policy("core").patients
    found = 0
    for _ in range(worlds):
        distances, cohort = world.draw(rng)
        test = permutation_tail(
            RankedDistances.of(distances),
            cohort.is_train,
            permutations(cohort, draws, rng),
            tail_size(world.released, policy),
        )
        found += test.p * family <= policy.p_review
    return found / worlds


def main() -> None:
    """Print one line per world."""
    torch.set_num_threads(1)
    rows = (
        ("perfect generator, 60 + 60 patients", World(), 1000, 1),
        ("perfect generator, 60 + 15 patients", World(holdout=15), 500, 1),
        ("1 % near copies", World(copies=0.01), 100, 1),
        ("1 % near copies, six tests at once", World(copies=0.01), 100, 6),
        ("1 % near copies of 1,000 tiles, six tests at once", World(released=1000, copies=0.01), 100, 6),
        ("2 % near copies, six tests at once", World(copies=0.02), 100, 6),
        ("5 % imitate a training patient, six tests at once", World(imitations=0.05), 100, 6),
    )
    print("rejected at 5 %, patient tail asymmetry")
    for name, world, worlds, family in rows:
        share = rejection(world, worlds, 1, draws=199 if family == 1 else 399, family=family)
        print(f"  {name:52s} {share:.3f}  of {worlds} worlds")


if __name__ == "__main__":
    main()
