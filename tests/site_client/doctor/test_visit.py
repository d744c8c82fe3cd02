"""The doctor's visit as a whole: every check under its own name, one report, one envelope."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from pixcell_core.cli.main import build
from site_client.doctor import network_checks
from site_client.doctor.finding import DoctorReport, Finding
from site_client.doctor.question import Question
from site_client.doctor.visit import NAMES, visit


def test_every_check_is_asked_under_its_own_name_and_one_that_breaks_hides_none(
    asked: Question, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    report = visit(asked, said.append)
    assert [c.name for c in report.checks] == list(NAMES.values()) and len(said) == len(NAMES)
    assert report.exit_code == (1 if report.fail else 0)

    def breaks(question: Question) -> Finding:
        raise ZeroDivisionError("a secret")

    broken = visit(asked, checks=(breaks, network_checks.check_kit))
    assert [c.status for c in broken.checks] == ["fail", "ok"] and "secret" not in broken.model_dump_json()


def test_the_report_fails_only_for_a_failure() -> None:
    def report(*statuses: Any) -> DoctorReport:
        return DoctorReport.of("east", tuple(Finding(name="x", status=s, found="") for s in statuses))

    assert report("ok", "warn", "skip").exit_code == 0
    assert report("ok", "fail").exit_code == 1


def test_the_command_prints_one_envelope_and_a_line_per_check(asked: Question) -> None:
    site = str(asked.folder.root)
    done = CliRunner().invoke(
        build(), ["site", "doctor", "--site-dir", site, "--proxy", "direct", "--format", "json"]
    )
    body = json.loads(done.stdout)
    assert {c["name"] for c in body["data"]["checks"]} == set(NAMES.values())
    assert "[1/27] kit: ok" in done.stderr
    assert done.exit_code == (1 if body["data"]["fail"] else 0)
    asked.folder.approval_key.chmod(0o644)
    assert (
        CliRunner().invoke(build(), ["site", "doctor", "--site-dir", site, "--proxy", "direct"]).exit_code
        == 1
    )


def test_a_folder_that_is_no_site_is_an_input_error(tmp_path: Path) -> None:
    assert CliRunner().invoke(build(), ["site", "doctor", "--site-dir", str(tmp_path)]).exit_code == 4
