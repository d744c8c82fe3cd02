"""The tiles of the benchmark: real ones from a folder, grouped by patient or slide, and procedural ones from seeds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

SIDE = 224
FIELD = 4  # tiles along one side of a procedural field
_PART_SEED = 2026
_GLASS = 0.5  # a tile with more than this share of near-white pixels is left out


@dataclass(frozen=True)
class TileSet:
    """(n, SIDE, SIDE, 3) uint8 tiles and the group (patient, slide) of each."""

    tiles: npt.NDArray[np.uint8]
    groups: tuple[str, ...]

    def split(self, train: float, rng: np.random.Generator) -> tuple[TileSet, TileSet]:
        """Training and holdout without a group in common; about `train` of the tiles go to training."""
        order = rng.permutation(sorted(set(self.groups)))
        groups = np.array(self.groups)
        chosen: set[str] = set()
        taken = 0
        for name in order:
            size = int((groups == name).sum())
            # A group that would overshoot goes to the holdout: some slides hold a quarter of all tiles.
            if taken + size <= train * len(groups) * 1.1:
                chosen.add(str(name))
                taken += size
        inside = np.isin(groups, sorted(chosen))
        return self.take(np.flatnonzero(inside)), self.take(np.flatnonzero(~inside))

    def take(self, rows: npt.NDArray[np.int64]) -> TileSet:
        """Some of the tiles."""
        return TileSet(self.tiles[rows], tuple(self.groups[int(row)] for row in rows))


def part_of(train: TileSet, holdout: TileSet, part: str) -> tuple[TileSet, TileSet]:
    """The part of the groups on which the numbers of fine detail were chosen ("tuned"), or the others ("untouched").

    Training groups are dealt out source by source in a fixed order; of the few holdout groups the largest was for tuning.
    """
    rng = np.random.default_rng(_PART_SEED)
    size = {str(name): train.groups.count(str(name)) for name in np.unique(train.groups)}
    tuned: set[str] = set()
    all_tuned = all_other = 0
    for source in sorted({name.split("/")[0] for name in size}):
        here = there = 0
        for name in rng.permutation([name for name in size if name.split("/")[0] == source]):
            if (here, all_tuned) <= (there, all_other):
                tuned.add(str(name))
                here, all_tuned = here + size[str(name)], all_tuned + size[str(name)]
            else:
                there, all_other = there + size[str(name)], all_other + size[str(name)]
    largest = max(sorted(set(holdout.groups)), key=holdout.groups.count)
    inside = np.array([name in tuned for name in train.groups])
    outside = np.array([name == largest for name in holdout.groups])
    if part == "untouched":
        inside, outside = ~inside, ~outside
    return train.take(np.flatnonzero(inside)), holdout.take(np.flatnonzero(outside))


def real_tiles(folder: Path, limit: int | None = None) -> TileSet:
    """Tiles of 224 pixels from `tiles/` and `slides/` of a folder of openly licensed data.

    Larger tiles are cut into as many as fit, slides at level 0 without overlap. Tiles of one slide, or of one
    patient where the name tells, form one group.
    """
    tiles: list[npt.NDArray[np.uint8]] = []
    groups: list[str] = []
    for path in sorted((folder / "tiles").rglob("*")):
        if path.suffix.lower() in {".png", ".jpg", ".tif"}:
            with Image.open(path) as image:
                pixels = np.asarray(image.convert("RGB"))
            cut = _cut(pixels)
            tiles += cut
            groups += [_group(path)] * len(cut)
    for path in sorted((folder / "slides").iterdir()):
        if path.suffix in {".svs", ".tiff", ".scn"} or path.is_dir():
            cut = _cut_slide(path)
            tiles += cut
            # Two sections of one patient carry the patient's letter.
            groups += ["HER2ST-C" if "HER2ST-C" in path.name else path.stem] * len(cut)
    rows = np.arange(len(tiles))
    if limit is not None and limit < len(rows):
        rows = np.sort(np.random.default_rng(0).choice(rows, limit, replace=False))
    return TileSet(np.stack([tiles[row] for row in rows]), tuple(groups[row] for row in rows))


def procedural_tiles(count: int, seed: int, patients_per_field: int = 1) -> TileSet:
    """Drawn tiles: every field of 4 × 4 tiles is a patient of its own, sites change every eight patients."""
    from pixcell_core.procedural import TissueClass, patient_look, render_field, site_look

    kinds = list(TissueClass)
    tiles: list[npt.NDArray[np.uint8]] = []
    groups: list[str] = []
    number = 0
    while len(tiles) < count:
        site = seed * 1000 + number // 8
        field = render_field(
            FIELD * SIDE,
            FIELD * SIDE,
            site=site_look(site),
            patient=patient_look(site, number),
            tissue=kinds[number % len(kinds)],
            seed=seed * 100_000 + number,
            coverage=1.0,
        )
        cut = _cut(field.rgb)
        tiles += cut
        groups += [f"patient-{number:04d}"] * len(cut)
        number += 1
    return TileSet(np.stack(tiles[:count]), tuple(groups[:count]))


def _group(path: Path) -> str:
    """The patient or slide behind a tile's name; tiles without any count as patients of one unknown group each."""
    source, stem = path.parts[-3], path.stem
    if source == "osteosarcoma_10x":
        return f"{source}/{'-'.join(stem.split('-')[:2])}"
    if source == "camelyon16_40x":
        return f"{source}/{'_'.join(stem.split('_')[:2])}"
    if source == "orion_crc":
        return f"{source}/{stem.split('_')[0]}"
    if source == "oral_oscc_400x":
        return source  # no patient is known: all of it lies on one side
    return f"{source}/{stem.rsplit('_', 1)[0]}"


def _cut(pixels: npt.NDArray[np.uint8]) -> list[npt.NDArray[np.uint8]]:
    rows, columns = pixels.shape[0] // SIDE, pixels.shape[1] // SIDE
    out = []
    for row in range(rows):
        for column in range(columns):
            tile = pixels[row * SIDE : (row + 1) * SIDE, column * SIDE : (column + 1) * SIDE]
            # Beside the scanned field a slide file may hold pure black.
            if (tile.min(axis=2) > 215).mean() < _GLASS and (tile.max(axis=2) < 8).mean() < 0.01:
                out.append(np.ascontiguousarray(tile))
    return out


def _cut_slide(path: Path) -> list[npt.NDArray[np.uint8]]:
    import openslide

    if path.is_dir():
        path = sorted(path.glob("*.dcm"))[0]
    with openslide.OpenSlide(path) as slide:
        width, height = slide.dimensions
        out: list[npt.NDArray[np.uint8]] = []
        for top in range(0, height - SIDE + 1, SIDE):
            strip = np.asarray(slide.read_region((0, top), 0, (width, SIDE)).convert("RGB"))
            out += _cut(strip)
    return out
