"""The tissue mask: right on procedural tissue whose truth is known, and on real slides with tinted glass and spots."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pixcell_core.errors import BadInputError
from pixcell_core.procedural import TissueClass, patient_look, render_field, site_look
from site_client.slides.reader import SlideReader
from site_client.slides.tiling import map_tissue
from site_client.slides.tissue import MASK_MPP, tissue_mask


def otsu_on_saturation(rgb: np.ndarray) -> np.ndarray:
    """The plain mask this one replaces; here to show on which slides it fails."""
    saturation = np.asarray(Image.fromarray(rgb).convert("HSV"))[..., 1]
    counts = np.bincount(saturation.ravel(), minlength=256).astype(float)
    levels = np.arange(256)
    below, above = np.cumsum(counts), counts.sum() - np.cumsum(counts)
    mean_below = np.cumsum(counts * levels) / np.maximum(below, 1)
    mean_above = ((counts * levels).sum() - np.cumsum(counts * levels)) / np.maximum(above, 1)
    return saturation > np.argmax(below * above * (mean_below - mean_above) ** 2)


@pytest.mark.parametrize("tissue", list(TissueClass))
def test_procedural_tissue_is_found(tissue: TissueClass) -> None:
    field = render_field(
        1024,
        1024,
        mpp=0.5,
        site=site_look(5),
        patient=patient_look(5, 1),
        tissue=tissue,
        seed=8,
        coverage=0.7,
    )
    small = np.asarray(Image.fromarray(field.rgb).resize((128, 128), Image.Resampling.BOX))
    mask = tissue_mask(small, 4.0)
    truth = np.asarray(Image.fromarray(((field.labels > 0) * 255).astype(np.uint8)).resize((128, 128))) > 127
    overlap = (mask & truth).sum() / (mask | truth).sum()
    assert overlap > 0.85


@pytest.mark.parametrize("name", ["blank_glass.tiff", "tinted_spots.tiff"])
def test_glass_is_not_tissue(hostile: Path, name: str) -> None:
    with SlideReader(hostile / name) as reader, pytest.raises(BadInputError) as caught:
        map_tissue(reader)
    assert caught.value.code == "no-tissue"


def test_plain_saturation_would_take_tinted_glass_for_tissue(hostile: Path) -> None:
    with SlideReader(hostile / "tinted_spots.tiff") as reader:
        assert otsu_on_saturation(reader.overview(MASK_MPP).rgb).mean() > 0.1


def test_unseen_parts_are_never_tissue() -> None:
    field = render_field(
        512,
        512,
        mpp=0.5,
        site=site_look(2),
        patient=patient_look(2, 1),
        tissue=TissueClass.tumor,
        seed=3,
        coverage=1.0,
    )
    small = np.asarray(Image.fromarray(field.rgb).resize((64, 64), Image.Resampling.BOX))
    seen = np.zeros((64, 64), dtype=bool)
    seen[:, :32] = True
    mask = tissue_mask(small, 4.0, seen)
    assert mask[:, :32].mean() > 0.9 and not mask[:, 32:].any()


@pytest.mark.parametrize(
    ("name", "assumed", "low", "high"),
    [
        ("CMU-1-Small-Region.svs", None, 0.35, 0.48),
        ("TCGA-CR-7395-01A-01-TS1.svs", 1.0, 0.58, 0.70),
        ("HER2ST-B4.tiff", None, 0.44, 0.58),
        ("HER2ST-C6.scn", None, 0.38, 0.50),
        ("dicom_HER2ST-C4", None, 0.37, 0.48),
    ],
)
def test_real_slides_have_the_tissue_one_sees(
    shared_data: Path, name: str, assumed: float | None, low: float, high: float
) -> None:
    """Bounds around the area outlined by eye on each slide."""
    with SlideReader(shared_data / "slides" / name, assumed_mpp=assumed) as reader:
        found = map_tissue(reader)
    assert low < found.mask.mean() < high


#: Corners that the eye sees as glass, as shares of height and width: (top, bottom, left, right).
GLASS = {
    "B4": ((0.0, 0.16, 0.75, 1.0), (0.88, 1.0, 0.5, 1.0)),
    "C6": ((0.0, 0.25, 0.0, 0.33), (0.84, 1.0, 0.0, 0.25), (0.88, 1.0, 0.9, 1.0)),
}


@pytest.mark.parametrize(("name", "section"), [("HER2ST-B4.tiff", "B4"), ("HER2ST-C6.scn", "C6")])
def test_measured_spots_lie_on_tissue_and_corners_do_not(shared_data: Path, name: str, section: str) -> None:
    """The published spots were kept because there was tissue under them: an oracle nobody tuned the mask on."""
    with SlideReader(shared_data / "slides" / name) as reader:
        found = map_tissue(reader)
        scale = reader.facts.mpp / found.overview.mpp
    with (shared_data / "slides" / "her2st_spots.csv").open() as handle:
        spots = [row for row in csv.DictReader(handle) if row["section"] == section]
    radius = 50.0 / found.overview.mpp
    hits = 0
    for spot in spots:
        row = (float(spot["level0_y"]) - found.overview.top) * scale
        column = (float(spot["level0_x"]) - found.overview.left) * scale
        part = found.mask[
            max(0, int(row - radius)) : int(row + radius), max(0, int(column - radius)) : int(column + radius)
        ]
        hits += part.size > 0 and part.mean() > 0.5
    assert hits / len(spots) > 0.95
    height, width = found.mask.shape
    for top, bottom, left, right in GLASS[section]:
        corner = found.mask[int(top * height) : int(bottom * height), int(left * width) : int(right * width)]
        assert not corner.any()
