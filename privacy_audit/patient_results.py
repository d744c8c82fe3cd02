"""What the patient tests say: statuses, thresholds and words, of what `patients` measured."""

from __future__ import annotations

import numpy as np

from privacy_audit.patients import CLOSEST, TAIL_EYE, TAIL_GIVEN, TAIL_SHAPE, PatientTests
from privacy_audit.policy import PatientPolicy
from privacy_audit.result import Status, TestResult, histogram
from privacy_audit.subject import Cohort

_EYES = {
    TAIL_EYE: "the second eye (texture and content)",
    TAIL_SHAPE: "shape spectra of haematoxylin (shifted, turned or recoloured tissue)",
    TAIL_GIVEN: "the embeddings that were given",
}


def tail_result(
    name: str, tests: PatientTests, adjusted: float, policy: PatientPolicy, cohort: Cohort, advice: str = ""
) -> TestResult:
    """The result of one view: status by Holm-adjusted p and by the power of the audit's own two views together.

    `advice` says what would give that power, where it is short. Given embeddings have no planted copies and so no power
    that could be known: what they find counts against the release, and what they do not find counts for nothing.
    """
    tail = tests.tails[name]
    status, why = _decide(adjusted, policy)
    own = name != TAIL_GIVEN
    if not own:
        if status is Status.PASS:
            why += " Whether these embeddings could show a leak was not measured, so the verdict does not rest on this."
    elif tests.power < policy.min_power:
        status = max(status, Status.REVIEW, key=lambda s: s.rank)
        why += f"{_caught(tests)}, fewer than {policy.min_power:.0%}: a sample too small to decide does not pass."
        why += f" {advice}" if advice else ""
    else:
        why += f"{_caught(tests)}."
    low, high = np.quantile(tail.null, [0.025, 0.975])
    return TestResult(
        name=name,
        section="attribution",
        claim="The release does not betray which patients were in training.",
        statistic=f"tail asymmetry of log distance ratios, training against holdout patients, by {_EYES[name]}",
        value=tail.observed,
        interval=(float(low), float(high)),
        interval_kind="central 95 % of the permutations",
        null=f"{len(tail.null)} permutations of the labels training/holdout over patients",
        p=tail.p,
        p_adjusted=adjusted,
        threshold=float(np.quantile(tail.null, 1.0 - policy.p_review)),
        direction="lower is safer",
        status=status,
        why=why,
        cannot_show=(
            "Leaks that reach no tail: attributes of a patient spread thinly over many tiles; and whether the holdout "
            "was drawn from the same patients' pool, which the preconditions ask for."
        ),
        histogram=histogram(
            tail.null,
            np.array([tail.observed]),
            axis="tail asymmetry",
            null_name="permuted labels",
            observed_name="observed",
            threshold=float(np.quantile(tail.null, 1.0 - policy.p_review)),
            marks=[tail.observed],
        ),
        gating=own or status is not Status.PASS,
        details={
            "power": round(tests.power, 4) if own else None,
            "power_lower": round(tests.power_lower, 4) if own else None,
            "power_copies": tests.copies if own else None,
            "strata": len(np.unique(cohort.stratum)),
        },
    )


def closest_result(tests: PatientTests, adjusted: float, policy: PatientPolicy) -> TestResult:
    """Membership of patients by their closest released tile; weaker than the tail, and known to many readers."""
    status, why = _decide(adjusted, policy)
    low, high = np.quantile(tests.closest.null, [0.025, 0.975])
    return TestResult(
        name=CLOSEST,
        section="membership",
        claim="Holding a patient's tiles does not tell whether that patient was in training, from the release alone.",
        statistic="AUC of training against holdout patients by their closest released tile",
        value=tests.closest.observed,
        interval=(float(low), float(high)),
        interval_kind="central 95 % of the permutations",
        null=f"{len(tests.closest.null)} permutations of the labels training/holdout over patients",
        p=tests.closest.p,
        p_adjusted=adjusted,
        threshold=float(np.quantile(tests.closest.null, 1.0 - policy.p_review)),
        direction="lower is safer",
        status=status,
        why=why,
        cannot_show="An attack on the weights of the generator: see membership by weights.",
        histogram=histogram(
            tests.closest.null,
            np.array([tests.closest.observed]),
            axis="AUC",
            null_name="permuted labels",
            observed_name="observed",
            threshold=float(np.quantile(tests.closest.null, 1.0 - policy.p_review)),
            marks=[tests.closest.observed],
        ),
    )


def _caught(tests: PatientTests) -> str:
    return f" Together the two views catch {tests.power:.0%} of simulated releases with {tests.copies} near copies"


def _decide(adjusted: float, policy: PatientPolicy) -> tuple[Status, str]:
    if adjusted < policy.p_fail:
        return Status.FAIL, (
            f"Released tiles lie nearer to training patients than chance allows (p = {adjusted:.2g} after Holm, "
            f"FAIL below {policy.p_fail:g})."
        )
    if adjusted < policy.p_review:
        return Status.REVIEW, (
            f"Released tiles lie somewhat nearer to training patients (p = {adjusted:.2g} after Holm, "
            f"REVIEW below {policy.p_review:g})."
        )
    return Status.PASS, (
        f"Swapping training and holdout patients at random gives the same picture (p = {adjusted:.2g} after Holm)."
    )
