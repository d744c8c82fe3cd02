"""Context: the numbers other tools report, with an honest p-value each. None of them decides anything here.

Means over all tiles do not see one per cent of copies, tiles of a patient are not independent, and twins in the training
set silence whatever is calibrated on it. So each number is computed with twins left out (nearest tile of ANOTHER
patient) and gets its p-value by permuting patients.

Legend: S released tiles (an even sample where there are many), m sampled real tiles, P patients, R kept ranks.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

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
GAP = "context: likelihood gap"
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
    distances = patient_minima(real[rows], real, own, cohort.patients)
    distances[torch.arange(len(rows)), own[rows]] = -1.0
    near, patients, gaps = _nearest_patients(released, real, own, cohort.patients)
    return ContextEvidence(
        owner=owner[rows],
        real_distances=as_stored(distances.numpy()),
        near_distances=as_stored(near.numpy()),
        near_patient=patients.numpy(),
        gap_distances=as_stored(gaps.numpy()),
        log_likelihood=_log_likelihood(real[rows], released),
    )


def even_sample(count: int) -> npt.NDArray[np.int64]:
    """Rows of the released tiles that the context looks at: all, or 1,000 spread evenly."""
    return np.unique(np.linspace(0, count - 1, min(count, _RELEASED)).round().astype(np.int64))


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

    def test(name: str, words: str, statistic: Callable[[Labels], float], *, low_is_bad: bool) -> TestResult:
        return _number(name, words, statistic, labels, cohort.is_train, low_is_bad)

    return (
        test(
            DCR,
            "share of released tiles nearer to a training than to a holdout tile",
            lambda sides: dcr_share(some, sides),
            low_is_bad=False,
        ),
        test(
            C_T,
            "z of Mann-Whitney, distance to training of released against holdout tiles, in one cell",
            lambda sides: copying_statistic(some, evidence, sides),
            low_is_bad=True,
        ),
        test(
            AUTHENTICITY,
            "share of released tiles farther from their nearest training tile than that is from another patient's",
            lambda sides: authenticity(evidence, sides),
            low_is_bad=True,
        ),
        test(
            GAP,
            "mean log-likelihood of training minus that of holdout tiles under Gaussians at the released tiles",
            lambda sides: likelihood_gap(evidence, sides),
            low_is_bad=False,
        ),
    )


def dcr_share(released: npt.NDArray[np.float64], sides: Labels) -> float:
    """Share of the released tiles with d(s, T) < d(s, H), ties counted half; .5 is innocent at equal sizes."""
    train, holdout = released[:, sides].min(axis=1), released[:, ~sides].min(axis=1)
    return float(((train < holdout) + 0.5 * (train == holdout)).mean())


def copying_statistic(released: npt.NDArray[np.float64], evidence: ContextEvidence, sides: Labels) -> float:
    """C_T of Meehan et al. (AISTATS 2020) in one cell: far below 0 where released tiles lie nearer to training."""
    held = ~sides[evidence.owner]
    if not held.any():
        return 0.0
    columns = np.where(evidence.real_distances < 0, np.inf, evidence.real_distances)
    theirs = columns[held][:, sides].min(axis=1)
    ours = released[:, sides].min(axis=1)
    order = np.sort(theirs)
    below = np.searchsorted(order, ours, side="left") + np.searchsorted(order, ours, side="right")
    n, m = len(ours), len(theirs)
    return float((below.sum() / 2.0 - n * m / 2.0) / np.sqrt(n * m * (n + m + 1) / 12.0))


def authenticity(evidence: ContextEvidence, sides: Labels) -> float:
    """Share with d(s, t*) > d(t*, its nearest tile of another patient) (Alaa et al., ICML 2022, twins left out)."""
    train = sides[evidence.near_patient]  # (S, R), nearest patient first
    at = np.where(train.any(axis=1), train.argmax(axis=1), train.shape[1] - 1)
    rows = np.arange(len(at))
    return float((evidence.near_distances[rows, at] > evidence.gap_distances[rows, at]).mean())


def likelihood_gap(evidence: ContextEvidence, sides: Labels) -> float:
    """Mean log-likelihood of the training minus that of the holdout tiles, each patient counting once.

    The idea of FLD's generalisation gap (Jiralerspong et al., NeurIPS 2023) with one bandwidth for all.
    """
    patients = np.unique(evidence.owner)
    means = np.array([evidence.log_likelihood[evidence.owner == one].mean() for one in patients])
    train = sides[patients]
    return float(means[train].mean() - means[~train].mean())


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


def _log_likelihood(real: Tensor, released: Tensor) -> npt.NDArray[np.float64]:
    """Log of the mean of Gaussians at the released tiles, up to a constant; the width is the median nearest distance."""
    near = nearest(real, released, 1)[0][:, 0]
    width = float(near.median().clamp_min(1e-6))
    parts = []
    for block in real.split(_BLOCK):
        squared = torch.cdist(block, released).square() / (2.0 * width * width)
        parts.append(torch.logsumexp(-squared.double(), dim=1) - np.log(len(released)))
    return torch.cat(parts).numpy()
