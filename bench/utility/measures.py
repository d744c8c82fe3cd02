"""How well a model knows held-out patients: the denoising loss, with the same noise and times for every model."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from pixcell_core.diffusion.loss import SCHEDULE, velocity_weight
from utility.sites import SitePatients

WEIGHT_CAP = 200.0
AT_ONCE = 128


@dataclass(frozen=True)
class HeldOutLoss:
    """Mean squared noise error over held-out tiles.

    `error` is the published loss without its variance term; `weighted` counts the error as one of the velocity
    (`velocity_weight`, cap 200), where the colour of a tile is decided.
    """

    error: float
    weighted: float


@torch.no_grad()
def held_out_loss(model: nn.Module, patients: SitePatients, draws: int = 4, seed: int = 5) -> HeldOutLoss:
    """The denoising loss; equal `draws` and `seed` mean equal noise and time steps, whatever the model.

    Every tile is seen at `draws` time steps, one in each stratum of the schedule.
    """
    rng = torch.Generator().manual_seed(seed)
    latents, embeddings = patients.latents.flatten(0, 1), patients.embeddings.flatten(0, 1)
    errors, weights = [], []
    for draw in range(draws):
        times = ((draw + torch.rand(len(latents), generator=rng)) * SCHEDULE.steps / draws).long()
        noise = torch.randn(latents.shape, generator=rng)
        for start in range(0, len(latents), AT_ONCE):
            at = slice(start, start + AT_ONCE)
            noisy = SCHEDULE.add_noise(latents[at], noise[at], times[at])
            seen = model(noisy, encoder_hidden_states=embeddings[at], timestep=times[at], return_dict=False)[
                0
            ]
            errors.append((seen[:, : latents.shape[1]] - noise[at]).pow(2).flatten(1).mean(1))
            weights.append(velocity_weight(times[at], WEIGHT_CAP))
    error, weight = torch.cat(errors).double(), torch.cat(weights).double()
    return HeldOutLoss(float(error.mean()), float((error * weight).mean()))
