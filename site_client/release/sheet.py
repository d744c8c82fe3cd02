"""The sample sheet and the README of a bundle: what a person looks at first."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, PngImagePlugin

from pixcell_core.contracts.canonical import Document
from pixcell_core.contracts.release import (
    DEFAULT_LICENCE,
    DEFAULT_USAGE,
    FilteredFrom,
    Generator,
    Line,
    PrivacyStatement,
    Prose,
)
from pixcell_core.trust.tile_png import MARK_KEYWORD, MARK_TEXT

SHEET_COLUMNS, SHEET_ROWS = 8, 5
SHEET_TILES = SHEET_COLUMNS * SHEET_ROWS
_CELL, _GAP, _HEAD = 128, 6, 28


class Terms(Document):
    """Under what terms the tiles are given away."""

    licence: Prose = DEFAULT_LICENCE
    usage: Prose = DEFAULT_USAGE
    contact: Line | None = None


_README = """{title}
{rule}

EVERY IMAGE IN THIS BUNDLE IS SYNTHETIC. It was made by a trained model. It shows no patient, and it is
not for diagnosis.

  releasing site        {site}
  tiles                 {tiles}, {width} x {height} pixels{filtered}
  generator             base {base}
                        adapter {adapter}
  conditioning          {conditioning}
                        {promise}
  differential privacy  {privacy}

{covers}What lies here
  tiles/                the tiles, numbered; the numbers follow no order of patients or slides
  sample-sheet.png      some of them on one page
  datasheet.md          what this is, from whom and how it was made, what is promised, tested and forbidden
  datasheet.html        the same for a browser; it loads nothing
  manifest.json         every tile by digest, and how it was made (sealed before the audit)
  audit/report.html     the audit, for people: open it in any browser, it loads nothing
  audit/report.json     the audit's evidence, for programs
  verdict.dsse.json     the verdict on exactly these tiles, signed by an auditor and the site
  bundle.dsse.json      the site's signed list of all files
  keys/                 the signers' public keys (compare their ids with their owners)
  ro-crate-metadata.json  the same for machines (RO-Crate 1.1)

Check it, offline
  pixcell release verify PATH_TO_THIS_BUNDLE --trust AUDITOR.pub

Licence
  {licence}

Use
  {usage}
"""


def sample_sheet(tiles: Sequence[npt.NDArray[np.uint8]]) -> bytes:
    """PNG of up to 40 tiles, uint8 (H, W, 3) each, in rows of 8 under a line that says they are synthetic."""
    shown = tiles[:SHEET_TILES]
    columns = min(SHEET_COLUMNS, len(shown))
    rows = -(-len(shown) // columns)
    size = (columns * (_CELL + _GAP) + _GAP, rows * (_CELL + _GAP) + _GAP + _HEAD)
    sheet = Image.new("RGB", size, "white")
    words = (
        "SYNTHETIC TILES"
        if columns < 4
        else "SYNTHETIC TILES - made by a model, no patient, not for diagnosis"
    )
    ImageDraw.Draw(sheet).text((_GAP, _GAP), words, fill=(40, 40, 40), font_size=16)
    for position, pixels in enumerate(shown):
        row, column = divmod(position, columns)
        tile = Image.fromarray(pixels)
        if tile.size != (_CELL, _CELL):
            tile = tile.resize((_CELL, _CELL), Image.Resampling.LANCZOS)
        sheet.paste(tile, (_GAP + column * (_CELL + _GAP), _HEAD + _GAP + row * (_CELL + _GAP)))
    text = PngImagePlugin.PngInfo()
    text.add_text(MARK_KEYWORD, MARK_TEXT)
    out = io.BytesIO()
    sheet.save(out, format="PNG", pnginfo=text)
    return out.getvalue()


def readme(
    site: str,
    generator: Generator,
    privacy: PrivacyStatement | None,
    terms: Terms,
    *,
    tiles: int,
    width: int,
    height: int,
    filtered: FilteredFrom | None = None,
) -> bytes:
    """The bundle's README as UTF-8 text."""
    title = f"Synthetic histopathology tiles released by {site}"
    covers = ""
    if privacy is not None:
        said = [("covers", line) for line in privacy.covers]
        said += [("does NOT cover", line) for line in privacy.does_not_cover]
        lines = "".join(f"  {_wrapped(f'{what} {line}', 4)}\n" for what, line in said)
        covers = f"What the privacy statement says\n{lines}\n"
    text = _README.format(
        title=title,
        rule="=" * len(title),
        site=site,
        tiles=tiles,
        filtered=f"\n{' ' * 24}{filtered}" if filtered else "",
        width=width,
        height=height,
        base=generator.base_digest,
        adapter=generator.adapter_digest or "none",
        conditioning=generator.conditioning.policy,
        promise=_wrapped(generator.conditioning.promise, 24),
        privacy=str(privacy) if privacy else "none claimed: the audit is the only ground of this release",
        covers=covers,
        licence=_wrapped(terms.licence, 2),
        usage=_wrapped(terms.usage, 2),
    )
    return text.encode("utf-8")


def _wrapped(text: str, indent: int) -> str:
    """Prose in lines of at most 100 characters, all but the first indented."""
    return ("\n" + " " * indent).join(textwrap.wrap(text, 100 - indent))
