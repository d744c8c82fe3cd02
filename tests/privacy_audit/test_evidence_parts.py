"""Evidence with every part survives the disk, and evidence that lost a part gives no verdict."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest

from privacy_audit.evidence import Evidence, EvidenceError
from privacy_audit.evidence_parts import (
    PARTS,
    HumanEvidence,
    MarkEvidence,
    MembershipEvidence,
    PrivacyClaimEvidence,
)
from privacy_audit.judge import judge
from privacy_audit.policy import parse_policy
from privacy_audit.report import EVIDENCE
from privacy_audit.result import Status
from tests.privacy_audit.conftest import Audited

OPTIONAL = {"base_twins", "conditioning", "membership", "dp", "given", "human", "marks"}


@pytest.fixture
def evidence(honest: Audited) -> Evidence:
    return Evidence.load(honest.out / EVIDENCE)


def test_every_part_comes_back_as_it_was(evidence: Evidence, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    more = {
        "membership": MembershipEvidence(np.arange(4), rng.normal(size=(4, 3)), rng.normal(size=(4, 3))),
        "dp": PrivacyClaimEvidence("patient", 1.5, None, 1e-5, None, None, None, None, 0),
        "human": HumanEvidence("sha256:0", "sha256:1", 0, 0, 1, 0, 0, 1, 0),
        "marks": MarkEvidence("sha256:0", "sha256:1", 0, 0, 1, 0, 0, 1, 0),
    }
    (tmp_path / "e.npz").write_bytes(replace(evidence, parts={**evidence.parts, **more}).to_bytes())
    again = Evidence.load(tmp_path / "e.npz")
    assert set(again.parts) == {*evidence.parts, *more}
    for name, part in {**evidence.parts, **more}.items():
        found = again.parts[name]
        assert type(found) is type(part) is PARTS[name]
        for one in fields(part):
            left, right = getattr(part, one.name), getattr(found, one.name)
            assert np.array_equal(left, right) if isinstance(left, np.ndarray) else left == right, (
                name,
                one.name,
            )


def test_a_part_that_every_audit_measures_cannot_be_dropped(evidence: Evidence, honest: Audited) -> None:
    policy = parse_policy(honest.report.policy.settings)
    for name in set(PARTS) - OPTIONAL:
        assert name in evidence.parts, name
        cut = replace(evidence, parts={k: v for k, v in evidence.parts.items() if k != name})
        with pytest.raises(EvidenceError, match="has no part"):
            judge(cut, policy, honest.report.seed)


def test_an_unknown_part_is_damage(evidence: Evidence, tmp_path: Path) -> None:
    strange = replace(evidence, parts={**evidence.parts, "strange": evidence.parts["cliques"]})
    (tmp_path / "e.npz").write_bytes(strange.to_bytes())
    with pytest.raises(EvidenceError):
        Evidence.load(tmp_path / "e.npz")


def test_a_policy_that_demands_what_was_not_given_does_not_pass(evidence: Evidence, honest: Audited) -> None:
    policy = parse_policy(honest.report.policy.settings)
    demanding = policy.model_copy(update={"required": ("conditioning", "membership", "dp", "human")})
    judged = judge(evidence, demanding, honest.report.seed)
    demanded = [test for test in judged.tests if not test.tested and test.gating]
    assert len(demanded) == 4 and all(test.status is Status.REVIEW for test in demanded)
    assert judged.verdict.rank >= Status.REVIEW.rank
    assert sum("policy demands" in words for words in judged.not_tested) == 4
