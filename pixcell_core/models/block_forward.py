"""One transformer block with a prepared condition: the plain form for training, the fused form for sampling.

Both compute what diffusers' block computes under `ada_norm_single`. The fused form uses that all images of a sampling
step share its time: the modulation then scales the layer norm itself, the gates scale the output products' weights,
and products take their bias, their activation and the residual along (oneDNN on a CPU).

Legend: B images, T latent tokens, d width, h heads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from pixcell_core.models.prepared import BlockWeights, Weights

Cross = torch.Tensor | tuple[torch.Tensor, torch.Tensor]
_EPS = 1e-6


def run_block(block: Any, tokens: torch.Tensor, cross: Cross, modulation: torch.Tensor) -> torch.Tensor:
    """Run a block on tokens (B, T, d) with modulation (B, 6 d); gradients flow, adapters and hooks apply."""
    vectors = block.scale_shift_table[None] + modulation.view(len(tokens), 6, -1)
    shift, scale, gate, shift_ff, scale_ff, gate_ff = vectors.chunk(6, dim=1)
    normed = torch.addcmul(shift, block.norm1(tokens), 1 + scale)
    tokens = torch.addcmul(tokens, gate, block.attn1(normed))
    if isinstance(cross, tuple):
        keys, values = cross
        query = block.attn2.to_q(tokens).unflatten(-1, (block.attn2.heads, -1)).transpose(1, 2)
        seen = F.scaled_dot_product_attention(query, keys, values).transpose(1, 2).flatten(2)
        tokens = tokens + block.attn2.to_out[0](seen)
    else:
        tokens = tokens + cross
    normed = torch.addcmul(shift_ff, block.norm2(tokens), 1 + scale_ff)
    return torch.addcmul(tokens, gate_ff, block.ff(normed))


def run_block_at_one_time(
    weights: BlockWeights,
    table: torch.Tensor,
    heads: int,
    tokens: torch.Tensor,
    cross: Cross,
    modulation: torch.Tensor,
) -> torch.Tensor:
    """Run a block on tokens (B, T, d) where all images share one time; no gradients.

    Args:
        weights: the block's merged weights.
        table: the block's own modulation (6, d).
        heads: attention heads h.
        tokens: (B, T, d), or (B / k, T, d) when k conditions share each latent: the first self-attention then runs once.
        cross: what `PreparedCondition.cross` gives, for B images.
        modulation: (1, 6 d).
    """
    shift, scale, gate, shift_ff, scale_ff, gate_ff = (table + modulation.view(6, -1)).unbind(0)
    normed = F.layer_norm(tokens, tokens.shape[-1:], 1 + scale, shift, _EPS)
    qkv = F.linear(normed, *weights.qkv).unflatten(-1, (3, heads, -1)).transpose(1, 3)
    seen = F.scaled_dot_product_attention(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2])
    tokens = _add_product(tokens, seen.transpose(1, 2).flatten(2), _gated(weights.attention_out, gate))
    batch = len(cross[0]) if isinstance(cross, tuple) else len(cross)
    if len(tokens) != batch:
        tokens = tokens.repeat(batch // len(tokens), 1, 1)
    if isinstance(cross, tuple):
        query = F.linear(tokens, *weights.cross_query).unflatten(-1, (heads, -1)).transpose(1, 2)
        seen = F.scaled_dot_product_attention(query, *cross).transpose(1, 2).flatten(2)
        tokens = _add_product(tokens, seen, weights.cross_out)
    else:
        tokens = tokens + cross
    normed = F.layer_norm(tokens, tokens.shape[-1:], 1 + scale_ff, shift_ff, _EPS)
    return _add_product(tokens, _gelu_of_product(normed, weights.up), _gated(weights.down, gate_ff))


def _gated(weights: Weights, gate: torch.Tensor) -> Weights:
    weight, bias = weights
    return weight * gate[:, None], None if bias is None else bias * gate


def _onednn(rows: torch.Tensor) -> bool:
    """Whether to call oneDNN's fused products; a compiler makes its own, and cannot take these apart."""
    if torch.compiler.is_compiling():
        return False
    return rows.device.type == "cpu" and rows.dtype == torch.float32 and torch.backends.mkldnn.is_available()


def _gelu_of_product(rows: torch.Tensor, weights: Weights) -> torch.Tensor:
    """GELU (tanh form) of rows · Wᵀ + b."""
    if _onednn(rows):
        fused: torch.Tensor = torch.ops.mkldnn._linear_pointwise(rows, *weights, "gelu", [], "tanh")
        return fused
    return F.gelu(F.linear(rows, *weights), approximate="tanh")


def _add_product(tokens: torch.Tensor, rows: torch.Tensor, weights: Weights) -> torch.Tensor:
    """Tokens + rows · Wᵀ + b."""
    if _onednn(rows):
        fused: torch.Tensor = torch.ops.mkldnn._linear_pointwise.binary(rows, tokens, *weights, "add")
        return fused
    return tokens + F.linear(rows, *weights)
