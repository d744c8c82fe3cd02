"""Identity planting: tiles of training patients that were not trained on, planted as if they had been generated.

A generator may betray a patient without copying a tile. The strongest such leak is the patient's own tissue: other
tiles of the same patient among the released ones. Planted at growing shares, they draw the curve from which a
reader sees how much imitation the patient test would have noticed in this cohort.

Legend: S released tiles, K planted tiles, n training tiles, P patients.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from privacy_audit.duplicates import Duplicates
from privacy_audit.intervals import clopper_pearson_lower
from privacy_audit.patients import (
    RankedDistances,
    permutation_tail,
    permutations,
    tail_size,
)
from privacy_audit.policy import PatientPolicy
from privacy_audit.result import Detection, Status, TestResult
from privacy_audit.subject import Cohort

IDENTITY = "self-test: tissue of training patients"
SHARES = (0.005, 0.01, 0.02, 0.05)
MOST_SIMULATIONS = 20  # of each share: a curve to read, not a gate
PLANTED = 240


def identity_rows(
    train_patient: npt.NDArray[np.int64], count: int, rng: np.random.Generator
) -> npt.NDArray[np.int64]:
    """Draw up to `count` training rows, patient by patient in turn, among patients with a second tile."""
    order = [
        rng.permutation(rows)
        for patient in rng.permutation(np.unique(train_patient))
        if len(rows := np.flatnonzero(train_patient == patient)) > 1
    ]
    drawn = [
        int(rows[lap]) for lap in range(max(map(len, order), default=0)) for rows in order if lap < len(rows)
    ]
    return np.array(drawn[:count], dtype=np.int64)


def identity_distances(
    rows: npt.NDArray[np.int64], train: Tensor, holdout: Tensor, cohort: Cohort, duplicates: Duplicates
) -> npt.NDArray[np.float64]:
    """D (K, P) of planted training tiles as if they had not been in training.

    Args:
        rows: (K,) training rows that are planted. train, holdout: (n, d) vectors of one view.
        cohort: the patients. duplicates: the tile itself and every tile of its field are left out of the search.
    """
    owner = torch.from_numpy(np.concatenate([cohort.of_train, cohort.of_holdout]))
    base = torch.cat([train, holdout]).float()
    out = torch.full((len(rows), cohort.patients), float("inf"))
    for number, row in enumerate(rows.tolist()):
        distance = torch.linalg.vector_norm(base - train[row].float(), dim=1)
        distance[: len(train)][torch.from_numpy(duplicates.same(np.arange(len(train)), np.array(row)))] = (
            torch.inf
        )
        out[number].scatter_reduce_(0, owner, distance, reduce="amin")
    # A patient all of whose tiles show one field has nothing left to be recognised by.
    finite = out[torch.isfinite(out)]
    return np.asarray(out.clamp_max(float(finite.max()) if len(finite) else 1.0).double().numpy())


def identity_curve(
    views: Sequence[tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]],
    planted_patient: npt.NDArray[np.int64],
    cohort: Cohort,
    policy: PatientPolicy,
    rng: np.random.Generator,
) -> TestResult:
    """How often the patient test notices unused tiles of training patients, by their share of the release.

    Args:
        views: for each kind of distance, D of the released (S, P) and of the planted tiles (K, P).
        planted_patient: (K,) patient of each planted tile.
        cohort, policy: as for the patient test; the same level, Bonferroni over the views.
        rng: source of the simulated releases.
    """
    released = len(views[0][0])
    simulations = min(policy.power_simulations, MOST_SIMULATIONS)
    detections = []
    for share in SHARES:
        count = min(max(int(np.ceil(share * released)), 1), released)
        caught = sum(_caught(views, planted_patient, count, cohort, policy, rng) for _ in range(simulations))
        detections.append(
            Detection(
                kind=f"identity{share:g}",
                words=f"{share:.1%} of the release from training patients ({count} tiles)",
                planted=simulations,
                found=caught,
                sensitivity=caught / simulations,
                lower=clopper_pearson_lower(caught, simulations),
                gate=None,
                met=True,
            )
        )
    seen = next((d for d in detections if d.sensitivity >= policy.min_power), None)
    return TestResult(
        name=IDENTITY,
        section="self-test",
        claim="The patient test would notice tissue of training patients, not only copies of tiles.",
        statistic=f"smallest planted share that is noticed in at least {policy.min_power:.0%} of simulated releases",
        value=None if seen is None else SHARES[detections.index(seen)],
        null=f"{simulations} simulated releases for each share",
        direction="lower is safer",
        status=Status.PASS,
        gating=False,
        why=(
            f"Noticed from {seen.words} on."
            if seen is not None
            else f"Not noticed at {SHARES[-1]:.0%} either: in this cohort, imitation of patients would go unseen."
        ),
        cannot_show="Imitation weaker than a patient's own tissue.",
        detections=tuple(detections),
    )


def _caught(
    views: Sequence[tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]],
    planted_patient: npt.NDArray[np.int64],
    count: int,
    cohort: Cohort,
    policy: PatientPolicy,
    rng: np.random.Generator,
) -> bool:
    """One simulated leak in an innocent world: labels shuffled, tiles of `training` patients planted, test run."""
    world = permutations(cohort, 1, rng)[0]
    usable = np.flatnonzero(world[planted_patient])
    if len(usable) < count:
        return False
    released = len(views[0][0])
    victims = rng.choice(released, size=count, replace=False)
    planted = rng.choice(usable, size=count, replace=False)
    labels = permutations(cohort, policy.power_permutations, rng)
    best = 1.0
    for observed, tiles in views:
        rows = observed.copy()
        rows[victims] = tiles[planted]
        test = permutation_tail(RankedDistances.of(rows), world, labels, tail_size(released, policy))
        best = min(best, test.p)
    return best * len(views) <= policy.p_review
