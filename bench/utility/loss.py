"""The diffusion loss that patients' gradients are taken of, with or without strata of time steps."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pixcell_core.diffusion import drop_condition, training_loss
from pixcell_core.diffusion.loss import velocity_weight

STEPS = 1000
CONDITION_DROP = 0.1


@dataclass(frozen=True)
class PatientLoss:
    """One loss per row, as the site's trainer computes it.

    Attributes:
        group: rows of one patient; they stand together.
        stratified: spread a patient's time steps evenly over the schedule (one per stratum, in random order).
            Inside one unit gradient this costs no privacy: it changes no bound.
        weight_cap: weigh the noise error by min(1 / alphas_cumprod, cap); 1 is the published loss.
    """

    group: int
    stratified: bool
    weight_cap: float = 1.0

    def __call__(self, model: nn.Module, rows: tuple[Tensor, ...]) -> Tensor:
        latents, condition = rows
        null = model.unconditional(1)  # type: ignore[operator]
        timestep = self.times(len(latents))
        return training_loss(
            model,
            latents,
            drop_condition(condition, null, CONDITION_DROP),
            timestep=timestep,
            noise=torch.randn_like(latents),
            error_weight=None if self.weight_cap == 1.0 else velocity_weight(timestep, self.weight_cap),
        )

    def times(self, count: int) -> Tensor:
        """Time steps (count,): uniform one by one, and even within each patient when stratified."""
        if not self.stratified or count % self.group:
            return torch.randint(0, STEPS, (count,))
        strata = torch.rand(count // self.group, self.group).argsort(dim=1)
        return (
            ((strata + torch.rand(strata.shape)) * STEPS / self.group).long().clamp(max=STEPS - 1).flatten()
        )
