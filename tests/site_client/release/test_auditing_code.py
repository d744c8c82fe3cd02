"""A recipient who knows which auditing code to believe: `release verify --auditing-code`, `audit code`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import typer
from typer.testing import CliRunner

from pixcell_core.contracts.artifacts import AUDITING_CODE, code_digest
from pixcell_core.trust.bundle import BundleRefusedError, BundleReport, Known, verify_bundle
from privacy_audit import commands
from tests.site_client.release.conftest import InMemory
from tests.site_client.release.test_release_commands import data, evidence_is_believed, run

if TYPE_CHECKING:
    from tests.site_client.release.conftest import Room, Sample

__all__ = ["evidence_is_believed"]

OTHER = "sha256:" + "1" * 64


def verify(sample: Sample, known: Sequence[str]) -> BundleReport:
    return verify_bundle(
        InMemory(sample.files), trusted_keys=None, now=sample.now, known=Known(auditing_code=known)
    )


def said(report: BundleReport) -> str:
    return next(check.detail for check in report.checks if check.name == "auditing code")


def test_code_that_is_known_passes_among_others(sample: Sample) -> None:
    here = code_digest(AUDITING_CODE)
    assert said(verify(sample, [OTHER, here])) == f"{here} judged, one of the 2 known"


def test_code_that_is_not_known_is_refused_by_name(sample: Sample) -> None:
    with pytest.raises(BundleRefusedError) as refused:
        verify(sample, [OTHER])
    assert (refused.value.code, refused.value.check) == ("code-unknown", "auditing code")


def test_without_a_list_the_report_says_that_nothing_was_compared(sample: Sample) -> None:
    assert said(verify(sample, [])).startswith("NOT COMPARED")


def test_as_a_recipient_types_it(room: Room, tmp_path: Path) -> None:
    release = room.draft()
    room.sign(release, room.audit(release))
    where = ("--site-dir", room.workspace.site_dir)
    assert run("release", "export", *where, "--out", tmp_path / "b.zip").exit_code == 0
    verified = ("release", "verify", tmp_path / "b.zip", "--format", "json", "--auditing-code")
    checks = data(run(*verified, "installed"))["checks"]
    assert any("one of the 1 known" in check["detail"] for check in checks)
    for word, exit_code, code in ((OTHER, 1, "code-unknown"), ("sha256:12", 4, "bad-code-digest")):
        refused = run(*verified, word)
        assert (refused.exit_code, json.loads(refused.stdout.splitlines()[-1])["code"]) == (exit_code, code)


def test_audit_code_prints_what_a_verdict_names() -> None:
    root = typer.Typer()
    commands.register(root)
    printed = CliRunner().invoke(root, ["audit", "code", "--format", "json"])
    assert data(printed)["digest"] == code_digest(AUDITING_CODE)
    assert code_digest(AUDITING_CODE) in CliRunner().invoke(root, ["audit", "code"]).stdout


def test_one_changed_byte_of_the_code_is_another_digest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import privacy_audit

    copy = tmp_path / "privacy_audit"
    shutil.copytree(Path(privacy_audit.__file__).parent, copy, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr("pixcell_core.contracts.artifacts._package_folder", lambda package: copy)
    before = code_digest(("privacy_audit",))
    (copy / "copies.py").write_text((copy / "copies.py").read_text() + "# changed\n")
    assert code_digest(("privacy_audit",)) != before
