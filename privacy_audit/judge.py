"""From evidence and policy to verdict: pure, seeded, the same at the site and at whoever verifies."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from privacy_audit.copies import NEAR, Conformal, exact_copies, flags_of, near_copies
from privacy_audit.evidence import Evidence
from privacy_audit.intervals import holm
from privacy_audit.patients import (
    CLOSEST,
    TAIL_EYE,
    TAIL_SHAPE,
    View,
    closest_result,
    patient_tests,
    tail_result,
)
from privacy_audit.policy import Policy
from privacy_audit.result import Flag, Status, TestResult, worst
from privacy_audit.self_test import SENSITIVITY, sensitivity, specificity
from privacy_audit.subject import Cohort

NOT_TESTED = (
    "Membership inference on the weights of the generator: no weights were given.",
    "Pairs of a released tile and the tile it was conditioned on: conditions were not given.",
    "Small patches (64 pixels) pasted elsewhere: planted and reported, without a gate.",
    "Burnt-in text, ink and label fragments in released tiles.",
    "Linkability by someone who holds another slide of the same patient.",
    "Rare diagnoses and isolated patients on their own.",
)


@dataclass(frozen=True)
class Judgement:
    """All test results in order, the flagged tiles, the verdict, and the kinds of copy this run can see."""

    verdict: Status
    tests: tuple[TestResult, ...]
    flagged: tuple[Flag, ...]
    proven_kinds: tuple[str, ...]


def judge(evidence: Evidence, policy: Policy, seed: int) -> Judgement:
    """Compute every test from the evidence. Equal arguments give equal results, to the last digit."""
    conformal = Conformal(evidence.null_scores)
    near = near_copies(
        evidence.released_scores, conformal, policy.copies, unrecognisable=evidence.unrecognisable
    )
    cohort = Cohort(
        of_train=np.empty(0, dtype=np.int64),
        of_holdout=evidence.null_owner,
        is_train=evidence.is_train,
        stratum=evidence.stratum,
    )
    views = {
        TAIL_EYE: View(evidence.released_distances, evidence.planted_distances),
        TAIL_SHAPE: View(evidence.released_shape_distances, evidence.planted_shape_distances),
    }
    permuted = patient_tests(
        views,
        cohort,
        policy.patients,
        np.random.default_rng([seed, 1]),
        planted_patient=evidence.planted_patient,
        unflagged=(near.p_values > policy.copies.flag_p) & ~evidence.released_exact,
        family=len(views) + 2,
    )
    adjusted = holm({NEAR: near.excess_p, **permuted.p_values})
    seen = sensitivity(
        evidence.planted_scores,
        evidence.planted_kind,
        evidence.planted_same,
        evidence.planted_right,
        conformal,
        policy.copies,
        policy.self_test,
    )
    innocent = specificity(
        evidence.null_scores,
        evidence.null_owner,
        evidence.recoloured_scores,
        evidence.recoloured_owner,
        policy.copies,
        policy.self_test,
        np.random.default_rng([seed, 2]),
    )
    tests = (
        *evidence.preconditions,
        seen,
        innocent,
        closest_result(permuted, adjusted[CLOSEST], policy.patients),
        exact_copies(evidence.released_exact),
        near.result.model_copy(update={"p_adjusted": adjusted[NEAR]}),
        *(tail_result(name, permuted, adjusted[name], policy.patients, cohort) for name in views),
    )
    flagged = flags_of(
        evidence.released_ids,
        evidence.released_nearest,
        evidence.released_scores,
        evidence.released_exact,
        near,
    )
    return Judgement(
        worst(test.status for test in tests if test.gating),
        tests,
        tuple(flagged),
        proven_kinds(tests),
    )


def proven_kinds(tests: tuple[TestResult, ...]) -> tuple[str, ...]:
    """Words of the kinds of copy whose planted controls reached their gate."""
    return tuple(
        detection.words
        for test in tests
        if test.name == SENSITIVITY
        for detection in test.detections
        if detection.met and detection.gate is not None
    )
