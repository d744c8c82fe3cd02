"""What one patient may add to a step: its gradient, at most C long, into a float64 sum."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

CLIP_MARGIN = 1.0 - 1e-5
"""Clipping aims this much below C. Rounding then never carries a contribution over it, nor does what a patient's
presence changes in the last digits of the patients whose rows share its pass."""


@dataclass
class UnitGradient:
    """The gradient of one patient's mean loss: one float32 tensor per trainable parameter."""

    tensors: list[Tensor]
    loss: float
    norm: float

    @property
    def usable(self) -> bool:
        """False when the gradient overflowed or is not a number; such a patient adds zero."""
        return math.isfinite(self.norm)


@dataclass
class GradientSum:
    """The running sum of clipped unit gradients of one step, in float64, with its private diagnostics."""

    tensors: list[Tensor]
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    discarded: int = 0

    def add(self, unit: UnitGradient, max_grad_norm: float) -> None:
        """Add one patient's contribution: its gradient, scaled down to at most `max_grad_norm`."""
        if not unit.usable:
            self.discarded += 1
            return
        scale = clip_scale(unit.norm, max_grad_norm)
        for total, gradient in zip(self.tensors, unit.tensors, strict=True):
            # The product and the sum are float64: a float32 operand is widened element by element, never copied.
            total.add_(gradient, alpha=scale)
        self.losses.append(unit.loss)
        self.norms.append(unit.norm)


def clip_scale(norm: float, max_grad_norm: float) -> float:
    """Return the factor that brings an L2 norm of `norm` to at most `max_grad_norm` times CLIP_MARGIN."""
    bound = max_grad_norm * CLIP_MARGIN
    return 1.0 if norm <= bound else bound / norm


def global_norm(tensors: Sequence[Tensor]) -> float:
    """Return the L2 norm over all tensors together, accumulated in float64; one wait for an accelerator, not many."""
    if not tensors:
        return 0.0
    parts = torch.stack([torch.linalg.vector_norm(t, dtype=torch.float64) for t in tensors])
    return float(torch.linalg.vector_norm(parts))
