"""The patients whom averages forget: copy and patient tests again on the most isolated, and a look at rare classes.

A patient who lies far from everybody else is the one a generator is most likely to repeat, and the one a neighbour
would recognise. One such patient in sixty moves no mean.

Legend: S released tiles, n holdout tiles, P patients, m sampled tiles.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import comb, prod

import numpy as np
import numpy.typing as npt
import torch

from privacy_audit.evidence_parts import StrataEvidence
from privacy_audit.neighbours import Standardiser, patient_minima
from privacy_audit.patients import RankedDistances, permutation_tail, permutations
from privacy_audit.policy import Policy
from privacy_audit.result import Status, TestResult
from privacy_audit.screen import ScreenScores
from privacy_audit.subject import Cohort, Group

ISOLATED_PATIENTS = "isolated patients: attribution"
ISOLATED_COPIES = "isolated patients: near copies"
RARE_CLASSES = "rare classes"
_SAMPLED_PER_PATIENT = 8
_SAMPLED = 4000  # in all: a median of a patient needs a few tiles


def isolation(
    train: Group, holdout: Group, cohort: Cohort, standardise: Standardiser
) -> npt.NDArray[np.float64]:
    """Median distance, over a patient's first tiles, to the nearest tile of any other patient; (P,)."""
    embeddings = standardise(train.features.embeddings, holdout.features.embeddings)
    owner = np.concatenate([cohort.of_train, cohort.of_holdout])
    rows = sampled_rows(owner, max(min(_SAMPLED_PER_PATIENT, _SAMPLED // cohort.patients), 1))
    distances = patient_minima(embeddings[rows], embeddings, torch.from_numpy(owner), cohort.patients).numpy()
    distances[np.arange(len(rows)), owner[rows]] = np.inf
    nearest = distances.min(axis=1).astype(np.float64)
    return np.array([np.median(nearest[owner[rows] == patient]) for patient in range(cohort.patients)])


def sampled_rows(owner: npt.NDArray[np.int64], per_patient: int) -> npt.NDArray[np.int64]:
    """Rows of at most `per_patient` tiles of each patient, evenly spread over its tiles; sorted."""
    chosen = []
    for patient in np.unique(owner):
        mine = np.flatnonzero(owner == patient)
        places = np.linspace(0, len(mine) - 1, min(per_patient, len(mine))).round().astype(int)
        chosen.append(mine[np.unique(places)])
    return np.sort(np.concatenate(chosen))


def gather(
    train: Group,
    holdout: Group,
    cohort: Cohort,
    standardise: Standardiser,
    released: ScreenScores,
    null: ScreenScores,
    classes: Sequence[str],
) -> StrataEvidence:
    """Measure isolation and whose tiles the matches are; `classes` is the class of each training tile, or empty."""
    found = sorted({(name, int(who)) for name, who in zip(classes, cohort.of_train, strict=True) if name})
    names = sorted({name for name, _ in found})
    return StrataEvidence(
        isolation=isolation(train, holdout, cohort, standardise),
        released_match=cohort.of_train[released.match],
        null_match=cohort.of_train[null.match],
        class_patients=np.array([sum(name == one for name, _ in found) for one in names], dtype=np.int64),
        class_names=tuple(names),
    )


def isolated(evidence: StrataEvidence, cohort: Cohort, policy: Policy) -> npt.NDArray[np.bool_]:
    """The most isolated patients, (P,) bool: a share of both sides together, and at least so many."""
    count = max(
        int(np.ceil(policy.strata.isolated_share * cohort.patients)), policy.strata.min_isolated_patients
    )
    chosen = np.zeros(cohort.patients, dtype=bool)
    chosen[np.argsort(-evidence.isolation, kind="stable")[: min(count, cohort.patients)]] = True
    return chosen


def attribution_p(
    evidence: StrataEvidence,
    distances: npt.NDArray[np.float64],
    cohort: Cohort,
    policy: Policy,
    rng: np.random.Generator,
) -> float | None:
    """Patient permutation among the isolated alone, within their strata; None where nothing can be permuted.

    Args:
        distances: D of the released tiles (S, P).
    """
    rows = np.flatnonzero(isolated(evidence, cohort, policy))
    sides = cohort.is_train[rows]
    ways = labellings(cohort, rows)
    if ways < 2:
        return None
    few = Cohort(cohort.of_train[:0], cohort.of_holdout[:0], sides, cohort.stratum[rows])
    labels = permutations(few, policy.patients.permutations, rng)
    tail = min(
        max(int(np.ceil(policy.patients.tail_share * len(distances))), policy.patients.min_tail_tiles),
        len(distances),
    )
    found = permutation_tail(RankedDistances.of(distances[:, rows]), sides, labels, tail).p
    # The draws may miss the one labelling that is observed; all labellings together could not.
    return max(found, 1 / ways)


def labellings(cohort: Cohort, rows: npt.NDArray[np.int64]) -> int:
    """How many labellings of these patients keep the number of training patients in every stratum."""
    strata, sides = cohort.stratum[rows], cohort.is_train[rows]
    return prod(
        comb(int((strata == one).sum()), int(sides[strata == one].sum())) for one in np.unique(strata)
    )


def patients_needed(family: int, p_fail: float) -> int:
    """Isolated patients, half of them on each side, whose smallest p times the family lies below `p_fail`."""
    count = 2
    while family / p_fail >= comb(count, count // 2):
        count += 2
    return count


def copies_p(
    evidence: StrataEvidence,
    scores: npt.NDArray[np.float64],
    null: npt.NDArray[np.float64],
    cohort: Cohort,
    policy: Policy,
) -> tuple[float, int, int, int]:
    """How surprising it is that so many released tiles near isolated patients outscore every holdout tile there.

    Among S released and n holdout tiles that are exchangeable, the top k are all released with the chance
    prod (S - i) / (S + n - i), i < k: exact, with no threshold chosen beforehand.

    Returns:
        p, k, S, n.
    """
    chosen = isolated(evidence, cohort, policy) & cohort.is_train
    here = scores[chosen[evidence.released_match]]
    there = null[chosen[evidence.null_match]]
    highest = there.max() if len(there) else -np.inf
    top = int((here > highest).sum())
    chance = 1.0
    for step in range(top):
        chance *= (len(here) - step) / (len(here) + len(there) - step)
    return float(chance), top, len(here), len(there)


def results(
    evidence: StrataEvidence,
    p_attribution: float | None,
    copies: tuple[float, int, int, int],
    adjusted: dict[str, float],
    cohort: Cohort,
    policy: Policy,
) -> tuple[TestResult, ...]:
    """The three tests of this module, in order; `adjusted` holds every p-value of the audit that Holm adjusts together."""
    family = len(adjusted)
    return (
        _copies(copies, adjusted[ISOLATED_COPIES], family, policy),
        _attribution(p_attribution, adjusted.get(ISOLATED_PATIENTS), family, evidence, cohort, policy),
        _rare(evidence, policy),
    )


def _copies(copies: tuple[float, int, int, int], adjusted: float, family: int, policy: Policy) -> TestResult:
    p, top, released, null = copies
    status, said = Status.PASS, ")."
    if adjusted < policy.strata.p_fail:
        status, said = Status.FAIL, f", FAIL below {policy.strata.p_fail:g})."
    # Where all of them on top would be no surprise either, the comparison could not have failed.
    elif top and family / policy.strata.p_fail >= comb(released + null, released):
        status, said = (
            Status.REVIEW,
            (
                f"). Against {'so few' if null else 'no'} holdout tiles there, no number of them could fail: a person "
                "has to look at these tiles."
            ),
        )
    elif adjusted < policy.patients.p_review:
        status, said = Status.REVIEW, f", REVIEW below {policy.patients.p_review:g})."
    return TestResult(
        name=ISOLATED_COPIES,
        section="near copies",
        claim="The tiles of unusual patients are copied no more than those of others.",
        statistic="released tiles near isolated patients that outscore every holdout tile near them",
        value=float(top),
        interval=None,
        null="holdout tiles whose best match is a tile of the same patients",
        p=p,
        p_adjusted=adjusted,
        threshold=float(_most_by_chance(copies, policy.strata.p_fail)),
        direction="lower is safer",
        status=status,
        why=(
            f"{top} of {released} released tiles that match an isolated patient best score above every holdout tile "
            f"(p = {adjusted:.2g} after Holm{said}"
        ),
        cannot_show="A single copied tile of an isolated patient: the near-copy screen looks at every tile.",
        details={"outscoring": top, "near_isolated": released},
    )


def _attribution(
    p: float | None,
    adjusted: float | None,
    family: int,
    evidence: StrataEvidence,
    cohort: Cohort,
    policy: Policy,
) -> TestResult:
    chosen = isolated(evidence, cohort, policy)
    ways = labellings(cohort, np.flatnonzero(chosen))
    # Draws have a smallest p of their own.
    reach = family * max(1 / ways, 1 / (policy.patients.permutations + 1))
    if p is None or adjusted is None:
        status, why = (
            Status.REVIEW,
            (
                "The most isolated patients all stand on one side, or do so in each of their strata, so nothing can be "
                "permuted among them; a person has to look at the tiles nearest to them."
            ),
        )
    elif adjusted < policy.strata.p_fail:
        status, why = (
            Status.FAIL,
            (
                f"Released tiles lie nearer to the isolated training patients than to the isolated holdout patients "
                f"(p = {adjusted:.2g} after Holm, FAIL below {policy.strata.p_fail:g})."
            ),
        )
    elif reach >= policy.strata.p_fail:
        status, why = (
            Status.REVIEW,
            (
                # Not how many ways there are: that would tell how many stand on which side, a count below the minimum.
                f"The isolated patients are so few on one side that no p after Holm over {family} tests can be below "
                f"{policy.strata.p_fail:g}: the test could not have failed. "
                + (
                    f"{patients_needed(family, policy.strata.p_fail)} isolated patients would do, half of them in training "
                    "and half in the holdout."
                    if family / ways >= policy.strata.p_fail
                    else "More permutations would do."
                )
            ),
        )
    elif adjusted < policy.patients.p_review:
        status, why = (
            Status.REVIEW,
            (
                f"Released tiles lie somewhat nearer to the isolated training patients than to the isolated holdout "
                f"patients (p = {adjusted:.2g} after Holm, REVIEW below {policy.patients.p_review:g})."
            ),
        )
    else:
        status, why = (
            Status.PASS,
            (
                f"Among the most isolated patients, too, swapping training and holdout gives the same picture "
                f"(p = {adjusted:.2g} after Holm)."
            ),
        )
    return TestResult(
        name=ISOLATED_PATIENTS,
        section="attribution",
        claim="The release does not betray which unusual patients were in training.",
        statistic="permutation p of the tail asymmetry among the most isolated patients",
        value=p,
        null="permutations of the labels training/holdout over the isolated patients",
        p=p,
        p_adjusted=adjusted,
        threshold=policy.strata.p_fail,
        direction="higher is safer",
        status=status,
        why=why,
        cannot_show="Leaks of one isolated patient: one patient in a dozen moves a permutation little.",
        details={"isolated": int(chosen.sum())},
    )


def _rare(evidence: StrataEvidence, policy: Policy) -> TestResult:
    smallest = policy.strata.min_class_patients
    rare = [
        name
        for name, count in zip(evidence.class_names, evidence.class_patients, strict=True)
        if count < smallest
    ]
    if not evidence.class_names:
        why = "The training tiles carry no class, so rare diagnoses cannot be told from common ones."
    elif rare:
        why = (
            f"{len(rare)} of {len(evidence.class_names)} classes have fewer than {smallest} training patients. A person "
            "has to decide whether a released tile of such a class points to somebody."
        )
    else:
        why = f"Each of the {len(evidence.class_names)} classes has at least {smallest} training patients."
    return TestResult(
        name=RARE_CLASSES,
        section="attribution",
        claim="No class of the training tiles is so rare that it names its patients.",
        statistic="classes with too few training patients",
        value=float(len(rare)) if evidence.class_names else None,
        threshold=0.0,
        direction="lower is safer",
        status=Status.REVIEW if rare or not evidence.class_names else Status.PASS,
        why=why,
        cannot_show="Rare findings that no class names.",
        gating=bool(evidence.class_names),
        tested=bool(evidence.class_names),
        details={"classes": len(evidence.class_names), "rare": len(rare)},
    )


def _most_by_chance(copies: tuple[float, int, int, int], limit: float) -> int:
    """The largest count of outscoring tiles whose chance is not below `limit`."""
    _, _, released, null = copies
    chance, count = 1.0, 0
    while count < released:
        chance *= (released - count) / (released + null - count)
        if chance < limit:
            break
        count += 1
    return count
