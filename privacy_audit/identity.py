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
from privacy_audit.neighbours import BASE_BLOCK, product
from privacy_audit.patients import (
    View,
    draws_for,
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
    rows: npt.NDArray[np.int64], base: Tensor, cohort: Cohort, duplicates: Duplicates
) -> npt.NDArray[np.float64]:
    """D (K, P) of planted training tiles as if they had not been in training.

    Args:
        rows: (K,) training rows that are planted. base: (n, d) vectors of one view, training tiles before holdout tiles.
        cohort: the patients, and which tiles are compared. duplicates: the tile itself and every tile of its field are
            left out of the search.
    """
    owner = torch.from_numpy(np.concatenate([cohort.of_train, cohort.of_holdout]))
    # Holdout tiles are of no training field.
    field = np.concatenate([duplicates.cluster, np.full(len(cohort.of_holdout), -1)])
    planted = base[torch.from_numpy(rows)].float()
    squares = (planted * planted).sum(dim=1)[:, None]
    compared = np.zeros(len(base), dtype=bool)
    training, holdout = cohort.compared_sides
    compared[training] = compared[holdout + len(cohort.of_train)] = True
    out = torch.full((len(rows), cohort.patients), float("inf"))
    for low in range(0, len(base), BASE_BLOCK):
        part = base[low : low + BASE_BLOCK].float()
        squared = product(-2.0 * planted, part) + (part * part).sum(dim=1) + squares
        same = field[rows][:, None] == field[None, low : low + BASE_BLOCK]
        same |= ~compared[None, low : low + BASE_BLOCK]
        squared[torch.from_numpy(same)] = torch.inf
        out.scatter_reduce_(1, owner[low : low + BASE_BLOCK].expand(len(rows), -1), squared, reduce="amin")
    out = out.clamp_min(0.0).sqrt()
    # A patient all of whose tiles show one field has nothing left to be recognised by.
    finite = out[torch.isfinite(out)]
    return np.asarray(out.clamp_max(float(finite.max()) if len(finite) else 1.0).double().numpy())


def identity_curve(
    views: Sequence[View],
    planted_patient: npt.NDArray[np.int64],
    cohort: Cohort,
    policy: PatientPolicy,
    rng: np.random.Generator,
    family: int,
) -> TestResult:
    """How often the patient test notices unused tiles of training patients, by their share of the release.

    Args:
        views: each kind of distance.
        planted_patient: (K,) patient of each planted tile.
        cohort, policy: as for the patient test, at the same level.
        rng: source of the simulated releases.
        family: how many p-values the audit adjusts together: Bonferroni over them, as for the power.
    """
    released = len(views[0].released)
    simulations = min(policy.power_simulations, MOST_SIMULATIONS)
    detections = []
    for share in SHARES:
        count = min(max(int(np.ceil(share * released)), 1), released)
        caught = sum(
            _caught(views, planted_patient, count, cohort, policy, rng, family) for _ in range(simulations)
        )
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
    views: Sequence[View],
    planted_patient: npt.NDArray[np.int64],
    count: int,
    cohort: Cohort,
    policy: PatientPolicy,
    rng: np.random.Generator,
    family: int,
) -> bool:
    """One simulated leak in an innocent world: labels shuffled, tiles of `training` patients planted, test run."""
    world = permutations(cohort, 1, rng)[0]
    usable = np.flatnonzero(world[planted_patient])
    if len(usable) < count:
        return False
    released = len(views[0].released)
    victims = rng.choice(released, size=count, replace=False)
    planted = rng.choice(usable, size=count, replace=False)
    labels = permutations(cohort, draws_for(family, policy), rng)
    best = 1.0
    for view in views:
        test = permutation_tail(view.leak(victims, planted), world, labels, tail_size(released, policy))
        best = min(best, test.p)
    return best * family <= policy.p_review
