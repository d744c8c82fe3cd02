"""Sampling against the plain diffusers loop: same weights, same steps, same images."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import PixArtTransformer2DModel
from paired import compare, show

from pixcell_core.diffusion.pipeline import default_scheduler
from pixcell_core.models import PixCellTransformer2DModel

STEPS, GUIDANCE = 5, 2.0
SIZES = {
    "starter, 64 tokens of width 192": (192, 16, 16, 0.25),
    "256 tokens of width 384": (384, 32, 4, 0.5),
}


def pair(width: int, side: int, scale: float) -> tuple[PixCellTransformer2DModel, PixArtTransformer2DModel]:
    """Our transformer and the stock one with the same weights."""
    config: dict[str, Any] = {
        "num_attention_heads": 6,
        "attention_head_dim": width // 6,
        "in_channels": 16,
        "out_channels": 32,
        "num_layers": 8,
        "cross_attention_dim": width,
        "sample_size": side,
        "caption_channels": 256,
        "interpolation_scale": scale,
    }
    torch.manual_seed(0)
    ours = PixCellTransformer2DModel(**config).eval()
    stock = PixArtTransformer2DModel(**config, use_additional_conditions=False).eval()
    stock.load_state_dict(ours.state_dict(), strict=False)
    return ours, stock


@torch.inference_mode()
def sample(
    model: Any, noise: torch.Tensor, both: torch.Tensor, *, prepared: bool, steps: int = STEPS
) -> torch.Tensor:
    """DPM-Solver++ with guidance: as diffusers' pipelines do it, or with a prepared condition."""
    scheduler, latents = default_scheduler(), noise.clone()
    scheduler.set_timesteps(steps)
    condition = model.prepare(both) if prepared else both
    for time in scheduler.timesteps.to(noise.device):
        given = latents if prepared else torch.cat([latents, latents])
        times = time if prepared else time.expand(len(both))
        output = model(given, encoder_hidden_states=condition, timestep=times, return_dict=False)[0]
        without, following = output[:, :16].chunk(2)
        guided = without + GUIDANCE * (following - without)
        latents = scheduler.step(guided, time, latents, return_dict=False)[0]
    return latents


def main() -> None:
    """Print the ratios."""
    torch.set_num_threads(2)
    for name, (width, side, batch, scale) in SIZES.items():
        ours, stock = pair(width, side, scale)
        noise, condition = torch.randn(batch, 16, side, side), torch.randn(batch, 1, 256)
        both = torch.cat([ours.unconditional(batch), condition])
        fast, plain = sample(ours, noise, both, prepared=True), sample(stock, noise, both, prepared=False)
        apart = float((fast - plain).abs().max() / plain.abs().max())
        found = compare(
            lambda o=ours, n=noise, b=both: sample(o, n, b, prepared=True),  # type: ignore[misc]
            lambda s=stock, n=noise, b=both: sample(s, n, b, prepared=False),  # type: ignore[misc]
        )
        show(
            f"sampling, {name} (largest difference {apart:.0e} of the largest latent)",
            "the diffusers loop",
            found,
        )


if __name__ == "__main__":
    main()
