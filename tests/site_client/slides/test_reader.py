"""The reader: pixels equal a slow oracle at every scale, facts are right, and bad files are named exactly."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import openslide
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pixcell_core.errors import BadInputError
from site_client.slides.identity import content_digest, locate
from site_client.slides.pyramid import write_pyramid
from site_client.slides.reader import SlideReader

COMMITTED = Path(__file__).resolve().parents[2] / "hostile"
REAL = {
    "CMU-1-Small-Region.svs": ("aperio", 0.499, 2220, 2967),
    "HER2ST-B4.tiff": ("generic-tiff", 0.6889, 6848, 6400),
    "HER2ST-C6.scn": ("leica", 0.6982, 9289, 9907),
    "dicom_HER2ST-C4": ("dicom", 0.6901, 6880, 5392),
}


def level0(path: Path) -> np.ndarray:
    with openslide.OpenSlide(str(path)) as slide:
        return np.asarray(slide.read_region((0, 0), 0, slide.dimensions).convert("RGB"))


def test_written_slides_open_with_scale_pyramid_and_true_colours(hostile: Path, tmp_path: Path) -> None:
    with SlideReader(hostile / "good.tiff") as reader:
        facts = reader.facts
    assert (facts.width, facts.height, facts.levels) == (640, 640, 3)
    assert facts.mpp == pytest.approx(0.5) and not facts.mpp_assumed
    # A magenta slide (RGB stored as if it were YCbCr) would miss these by a hundred grey levels.
    for colour in ((250, 250, 250), (200, 60, 120), (90, 50, 140), (30, 160, 60)):
        write_pyramid(tmp_path / "flat.tiff", np.full((300, 520, 3), colour, dtype=np.uint8), 0.25)
        assert np.abs(level0(tmp_path / "flat.tiff").reshape(-1, 3).mean(0) - colour).max() < 3
        with SlideReader(tmp_path / "flat.tiff") as reader:
            assert reader.facts.mpp == pytest.approx(0.25)
            assert (reader.facts.width, reader.facts.height) == (520, 300)


def test_native_scale_is_a_plain_copy(hostile: Path) -> None:
    whole = level0(hostile / "good.tiff")
    with SlideReader(hostile / "good.tiff") as reader:
        part = reader.read(37, 101, (128, 96), 0.5)
    assert np.array_equal(part, whole[101:197, 37:165])


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(x=st.integers(0, 300), y=st.integers(0, 300), factor=st.sampled_from([1.5, 2.0, 2.5, 3.0]))
def test_downscaling_is_an_area_mean(hostile: Path, x: int, y: int, factor: float) -> None:
    """Against the slow, obvious mean over the source pixels, on a slide with one level only."""
    flat = hostile / "one_level.tiff"
    if not flat.exists():
        write_pyramid(flat, level0(hostile / "good.tiff")[:256, :256].copy(), 0.5)
    whole = level0(flat).astype(float)
    x, y = x % 80, y % 80
    size = 40
    with SlideReader(flat) as reader:
        fast = reader.read(x, y, (size, size), 0.5 * factor).astype(float)
    # Weighted box: every source pixel counts by the share of it that a target pixel covers.
    weights = np.zeros((size, 256))
    for row in range(size):
        low, high = row * factor, (row + 1) * factor
        for source in range(int(low), int(np.ceil(high))):
            weights[row, source] = min(high, source + 1) - max(low, source)
    weights /= factor
    window = whole[y : y + 256, x : x + 256]
    rows, columns = weights[:, : window.shape[0]], weights[:, : window.shape[1]]
    slow = np.stack([rows @ window[..., c] @ columns.T for c in range(3)], axis=-1)
    assert np.abs(fast - slow).max() <= 1.01


def test_best_level_is_the_coarsest_fine_enough(hostile: Path) -> None:
    with SlideReader(hostile / "good.tiff") as reader:
        assert [reader.level_for(m) for m in (0.3, 0.5, 0.9, 1.0, 1.9, 2.0, 8.0)] == [0, 0, 0, 1, 1, 2, 2]


def test_coarse_read_shows_the_same_place_as_a_fine_one(hostile: Path) -> None:
    """A mutant that forgets to scale coordinates to the level reads another place and fails here."""
    with SlideReader(hostile / "good.tiff") as reader:
        coarse = reader.read(160, 240, (48, 48), 2.0).astype(float)
        fine = reader.read(160, 240, (192, 192), 0.5).astype(float)
    mean = fine.reshape(48, 4, 48, 4, 3).mean((1, 3))
    assert np.abs(coarse - mean).mean() < 6


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("picture.tiff", "not-a-slide"),
        ("truncated.tiff", "slide-truncated"),
        ("tiles_past_end.tiff", "slide-truncated"),
        ("no_mpp.tiff", "mpp-missing"),
        ("absurd_mpp.tiff", "mpp-implausible"),
        ("empty_folder", "not-a-slide"),
        ("nowhere.svs", "slide-missing"),
    ],
)
def test_hostile_slides_are_named(hostile: Path, name: str, code: str) -> None:
    with pytest.raises(BadInputError) as caught:
        SlideReader(hostile / name)
    assert caught.value.code == code and caught.value.exit_code == 4
    assert name in caught.value.message and caught.value.hint


@pytest.mark.parametrize(
    ("name", "code"), [("not_a_slide.svs", "not-a-slide"), ("zero_byte.svs", "slide-empty")]
)
def test_committed_hostile_files_are_named(name: str, code: str) -> None:
    with pytest.raises(BadInputError) as caught:
        SlideReader(COMMITTED / name)
    assert caught.value.code == code


def test_a_broken_tile_is_an_error_not_grey_pixels(hostile: Path) -> None:
    with SlideReader(hostile / "broken_tile.tiff") as reader, pytest.raises(BadInputError) as caught:
        reader.read(0, 0, (128, 128), 0.5)
    assert caught.value.code == "slide-truncated"


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(share=st.floats(0.0, 0.9999))
def test_every_truncation_is_refused(hostile: Path, tmp_path: Path, share: float) -> None:
    body = (hostile / "good.tiff").read_bytes()
    short = tmp_path / "short.tiff"
    short.write_bytes(body[: int(len(body) * share)])
    with pytest.raises(BadInputError) as caught:
        SlideReader(short)
    assert caught.value.code in {"slide-truncated", "not-a-slide", "slide-empty"}


def test_an_assumed_scale_never_overrides_the_slides_own(hostile: Path) -> None:
    with SlideReader(hostile / "good.tiff", assumed_mpp=1.0) as reader:
        assert reader.facts.mpp == pytest.approx(0.5) and not reader.facts.mpp_assumed
    with SlideReader(hostile / "no_mpp.tiff", assumed_mpp=1.0) as reader:
        assert reader.facts.mpp == 1.0 and reader.facts.mpp_assumed


def test_the_hint_of_a_slide_without_scale_names_the_option(hostile: Path) -> None:
    with pytest.raises(BadInputError) as caught:
        SlideReader(hostile / "no_mpp.tiff")
    assert "--assume-mpp" in caught.value.hint


@pytest.mark.parametrize("name", REAL)
def test_real_slides_state_their_facts(shared_data: Path, name: str) -> None:
    vendor, mpp, width, height = REAL[name]
    with SlideReader(shared_data / "slides" / name) as reader:
        facts = reader.facts
    assert (facts.vendor, facts.width, facts.height) == (vendor, width, height)
    assert facts.mpp == pytest.approx(mpp, abs=1e-3)


def test_the_real_slide_without_scale_needs_the_admins_word(shared_data: Path) -> None:
    slide = shared_data / "slides" / "TCGA-CR-7395-01A-01-TS1.svs"
    with pytest.raises(BadInputError, match="microns per pixel"):
        SlideReader(slide)
    with SlideReader(slide, assumed_mpp=1.0) as reader:
        assert reader.facts.mpp_assumed


def test_leica_margins_are_outside_the_bounds(shared_data: Path) -> None:
    with SlideReader(shared_data / "slides" / "HER2ST-C6.scn") as reader:
        assert reader.facts.bounds == (0, 2015, 6480, 5392)
        view = reader.overview(8.0)
        assert view.seen.mean() > 0.99
        assert reader.read(7000, 100, (64, 64), 1.0).min() == 255


def test_dicom_folders_are_slides_and_mixed_or_cut_ones_are_not(shared_data: Path, tmp_path: Path) -> None:
    original = shared_data / "slides" / "dicom_HER2ST-C4"
    copy = tmp_path / "slide"
    copy.mkdir()
    for number, member in enumerate(sorted(original.iterdir())):
        shutil.copyfile(member, copy / f"renamed-{9 - number}")
    assert content_digest(locate(copy)) == content_digest(locate(original))
    with SlideReader(copy) as reader:
        assert reader.facts.vendor == "dicom"
    victim = copy / "renamed-9"
    body = victim.read_bytes()
    for share in (0.1, 0.5, 0.999):
        victim.write_bytes(body[: int(len(body) * share)])
        with pytest.raises(BadInputError) as caught:
            SlideReader(copy)
        assert caught.value.code == "slide-truncated"
