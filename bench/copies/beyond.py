"""Blends that the audit does not plant: thinner ones, and ones turned or shifted first; reported without a goal."""

from __future__ import annotations

import numpy as np

from privacy_audit.plants import CopyKind, Maker, Tile, dihedral, shift


def _under(first: Maker, weight: float) -> Maker:
    def make(tile: Tile, filler: Tile, rng: np.random.Generator) -> Tile:
        under = first(tile, filler, rng).astype(np.float64)
        return np.round(weight * under + (1.0 - weight) * filler).astype(np.uint8)

    return make


def _as_it_is(tile: Tile, filler: Tile, rng: np.random.Generator) -> Tile:
    return tile


BEYOND = (
    CopyKind("blend30", "blended, 0.3 of it this tile", _under(_as_it_is, 0.3)),
    CopyKind("blend20", "blended, 0.2 of it this tile", _under(_as_it_is, 0.2)),
    CopyKind("blend-d4", "turned or mirrored, then blended half and half", _under(dihedral, 0.5)),
    CopyKind("blend-shift25", "shifted by a quarter, then blended half and half", _under(shift(0.25), 0.5)),
)
