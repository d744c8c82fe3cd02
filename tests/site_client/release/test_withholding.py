"""Withholding flagged tiles: once, after a REVIEW, and never unsaid."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pixcell_core.contracts.canonical import file_digest
from pixcell_core.errors import PixcellError
from pixcell_core.trust.bundle import verify_bundle
from pixcell_core.trust.bundle_files import open_bundle
from privacy_audit.copies import NEAR
from privacy_audit.report import FILTERED
from site_client.release.export import export_release
from site_client.release.refuse import refuse_release
from site_client.release.withhold import withhold_flagged
from site_client.release.workspace import ReleaseFolder
from tests.site_client.release.conftest import set_verdict
from tests.site_client.release.test_failed_audits import event_of
from tests.site_client.release.test_gate_road import believe

if TYPE_CHECKING:
    from tests.site_client.release.conftest import Room


def flagging(*names: str, status: str = "REVIEW") -> Any:
    """An edit that gives the report a verdict and flags tiles."""

    def change(report: dict[str, Any]) -> None:
        set_verdict(status)(report)
        report["tests"][0]["name"] = NEAR
        digest = "sha256:" + "9" * 64
        report["flagged"] = [
            {"synthetic": name, "nearest": digest, "score": 0.5, "p_value": 0.001, "kind": "near copy"}
            for name in names
        ]

    return change


def knowing(first: Path, withheld: int, of: int) -> Any:
    """An edit that lets the second audit state the filtering."""

    def change(report: dict[str, Any]) -> None:
        details = {"withheld": withheld, "of": of, "first_report": file_digest(first / "report.json")}
        report["tests"].insert(0, {**report["tests"][0], "name": FILTERED, "details": details})

    return change


def withhold(room: Room, audit: Path, release: ReleaseFolder | None = None) -> ReleaseFolder:
    """Withhold without computing the audit again: these audits have no evidence."""
    return withhold_flagged(
        room.workspace,
        audit,
        now=room.now,
        release_id=None if release is None else release.release_id,
        check_audit=believe,
    )


def withheld(room: Room) -> tuple[ReleaseFolder, ReleaseFolder, Path]:
    """A release, its filtered rest, and the first audit."""
    release = room.draft()
    first = room.audit(release, flagging("00002.png", "00005.png"))
    return (
        release,
        withhold(room, first, release),
        first,
    )


def test_the_rest_is_sealed_numbered_and_said_to_be_filtered(room: Room) -> None:
    release, rest, first = withheld(room)
    before, after = release.manifest(), rest.manifest()
    assert [tile.name for tile in after.tiles] == ["00001.png", "00002.png", "00003.png", "00004.png"]
    kept = [tile for tile in before.tiles if tile.name not in {"00002.png", "00005.png"}]
    assert [(t.file_digest, t.label) for t in after.tiles] == [(t.file_digest, t.label) for t in kept]
    assert after.filtered is not None
    assert (after.filtered.withheld, after.filtered.of) == (2, 6)
    assert after.filtered.manifest_digest == before.digest
    assert after.filtered.audit_report_digest == file_digest(first / "report.json")
    assert "filtered: 2 of 6 tiles" in (rest.path / "README.txt").read_text()
    assert rest.origin_of("00002.png") == release.origin_of("00003.png")
    rows = (rest.tiles / "tiles.csv").read_text().splitlines() if (rest.tiles / "tiles.csv").exists() else []
    assert not rows or len(rows) == 5
    assert release.manifest() == before
    assert room.kinds()[-1] == "release.filtered"


def test_the_bundle_of_a_filtered_release_verifies_and_says_so(room: Room, tmp_path: Path) -> None:
    _, rest, first = withheld(room)
    room.sign(rest, room.audit(rest, knowing(first, 2, 6)))
    export_release(room.workspace, tmp_path / "one.zip", now=room.now, release_id=rest.release_id)
    with open_bundle(tmp_path / "one.zip") as files:
        report = verify_bundle(files, trusted_keys=[room.auditor.verify_key], now=room.now)
        assert b"filtered: 2 of 6 tiles" in files.read("README.txt")
        assert json.loads(files.read("manifest.json"))["filtered"]["withheld"] == 2
    assert report.tiles == 4
    (said,) = [check.detail for check in report.checks if check.name == "manifest"]
    assert "filtered: 2 of 6 tiles" in said


def test_an_audit_that_was_not_told_of_the_filtering_is_refused(room: Room) -> None:
    release, rest, first = withheld(room)
    for change in (None, knowing(first, 1, 6), knowing(first, 2, 7)):
        audit = room.audit(rest, change)
        assert room.refusal(lambda audit=audit: room.sign(rest, audit)) == "filtering-not-stated"  # type: ignore[misc]
    other = room.audit(release)
    audit = room.audit(rest, knowing(other, 2, 6))
    assert room.refusal(lambda: room.sign(rest, audit)) == "filtering-not-stated"
    audit = room.audit(release, knowing(first, 2, 6))
    assert room.refusal(lambda: room.sign(release, audit)) == "filtering-not-stated"


def test_a_release_is_filtered_once(room: Room) -> None:
    _, rest, first = withheld(room)

    def lied(report: dict[str, Any]) -> None:
        knowing(first, 2, 6)(report)
        flagging("00001.png")(report)

    again = room.audit(rest, lied)
    assert room.refusal(lambda: withhold(room, again, rest)) == "filtered-before"


def test_pass_fail_invalid_and_foreign_audits_withhold_nothing(room: Room) -> None:
    release = room.draft()
    for status in ("PASS", "FAIL", "INVALID"):
        audit = room.audit(release, flagging("00002.png", status=status))
        room.refused(
            "withholding-refused",
            lambda audit=audit: withhold(room, audit),  # type: ignore[misc]
        )
    everything = [tile.name for tile in release.manifest().tiles]
    for names in ([], everything):
        audit = room.audit(release, flagging(*names))
        room.refused(
            "withholding-refused",
            lambda audit=audit: withhold(room, audit),  # type: ignore[misc]
        )
    audit = room.audit(
        release,
        lambda report: (flagging("00002.png")(report), report["subjects"]["synthetic"]["files"].pop()),
    )
    room.refused("audit-of-other-tiles", lambda: withhold(room, audit))
    assert len(room.workspace.all_releases()) == 1


def test_a_report_that_was_written_by_hand_withholds_nothing(room: Room) -> None:
    """After a FAIL: REVIEW in its place, and the copies flagged. The evidence does not say so."""
    release = room.draft()
    written = room.audit(release, flagging("00002.png"))
    with pytest.raises(PixcellError):
        withhold_flagged(room.workspace, written, now=room.now)
    assert len(room.workspace.all_releases()) == 1


def test_tiles_that_failed_are_not_withheld_from(room: Room) -> None:
    release = room.draft()
    event_of(room.audit(release, set_verdict("FAIL"))).append_to(room.workspace.log())
    written = room.audit(release, flagging("00002.png"))
    room.refused("failed-before", lambda: withhold(room, written))
    assert room.workspace.find(None).release_id == release.release_id, "no second draft was sealed"


def test_a_refused_or_changed_release_is_not_withheld_from(room: Room) -> None:
    release = room.draft()
    audit = room.audit(release, flagging("00002.png"))
    readme = (release.path / "README.txt").read_bytes()
    (release.path / "README.txt").write_bytes(readme + b" ")
    room.refused("unsealed", lambda: withhold(room, audit))
    (release.path / "README.txt").write_bytes(readme)
    refuse_release(room.workspace, room.auditor, "Ink.", now=room.now)
    room.refused("release-refused", lambda: withhold(room, audit))
    assert len(room.workspace.all_releases()) == 1


def test_a_review_with_another_reason_is_not_answered_by_withholding(room: Room) -> None:
    release = room.draft()

    def also(report: dict[str, Any]) -> None:
        flagging("00002.png")(report)
        report["tests"].append({**report["tests"][0], "name": "membership"})

    room.refused("withholding-refused", lambda: withhold(room, room.audit(release, also)))
    assert room.workspace.find(None).release_id == release.release_id, "no second draft was sealed"
