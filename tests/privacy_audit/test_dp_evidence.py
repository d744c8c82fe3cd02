"""The claim of differential privacy against charges and canaries: contradictions fail, absence is said aloud."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pixcell_core.errors import PixcellError
from pixcell_core.private.accounting import epsilon
from pixcell_core.private.events import GaussianEvent
from privacy_audit import dp_evidence
from privacy_audit.policy import load_policy
from privacy_audit.result import Status

POLICY = load_policy("core")
CHARGE = {"kind": "reserve", "sample_rate": 1.0, "noise_multiplier": 6.0, "steps": 20}
STATED = (
    '{"schema_version": "budget-export/v1", "lines": [], '
    '"statement": {"unit": "patient", "delta": 1e-5, "epsilon_spent": %s}}'
)
TRUE = epsilon([GaussianEvent(1.0, 6.0, 20)], 1e-5).value


def ledger(path: Path, **changes: Any) -> Path:
    statement = {"unit": "patient", "epsilon_spent": TRUE, "delta": 1e-5, "cohorts": [], **changes}
    lines = [{"record": CHARGE}, {"record": {"kind": "open"}}]
    body = {"schema_version": "budget-export/v1", "statement": statement, "public_key": None, "lines": lines}
    path.write_text(json.dumps(body))
    return path


def canaries(path: Path, **changes: Any) -> Path:
    report = {
        "canaries": 100, "epsilon_lower_bound": 1.2, "epsilon_claimed": 8.0, "delta": 1e-5, "unit": "patient", **changes,
    }  # fmt: skip
    path.write_text(json.dumps({"schema_version": "1", "status": "ok", "data": report}))
    return path


def status(tmp_path: Path, in_ledger: dict[str, Any] | None, in_report: dict[str, Any] | None) -> Status:
    evidence = dp_evidence.read(
        None if in_ledger is None else ledger(tmp_path / "l.json", **in_ledger),
        None if in_report is None else canaries(tmp_path / "c.json", **in_report),
    )
    return dp_evidence.result(evidence, POLICY).status


def test_a_claim_that_nothing_contradicts_passes(tmp_path: Path) -> None:
    assert status(tmp_path, {}, {}) is Status.PASS


@pytest.mark.parametrize(
    ("in_ledger", "in_report", "wanted"),
    [
        ({"epsilon_spent": TRUE - 0.5}, {}, Status.FAIL),  # claims less than it charged
        ({}, {"epsilon_lower_bound": 9.0}, Status.FAIL),  # canaries prove more than their run claims
        ({}, {"epsilon_lower_bound": None}, Status.FAIL),  # beyond every number
        ({"unit": "tile"}, {}, Status.REVIEW),  # protects tiles, not patients
        ({}, None, Status.REVIEW),
        (None, {}, Status.REVIEW),
    ],
)
def test_contradictions_fail_and_gaps_are_reviews(
    tmp_path: Path, in_ledger: dict[str, Any] | None, in_report: dict[str, Any] | None, wanted: Status
) -> None:
    assert status(tmp_path, in_ledger, in_report) is wanted


def test_absent_is_not_tested_and_gates_only_where_demanded() -> None:
    assert dp_evidence.read(None, None) is None
    found = dp_evidence.result(None, POLICY)
    assert not found.tested and not found.gating and "--ledger-export" in found.why
    assert dp_evidence.result(None, POLICY.model_copy(update={"required": ("dp",)})).gating


@pytest.mark.parametrize(
    "text",
    [
        "[]", "{}", "{", '{"schema_version": "budget-export/v1"}',
        STATED % "-1", STATED % '"2"', STATED % "null", STATED % "1e999",
    ],
)  # fmt: skip
def test_what_is_no_ledger_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "l.json").write_text(text)
    with pytest.raises(PixcellError) as caught:
        dp_evidence.read(tmp_path / "l.json", None)
    assert caught.value.exit_code == 4


@pytest.mark.parametrize(
    "change", [{"canaries": True}, {"canaries": 0}, {"epsilon_claimed": "8"}, {"delta": None}]
)
def test_what_is_no_canary_report_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    with pytest.raises(PixcellError) as caught:
        dp_evidence.read(None, canaries(tmp_path / "c.json", **change))
    assert caught.value.exit_code == 4
    with pytest.raises(PixcellError):
        dp_evidence.read(None, tmp_path / "absent.json")
