"""The tiles the starter learns from: openly licensed real tiles and slides, and tissue drawn from seeds.

Everything is held out by slide or patient, never by tile. Sources that carry no patient identifiers are used for
training only and never enter a held-out figure.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

Pixels = npt.NDArray[np.uint8]

# Whole groups kept away from every training of the starter.
HELD_OUT = frozenset(
    {
        "camelyon16_40x/tumor_073",
        "camelyon16_40x/tumor_064",
        "osteosarcoma_10x/P9",
        "osteosarcoma_10x/Case-4",
        "orion_crc/C05",
        "slides/TCGA-CR-7395",
        "slides/HER2ST-B",
    }
)


@dataclass(frozen=True)
class RealTile:
    """One openly licensed tile: `pixels` (H, W, 3), its source, its slide or patient, its label and scale."""

    source: str
    group: str
    label: str
    mpp: float
    pixels: Pixels

    @property
    def held_out(self) -> bool:
        """Whether the tile's slide or patient is kept for measuring."""
        return self.group in HELD_OUT


def _group(source: str, name: str) -> str:
    patterns = {
        "camelyon16_40x": r"^((?:tumor|normal)_\d+)",
        "osteosarcoma_10x": r"^(?:Case-48-)?(Case-\d+|P\d+)",
        "orion_crc": r"^(C\d+)",
        "crc_val_he_7k": r"^[A-Z]+-(TCGA-[A-Z]+)",
    }
    found = re.match(patterns[source], name) if source in patterns else None
    return f"{source}/{found.group(1) if found else 'unknown'}"


SOURCE_MPP = {
    "camelyon16_40x": 0.25,
    "osteosarcoma_10x": 1.0,
    "orion_crc": 0.65,
    "crc_val_he_7k": 0.5,
    "oral_oscc_400x": 0.5,
}


def read_tiles(folder: Path) -> Iterator[RealTile]:
    """Read the tile sets under `folder/tiles/<source>/<label>/`."""
    for source, mpp in SOURCE_MPP.items():
        for path in sorted((folder / "tiles" / source).glob("*/*")):
            if path.suffix.lower() not in {".png", ".jpg", ".jpeg", ".tif", ".tiff"}:
                continue
            pixels = np.asarray(Image.open(path).convert("RGB"))
            yield RealTile(source, _group(source, path.name), path.parent.name, mpp, pixels)


SLIDES = {
    "CMU-1-Small-Region.svs": ("CMU-1", 0.499),
    "TCGA-CR-7395-01A-01-TS1.svs": ("TCGA-CR-7395", 1.0),
    "HER2ST-B4.tiff": ("HER2ST-B", 0.689),
    "HER2ST-C6.scn": ("HER2ST-C", 0.698),
    "dicom_HER2ST-C4": ("HER2ST-C", 0.690),
}


def optical_density_spread(pixels: Pixels) -> float:
    """Standard deviation of the optical density over a tile; glass and tinted background read near zero."""
    density = -np.log10((pixels.astype(np.float32).mean(axis=2) + 1.0) / 256.0)
    return float(density.std())


def read_slides(folder: Path, size: int = 256, limit_per_slide: int = 400) -> Iterator[RealTile]:
    """Cut tissue tiles of `size` px at level 0 from the slides under `folder/slides`."""
    import openslide

    for name, (group, mpp) in SLIDES.items():
        path = folder / "slides" / name
        if path.is_dir():
            path = sorted(path.glob("*.dcm"))[0]
        if not path.exists():
            continue
        slide = openslide.OpenSlide(str(path))
        left = int(slide.properties.get("openslide.bounds-x", 0))
        top = int(slide.properties.get("openslide.bounds-y", 0))
        width = int(slide.properties.get("openslide.bounds-width", slide.dimensions[0]))
        height = int(slide.properties.get("openslide.bounds-height", slide.dimensions[1]))
        places = [
            (left + x, top + y) for y in range(0, height - size, size) for x in range(0, width - size, size)
        ]
        order = np.random.default_rng(7).permutation(len(places))
        kept = 0
        for at in order:
            region = np.asarray(slide.read_region(places[at], 0, (size, size)).convert("RGB"))
            if optical_density_spread(region) < 0.05 or region.mean() > 235:
                continue
            yield RealTile("slides", f"slides/{group}", "tissue", mpp, region)
            kept += 1
            if kept >= limit_per_slide:
                break


def read_real(folder: Path) -> list[RealTile]:
    """Every real tile under the data folder, or an empty list when it is absent."""
    if not (folder / "MANIFEST.json").is_file():
        return []
    return [*read_tiles(folder), *read_slides(folder)]


def draw_procedural(count: int, size: int, seed: int) -> list[RealTile]:
    """Draw `count` procedural fields of `size` px at 0.5 um/px, of many sites and patients."""
    from pixcell_core.procedural import TissueClass, patient_look, render_field, site_look

    classes = list(TissueClass)
    tiles = []
    for i in range(count):
        site_seed = seed + i % 24
        tissue = classes[i % len(classes)]
        field = render_field(
            size,
            size,
            mpp=0.5,
            site=site_look(site_seed),
            patient=patient_look(site_seed, seed + 1000 + i),
            tissue=tissue,
            seed=seed + i,
        )
        tiles.append(RealTile("procedural", f"procedural/{site_seed}/{i}", str(tissue), 0.5, field.rgb))
    return tiles


def dihedral(pixels: Pixels, which: int) -> Pixels:
    """One of the eight symmetries of the square."""
    turned = np.rot90(pixels, which % 4)
    return np.ascontiguousarray(turned[:, ::-1] if which >= 4 else turned)


def random_crop(
    rng: np.random.Generator, pixels: Pixels, size: int, *, smallest_scale: float = 1.0
) -> Pixels:
    """A random crop of `size` px, seen at a random scale (area resampling) and orientation."""
    import cv2

    scale = float(rng.uniform(smallest_scale, 1.0)) if smallest_scale < 1.0 else 1.0
    side = min(round(size / scale), *pixels.shape[:2])
    y = int(rng.integers(0, pixels.shape[0] - side + 1))
    x = int(rng.integers(0, pixels.shape[1] - side + 1))
    crop = pixels[y : y + side, x : x + side]
    if side != size:
        crop = np.asarray(cv2.resize(crop, (size, size), interpolation=cv2.INTER_AREA), dtype=np.uint8)
    return dihedral(crop, int(rng.integers(8)))
