"""One LoRA training step against the stock PixArt class with the same adapter, weights, batch and loss.

What can be gained is bounded. With frozen weights a step costs two passes over the layers. Of the 14 d x d products
that a stock block applies to every image token (4 self-attention, 2 cross-attention, 8 MLP) one condition token
leaves 12, since cross-attention then yields one vector per tile and its queries are never needed: 14 / 12 = 1.17.
With more tokens a training step has nothing to reuse, for every batch brings new conditions: 1.0.
A step is forward, backward and AdamW on the adapter alone.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from diffusers import PixArtTransformer2DModel
from paired import compare, show
from torch import nn

from pixcell_core.diffusion import training_loss
from pixcell_core.models import PixCellTransformer2DModel
from pixcell_core.starter.recipe.train_transformer import CONFIG
from pixcell_core.training.adapters import attach_lora

WIDE = {
    **CONFIG,
    "num_attention_heads": 6,
    "attention_head_dim": 64,
    "cross_attention_dim": 384,
    "sample_size": 32,
}
"""256 image tokens, width 384."""

CASES = (
    ("starter size, 64 image tokens, 1 condition token", CONFIG, 1, 16),
    ("width 384, 256 image tokens, 1 condition token", WIDE, 1, 8),
    ("width 384, 256 image tokens, 4 condition tokens", {**WIDE, "interpolation_scale": 0.5}, 4, 8),
)


class WithTable(nn.Module):
    """The stock class as its users call it for several tokens: the table is added to the condition outside."""

    def __init__(self, stock: nn.Module, table: torch.Tensor | None) -> None:
        super().__init__()
        self.stock, self.table = stock, table

    def forward(self, noisy: torch.Tensor, encoder_hidden_states: torch.Tensor, **kwargs: object) -> object:
        condition = encoder_hidden_states if self.table is None else encoder_hidden_states + self.table
        return self.stock(noisy, encoder_hidden_states=condition, **kwargs)


def pair(config: dict[str, object], tokens: int) -> tuple[nn.Module, nn.Module]:
    """Our transformer and the stock one, with equal weights and equal adapters."""
    torch.manual_seed(0)
    ours = PixCellTransformer2DModel(**{**config, "caption_num_tokens": tokens})
    stock = PixArtTransformer2DModel(
        **{k: v for k, v in config.items() if k != "caption_num_tokens"}, use_additional_conditions=False
    )
    extra = {"caption_projection.uncond_embedding", "y_pos_embed.y_pos_embed"}
    stock.load_state_dict({k: v for k, v in ours.state_dict().items() if k not in extra}, strict=True)
    table = None if ours.y_pos_embed is None else ours.y_pos_embed.y_pos_embed
    for model in (ours, stock):
        attach_lora(model, kind="ffa-lora", rank=4, seed=1)
    return ours.train(), WithTable(stock, copy.deepcopy(table)).train()


def stepper(model: nn.Module, *batch: torch.Tensor) -> Callable[[], float]:
    """One optimiser step on a fixed batch of latents, condition, timestep, noise."""
    latents, condition, timestep, noise = batch
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def step() -> float:
        loss = training_loss(model, latents, condition, timestep=timestep, noise=noise).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return float(loss.item())

    return step


def main() -> None:
    """Print the ratios; refuse to time two ways that do not compute the same."""
    torch.set_num_threads(1)
    for name, config, tokens, batch in CASES:
        ours, stock = pair(dict(config), tokens)
        side, wide = int(str(config["sample_size"])), int(str(config["caption_channels"]))
        latents, noise = (torch.randn(batch, 16, side, side) for _ in range(2))
        data = (latents, torch.randn(batch, tokens, wide), torch.randint(0, 1000, (batch,)), noise)
        one, other = stepper(ours, *data), stepper(stock, *data)
        for _ in range(3):
            left, right = one(), other()
            assert abs(left - right) < 1e-4 * abs(right), (left, right)
        found = compare(one, other)
        show(f"LoRA step, {name}, {batch} tiles", "diffusers' PixArtTransformer2DModel", found)
        print(f"  {1 / found.ratio:.2f} x as fast, {found.ours / batch * 1000:.1f} ms per tile")


if __name__ == "__main__":
    main()
