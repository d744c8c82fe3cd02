"""The catalogue: one slide is one person's, tiles come whole, nothing of the vendor's header is kept."""

from __future__ import annotations

import shutil
import sqlite3
from pathlib import Path

import openslide
import pytest

from pixcell_core.errors import BadInputError, RefusedError
from site_client.catalogue import Catalogue
from site_client.catalogue.intake import add_slides, check_slide, tile_slides
from site_client.catalogue.slide_list import SlideEntry, read_slide_list
from site_client.catalogue.split import SplitSeed
from site_client.slides.tiling import TilingPlan
from tests.hostile.make_slides import broken_tile, glass, good_slide

PLAN = TilingPlan(128, 0.5)


@pytest.fixture(scope="session")
def three_slides(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("three")
    for seed in (1, 2, 3):
        good_slide(folder / f"s{seed}.tiff", seed=seed, size=512)
    return folder


def entries(folder: Path, *names: str) -> list[SlideEntry]:
    return [SlideEntry(folder / name, f"P{i}", "tumor", i + 2) for i, name in enumerate(names)]


def test_adding_twice_changes_nothing(three_slides: Path, tmp_path: Path) -> None:
    wanted = entries(three_slides, "s1.tiff", "s2.tiff", "s3.tiff")
    with Catalogue(tmp_path, create=True) as catalogue:
        first = add_slides(catalogue, wanted, None)
        again = add_slides(catalogue, wanted, None)
        assert (first.added, first.known, again.added, again.known) == (3, 0, 0, 3)
        assert [s.patient for s in catalogue.slides()] == ["P0", "P1", "P2"]
        assert all(s.tissue_mm2 > 0.01 and len(s.sha256) == 64 for s in catalogue.slides())
    assert sqlite3.connect(tmp_path / "catalogue.db").execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_the_same_bytes_under_two_patients_are_refused(three_slides: Path, tmp_path: Path) -> None:
    shutil.copy(three_slides / "s1.tiff", tmp_path / "copy.tiff")
    wanted = [
        SlideEntry(three_slides / "s1.tiff", "SECRET-A", None, 2),
        SlideEntry(tmp_path / "copy.tiff", "SECRET-B", None, 3),
    ]
    with Catalogue(tmp_path / "site", create=True) as catalogue:
        with pytest.raises(BadInputError) as caught:
            add_slides(catalogue, wanted, None)
        assert caught.value.code == "slide-two-patients" and "SECRET" not in str(caught.value)
        assert len(catalogue.slides()) == 1


def test_one_bad_slide_is_named_and_the_good_ones_stay(three_slides: Path, tmp_path: Path) -> None:
    bad = tmp_path / "zero.svs"
    bad.touch()
    glass(tmp_path / "blank.tiff", tinted=False, size=512)
    with Catalogue(tmp_path / "site", create=True) as catalogue:
        with pytest.raises(BadInputError) as caught:
            add_slides(catalogue, [*entries(three_slides, "s1.tiff"), SlideEntry(bad, "P9", None, 3)], None)
        assert caught.value.code == "slide-empty" and "1 of 2" in caught.value.message
        assert len(catalogue.slides()) == 1
        two = [SlideEntry(bad, "P9", None, 3), SlideEntry(tmp_path / "blank.tiff", "P8", None, 4)]
        with pytest.raises(BadInputError) as caught:
            add_slides(catalogue, two, None)
        assert caught.value.code == "slides-refused"
        assert "[slide-empty]" in caught.value.message and "[no-tissue]" in caught.value.message


def test_a_slide_is_cut_whole_or_not_at_all(three_slides: Path, tmp_path: Path) -> None:
    folder = tmp_path / "slides"
    folder.mkdir()
    shutil.copy(three_slides / "s1.tiff", folder / "s1.tiff")
    broken_tile(three_slides / "s2.tiff", folder / "s2.tiff")
    with Catalogue(tmp_path / "site", create=True) as catalogue:
        add_slides(catalogue, entries(folder, "s1.tiff", "s2.tiff"), None)
        with pytest.raises(BadInputError) as caught:
            tile_slides(catalogue, PLAN)
        assert caught.value.code == "slide-truncated"
        good, bad = catalogue.slides()
        assert len(catalogue.tiles(PLAN.key, good.id)) > 5
        assert catalogue.tiles(PLAN.key, bad.id) == [] and catalogue.untiled(PLAN.key) == [bad]


def test_cutting_resumes_and_plans_do_not_mix(three_slides: Path, tmp_path: Path) -> None:
    with Catalogue(tmp_path, create=True) as catalogue:
        with pytest.raises(RefusedError):
            tile_slides(catalogue, PLAN)
        add_slides(catalogue, entries(three_slides, "s1.tiff"), None)
        made = tile_slides(catalogue, PLAN).made
        assert made > 5 and tile_slides(catalogue, PLAN).made == 0
        add_slides(catalogue, entries(three_slides, "s1.tiff", "s2.tiff"), None)
        more = tile_slides(catalogue, PLAN).made
        assert tile_slides(catalogue, TilingPlan(256, 0.5)).made > 0
        assert catalogue.tile_counts()[PLAN.key] == made + more


def test_check_sees_what_changed(three_slides: Path, tmp_path: Path) -> None:
    slide = tmp_path / "s.tiff"
    shutil.copy(three_slides / "s1.tiff", slide)
    with Catalogue(tmp_path / "site", create=True) as catalogue:
        add_slides(catalogue, [SlideEntry(slide, "P", None, 2)], None)
        (record,) = catalogue.slides()
        assert check_slide(record, deep=True) is None
        broken_tile(three_slides / "s1.tiff", slide)
        assert check_slide(record, deep=False) is None
        changed = check_slide(record, deep=True)
        assert changed is not None and changed.code == "slide-changed"
        slide.write_bytes(slide.read_bytes()[:9000])
        assert (found := check_slide(record, deep=False)) is not None and found.code == "slide-truncated"
        slide.unlink()
        assert (found := check_slide(record, deep=False)) is not None and found.code == "slide-missing"


def test_a_broken_or_newer_catalogue_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="no catalogue"):
        Catalogue(tmp_path)
    (tmp_path / "catalogue.db").write_bytes(b"this is no database" * 100)
    with pytest.raises(BadInputError) as caught:
        Catalogue(tmp_path)
    assert caught.value.code == "catalogue-broken"
    (tmp_path / "catalogue.db").unlink()
    Catalogue(tmp_path, create=True).close()
    with sqlite3.connect(tmp_path / "catalogue.db") as raw:
        raw.execute("PRAGMA user_version=99")
    with pytest.raises(BadInputError) as caught:
        Catalogue(tmp_path)
    assert caught.value.code == "catalogue-newer"


def test_all_real_slides_enter_and_two_of_them_are_one_patient(shared_data: Path, tmp_path: Path) -> None:
    (tmp_path / "slides.csv").write_text(
        "file,patient,label\nCMU-1-Small-Region.svs,skin,\nTCGA-CR-7395-01A-01-TS1.svs,neck,\n"
        "HER2ST-B4.tiff,B,\nHER2ST-C6.scn,C,\ndicom_HER2ST-C4,C,\n"
    )
    listed = read_slide_list(tmp_path / "slides.csv", shared_data / "slides")
    with Catalogue(tmp_path / "site", create=True) as catalogue:
        with pytest.raises(BadInputError) as caught:
            add_slides(catalogue, listed, None)
        assert caught.value.code == "mpp-missing"
        add_slides(catalogue, listed, 1.0)
        assert len(catalogue.slides()) == 5 and len(catalogue.patients()) == 4
        assert [s.mpp_assumed for s in catalogue.slides()].count(True) == 1
        assert tile_slides(catalogue, TilingPlan(128, 3.0)).without_tiles == 0
        assert all(catalogue.tiles(TilingPlan(128, 3.0).key, s.id) for s in catalogue.slides())
        catalogue.draw_split(0.5, SplitSeed.given(3))
        parts = {s.patient: s.part for s in catalogue.slides()}
        assert sorted(parts.values()) == ["holdout", "holdout", "train", "train"]
    # Nothing of the vendor's header (scanner, user, date, barcode comment) reached the catalogue.
    kept = (tmp_path / "site" / "catalogue.db").read_bytes()
    with openslide.OpenSlide(str(shared_data / "slides" / "CMU-1-Small-Region.svs")) as slide:
        private = {v for k, v in slide.properties.items() if k.startswith("aperio.") and len(v) > 5}
    assert private and not [v for v in private if v.encode() in kept]
