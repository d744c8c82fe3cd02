"""Cuts a slide into tiles: a grid at the requested size and scale, kept where tissue is, each judged."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pixcell_core.errors import BadInputError
from site_client.slides.quality import TileQuality, focus_measure, ink_fraction
from site_client.slides.reader import Overview, SlideFacts, SlideReader
from site_client.slides.tissue import MASK_MPP, tissue_mask

#: Tiles may be made from pixels at most this much coarser than asked; past that the detail is invented.
MAX_UPSAMPLING = 1.5


@dataclass(frozen=True)
class TilingPlan:
    """What tiles are wanted. `min_tissue` is the least share of mask in a tile."""

    tile_size: int = 256
    mpp: float = 0.5
    min_tissue: float = 0.5

    def __post_init__(self) -> None:
        if not 16 <= self.tile_size <= 4096 or self.tile_size % 8:
            raise BadInputError(
                f"A tile of {self.tile_size} pixels cannot be used.",
                hint="Give --tile-size as a multiple of 8 between 16 and 4096; 128, 256, 512 and "
                "1024 are usual.",
                code="bad-tile-size",
            )
        if not 0.1 <= self.mpp <= 10.0:
            raise BadInputError(
                f"{self.mpp:g} microns per pixel is outside what tiles can be cut at.",
                hint="Give --mpp between 0.1 and 10; 0.5 is 20x, 0.25 is 40x.",
                code="bad-mpp",
            )

    @property
    def key(self) -> str:
        """Name of this plan in the catalogue."""
        return f"{self.tile_size}px@{self.mpp:g}/t{self.min_tissue:g}"


@dataclass(frozen=True)
class Tile:
    """One tile: where it lies (level-0 pixels of the left upper corner) and how good it is."""

    tile: str
    x: int
    y: int
    level: int
    mpp: float
    quality: TileQuality


@dataclass(frozen=True)
class TissueMap:
    """A slide's overview and its tissue mask, (H, W) bool of the same size."""

    overview: Overview
    mask: npt.NDArray[np.bool_]

    def share(self, x: float, y: float, span: float, slide_mpp: float) -> float:
        """Share of tissue in the square of `span` level-0 pixels whose corner is (x, y)."""
        scale = slide_mpp / self.overview.mpp
        left, top = (x - self.overview.left) * scale, (y - self.overview.top) * scale
        rows = slice(int(top), max(int(top) + 1, round(top + span * scale)))
        columns = slice(int(left), max(int(left) + 1, round(left + span * scale)))
        part = self.mask[rows, columns]
        return float(part.mean()) if part.size else 0.0


def map_tissue(reader: SlideReader) -> TissueMap:
    """Make the tissue mask of a slide.

    Raises:
        BadInputError: code `no-tissue` when the slide shows only glass.
    """
    overview = reader.overview(MASK_MPP)
    mask = tissue_mask(overview.rgb, overview.mpp, overview.seen)
    if not mask.any():
        raise BadInputError(
            f"No tissue was found on {reader.path}.",
            hint="Look at the slide: blank glass and control slides do not belong in slides.csv. "
            "`pixcell site data show --sheet OUT.png` draws what was found on the other slides.",
            code="no-tissue",
        )
    return TissueMap(overview, mask)


def tile_name(slide_digest: str, x: int, y: int, plan: TilingPlan) -> str:
    """An identifier that names a tile without naming its file or patient."""
    text = f"{slide_digest}|{x}|{y}|{plan.tile_size}|{plan.mpp:.6g}"
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def grid(facts: SlideFacts, plan: TilingPlan, path: Path) -> Iterator[tuple[int, int]]:
    """Corners of the whole tiles inside the scanned rectangle, row by row, in level-0 pixels.

    The grid starts at the scanned rectangle's corner, not at the slide's origin (Leica slides keep an empty
    margin there), and is centred so that the rest lost at the borders is shared.

    Raises:
        BadInputError: `too-coarse` when the slide has no pixels fine enough, `slide-too-small` when no
            tile fits.
    """
    if facts.mpp > plan.mpp * MAX_UPSAMPLING:
        raise BadInputError(
            f"{path} has {facts.mpp:.3g} microns per pixel at its finest; tiles at "
            f"{plan.mpp:g} would invent detail.",
            hint="Cut this site's tiles at --mpp "
            f"{np.ceil(facts.mpp / MAX_UPSAMPLING * 20) / 20:g} or coarser"
            " (the same for every site of a study).",
            code="too-coarse",
        )
    span = plan.tile_size * plan.mpp / facts.mpp
    left, top, width, height = facts.bounds
    columns, rows = int((width + 0.5) // span), int((height + 0.5) // span)
    if not columns or not rows:
        raise BadInputError(
            f"{path} is smaller than one tile of {plan.tile_size} pixels at {plan.mpp:g} microns per pixel.",
            hint="Ask for smaller tiles, or take the slide out of slides.csv.",
            code="slide-too-small",
        )
    left += int(max(0.0, width - columns * span) / 2)
    top += int(max(0.0, height - rows * span) / 2)
    for row in range(rows):
        for column in range(columns):
            yield round(left + column * span), round(top + row * span)


def cut_tiles(reader: SlideReader, slide_digest: str, plan: TilingPlan, tissue: TissueMap) -> Iterator[Tile]:
    """Every tile with enough tissue, judged.

    Raises:
        BadInputError: as `grid`; `slide-truncated` when pixels of a tile cannot be decoded.
    """
    level = reader.level_for(plan.mpp)
    span = plan.tile_size * plan.mpp / reader.facts.mpp
    size = (plan.tile_size, plan.tile_size)
    for x, y in grid(reader.facts, plan, reader.path):
        share = tissue.share(x, y, span, reader.facts.mpp)
        if share < plan.min_tissue:
            continue
        rgb = reader.read(x, y, size, plan.mpp)
        quality = TileQuality(tissue=share, focus=focus_measure(rgb, plan.mpp), ink=ink_fraction(rgb))
        yield Tile(tile_name(slide_digest, x, y, plan), x, y, level, plan.mpp, quality)
