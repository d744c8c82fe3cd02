"""The encoder that looks at the tiles of an evaluation, under the label every result carries.

Legend: B batch, H W pixels, n tokens, d feature width.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from pixcell_core.errors import BadInputError
from pixcell_core.evaluation.feature_set import Floats

if TYPE_CHECKING:
    from pixcell_core.encoders import ImageEncoder

DEFAULT = "second-eye"
CUT = 256


def eye_label(spec: str) -> str:
    """What results call the encoder `name` or `name:path`: a path's last part alone, so that no machine is named."""
    name, _, path = spec.partition(":")
    return f"{name}:{Path(path).name}" if path else name


class TileEye:
    """Any registered encoder, turned into one feature row per tile.

    A tile whose sides are multiples of 256 px is cut into tiles of 256 px and the tokens are averaged, so that a larger
    image is seen at the scale the encoders know; any other tile, which must be square, is seen whole.
    """

    def __init__(self, spec: str = DEFAULT, device: str = "cpu") -> None:
        self.spec, self.label, self.device = spec, eye_label(spec), device
        self._encoders: dict[int, ImageEncoder] = {}

    def look(self, pixels: npt.NDArray[np.uint8]) -> Floats:
        """Features float64 (B, d) of tiles uint8 (B, H, W, 3).

        Raises:
            BadInputError: no such encoder or device, its weights are not here, or tiles it cannot see.
        """
        import torch

        height, width = pixels.shape[1:3]
        if height % CUT == 0 and width % CUT == 0:
            side = CUT
        elif height == width:
            side = height
        else:
            raise BadInputError(
                f"A tile is {width}x{height} px; a square, or sides that are multiples of {CUT} px, is expected.",
                hint="Cut square tiles first.",
                code="tile-shape",
            )
        tokens = self._encoder(side).encode(
            torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)))
        )
        return np.asarray(tokens.double().cpu().mean(dim=1).numpy())

    def _encoder(self, side: int) -> ImageEncoder:
        if side not in self._encoders:
            from pixcell_core.encoders import load_tile_encoder

            self._encoders[side] = load_tile_encoder(self.spec, device=self.device, tile_size=side)
        return self._encoders[side]
