"""Saves and resumes a training of the recipe: model, optimiser, moving average, step."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from pixcell_core.training.ema import Ema


def save_checkpoint(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, ema: Ema, step: int
) -> None:
    """Write a checkpoint beside its place and rename it there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    torch.save(
        {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "ema": ema.state_dict(),
            "step": step,
        },
        partial,
    )
    partial.replace(path)


def load_checkpoint(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, ema: Ema) -> int:
    """Load a checkpoint in place where one exists; return the step to go on from."""
    if not path.exists():
        return 0
    saved = torch.load(path, weights_only=True)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    ema.load_state_dict(saved["ema"])
    return int(saved["step"])
