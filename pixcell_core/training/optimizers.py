"""Optimisers by name, and the learning rate of each step."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

from pixcell_core.training.settings import TrainingSettings

CAME_BETAS = (0.9, 0.999, 0.9999)
CAME_EPS = (1e-30, 1e-16)


def make_optimizer(parameters: Iterable[nn.Parameter], settings: TrainingSettings) -> torch.optim.Optimizer:
    """AdamW, or CAME (Luo et al. 2023, algorithm 2) with the published betas and epsilons.

    CAME keeps a row and a column of second moments per matrix instead of the whole matrix, so its state is about
    half of AdamW's.
    """
    if settings.optimizer == "came":
        from came_pytorch import CAME

        came: torch.optim.Optimizer = CAME(
            parameters,
            lr=settings.learning_rate,
            betas=CAME_BETAS,
            eps=CAME_EPS,
            weight_decay=settings.weight_decay,
        )
        return came
    return torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay)


def learning_rate_at(step: int, settings: TrainingSettings) -> float:
    """Learning rate of the step after `step` finished ones: linear warm-up, then constant or half a cosine to 0."""
    warm = min(1.0, (step + 1) / max(settings.warmup_steps, 1))
    if settings.schedule == "cosine" and step >= settings.warmup_steps:
        share = (step - settings.warmup_steps) / max(settings.steps - settings.warmup_steps, 1)
        warm = 0.5 * (1.0 + math.cos(math.pi * min(share, 1.0)))
    return settings.learning_rate * warm
