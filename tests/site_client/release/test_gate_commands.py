"""The gate as people type it: request, review, sign by role, refuse, export, withdraw, verify with what is known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pixcell_core.trust.keys import SigningKey
from site_client.release.signing import sign_release
from tests.site_client.release.test_release_commands import data, evidence_is_believed, run

if TYPE_CHECKING:
    from tests.site_client.release.conftest import Room

__all__ = ["evidence_is_believed"]


@pytest.fixture
def drafted(room: Room, tmp_path: Path) -> tuple[str, Path]:
    """Arguments that name the site, and an auditor's key file."""
    site = str(room.workspace.site_dir)
    assert (
        run("release", "draft", "--site-dir", site, "--tiles", room.source, "--site", "north").exit_code == 0
    )
    room.auditor.save(tmp_path / "auditor")
    return site, tmp_path / "auditor"


def test_the_written_road(room: Room, drafted: tuple[str, Path], tmp_path: Path) -> None:
    site, key = drafted
    where = ("--site-dir", site)
    asked = data(run("release", "request", *where, "--signers", room.rule(2), "--format", "json"))
    assert (asked["needed"], len(asked["signers"])) == (2, 4)
    release = room.workspace.find(None)
    audit = room.audit(release)
    seen = data(run("release", "review", *where, "--audit", audit, "--format", "json"))
    assert (seen["state"], seen["audit"], seen["next"]) == ("audited", "PASS", "sign")
    assert "exact copies" in run("release", "review", *where, "--audit", audit).stdout
    signed = data(run("release", "sign", *where, "--audit", audit, "--key", key, "--format", "json"))
    assert "the site has not signed" in signed["standing"]
    row = data(run("release", "show", *where, "--format", "json"))["releases"][0]
    assert (row["state"], row["signed"]) == ("signed", "1 of 2")
    assert "the site has not signed" in row["blocked_by"]
    blocked = run("release", "export", *where, "--out", tmp_path / "b.zip", "--format", "json")
    assert json.loads(blocked.stdout.splitlines()[-1])["code"] == "signatures-missing"
    own = room.workspace.key_path
    assert run("release", "sign", *where, "--role", "site", "--key", own).exit_code == 0
    exported = data(
        run("release", "export", *where, "--dicom", "--out", tmp_path / "b.zip", "--format", "json")
    )
    assert exported["verdict"] == "PASS"
    rule = tmp_path / "pinned.json"
    rule.write_bytes((release.path / "signers.json").read_bytes())
    verify = ("release", "verify", tmp_path / "b.zip")
    assert run(*verify, "--signers", rule, "--trust", _public(key, room)).exit_code == 0
    assert run(*verify, "--signers", "sha256:" + "0" * 64).exit_code == 1
    taken = run("release", "withdraw", *where, "--reason", "consent", "--format", "json")
    assert (taken.exit_code, json.loads(taken.stdout)["code"]) == (4, "needs-yes")
    listed = tmp_path / "withdrawals.json"
    gone = run("release", "withdraw", *where, "--reason", "consent", "--yes", "--out", listed)
    assert gone.exit_code == 0 and "withdrawn" in gone.stdout
    result = run(*verify, "--withdrawals", listed, "--format", "json")
    assert json.loads(result.stdout.splitlines()[-1])["code"] == "release-withdrawn"
    assert "withdrawn" in run("release", "show", *where).stdout


def _public(key: Path, room: Room) -> Path:
    path = key.with_name("auditor.pub")
    room.auditor.verify_key.save(path)
    return path


def test_refusing_from_the_command_line(room: Room, drafted: tuple[str, Path], tmp_path: Path) -> None:
    site, key = drafted
    where = ("--site-dir", site)
    result = run("release", "refuse", *where, "--key", key, "--reason", "Tile 4 shows ink.")
    assert result.exit_code == 0 and "ink" in result.stdout
    row = data(run("release", "show", *where, "--format", "json"))["releases"][0]
    assert row["state"] == "refused" and "Tile 4 shows ink." in row["blocked_by"]
    assert run("release", "export", *where, "--out", tmp_path / "b").exit_code == 1


def body(arguments: tuple[Any, ...]) -> dict[str, Any]:
    result = run(*arguments, "--format", "json")
    assert result.exit_code == 4, result.output
    return json.loads(result.stdout.splitlines()[-1])


def test_arguments_that_make_no_sense(room: Room, drafted: tuple[str, Path], tmp_path: Path) -> None:
    site, key = drafted
    where = ("--site-dir", site)
    nothing = tmp_path / "absent"
    for arguments, code in (
        (("sign", *where, "--key", key), "no-audit"),
        (
            ("sign", *where, "--key", key, "--role", "site", "--exception", "a", "--approver", "b"),
            "incomplete-exception",
        ),
        (("sign", *where, "--key", nothing, "--audit", nothing), "document-unreadable"),
        (("request", *where, "--signers", nothing), "document-unreadable"),
        (("request", *where, "--policy", nothing), "policy-missing"),
        (("request", *where, "--purpose", "a\x00b"), "cannot-be-signed"),
        (("refuse", *where, "--key", key, "--reason", ""), "cannot-be-signed"),
        (("review", *where, "--audit", nothing), "document-unreadable"),
        (("verify", nothing), "no-bundle"),
        (("verify", nothing, "--ca", nothing), "document-unreadable"),
        (("draft", *where, "--tiles", room.source, "--licence", "a\x00b"), "cannot-be-signed"),
    ):
        assert body(("release", *arguments))["code"] == code, arguments
    assert room.workspace.state(room.workspace.find(None)) == "draft"


def test_a_certificate_file_that_is_none(room: Room, drafted: tuple[str, Path], tmp_path: Path) -> None:
    site, key = drafted
    fake = tmp_path / "kit.json"
    fake.write_text("{}")
    audit = room.audit(room.workspace.find(None))
    result = run("release", "sign", "--site-dir", site, "--audit", audit, "--key", key, "--certificate", fake)
    assert result.exit_code == 1 and room.workspace.find(None).verdict() is None


def test_jpeg_from_the_command_line(room: Room, tmp_path: Path) -> None:
    where = ("--site-dir", room.workspace.site_dir)
    drafted = data(
        run(
            "release",
            "draft",
            *where,
            "--tiles",
            room.source,
            "--site",
            "north",
            "--tile-format",
            "jpg",
            "--format",
            "json",
        )
    )
    release = room.workspace.find(drafted["release"])
    assert {path.suffix for path in Path(drafted["tiles_dir"]).glob("0*")} == {".jpg"}
    from datetime import UTC, datetime

    sign_release(
        room.workspace,
        room.audit(release),
        SigningKey.generate(),
        now=datetime.now(UTC),
        check_audit=lambda audit, tiles: None,
    )
    assert run("release", "export", *where, "--out", tmp_path / "b.zip").exit_code == 0
    assert run("release", "verify", tmp_path / "b.zip").exit_code == 0
