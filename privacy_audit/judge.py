"""From evidence and policy to verdict: pure, seeded, the same at the site and at whoever verifies."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from privacy_audit import (
    cliques,
    conditioning,
    context,
    coverage,
    disclosure,
    dp_evidence,
    linkability,
    membership,
    power,
    review_queue,
    strata,
)
from privacy_audit.base_twins import nulls_of
from privacy_audit.copies import NEAR, exact_copies, flags_of, near_copies
from privacy_audit.evidence import Evidence, EvidenceError, PartT
from privacy_audit.evidence_parts import (
    CliqueEvidence,
    ConditioningEvidence,
    ContextEvidence,
    DisclosureEvidence,
    GivenEvidence,
    HumanEvidence,
    LinkabilityEvidence,
    MarkEvidence,
    MembershipEvidence,
    PrivacyClaimEvidence,
    StrataEvidence,
)
from privacy_audit.intervals import holm
from privacy_audit.patient_results import closest_result, tail_result
from privacy_audit.patients import (
    CLOSEST,
    TAIL_EYE,
    TAIL_SHAPE,
    View,
    patient_tests,
)
from privacy_audit.policy import Policy
from privacy_audit.result import Flag, Status, TestResult, worst
from privacy_audit.self_test import sensitivity, specificity
from privacy_audit.subject import Cohort


@dataclass(frozen=True)
class Judgement:
    """All test results in order, the flagged tiles, the verdict, and the kinds of copy this run can see."""

    verdict: Status
    tests: tuple[TestResult, ...]
    flagged: tuple[Flag, ...]
    proven_kinds: tuple[str, ...]
    not_tested: tuple[str, ...]


def judge(evidence: Evidence, policy: Policy, seed: int) -> Judgement:
    """Compute every test from the evidence. Equal arguments give equal results, to the last digit."""
    nulls = nulls_of(evidence)
    sizes = (len(evidence.released_scores), len(evidence.null_scores))
    policy = policy.model_copy(update={"copies": policy.copies.for_sizes(*sizes)})
    seen = sensitivity(
        evidence.planted_scores,
        evidence.planted_kind,
        evidence.planted_same,
        evidence.planted_right,
        # Proof of sensitivity rests on the holdout alone: twins are optional, and may flag much without cause.
        nulls.first,
        policy.copies,
        policy.self_test,
    )
    near = near_copies(
        evidence.released_scores,
        nulls,
        policy.copies,
        unrecognisable=evidence.unrecognisable,
        proven=coverage.proven_kinds(seen.detections),
        unproven=coverage.unproven_kinds(seen.detections),
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
    given, steered = evidence.part(GivenEvidence), evidence.part(ConditioningEvidence)
    attacked, groups = evidence.part(MembershipEvidence), _needed(evidence, StrataEvidence)
    p_values = {NEAR: near.excess_p}
    p_steered: float | None = None
    if steered is not None:
        p_steered = conditioning.p_value(steered, policy, np.random.default_rng([seed, 3]))
        p_values[conditioning.NAME] = p_steered
    outscoring = strata.copies_p(groups, evidence.released_scores, evidence.null_scores, cohort, policy)
    p_values[strata.ISOLATED_COPIES] = outscoring[0]
    p_isolated = strata.attribution_p(
        groups, evidence.released_distances, cohort, policy, np.random.default_rng([seed, 4])
    )
    if p_isolated is not None:
        p_values[strata.ISOLATED_PATIENTS] = p_isolated
    p_attacks = (
        membership.p_values(attacked, cohort, policy, np.random.default_rng([seed, 5])) if attacked else {}
    )
    p_values |= p_attacks
    unflagged = (near.p_values > policy.copies.flag_p) & ~evidence.released_exact
    family = len(p_values) + len(views) + 1 + (given is not None)
    permuted = patient_tests(
        views,
        cohort,
        policy.patients,
        np.random.default_rng([seed, 1]),
        planted_patient=evidence.planted_patient,
        unflagged=unflagged,
        family=family,
        given=given.released_distances if given else None,
    )
    advice = ""
    if permuted.power < policy.patients.min_power and unflagged.any():
        unleaked = {name: View(view.released[unflagged], view.planted) for name, view in views.items()}
        advice = power.enough(
            unleaked,
            evidence.planted_patient,
            cohort,
            policy.patients,
            np.random.default_rng([seed, 8]),
            family,
        ).words(policy.patients.min_power)
    p_values |= permuted.p_values
    adjusted = holm(p_values)
    innocent = specificity(
        evidence.null_scores,
        evidence.null_owner,
        evidence.recoloured_scores,
        evidence.recoloured_owner,
        policy.copies,
        policy.self_test,
        np.random.default_rng([seed, 2]),
    )
    certain = sorted({*np.flatnonzero(evidence.released_exact).tolist(), *near.confirmed.tolist()})
    rare = strata.results(groups, p_isolated, outscoring, adjusted, cohort, policy)
    tests = (
        *evidence.preconditions,
        seen,
        innocent,
        dp_evidence.result(evidence.part(PrivacyClaimEvidence), policy),
        closest_result(permuted, adjusted[CLOSEST], policy.patients),
        *membership.results(attacked, p_attacks, adjusted, cohort, policy, np.random.default_rng([seed, 6])),
        exact_copies(evidence.released_exact),
        near.result.model_copy(update={"p_adjusted": adjusted[NEAR]}),
        conditioning.result(steered, p_steered, adjusted.get(conditioning.NAME), policy),
        rare[0],
        cliques.result(_needed(evidence, CliqueEvidence), certain, len(evidence.released_scores), policy),
        review_queue.result(evidence.part(HumanEvidence), policy),
        *(
            tail_result(name, permuted, adjusted[name], policy.patients, cohort, advice)
            for name in permuted.tails
        ),
        *rare[1:],
        linkability.result(_needed(evidence, LinkabilityEvidence), cohort, policy.linkability),
        disclosure.result(_needed(evidence, DisclosureEvidence), policy, evidence.part(MarkEvidence)),
        *context.results(
            _needed(evidence, ContextEvidence),
            evidence.released_distances,
            cohort,
            policy,
            np.random.default_rng([seed, 7]),
        ),
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
        coverage.proven_kinds(seen.detections),
        coverage.not_covered(tests, evidence, nulls, policy),
    )


def _needed(evidence: Evidence, kind: type[PartT]) -> PartT:
    """A part that every audit measures.

    Raises:
        EvidenceError: it is not there, so the evidence is of another version or was cut.
    """
    part = evidence.part(kind)
    if part is None:
        raise EvidenceError(
            f"The evidence has no part {kind.__name__}.",
            hint="It is of another version or was changed. Run the audit again.",
        )
    return part
