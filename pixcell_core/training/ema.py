"""Exponential moving average over a model's trainable parameters; buffers are never averaged."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn


class Ema:
    """Keeps `shadow = decay * shadow + (1 - decay) * parameter` after each update.

    The decay is warmed up as min(decay, (1 + n) / (10 + n)) so that early averages are not dominated by the start.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay, self.updates = decay, 0
        self.shadow = {k: p.detach().clone().float() for k, p in model.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move the average towards the model's parameters."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        kept = {k: p for k, p in model.named_parameters() if k in self.shadow}
        averages = [self.shadow[k] for k in kept]
        # One call for all tensors: on a GPU, one by one costs more time in launching than in averaging.
        torch._foreach_lerp_(averages, [p.detach().float() for p in kept.values()], 1.0 - decay)

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Write the average into the model."""
        for name, parameter in model.named_parameters():
            if name in self.shadow:
                parameter.copy_(self.shadow[name])

    @contextmanager
    def swapped_into(self, model: nn.Module) -> Iterator[None]:
        """Within the block the model holds the average; its own parameters return afterwards."""
        kept = {k: p.detach().clone() for k, p in model.named_parameters() if k in self.shadow}
        try:
            self.copy_to(model)
            yield
        finally:
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if name in kept:
                        parameter.copy_(kept[name])

    def state_dict(self) -> dict[str, object]:
        """The average and the number of updates behind it."""
        return {"updates": self.updates, "shadow": self.shadow}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Restore what `state_dict` returned."""
        self.updates = int(state["updates"])  # type: ignore[call-overload]
        found: Mapping[str, torch.Tensor] = state["shadow"]  # type: ignore[assignment]
        if {k: v.shape for k, v in found.items()} != {k: v.shape for k, v in self.shadow.items()}:
            raise ValueError("the average belongs to another model")
        # A copy on the device the average lives on: a checkpoint is read on the CPU.
        self.shadow = {k: found[k].to(v.device, copy=True) for k, v in self.shadow.items()}
