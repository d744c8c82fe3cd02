"""What an audit says it does not cover follows from its own results: change what was given, and the words change."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from privacy_audit import battery, coverage
from privacy_audit.copies import NEAR
from privacy_audit.evidence import Evidence
from privacy_audit.evidence_parts import (
    BaseTwinEvidence,
    DisclosureEvidence,
    EvidencePart,
    GivenEvidence,
    MarkEvidence,
    MembershipEvidence,
    PrivacyClaimEvidence,
)
from privacy_audit.judge import Judgement, judge
from privacy_audit.plants import KINDS
from privacy_audit.policy import Policy
from privacy_audit.report import EVIDENCE, REPORT
from privacy_audit.result import Status
from privacy_audit.self_test import SENSITIVITY
from privacy_audit.subject import Cohort
from privacy_audit.verify import verify_audit
from tests.privacy_audit.conftest import Audited, small_policy

WORDS = {kind.key: kind.words for kind in KINDS}


@pytest.fixture(scope="module")
def evidence(honest: Audited) -> Evidence:
    return Evidence.load(honest.out / EVIDENCE)


def gates(**changes: float | None) -> Policy:
    """The small policy with some gates changed, or left out (None)."""
    policy = small_policy()
    kept = {k: v for k, v in {**policy.self_test.gates, **changes}.items() if v is not None}
    return policy.model_copy(update={"self_test": policy.self_test.model_copy(update={"gates": kept})})


def said(judged: Judgement, words: str) -> list[str]:
    return [line for line in judged.not_tested if words in line]


def test_a_kind_is_either_proven_or_named_with_its_reason(evidence: Evidence) -> None:
    for policy in (gates(), gates(blend=None, patch64=None), gates(rot15=0.99), gates(exact=None, d4=0.995)):
        judged = judge(evidence, policy, 3)
        near = next(test for test in judged.tests if test.name == NEAR)
        for key, words in WORDS.items():
            proven = words in judged.proven_kinds
            assert proven != bool(said(judged, f"Copies of this kind: {words} (")), key
            assert (words in near.claim) == proven and (words in near.cannot_show) != proven, key


def test_a_gate_that_a_policy_adds_moves_the_kind(evidence: Evidence) -> None:
    without, with_gate = judge(evidence, gates(blend=None), 3), judge(evidence, gates(blend=0.001), 3)
    assert "the policy sets no gate" in said(without, WORDS["blend"])[0]
    found = next(test for test in with_gate.tests if test.name == SENSITIVITY)
    blend = next(one for one in found.detections if one.kind == "blend")
    assert blend.met and not said(with_gate, WORDS["blend"]) and WORDS["blend"] in with_gate.proven_kinds
    short = judge(evidence, gates(rot15=0.99), 3)
    assert "short of the gate 0.99" in said(short, WORDS["rot15"])[0]


def test_a_kind_with_a_gate_that_was_not_planted_proves_nothing(evidence: Evidence) -> None:
    gone = evidence.planted_kind != next(n for n, kind in enumerate(KINDS) if kind.key == "jpeg50")
    names = [name for name in vars(evidence) if name.startswith("planted_")]
    cut = replace(evidence, **{name: getattr(evidence, name)[gone] for name in names})
    judged = judge(cut, small_policy(), 3)
    assert judged.verdict is Status.INVALID
    assert "the policy sets a gate, and none was planted" in said(judged, WORDS["jpeg50"])[0]


def test_every_input_that_was_not_given_is_named_with_its_option(evidence: Evidence) -> None:
    judged = judge(evidence, small_policy(), 3)
    for option in ("--conditions", "--generator", "--base-twins", "--embeddings", "--ledger-export"):
        assert len(said(judged, option)) == 1, option
    assert len(said(judged, "pixcell audit decide")) == 1
    assert said(judged, "no test of this battery")


def with_parts(evidence: Evidence, **parts: EvidencePart) -> Evidence:
    return replace(evidence, parts={**evidence.parts, **parts})


def test_what_was_given_is_not_said_to_be_missing(evidence: Evidence) -> None:
    policy = small_policy()
    twins = with_parts(evidence, base_twins=BaseTwinEvidence(np.full(150, 0.9), "sha256:0"))
    assert not said(judge(twins, policy, 3), "--base-twins")
    few = with_parts(evidence, base_twins=BaseTwinEvidence(np.full(5, 0.9), "sha256:0"))
    assert "5 are too few" in said(judge(few, policy, 3), "twins from the base model")[0]
    given = with_parts(evidence, given=GivenEvidence(evidence.released_distances))
    assert not said(judge(given, policy, 3), "--embeddings")
    ledger = PrivacyClaimEvidence("patient", 1.5, 1.5, 1e-5, None, None, None, None, 0)
    lines = judge(with_parts(evidence, dp=ledger), policy, 3)
    assert said(lines, "--canary-report") and not said(lines, "--ledger-export")
    rng = np.random.default_rng(0)
    owner = np.arange(len(evidence.is_train))
    scores = rng.normal(size=(2, len(owner), 3))
    weights = judge(with_parts(evidence, membership=MembershipEvidence(owner, *scores)), policy, 3)
    assert not said(weights, "--generator") and said(weights, "1 % false alarms")


def test_the_family_that_simulations_reckon_with_is_the_one_that_is_adjusted(evidence: Evidence) -> None:
    none = np.empty(0, dtype=np.int64)
    cohort = Cohort(none, none, evidence.is_train, evidence.stratum)
    owner = np.arange(len(evidence.is_train))
    scores = np.random.default_rng(0).normal(size=(2, len(owner), 3))
    weights = with_parts(evidence, membership=MembershipEvidence(owner, *scores))
    both = with_parts(weights, given=GivenEvidence(evidence.released_distances))
    for given, family in ((evidence, 6), (weights, 9), (both, 10)):
        adjusted = [test for test in judge(given, small_policy(), 3).tests if test.p_adjusted is not None]
        assert len(adjusted) == family == battery.family_size(given.parts, cohort, small_policy())
    enough = small_policy(membership__min_patients_for_tpr=len(owner) // 2)
    assert battery.family_size(both.parts, cohort, enough) == 13


def test_unread_hits_of_the_detectors_are_named(evidence: Evidence) -> None:
    seen = evidence.part(DisclosureEvidence)
    assert seen is not None
    glyphs = seen.glyphs.copy()
    glyphs[:3] = 40
    hit = with_parts(evidence, disclosure=replace(seen, glyphs=glyphs))
    policy = small_policy()
    assert "3 tiles" in said(judge(hit, policy, 3), "by nobody")[0]
    one = MarkEvidence("sha256:0", "sha256:1", 0, 0, 2, 0, 0, 3, 1)
    assert "2 tiles" in said(judge(with_parts(hit, marks=one), policy, 3), "by nobody")[0]
    every = replace(one, shown=3, open=0)
    assert not said(judge(with_parts(hit, marks=every), policy, 3), "by nobody")


def test_a_report_that_claims_more_coverage_than_its_evidence_is_named(
    honest: Audited, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(honest.out, tmp_path / "out", ignore=shutil.ignore_patterns("cache")))
    body = json.loads((out / REPORT).read_text())
    body["not_tested"] = body["not_tested"][1:]
    (out / REPORT).write_text(json.dumps(body))
    checks = {check.name: check.ok for check in verify_audit(out).checks}
    assert checks["coverage"] is False and checks["tests"] is True
    assert verify_audit(honest.out).verified


def test_nothing_planted_at_all() -> None:
    assert coverage.detections_of(()) == () and coverage.proven_kinds(()) == ()
