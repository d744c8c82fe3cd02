"""The openly licensed real tiles as three small sites, by patient or slide: what privacy does to very few patients.

Patients that the base model was kept away from are held out here too. Sets without patient identifiers are left out.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pixcell_core.starter.recipe.corpus import RealTile, read_tiles
from utility.sites import SIDE, SitePatients, encoded

SOURCES = ("camelyon16_40x", "orion_crc", "osteosarcoma_10x")
CROPS = 32
"""Crops of 64 px kept of every patient, drawn over all tiles of that patient."""


def real_sites(folder: Path) -> tuple[list[SitePatients], SitePatients]:
    """Training patients of each source, and the held-out patients of all, encoded (no labels: all 0).

    Args:
        folder: holds `tiles/<source>/<label>/`.
    """
    by_source: dict[str, dict[str, list[RealTile]]] = {source: {} for source in SOURCES}
    for tile in read_tiles(folder):
        if tile.source in by_source and not tile.group.endswith("/unknown"):
            by_source[tile.source].setdefault(tile.group, []).append(tile)
    training = [_encode([t for t in groups.values() if not t[0].held_out]) for groups in by_source.values()]
    held_out = [_encode([t for t in groups.values() if t[0].held_out]) for groups in by_source.values()]
    return training, SitePatients.joined(held_out)


def _encode(patients: list[list[RealTile]]) -> SitePatients:
    rng = np.random.default_rng(4)
    pixels = np.stack([_crops(tiles, rng) for tiles in patients])
    return encoded(pixels, np.zeros(pixels.shape[:2], np.int64))


def _crops(tiles: list[RealTile], rng: np.random.Generator) -> np.ndarray:
    found = []
    for i in range(CROPS):
        whole = tiles[i % len(tiles)].pixels
        y, x = (int(rng.integers(side - SIDE + 1)) for side in whole.shape[:2])
        found.append(whole[y : y + SIDE, x : x + SIDE])
    return np.stack(found)
