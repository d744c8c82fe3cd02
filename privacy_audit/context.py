"""Context: the numbers other tools report, with an honest p-value each. None of them decides anything here.

Means over all tiles do not see one per cent of copies, tiles of a patient are not independent, and twins in the training
set silence whatever is calibrated on it. So each number is computed with twins left out (nearest tile of ANOTHER
patient) and gets its p-value by permuting patients. See `data_copying` and `likelihood_gap` for the two that need more
than distances.

Legend: S released tiles (an even sample where there are many), m sampled real tiles, P patients, R kept ranks.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pixcell_core.contracts.bands import band
from privacy_audit import data_copying, likelihood_gap
from privacy_audit.evidence import as_stored
from privacy_audit.evidence_parts import ContextEvidence
from privacy_audit.neighbours import Standardiser, nearest, patient_minima
from privacy_audit.patients import permutations
from privacy_audit.policy import Policy
from privacy_audit.result import Status, TestResult
from privacy_audit.strata import sampled_rows
from privacy_audit.subject import Cohort, Group

DCR = "context: share nearer to training (DCR)"
C_T = "context: data-copying statistic C_T"
AUTHENTICITY = "context: authenticity"
GAP = "context: generalisation gap (FLD)"
_BLOCK = 512
_RELEASED = 1000  # released tiles looked at: a mean does not need them all
_REAL = 4000  # real tiles in all
_RANKS = 8  # nearest patients of a released tile whose tiles are compared with their neighbours
Labels = npt.NDArray[np.bool_]


def gather(
    synthetic: Group,
    train: Group,
    holdout: Group,
    cohort: Cohort,
    standardise: Standardiser,
    per_patient: int,
) -> ContextEvidence:
    """Measure what the four numbers need, by the second eye."""
    real = standardise(train.features.embeddings, holdout.features.embeddings)
    owner = np.concatenate([cohort.of_train, cohort.of_holdout])
    released = standardise(synthetic.features.embeddings[even_sample(len(synthetic)).tolist()])
    rows = sampled_rows(owner, max(min(per_patient, _REAL // cohort.patients), 1))
    own = torch.from_numpy(owner)
    near, patients, gaps = _nearest_patients(released, real, own, cohort.patients)
    sampled = real[rows]
    cell_of = data_copying.cells(sampled, torch.cat([released, real]), len(released))
    released_cell, every_cell = cell_of[: len(released)], cell_of[len(released) :]

    def in_cells(queries: Tensor, cell: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        found = data_copying.distances_in_cells(queries, cell, real, every_cell, owner, cohort.patients)
        return as_stored(found.numpy())

    mixed = sampled_rows(owner, max(likelihood_gap.REAL // cohort.patients, 1))
    centres = released[_even(len(released), likelihood_gap.RELEASED).tolist()]
    return ContextEvidence(
        owner=owner[rows],
        real_cell=every_cell[rows],
        real_distances=in_cells(sampled, every_cell[rows]),
        released_cell=released_cell,
        released_distances=in_cells(released, released_cell),
        near_distances=as_stored(near.numpy()),
        near_patient=patients.numpy(),
        gap_distances=as_stored(gaps.numpy()),
        mixture_owner=owner[mixed],
        mixture_distances=as_stored(torch.cdist(real[mixed].double(), centres.double()).numpy()),
        width=int(real.shape[1]),
    )


def even_sample(count: int) -> npt.NDArray[np.int64]:
    """Rows of the released tiles that the context looks at: all, or 1,000 spread evenly."""
    return _even(count, _RELEASED)


def _even(count: int, most: int) -> npt.NDArray[np.int64]:
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(np.int64))


def results(
    evidence: ContextEvidence,
    released: npt.NDArray[np.float64],
    cohort: Cohort,
    policy: Policy,
    rng: np.random.Generator,
) -> tuple[TestResult, ...]:
    """The four numbers with permutation p-values.

    Args:
        released: D of the released tiles (S, P).
    """
    labels = permutations(cohort, policy.context.permutations, rng)
    some = released[even_sample(len(released))]
    looked = (
        f" ({len(some)} of {len(released)} released tiles, evenly drawn)" if len(some) < len(released) else ""
    )
    cells, used = (
        len(np.unique(evidence.real_cell)),
        data_copying.usable_cells(evidence.released_cell, evidence.real_cell),
    )
    squared = evidence.mixture_distances**2
    real, centres = squared.shape

    def test(
        name: str,
        words: str,
        statistic: Callable[[Labels], float],
        *,
        low_is_bad: bool,
        most: int | None = None,
    ) -> TestResult:
        return _number(name, words, statistic, labels[:most], cohort.is_train, low_is_bad)

    def copying(sides: Labels) -> float:
        return data_copying.statistic(
            evidence.released_distances,
            evidence.released_cell,
            evidence.real_distances,
            evidence.real_cell,
            evidence.owner,
            sides,
        )

    return (
        test(
            DCR,
            f"share of released tiles nearer to a training than to a holdout tile{looked}",
            lambda sides: dcr_share(some, sides),
            low_is_bad=False,
        ),
        test(
            C_T,
            f"z of Mann-Whitney, distance to training of released against holdout tiles, mean over {len(used)} of {cells} "
            f"cells of k-means that hold {data_copying.LEAST_RELEASED} released tiles{looked}",
            copying,
            low_is_bad=True,
        ),
        test(
            AUTHENTICITY,
            "share of released tiles farther from their nearest training tile than that is from another patient's"
            f"{looked}",
            lambda sides: authenticity(evidence, sides),
            low_is_bad=True,
        ),
        test(
            GAP,
            "100 times the negative log-likelihood per dimension of training less that of holdout tiles, under Gaussians at "
            f"released tiles with bandwidths fitted to training ({centres} of {len(released)} released and "
            f"{band(real)} real tiles, evenly drawn)",
            lambda sides: likelihood_gap.gap(squared, evidence.width, sides[evidence.mixture_owner]),
            low_is_bad=True,
            most=likelihood_gap.PERMUTATIONS,
        ),
    )


def dcr_share(released: npt.NDArray[np.float64], sides: Labels) -> float:
    """Share of the released tiles with d(s, T) < d(s, H), ties counted half; .5 is innocent at equal sizes."""
    train, holdout = released[:, sides].min(axis=1), released[:, ~sides].min(axis=1)
    return float(((train < holdout) + 0.5 * (train == holdout)).mean())


def authenticity(evidence: ContextEvidence, sides: Labels) -> float:
    """Share with d(s, t*) > d(t*, its nearest tile of another patient) (Alaa et al., ICML 2022, twins left out)."""
    train = sides[evidence.near_patient]  # (S, R), nearest patient first
    at = np.where(train.any(axis=1), train.argmax(axis=1), train.shape[1] - 1)
    rows = np.arange(len(at))
    return float((evidence.near_distances[rows, at] > evidence.gap_distances[rows, at]).mean())


def _number(
    name: str,
    words: str,
    statistic: Callable[[Labels], float],
    labels: Labels,
    observed: Labels,
    low_is_bad: bool,
) -> TestResult:
    value = statistic(observed)
    null = np.array([statistic(row) for row in labels])
    extreme = null <= value + 1e-12 if low_is_bad else null >= value - 1e-12
    p = float((1 + np.count_nonzero(extreme)) / (len(null) + 1))
    low, high = np.quantile(null, [0.025, 0.975])
    return TestResult(
        name=name,
        section="context",
        claim="None: a number that readers know from elsewhere.",
        statistic=words,
        value=value,
        interval=(float(low), float(high)),
        interval_kind="central 95 % of the permutations",
        null=f"{len(null)} permutations of the labels training/holdout over patients",
        p=p,
        threshold=float(low if low_is_bad else high),
        direction="higher is safer" if low_is_bad else "lower is safer",
        status=Status.PASS if p >= 0.05 else Status.REVIEW,
        why=(
            "For context, not a gate. "
            + (
                "It looks as it would by chance."
                if p >= 0.05
                else "It lies outside what chance gives; see the gating tests."
            )
        ),
        cannot_show="One per cent of copies: it is a mean over all tiles.",
        gating=False,
    )


def _nearest_patients(
    released: Tensor, real: Tensor, owner: Tensor, patients: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Of the R patients nearest to each released tile: distance to their nearest tile, who they are, and how far that
    tile lies from any other patient's; each (S, R)."""
    keep = min(_RANKS, patients)
    minima = patient_minima(released, real, owner, patients)
    near, who = minima.topk(keep, dim=1, largest=False)
    tile = torch.empty_like(who)
    for patient in who.unique().tolist():
        mine = torch.nonzero(owner == patient)[:, 0]
        rows, ranks = torch.nonzero(who == patient, as_tuple=True)
        tile[rows, ranks] = mine[nearest(released[rows], real[mine], 1)[1][:, 0]]
    used, place = tile.unique(return_inverse=True)
    to_all = patient_minima(real[used], real, owner, patients, label="context: neighbours' neighbours")
    to_all[torch.arange(len(used)), owner[used]] = float("inf")
    return near, who, to_all.min(dim=1).values[place]
