"""What an audit covers and what it does not, derived from its own results: it cannot contradict the run.

A kind of copy is covered where planted copies of it reached the gate of the policy. A test is covered where it was made.
What a test could have been given and was not is named with the option that gives it.
"""

from __future__ import annotations

from collections.abc import Iterable

from privacy_audit import disclosure
from privacy_audit.copies import Nulls, least_null
from privacy_audit.evidence import Evidence
from privacy_audit.evidence_parts import (
    DisclosureEvidence,
    GivenEvidence,
    MarkEvidence,
    MembershipEvidence,
    PrivacyClaimEvidence,
)
from privacy_audit.policy import Policy
from privacy_audit.result import Detection, TestResult
from privacy_audit.self_test import SENSITIVITY

NO_TEST = (
    "Attributes of a patient that a released tile may tell without looking like any of that patient's tiles: no test of "
    "this battery looks for them.",
)
"""What no input and no policy would cover: the battery has no test for it."""


def detections_of(tests: Iterable[TestResult]) -> tuple[Detection, ...]:
    """What became of the planted kinds."""
    return next((test.detections for test in tests if test.name == SENSITIVITY), ())


def proven_kinds(detections: Iterable[Detection]) -> tuple[str, ...]:
    """Words of the kinds of copy whose planted controls reached their gate."""
    return tuple(one.words for one in detections if one.met and one.gate is not None)


def unproven_kinds(detections: Iterable[Detection]) -> tuple[str, ...]:
    """Words of all other kinds, each with the reason."""
    return tuple(
        f"{one.words} ({_reason(one)})" for one in detections if not (one.met and one.gate is not None)
    )


def _reason(one: Detection) -> str:
    if not one.planted:
        return "none was planted" if one.gate is None else "the policy sets a gate, and none was planted"
    found = f"{one.found} of {one.planted} planted ones found"
    return (
        f"{found}; the policy sets no gate"
        if one.gate is None
        else f"{found}, short of the gate {one.gate:g}"
    )


def not_covered(
    tests: tuple[TestResult, ...], evidence: Evidence, nulls: Nulls, policy: Policy
) -> tuple[str, ...]:
    """Tests that were not made, kinds that were not proven, inputs that were not given, and what no run covers."""
    return (
        *_tests(tests),
        *(f"Copies of this kind: {words}." for words in unproven_kinds(detections_of(tests))),
        *_inputs(evidence, nulls, policy),
        *NO_TEST,
    )


def _tests(tests: tuple[TestResult, ...]) -> list[str]:
    left_out = []
    for test in tests:
        if not test.tested:
            why = test.why.removeprefix("Not tested: ").removesuffix(" The verdict does not rest on it.")
            left_out.append(f"{test.name[:1].upper()}{test.name[1:]}: {why[:1].lower()}{why[1:]}")
    return left_out


def _inputs(evidence: Evidence, nulls: Nulls, policy: Policy) -> list[str]:
    """Tests that were made with less than they could have been given."""
    missing = []
    flag_p = policy.copies.flag_p
    if not nulls.seconds:
        missing.append(
            "Near copies against what the base model draws: no twins were given (--base-twins DIR); the holdout alone "
            "says what is near."
        )
    for name, part in nulls.seconds:
        if part.threshold(flag_p) is None:
            missing.append(
                f"Near copies against {name}: {len(part.null)} are too few to have a threshold, {least_null(flag_p)} "
                "are needed."
            )
    if evidence.part(GivenEvidence) is None:
        missing.append(
            "Patients through another encoder's eyes: no embeddings were given (--embeddings FILE)."
        )
    claim = evidence.part(PrivacyClaimEvidence)
    if claim is not None and claim.claimed is None:
        missing.append("What the ledger spent: no export of it was given (--ledger-export FILE).")
    if claim is not None and claim.canary_bound is None:
        missing.append("An attack on the mechanism: no report of canaries was given (--canary-report FILE).")
    holdout = int((~evidence.is_train).sum())
    if evidence.part(MembershipEvidence) is not None and holdout < policy.membership.min_patients_for_tpr:
        missing.append(
            "Members found at 1 % false alarms: it takes "
            f"{policy.membership.min_patients_for_tpr} holdout patients, and there are fewer."
        )
    seen, read = evidence.part(DisclosureEvidence), evidence.part(MarkEvidence)
    if seen is not None:
        unread = int(disclosure.hits(seen, policy.disclosure).sum()) - (read.shown - read.open if read else 0)
        if unread > 0:
            missing.append(
                f"Text, ink and labels by eye: {unread} tiles that the detectors brought up were read by nobody "
                "(pixcell audit review)."
            )
    if evidence.unrecognisable > 0:
        missing.append(
            f"Copies of the {evidence.unrecognisable:.1%} of training tiles that show almost no nuclei."
        )
    return missing
