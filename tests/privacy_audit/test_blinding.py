"""What is shared of real tiles: bands instead of counts, and names that mean nothing to whoever holds a tile."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pixcell_core.contracts.bands import band, band_floor
from pixcell_core.contracts.release import tiles_root
from pixcell_core.errors import BadInputError
from privacy_audit.blinding import KEY_FILE, Blinding
from privacy_audit.preconditions import SIZES
from privacy_audit.report import NEIGHBOURS, PAGE, REPORT, AuditReport
from privacy_audit.run import AuditRequest, run_audit
from privacy_audit.tiles import open_tiles, pixel_digest
from tests.privacy_audit.conftest import TextureEye, World, small_policy


@pytest.fixture(scope="module")
def audited(world: World, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, AuditReport]:
    out = tmp_path_factory.mktemp("audited") / "first"
    request = AuditRequest(world.train, world.holdout, world.dishonest, out, small_policy(), seed=3)
    return out, run_audit(request, TextureEye())


def digests_of(folder: Path) -> set[str]:
    """Digests of the files and of the decoded pixels of a folder's tiles."""
    source = open_tiles(folder, name="x", needs_patients=False)
    pixels = source.read(0, len(source.ids)).permute(0, 2, 3, 1).contiguous().numpy()
    return {*source.file_digests(), *(pixel_digest(tile) for tile in pixels)}


def test_bands_tell_their_edges_alone() -> None:
    assert [band(n) for n in (0, 9, 10, 49, 50, 1999, 5000)] == [
        "fewer than 10",
        "fewer than 10",
        "10 to 19",
        "20 to 49",
        "50 to 99",
        "1000 to 1999",
        "5000 to 9999",
    ]
    assert band(15, smallest=20) == "fewer than 20" and band(25, smallest=20) == "20 to 49"
    for count in range(10, 30_000):
        low, high = (int(edge) for edge in band(count).split(" to "))
        assert low == band_floor(count) <= count <= high < 2.6 * low


def test_one_tile_more_hardly_ever_changes_a_band() -> None:
    changes = [count for count in range(10, 20_000) if band(count) != band(count + 1)]
    assert len(changes) == 10


def test_the_shared_files_name_no_real_tile_to_whoever_holds_it(
    audited: tuple[Path, AuditReport], world: World
) -> None:
    out, report = audited
    assert report.flagged
    real = digests_of(world.train) | digests_of(world.holdout)
    released = digests_of(world.dishonest)
    # A planted exact copy is released itself, so its own digest is shared with it.
    plain = (real - released) | {tiles_root(digests_of(world.train)), tiles_root(digests_of(world.holdout))}
    assert len(plain) > 200
    for name in (REPORT, PAGE):
        text = (out / name).read_text()
        assert not [digest for digest in plain if digest in text or digest[7:] in text]
    # The site itself finds its tile again.
    kept = json.loads((out / NEIGHBOURS).read_text())
    assert {f["nearest"] for f in kept["flagged"]} == {f.nearest for f in report.flagged}
    assert all((world.train / f["training_tile"]).is_file() for f in kept["flagged"])
    assert (out / KEY_FILE).stat().st_mode & 0o077 == 0


def test_the_shared_report_holds_no_count_and_no_time_that_grows_with_the_cohort(
    audited: tuple[Path, AuditReport], world: World
) -> None:
    out, _ = audited
    tiles, patients = (len(list(world.train.rglob("*.png"))), len(list(world.train.iterdir())))
    body = json.loads((out / REPORT).read_text())
    assert body["subjects"]["train"]["tiles"] == band(tiles)
    assert "seconds" not in body
    said = json.dumps([{k: t[k] for k in ("value", "why", "null", "details")} for t in body["tests"]])
    assert f" {tiles} " not in said
    sizes = next(t for t in body["tests"] if t["name"] == SIZES)
    assert sizes["value"] == 10.0 < patients and sizes["details"]["train_patients"] == band(patients, 8)


def test_another_key_gives_other_names_for_the_same_tiles(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / name / "site").mkdir(parents=True)
    first, second = Blinding.make(tmp_path / "a"), Blinding.make(tmp_path / "b")
    again = Blinding.make(tmp_path / "c", tmp_path / "a")
    digest = "sha256:" + "7" * 64
    assert first.name(digest) != second.name(digest) != digest
    assert first.name(digest) == again.name(digest) and first.root([digest]) == again.root([digest])
    assert "…" in repr(first) and "b'" not in repr(first)


def test_a_filtered_audit_without_the_first_ones_key_is_refused(tmp_path: Path) -> None:
    for name in ("first", "second"):
        (tmp_path / name / "site").mkdir(parents=True)
    with pytest.raises(BadInputError) as missing:
        Blinding.make(tmp_path / "second", tmp_path / "first")
    assert missing.value.code == "no-blinding-key"
    (tmp_path / "first" / KEY_FILE).write_bytes(b"short")
    with pytest.raises(BadInputError):
        Blinding.make(tmp_path / "second", tmp_path / "first")
