"""Draws what was found: each slide's overview, its tissue outline, its tiles, and those out of quality."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw
from scipy import ndimage

from site_client.slides.quality import MAX_INK, MIN_FOCUS
from site_client.slides.reader import SlideReader
from site_client.slides.storage import atomic_path, storage_errors
from site_client.slides.tiling import Tile, TilingPlan, map_tissue

CELL = 420
CAPTION = 34
_OUTLINE, _GRID, _BAD = (0, 150, 60), (30, 80, 220), (220, 30, 30)


@dataclass(frozen=True)
class SheetSlide:
    """A slide to draw: its file, the name to print (never its file name or patient), and its tiles."""

    path: Path
    name: str
    assumed_mpp: float | None
    tiles: Sequence[Tile]


def _picture(slide: SheetSlide, plan: TilingPlan | None) -> tuple[Image.Image, float]:
    with SlideReader(slide.path, assumed_mpp=slide.assumed_mpp) as reader:
        tissue = map_tissue(reader)
        facts = reader.facts
    view = tissue.overview
    mask: npt.NDArray[np.bool_] = tissue.mask
    rgb = view.rgb.copy()
    rgb[~mask] = (rgb[~mask] * 0.72).astype(np.uint8)
    width = max(1, max(mask.shape) // 300)
    rgb[mask ^ ndimage.binary_erosion(mask, iterations=width)] = _OUTLINE
    image = Image.fromarray(rgb)
    scale = CELL / max(image.size)
    image = image.resize(
        (max(1, round(image.width * scale)), max(1, round(image.height * scale))), Image.Resampling.LANCZOS
    )
    pen = ImageDraw.Draw(image)
    to_view = facts.mpp / view.mpp * scale
    for tile in slide.tiles:
        span = (plan.tile_size * tile.mpp / facts.mpp if plan else 0.0) * to_view
        left, top = (tile.x - view.left) * to_view, (tile.y - view.top) * to_view
        bad = tile.quality.ink > MAX_INK or tile.quality.focus < MIN_FOCUS
        pen.rectangle((left, top, left + span, top + span), outline=_BAD if bad else _GRID, width=1)
    return image, float(mask.mean())


def draw_sheet(slides: Sequence[SheetSlide], plan: TilingPlan | None, out: Path, columns: int = 4) -> None:
    """Write the sheet as PNG, whole or not at all. Green: tissue; blue: tiles; red: tiles with ink or blur.

    The picture shows patients' tissue: it is for the site alone and says so.
    """
    columns = min(columns, max(1, len(slides)))
    rows = -(-len(slides) // columns)
    sheet = Image.new("RGB", (columns * (CELL + 10) + 10, rows * (CELL + CAPTION) + 40), "white")
    pen = ImageDraw.Draw(sheet)
    pen.text(
        (10, 10),
        "Tissue (green), tiles (blue), ink or blur (red). Patients' tissue: for this site only.",
        fill="black",
    )
    for number, slide in enumerate(slides):
        image, share = _picture(slide, plan)
        left, top = 10 + (number % columns) * (CELL + 10), 36 + (number // columns) * (CELL + CAPTION)
        sheet.paste(image, (left, top))
        pen.text(
            (left, top + CELL + 4),
            f"{slide.name}  tissue {share:.0%}  tiles {len(slide.tiles)}",
            fill="black",
        )
    with storage_errors("writing the contact sheet", out.parent), atomic_path(out) as partial:
        sheet.save(partial, "PNG")
