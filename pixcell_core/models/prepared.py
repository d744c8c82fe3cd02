"""What no denoising step changes about a condition, computed once per image instead of once per step.

The condition's projection is constant over the steps, and so are each block's cross-attention keys and values. With
one condition token even the whole cross-attention is: a softmax over one key is 1 whatever the query, so the block adds
`to_out(to_v(c))`, which depends on no latent, and its query and output products over all tokens fall away.

Legend: B images, n condition tokens, d transformer width, h heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

Weights = tuple[torch.Tensor, torch.Tensor | None]
"""Weight (out, in) and bias (out,) of one linear layer."""


@dataclass(frozen=True)
class BlockWeights:
    """The products of one block as sampling uses them: adapters merged, query, key and value joined."""

    qkv: Weights
    attention_out: Weights
    cross_query: Weights
    cross_out: Weights
    up: Weights
    down: Weights


@dataclass(frozen=True)
class PreparedCondition:
    """A condition ready for every step: `PixCellTransformer2DModel.prepare` makes it, `forward` takes it.

    With one token `constants` holds each block's whole cross-attention, (B, 1, d); with more, `keys` and `values` hold
    (B, h, n, d / h) per block. `weights` is filled where no gradient is wanted.
    """

    batch: int
    constants: tuple[torch.Tensor, ...] = ()
    keys: tuple[torch.Tensor, ...] = ()
    values: tuple[torch.Tensor, ...] = ()
    weights: tuple[BlockWeights, ...] = ()

    def __len__(self) -> int:
        return self.batch

    def cross(self, block: int) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """The constant of a block, or its keys and values."""
        return self.constants[block] if self.constants else (self.keys[block], self.values[block])


def prepare_condition(blocks: Sequence[Any], projected: torch.Tensor) -> PreparedCondition:
    """Run the condition's side of every block.

    Args:
        blocks: the transformer's blocks.
        projected: projected condition (B, n, d).
    """
    batch, tokens = projected.shape[:2]
    weights = () if torch.is_grad_enabled() else tuple(_weights_of(block) for block in blocks)
    values = tuple(block.attn2.to_v(projected) for block in blocks)
    if tokens == 1:
        constants = tuple(block.attn2.to_out[0](value) for block, value in zip(blocks, values, strict=True))
        return PreparedCondition(batch, constants=constants, weights=weights)
    keys = tuple(_heads(block.attn2.to_k(projected), block.attn2.heads) for block in blocks)
    split = tuple(_heads(value, block.attn2.heads) for block, value in zip(blocks, values, strict=True))
    return PreparedCondition(batch, keys=keys, values=split, weights=weights)


def _heads(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """(B, n, d) to (B, h, n, d / h)."""
    return rows.unflatten(-1, (heads, -1)).transpose(1, 2)


def _weights_of(block: Any) -> BlockWeights:
    joined = [_merged(layer) for layer in (block.attn1.to_q, block.attn1.to_k, block.attn1.to_v)]
    biases = [bias for _, bias in joined if bias is not None]
    return BlockWeights(
        qkv=(torch.cat([weight for weight, _ in joined]), torch.cat(biases) if len(biases) == 3 else None),
        attention_out=_merged(block.attn1.to_out[0]),
        cross_query=_merged(block.attn2.to_q),
        cross_out=_merged(block.attn2.to_out[0]),
        up=_merged(block.ff.net[0].proj),
        down=_merged(block.ff.net[2]),
    )


def _merged(layer: Any) -> Weights:
    """Weight and bias of a linear layer, with the deltas of its active adapters added."""
    base: Any = layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer
    weight: torch.Tensor = base.weight
    if (
        base is not layer
        and not getattr(layer, "merged", False)
        and not getattr(layer, "disable_adapters", False)
    ):
        for name in getattr(layer, "active_adapters", ()):
            if name in getattr(layer, "lora_A", {}):
                weight = weight + layer.get_delta_weight(name).to(weight)
    return weight, base.bias
