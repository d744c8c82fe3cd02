"""Variations of winning candidates by the public model: draw a tile from the embedding, and embed that tile.

The model is the study's public base, without any adapter, so a variation is post-processing of what the votes released.
Legend: k parents, n tokens, d embedding width, h w latent pixels, H W pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from pixcell_core.diffusion import PixCellPipeline
from pixcell_core.errors import BadInputError
from pixcell_core.private.condition_search import Interpolation, Variation

VARIATIONS = ("interpolation", "model")


class ModelVariation:
    """Tiles drawn from the parents by the public base, encoded again: resemblance as the model sees it.

    Args:
        pipeline: the public base without an adapter.
        encode: uint8 tiles (k, 3, H, W) to embeddings (k, n, d).
        encoder_name: stands in the name of the variation, since another encoder makes other candidates.
        latent_size: (h, w).
        num_inference_steps: sampler steps.
        guidance_scale: guidance of the sampler.
        batch_size: tiles drawn at once.
    """

    def __init__(
        self,
        pipeline: PixCellPipeline,
        encode: Callable[[torch.Tensor], torch.Tensor],
        *,
        encoder_name: str,
        latent_size: tuple[int, int],
        num_inference_steps: int,
        guidance_scale: float,
        batch_size: int = 32,
    ) -> None:
        self.name = f"model, {num_inference_steps} steps, guidance {guidance_scale:g}, encoder {encoder_name}"
        self._pipeline, self._encode, self._batch_size = pipeline, encode, batch_size
        self._settings: dict[str, Any] = {
            "guidance_scale": guidance_scale,
            "num_inference_steps": num_inference_steps,
            "latent_size": latent_size,
            "output_type": "np",
        }

    def __call__(self, parents: torch.Tensor, iteration: int, rng: np.random.Generator) -> torch.Tensor:
        """One drawn and encoded variation (k, n, d) of each parent (k, n, d)."""
        seeds = [int(seed) for seed in rng.integers(2**62, size=len(parents))]
        made = [torch.empty(0, *parents.shape[1:])]
        for start in range(0, len(parents), self._batch_size):
            rows = slice(start, start + self._batch_size)
            drawn: Any = self._pipeline(
                uni_embeds=parents[rows],
                generator=[torch.Generator().manual_seed(seed) for seed in seeds[rows]],
                **self._settings,
            )
            pixels = torch.from_numpy(np.asarray(drawn.images)).permute(0, 3, 1, 2).contiguous()
            made.append(self._encode(pixels).float().cpu())
        if any(part.shape[1:] != parents.shape[1:] for part in made):
            raise BadInputError(
                f"The encoder gives {tuple(made[-1].shape[1:])} numbers per tile (tokens, width), the candidates have "
                f"{tuple(parents.shape[1:])}.",
                hint="Give --encoder the one that made the candidates, or take --variation interpolation.",
                code="features-do-not-fit",
            )
        return torch.cat(made)


def variation_named(name: str, bank: torch.Tensor, model: Callable[[], Variation]) -> Variation:
    """The variation of that name; `model` makes the costly one where it is asked for.

    Raises:
        BadInputError: an unknown name.
    """
    if name == "interpolation":
        return Interpolation(bank)
    if name == "model":
        return model()
    raise BadInputError(
        f"There is no variation {name!r}.",
        hint=f"Choose one of: {', '.join(VARIATIONS)}.",
        code="unknown-variation",
    )
