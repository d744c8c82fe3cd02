"""The release commands as a person calls them, from draft to a verified bundle, and their refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import typer
from typer.testing import CliRunner, Result

from pixcell_core.cli.trust_commands import register as register_trust
from site_client.release.commands import register
from tests.site_client.release.conftest import set_verdict

if TYPE_CHECKING:
    from tests.site_client.release.conftest import Room


def run(*arguments: object) -> Result:
    root = typer.Typer()
    register(root)
    register_trust(root)
    return CliRunner().invoke(root, [str(argument) for argument in arguments])


def data(result: Result) -> dict[str, Any]:
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout.splitlines()[-1])["data"]


@pytest.fixture(autouse=True)
def evidence_is_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    """These audits were written by hand: computing them again is tested with the audit itself."""
    monkeypatch.setattr("privacy_audit.verify.verify_audit", lambda audit, tiles: _Sound())


class _Sound:
    checks = ()


def test_from_draft_to_verified(room: Room, tmp_path: Path) -> None:
    site = ("--site-dir", room.workspace.site_dir)
    drafted = data(
        run("release", "draft", *site, "--tiles", room.source, "--site", "north", "--format", "json")
    )
    assert drafted["tiles"] == 6
    release = room.workspace.find(drafted["release"])
    assert Path(drafted["tiles_dir"]) == release.tiles
    assert run("key", "new", tmp_path / "auditor").exit_code == 0
    sign = ("release", "sign", *site, "--audit", room.audit(release), "--key", tmp_path / "auditor")
    assert data(run(*sign, "--format", "json"))["verdict"] == "PASS"
    exported = data(run("release", "export", *site, "--out", tmp_path / "bundle.zip", "--format", "json"))
    assert exported["tiles"] == 6
    assert "exported" in run("release", "show", *site).stdout
    result = run("release", "verify", tmp_path / "bundle.zip")
    assert result.exit_code == 0
    assert "ORIGIN NOT PROVEN" in result.stdout
    trusting = ("release", "verify", tmp_path / "bundle.zip", "--trust", tmp_path / "auditor.pub")
    assert data(run(*trusting, "--format", "json"))["trusted"] is True
    assert "✓ origin" in run(*trusting).stdout
    assert run("log", "verify", room.workspace.site_dir / "log").exit_code == 0
    changed = bytearray((tmp_path / "bundle.zip").read_bytes())
    changed[len(changed) // 2] ^= 1
    (tmp_path / "bundle.zip").write_bytes(bytes(changed))
    broken = run(*trusting, "--format", "json")
    assert broken.exit_code == 1
    assert json.loads(broken.stdout)["status"] == "error"


def test_fail_names_the_flagged_tiles_and_where_they_came_from(room: Room, tmp_path: Path) -> None:
    release = room.draft()
    site = ("--site-dir", room.workspace.site_dir)
    run("key", "new", tmp_path / "auditor")

    def planted(report: dict[str, Any]) -> None:
        set_verdict("FAIL")(report)
        flag = {"nearest": "sha256:" + "7" * 64, "score": 1.0, "p_value": 0.001, "kind": "exact copy"}
        report["flagged"] = [{"synthetic": "00004.png", **flag}]

    audit = room.audit(release, planted)
    result = run(
        "release", "sign", *site, "--audit", audit, "--key", tmp_path / "auditor", "--format", "json"
    )
    assert result.exit_code == 1
    body = json.loads(result.stdout.splitlines()[-1])
    assert body["code"] == "verdict-forbids"
    assert f"00004.png (was {release.origin_of('00004.png')})" in body["message"]
    assert str(release.origin_of("00004.png")).startswith("surrogate-")
    assert (release.path / "origins.json").stat().st_mode & 0o077 == 0
    assert run("release", "export", *site, "--out", tmp_path / "out").exit_code == 1
    assert not (tmp_path / "out").exists()


def test_review_asks_for_both_reason_and_person(room: Room, tmp_path: Path) -> None:
    release = room.draft()
    run("key", "new", tmp_path / "auditor")
    audit = room.audit(release, set_verdict("REVIEW"))
    sign = (
        "release",
        "sign",
        "--site-dir",
        room.workspace.site_dir,
        "--audit",
        audit,
        "--key",
        tmp_path / "auditor",
    )
    assert run(*sign).exit_code == 1
    assert run(*sign, "--exception", "small cohort").exit_code == 4
    assert run(*sign, "--approver", "release board").exit_code == 4
    assert run(*sign, "--exception", "", "--approver", "release board").exit_code == 4
    result = run(*sign, "--exception", "small cohort", "--approver", "release board")
    assert result.exit_code == 0
    assert "exception by release board: small cohort" in result.stdout


def test_bad_places_exit_4(room: Room, tmp_path: Path) -> None:
    nowhere = ("--site-dir", tmp_path / "nowhere")
    for arguments in (
        ("release", "draft", *nowhere, "--tiles", room.source),
        ("release", "draft", "--site-dir", room.workspace.site_dir, "--tiles", room.source),
        ("release", "export", *nowhere, "--out", tmp_path / "out"),
        ("release", "show", *nowhere),
        ("release", "export", "--site-dir", room.workspace.site_dir, "--out", tmp_path / "out"),
    ):
        result = run(*arguments)
        assert result.exit_code == 4, result.output
        assert "→" in result.stderr
    assert run("release", "show", "--site-dir", room.workspace.site_dir).exit_code == 0
