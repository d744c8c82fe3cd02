"""Tiles: the grid stays inside and never overlaps, quality measures order tiles as a person would."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageFilter

from pixcell_core.errors import BadInputError
from pixcell_core.procedural import TissueClass, patient_look, render_field, site_look
from site_client.slides.quality import focus_measure, ink_fraction
from site_client.slides.reader import SlideFacts, SlideReader
from site_client.slides.tiling import TilingPlan, cut_tiles, grid, map_tissue, tile_name


def facts(mpp: float, bounds: tuple[int, int, int, int]) -> SlideFacts:
    x, y, width, height = bounds
    return SlideFacts("test", mpp, False, x + width + 100, y + height + 100, 1, bounds)


@given(
    mpp=st.floats(0.2, 0.7),
    x=st.integers(0, 3000),
    y=st.integers(0, 3000),
    width=st.integers(400, 9000),
    height=st.integers(400, 9000),
)
def test_the_grid_fills_the_scanned_rectangle_without_overlap(
    mpp: float, x: int, y: int, width: int, height: int
) -> None:
    plan = TilingPlan(128, 0.5)
    span = 128 * 0.5 / mpp
    corners = list(grid(facts(mpp, (x, y, width, height)), plan, Path("s")))
    columns, rows = sorted({c for c, _ in corners}), sorted({r for _, r in corners})
    assert len(corners) == len(columns) * len(rows)
    for values, start, length in ((columns, x, width), (rows, y, height)):
        assert values[0] >= start and values[-1] + span <= start + length + 1
        assert all(b - a >= span - 1 for a, b in pairwise(values))
        assert length - len(values) * span < span  # another tile would not have fitted


def test_tiles_that_would_invent_detail_are_refused() -> None:
    with pytest.raises(BadInputError) as caught:
        list(grid(facts(1.0, (0, 0, 4000, 4000)), TilingPlan(128, 0.5), Path("s")))
    assert caught.value.code == "too-coarse" and "--mpp 0.7" in caught.value.hint
    assert list(grid(facts(0.7, (0, 0, 4000, 4000)), TilingPlan(128, 0.5), Path("s")))


def test_a_slide_smaller_than_a_tile_is_refused() -> None:
    with pytest.raises(BadInputError) as caught:
        list(grid(facts(0.5, (0, 0, 100, 4000)), TilingPlan(128, 0.5), Path("s")))
    assert caught.value.code == "slide-too-small"


@pytest.mark.parametrize(("size", "mpp"), [(8, 0.5), (130, 0.5), (8192, 0.5), (128, 0.01), (128, 50.0)])
def test_impossible_plans_are_refused(size: int, mpp: float) -> None:
    with pytest.raises(BadInputError):
        TilingPlan(size, mpp)


def test_tiles_carry_what_the_reader_reads(hostile: Path) -> None:
    plan = TilingPlan(128, 0.5)
    with SlideReader(hostile / "good.tiff") as reader:
        found = map_tissue(reader)
        tiles = list(cut_tiles(reader, "digest", plan, found))
        assert len(tiles) > 10 and len({t.tile for t in tiles}) == len(tiles)
        first = tiles[0]
        rgb = reader.read(first.x, first.y, (128, 128), 0.5)
    assert first.quality.focus == pytest.approx(focus_measure(rgb, 0.5))
    assert all(t.quality.tissue >= plan.min_tissue and t.level == 0 for t in tiles)
    assert tile_name("digest", first.x, first.y, plan) == first.tile
    assert tile_name("other", first.x, first.y, plan) != first.tile


def tissue(seed: int, mpp: float = 0.5, size: int = 256) -> np.ndarray:
    field = render_field(
        size,
        size,
        mpp=mpp,
        site=site_look(seed),
        patient=patient_look(seed, 1),
        tissue=list(TissueClass)[seed % len(TissueClass)],
        seed=seed,
        coverage=1.0,
    )
    return field.rgb


@pytest.mark.parametrize("seed", range(4))
def test_blur_lowers_focus(seed: int) -> None:
    rgb = tissue(seed)
    measures = [focus_measure(rgb, 0.5)]
    for radius in (2, 4, 8):
        blurred = np.asarray(Image.fromarray(rgb).filter(ImageFilter.GaussianBlur(radius)))
        measures.append(focus_measure(blurred, 0.5))
    assert measures == sorted(measures, reverse=True)
    assert measures[-1] < 10.0 < measures[0]


def test_focus_is_measured_at_one_scale() -> None:
    """The same tissue scanned twice as fine measures the same; a mutant that ignores mpp is off by far."""
    fine = tissue(1)
    coarse = fine.reshape(128, 2, 128, 2, 3).mean((1, 3)).round().astype(np.uint8)
    assert focus_measure(fine, 0.25) == pytest.approx(focus_measure(coarse, 0.5), rel=0.05)
    assert focus_measure(fine, 1.0) != pytest.approx(focus_measure(coarse, 1.0), rel=0.5)


@pytest.mark.parametrize("seed", range(12))
def test_stained_tissue_is_not_ink(seed: int) -> None:
    assert ink_fraction(tissue(seed)) < 0.02


@pytest.mark.parametrize("ink", [(20, 120, 60), (30, 60, 190), (15, 15, 18), (215, 20, 25), (0, 140, 130)])
def test_pen_marks_are_ink(ink: tuple[int, int, int]) -> None:
    rgb = tissue(3).copy()
    rgb[:, :64] = ink
    assert ink_fraction(rgb) == pytest.approx(0.25, abs=0.02)


def test_real_tissue_is_sharp_and_without_ink(shared_data: Path) -> None:
    for name, assumed in (("TCGA-CR-7395-01A-01-TS1.svs", 1.0), ("HER2ST-C6.scn", None)):
        with SlideReader(shared_data / "slides" / name, assumed_mpp=assumed) as reader:
            tiles = list(cut_tiles(reader, "d", TilingPlan(256, 2.8), map_tissue(reader)))
        assert len(tiles) > 10
        assert np.mean([t.quality.ink for t in tiles]) < 0.02
        assert np.mean([t.quality.focus > 10.0 for t in tiles]) > 0.98
        if name.endswith(".scn"):
            assert min(t.y for t in tiles) >= 2015
