"""The noise schedule PixCell was trained with: 1000 steps, linear beta from 1e-4 to 0.02."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class NoiseSchedule:
    """The quantities of a discrete diffusion that loss and samplers need, each float64 of shape (T,).

    `log_beta` and `log_posterior` bound the learned variance (Nichol & Dhariwal 2021, equation 15); the first
    posterior entry, which is zero, is replaced by the second.
    """

    betas: torch.Tensor
    alphas_cumprod: torch.Tensor
    log_beta: torch.Tensor
    log_posterior: torch.Tensor

    @property
    def steps(self) -> int:
        """T."""
        return len(self.betas)

    def add_noise(self, latents: torch.Tensor, noise: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """q(x_t | x_0): latents and noise (B, C, H, W), timestep (B,) of integers."""
        level = self.alphas_cumprod.to(latents.device)[timestep].to(latents.dtype)[:, None, None, None]
        return level.sqrt() * latents + (1 - level).sqrt() * noise


def linear_schedule(steps: int = 1000, first: float = 1e-4, last: float = 0.02) -> NoiseSchedule:
    """Build the linear schedule."""
    betas = torch.linspace(first, last, steps, dtype=torch.float64)
    alphas = torch.cumprod(1 - betas, 0)
    before = torch.cat([alphas.new_ones(1), alphas[:-1]])
    posterior = betas * (1 - before) / (1 - alphas)
    posterior[0] = posterior[1]
    return NoiseSchedule(betas, alphas, betas.log(), posterior.log())
