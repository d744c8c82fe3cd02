"""The road of a release: sealed, signed, exported, verified; and what each step leaves behind."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from pixcell_core.contracts.canonical import parse_document
from pixcell_core.contracts.verdict import Verdict, VerdictException
from pixcell_core.trust.bundle import verify_bundle
from pixcell_core.trust.bundle_files import open_bundle
from pixcell_core.trust.log import verify_log
from pixcell_core.trust.tile_png import MARK_KEYWORD
from site_client.release.export import export_release
from tests.site_client.release.conftest import set_verdict

if TYPE_CHECKING:
    from tests.site_client.release.conftest import Room


def test_the_whole_road_as_folder_and_as_archive(room: Room, tmp_path: Path) -> None:
    for out in (tmp_path / "bundle", tmp_path / "bundle.zip"):
        exported = room.exported(out)
        assert exported.report.tiles == 6
        with open_bundle(out) as files:
            report = verify_bundle(files, trusted_keys=[room.auditor.verify_key], now=room.now)
            assert report.trusted
            assert (report.site, report.verdict) == ("north", "PASS")
            assert report.proven_kinds == ("exact copy", "near copy")
            untrusted = verify_bundle(files, trusted_keys=None, now=room.now)
            assert not untrusted.trusted
            assert "NOT PROVEN" in untrusted.checks[-1].detail
            assert all(check.passed for check in report.checks)
    assert room.kinds() == ["release.sealed", *["release.signed", "release.exported"] * 2]
    assert verify_log(room.workspace.site_dir / "log").entries == 5


def test_both_forms_hold_the_same_files_and_an_archive_can_be_unpacked(room: Room, tmp_path: Path) -> None:
    import zipfile

    room.signed()
    export_release(room.workspace, tmp_path / "folder", now=room.now)
    export_release(room.workspace, tmp_path / "one.zip", now=room.now)
    with zipfile.ZipFile(tmp_path / "one.zip") as archive:
        archive.extractall(tmp_path / "unpacked")
    with open_bundle(tmp_path / "folder") as folder, open_bundle(tmp_path / "one.zip") as archive_files:
        assert folder.names() == archive_files.names()
    with open_bundle(tmp_path / "unpacked") as files:
        assert verify_bundle(files, trusted_keys=[room.auditor.verify_key], now=room.now).trusted


def test_the_same_release_exports_to_the_same_archive(room: Room, tmp_path: Path) -> None:
    room.signed()
    one = export_release(room.workspace, tmp_path / "one.zip", now=room.now)
    with open_bundle(one.path) as files:
        names = files.names()
    assert names == sorted(names)
    assert re.fullmatch(r"sha256:[0-9a-f]{64}", one.digest)


def test_tiles_lose_names_order_and_metadata_and_keep_their_pixels(room: Room) -> None:
    release = room.draft()
    manifest = release.manifest()
    sealed = {}
    for tile in manifest.tiles:
        data = (release.tiles / tile.name).read_bytes()
        with Image.open(io.BytesIO(data)) as image:
            assert list(image.info) == [MARK_KEYWORD], "no resolution, no time, no profile"
            sealed[np.asarray(image).tobytes()] = tile
        assert b"surrogate" not in data
    originals = [np.asarray(Image.open(p)).tobytes() for p in sorted(room.source.glob("*.png"))]
    assert set(originals) == set(sealed)
    order = [sealed[pixels].name for pixels in originals]
    assert order != sorted(order), "the numbers follow the pixels' digests, not the source's names"
    digests = [tile.pixel_digest for tile in manifest.tiles]
    assert digests == sorted(digests)
    assert sorted(str(tile.label) for tile in manifest.tiles) == ["None"] * 3 + ["tumour"] * 3


def test_the_conditions_of_a_tile_reach_the_audit_and_never_the_bundle(room: Room, tmp_path: Path) -> None:
    rows = "file,label,condition\n" + "".join(
        f"{path.name},stroma,patient-{number}/tile-7\n"
        for number, path in enumerate(sorted(room.source.glob("*.png")))
    )
    (room.source / "tiles.csv").write_text(rows)
    release = room.draft()
    table = (release.tiles / "tiles.csv").read_text()
    assert "patient-3/tile-7" in table
    room.sign(release, room.audit(release))
    out = export_release(room.workspace, tmp_path / "out", now=room.now).path
    for path in out.rglob("*"):
        assert path.is_dir() or b"patient-3" not in path.read_bytes()
    assert not list(out.rglob("*.csv"))


def test_review_leaves_only_with_a_named_exception_that_is_signed(room: Room, tmp_path: Path) -> None:
    release = room.draft()
    audit = room.audit(release, set_verdict("REVIEW"))
    exception = VerdictException(
        reason="twelve patients only; shared under agreement", approver="release board"
    )
    room.sign(release, audit, exception=exception)
    exported = export_release(room.workspace, tmp_path / "out", now=room.now)
    assert (exported.report.verdict, exported.report.approver) == ("REVIEW", "release board")
    assert b"shared under agreement" in _verdict_payload(exported.path)


def _verdict_payload(bundle: Path) -> bytes:
    from pixcell_core.trust.dsse import Envelope

    return Envelope.load(bundle / "verdict.dsse.json").unsafe_unverified_payload()


def test_two_auditors_sign_one_verdict(room: Room, tmp_path: Path) -> None:
    release = room.draft()
    audit = room.audit(release)
    room.sign(release, audit)
    signed = room.sign(release, audit, room.second)
    assert len(signed.envelope.signatures) == 2
    out = export_release(room.workspace, tmp_path / "out", now=room.now).path
    keys = [room.auditor.verify_key, room.second.verify_key]
    with open_bundle(out) as files:
        assert verify_bundle(files, trusted_keys=keys, threshold=2, now=room.now).trusted


def test_the_verdict_is_an_in_toto_statement(room: Room, tmp_path: Path) -> None:
    import json

    out = room.exported(tmp_path / "out").path
    statement = json.loads(_verdict_payload(out))
    assert statement["_type"] == "https://in-toto.io/Statement/v1"
    assert set(statement) == {"_type", "subject", "predicateType", "predicate"}
    assert all(set(subject) == {"name", "digest"} for subject in statement["subject"])
    assert parse_document(Verdict, _verdict_payload(out)).to_bytes() == _verdict_payload(out)


def test_the_readme_and_the_sheet_say_what_this_is(room: Room, tmp_path: Path) -> None:
    out = room.exported(tmp_path / "out").path
    words = (out / "README.txt").read_text()
    for said in (
        "SYNTHETIC",
        "pixcell release verify",
        "none claimed",
        "mean of 3 patients",
        "Not for diagnosis",
    ):
        assert said in words
    with Image.open(out / "sample-sheet.png") as sheet:
        assert sheet.size == (6 * 134 + 6, 134 + 6 + 28)


def test_the_audience_is_signed(room: Room, tmp_path: Path) -> None:
    release = room.draft()
    audit = room.audit(release)
    room.sign(release, audit, audience="registered")
    exported = export_release(room.workspace, tmp_path / "out", now=room.now)
    assert exported.report.audience == "registered"
    assert b'"audience":"registered"' in _verdict_payload(exported.path)
