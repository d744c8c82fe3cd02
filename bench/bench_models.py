"""Starter autoencoder against diffusers' AutoencoderTiny, transformer against stock PixArt: same input, same process."""

from __future__ import annotations

import torch
from diffusers import AutoencoderTiny, PixArtTransformer2DModel
from paired import compare, show

from pixcell_core.models import PixCellTransformer2DModel, TileAutoencoder
from pixcell_core.starter.recipe.train_transformer import CONFIG


def main() -> None:
    """Print the ratios."""
    torch.set_num_threads(1)
    images = torch.rand(8, 3, 128, 128) * 2 - 1
    ours, tiny = TileAutoencoder().eval(), AutoencoderTiny(latent_channels=16).eval()
    with torch.inference_mode():
        found = compare(lambda: ours(images), lambda: tiny.decode(tiny.encode(images).latents).sample)
        show("autoencoder round trip, 8 tiles of 128 px", "AutoencoderTiny (TAESD3's architecture)", found)
        model = PixCellTransformer2DModel(**CONFIG).eval()
        stock_config = {k: v for k, v in CONFIG.items() if k != "caption_num_tokens"}
        stock = PixArtTransformer2DModel(**stock_config, use_additional_conditions=False).eval()
        x, c, t = torch.randn(16, 16, 16, 16), torch.randn(16, 1, 256), torch.randint(0, 1000, (16,))
        found = compare(
            lambda: model(x, encoder_hidden_states=c, timestep=t),
            lambda: stock(x, encoder_hidden_states=c, timestep=t),
        )
        show("transformer forward, 16 tiles", "diffusers' PixArtTransformer2DModel", found)


if __name__ == "__main__":
    main()
