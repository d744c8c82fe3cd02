"""Base-model twins: what the public base drew from the same seeds and conditions, as a second null of the screen.

The base never saw a private slide, so its tiles come as near to training as chance, the conditions and public tissue
bring them. The holdout does not know the conditions; the twins do. Released tiles that stand out from either are looked
at (`copies.Nulls`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from pixcell_core.contracts import parse_json, read_bounded
from privacy_audit.blinding import Blinding
from privacy_audit.copies import Conformal, Nulls
from privacy_audit.evidence import Evidence
from privacy_audit.evidence_parts import BaseTwinEvidence
from privacy_audit.features import TileFeatures
from privacy_audit.screen import ScreenScores
from privacy_audit.tiles import TileError, TileSource, open_tiles, require_one_size

HOLDOUT_NULL, TWIN_NULL = "holdout tiles", "twins from the base model"
_MAX_ORIGINS_BYTES = 64 * 1024 * 1024


class TwinTiles:
    """The twins of the released tiles, and no other tile of their folder; a `TileSource`."""

    def __init__(self, source: TileSource, rows: Sequence[int]) -> None:
        self.name, self._source, self._rows = source.name, source, list(rows)

    @property
    def ids(self) -> Sequence[str]:
        """Names as they lie in the folder."""
        return [self._source.ids[row] for row in self._rows]

    @property
    def patients(self) -> Sequence[str]:
        """Empty texts: nobody stands behind a twin."""
        return [""] * len(self._rows)

    @property
    def strata(self) -> Sequence[str]:
        """Empty texts."""
        return [""] * len(self._rows)

    @property
    def classes(self) -> Sequence[str]:
        """Empty texts."""
        return [""] * len(self._rows)

    @property
    def folder(self) -> Path:
        """The folder itself."""
        return self._source.folder

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Pixels of twins start..stop-1, uint8 (B, 3, H, W)."""
        return torch.cat([self._source.read(row, row + 1) for row in self._rows[start:stop]])

    def file_digests(self) -> list[str]:
        """Of each twin."""
        every = self._source.file_digests()
        return [every[row] for row in self._rows]


def read_origins(path: Path, released: Sequence[str]) -> dict[str, str]:
    """Names that released tiles had when they were drawn, by the names under which they are released.

    Args:
        path: the JSON object that a release keeps as `origins.json`.
        released: names of the released tiles.

    Raises:
        TileError: no object of names, or a released tile that it does not name.
    """
    value = parse_json(read_bounded(path, _MAX_ORIGINS_BYTES), name=path.name, max_bytes=_MAX_ORIGINS_BYTES)
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value.values()):
        raise TileError(
            f"{path.name} is no object of names by names.",
            hint="Give the origins.json of this release.",
            code="bad-origins",
        )
    if missing := [name for name in released if name not in value]:
        raise TileError(
            f"{path.name} does not name {len(missing)} of the released tiles, the first is {missing[0]}.",
            hint="Give the origins.json that lies beside these tiles.",
            code="bad-origins",
        )
    return {name: str(value[name]) for name in released}


def open_twins(folder: Path, synthetic: TileSource, drawn: Mapping[str, str]) -> TwinTiles:
    """Open the twins of a release.

    Args:
        folder: tiles that the base drew, under the names of the released tiles.
        synthetic: the released tiles.
        drawn: the names these had when they were drawn, where they are released under others; see `read_origins`.

    Raises:
        TileError: no such folder, twins of another release or of another size, or the released tiles themselves.
    """
    source = open_tiles(folder, name="base twins", needs_patients=False)
    wanted = {drawn.get(name, name) for name in synthetic.ids}
    rows = [row for row, name in enumerate(source.ids) if name in wanted]
    # Tiles that were drawn and then withheld have twins too; so a folder may hold more, but not instead.
    if not rows or (len(rows) < len(source.ids) and len(rows) < len(wanted)):
        strange = next(name for name in source.ids if name not in wanted)
        raise TileError(
            f"The folder of base twins holds {strange}, which is the name of no released tile.",
            hint="Draw the twins with the base alone, same seed and conditions, and keep their names; where the release "
            "has renamed its tiles, add --origins with its origins.json.",
            code="twins-of-another-release",
        )
    twins = TwinTiles(source, rows)
    require_one_size(synthetic, twins)
    released = dict(zip(synthetic.ids, synthetic.file_digests(), strict=True))
    names = {drawn.get(name, name): name for name in synthetic.ids}
    if all(
        released[names[name]] == found for name, found in zip(twins.ids, twins.file_digests(), strict=True)
    ):
        raise TileError(
            "The base twins are the released tiles themselves.",
            hint="Draw them again with the base alone, without the adapter: a null must not hold what it judges.",
            code="twins-are-the-release",
        )
    return twins


def gather(scores: ScreenScores, features: TileFeatures, blinding: Blinding) -> BaseTwinEvidence:
    """The twins' part of the evidence: their screen scores, and a blinded root that says which twins these were."""
    return BaseTwinEvidence(scores=np.asarray(scores.score), root=blinding.root(features.digests))


def nulls_of(evidence: Evidence) -> Nulls:
    """What released tiles are compared with: the holdout, and the twins where there are any."""
    parts = [(HOLDOUT_NULL, Conformal(evidence.null_scores))]
    twins = evidence.part(BaseTwinEvidence)
    if twins is not None:
        parts.append((TWIN_NULL, Conformal(twins.scores)))
    return Nulls(tuple(parts))
