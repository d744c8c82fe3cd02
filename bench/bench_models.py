"""Starter autoencoder against diffusers' AutoencoderTiny, transformer against stock PixArt: same input, same process."""

from __future__ import annotations

import torch
from diffusers import AutoencoderTiny, PixArtTransformer2DModel
from paired import compare, show

from pixcell_core.models import PixCellTransformer2DModel, TileAutoencoder

SMALL = {
    "num_attention_heads": 6,
    "attention_head_dim": 32,
    "in_channels": 16,
    "out_channels": 32,
    "num_layers": 8,
    "cross_attention_dim": 192,
    "sample_size": 16,
    "patch_size": 2,
    "caption_channels": 256,
    "interpolation_scale": 0.25,
}


def main() -> None:
    """Print the ratios."""
    torch.set_num_threads(1)
    images = torch.rand(8, 3, 128, 128) * 2 - 1
    ours, tiny = TileAutoencoder().eval(), AutoencoderTiny(latent_channels=16).eval()
    with torch.inference_mode():
        found = compare(lambda: ours(images), lambda: tiny.decode(tiny.encode(images).latents).sample)
        show("autoencoder round trip, 8 tiles of 128 px", "AutoencoderTiny (TAESD3's architecture)", found)
        model = PixCellTransformer2DModel(**SMALL).eval()
        stock = PixArtTransformer2DModel(**SMALL, use_additional_conditions=False).eval()
        x, c, t = torch.randn(16, 16, 16, 16), torch.randn(16, 1, 256), torch.randint(0, 1000, (16,))
        found = compare(
            lambda: model(x, encoder_hidden_states=c, timestep=t),
            lambda: stock(x, encoder_hidden_states=c, timestep=t),
        )
        show("transformer forward, 16 tiles", "diffusers' PixArtTransformer2DModel", found)


if __name__ == "__main__":
    main()
