"""The training loss PixCell is published with: noise error plus a variance bound that leaves the noise alone."""

from __future__ import annotations

import math

import torch
from torch import nn

from pixcell_core.diffusion.schedule import NoiseSchedule, linear_schedule

SCHEDULE = linear_schedule()


def _normal_kl(
    mean1: torch.Tensor, log1: torch.Tensor, mean2: torch.Tensor, log2: torch.Tensor
) -> torch.Tensor:
    """KL(N(mean1, exp log1) || N(mean2, exp log2)) in nats, entry by entry."""
    return 0.5 * (log2 - log1 - 1.0 + torch.exp(log1 - log2) + (mean1 - mean2).pow(2) * torch.exp(-log2))


def _discretised_log_likelihood(x: torch.Tensor, mean: torch.Tensor, log_scale: torch.Tensor) -> torch.Tensor:
    """Log-likelihood of x under a Gaussian integrated over bins of width 2/255, the last bins being open."""
    inverse = torch.exp(-log_scale)

    def cdf(value: torch.Tensor) -> torch.Tensor:
        return 0.5 * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (value + 0.044715 * value.pow(3))))

    upper = cdf(inverse * (x - mean + 1.0 / 255.0))
    lower = cdf(inverse * (x - mean - 1.0 / 255.0))
    inside = (upper - lower).clamp(min=1e-12).log()
    low_end = upper.clamp(min=1e-12).log()
    high_end = (1.0 - lower).clamp(min=1e-12).log()
    return torch.where(x < -0.999, low_end, torch.where(x > 0.999, high_end, inside))


def variance_bound(
    schedule: NoiseSchedule,
    clean: torch.Tensor,
    noisy: torch.Tensor,
    noise: torch.Tensor,
    value: torch.Tensor,
    timestep: torch.Tensor,
) -> torch.Tensor:
    """One term of the variational bound in bits per entry, (B,) (Nichol & Dhariwal 2021, section 3.1).

    KL between the true and the predicted posterior for t > 0, discretised likelihood at t = 0. `noise` must be
    detached by the caller: this term trains the variance alone.
    """
    at = timestep.cpu()

    def pick(table: torch.Tensor) -> torch.Tensor:
        return table[at].to(clean.device, clean.dtype)[:, None, None, None]

    level = pick(schedule.alphas_cumprod)
    before = pick(torch.cat([schedule.alphas_cumprod.new_ones(1), schedule.alphas_cumprod[:-1]]))
    beta = pick(schedule.betas)
    weight_clean = beta * before.sqrt() / (1 - level)
    weight_noisy = (1 - before) * (1 - beta).sqrt() / (1 - level)
    predicted = (noisy - (1 - level).sqrt() * noise) / level.sqrt()
    true_mean = weight_clean * clean + weight_noisy * noisy
    mean = weight_clean * predicted + weight_noisy * noisy
    low, high = pick(schedule.log_posterior), pick(schedule.log_beta)
    share = (value + 1) / 2
    log_variance = share * high + (1 - share) * low
    kl = _normal_kl(true_mean, low.expand_as(mean), mean, log_variance).flatten(1).mean(1)
    likelihood = _discretised_log_likelihood(clean, mean, 0.5 * log_variance).flatten(1).mean(1)
    return torch.where(timestep == 0, -likelihood, kl) / math.log(2.0)


def training_loss(
    model: nn.Module,
    latents: torch.Tensor,
    condition: torch.Tensor,
    *,
    timestep: torch.Tensor,
    noise: torch.Tensor,
    schedule: NoiseSchedule = SCHEDULE,
    error_weight: torch.Tensor | None = None,
) -> torch.Tensor:
    """The loss of each sample, (B,): mean squared noise error + variance bound with the noise detached.

    Args:
        model: a transformer called as `model(latents, condition, timestep)`.
        latents: scaled latents (B, 16, h, w).
        condition: condition tokens (B, n, d); rows to be trained unconditionally already hold the null condition.
        timestep: integers (B,), uniform on 0..T-1.
        noise: unit Gaussian of the latents' shape.
        schedule: noise schedule.
        error_weight: (B,) factors of the noise error, see `velocity_weight`; 1 when absent, as published.
    """
    noisy = schedule.add_noise(latents, noise, timestep)
    output = model(noisy, encoder_hidden_states=condition, timestep=timestep, return_dict=False)[0].float()
    error = (output[:, : latents.shape[1]] - noise).pow(2).flatten(1).mean(1)
    if error_weight is not None:
        error = error * error_weight
    if output.shape[1] == latents.shape[1]:
        return error
    predicted, value = output.chunk(2, dim=1)
    return error + variance_bound(schedule, latents, noisy, predicted.detach(), value, timestep)


def velocity_weight(timestep: torch.Tensor, cap: float, schedule: NoiseSchedule = SCHEDULE) -> torch.Tensor:
    """Weights (B,) that make the noise error count as a velocity error would: min(1 / alphas_cumprod, cap).

    The squared error of v = sqrt(a) eps - sqrt(1 - a) x0 is 1 / a times that of eps (Salimans & Ho 2022, appendix D).
    Unweighted, a short training never learns the colour of a tile, which is decided where a is tiny.
    """
    return (1.0 / schedule.alphas_cumprod[timestep.cpu()]).clamp(max=cap).float().to(timestep.device)


def drop_condition(
    condition: torch.Tensor, null: torch.Tensor, probability: float, generator: torch.Generator | None = None
) -> torch.Tensor:
    """Replace whole conditions (all tokens of a sample together) by the null condition with the given probability."""
    dropped = torch.rand(len(condition), generator=generator).to(condition.device) < probability
    return torch.where(dropped[:, None, None], null.to(condition), condition)
