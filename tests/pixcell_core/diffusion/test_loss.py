"""The published loss: against diffusers' schedulers, closed forms, and the promise that the bound leaves the noise alone."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import DDPMScheduler
from torch import nn

from pixcell_core.diffusion import drop_condition, linear_schedule, training_loss
from pixcell_core.diffusion.loss import _normal_kl, variance_bound

SCHEDULE = linear_schedule()


class _Fixed(nn.Module):
    """A model that always answers with the given output."""

    def __init__(self, output: torch.Tensor) -> None:
        super().__init__()
        self.output = output

    def forward(self, *args: torch.Tensor, **kwargs: object) -> tuple[torch.Tensor]:
        return (self.output,)


def test_schedule_equals_diffusers() -> None:
    stock = DDPMScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear")
    assert torch.allclose(SCHEDULE.alphas_cumprod.float(), stock.alphas_cumprod, atol=2e-6)
    x, noise, t = torch.randn(4, 16, 4, 4), torch.randn(4, 16, 4, 4), torch.tensor([0, 10, 500, 999])
    assert torch.allclose(SCHEDULE.add_noise(x, noise, t), stock.add_noise(x, noise, t), atol=1e-5)


def test_perfect_noise_leaves_only_the_variance_term() -> None:
    x, noise, t = torch.randn(3, 16, 4, 4), torch.randn(3, 16, 4, 4), torch.tensor([5, 300, 900])
    lower = torch.full_like(noise, -1.0)  # v = -1 is the lower bound: the true posterior variance
    loss = training_loss(
        _Fixed(torch.cat([noise, lower], 1)), x, torch.zeros(3, 1, 4), timestep=t, noise=noise
    )
    assert torch.allclose(loss, torch.zeros(3), atol=2e-3)


@pytest.mark.parametrize("step", [1, 50, 400, 999])
def test_variance_bound_equals_the_kl_of_the_two_posteriors(step: int) -> None:
    """Oracle: posteriors written out with Python floats from the betas themselves."""
    torch.manual_seed(step)
    clean, noise = torch.randn(1, 1, 1, 1).double(), torch.randn(1, 1, 1, 1).double()
    guess, value, t = noise + 0.1, torch.full((1, 1, 1, 1), 0.3).double(), torch.tensor([step])
    noisy = SCHEDULE.add_noise(clean, noise, t)
    got = variance_bound(SCHEDULE, clean, noisy, guess, value, t)

    betas = [1e-4 + (0.02 - 1e-4) * i / 999 for i in range(1000)]
    level = math.prod(1 - b for b in betas[: step + 1])
    before = math.prod(1 - b for b in betas[:step])
    beta = betas[step]

    def posterior_mean(x0: float, xt: float) -> float:
        return (beta * math.sqrt(before) * x0 + (1 - before) * math.sqrt(1 - beta) * xt) / (1 - level)

    xt, x0 = noisy.item(), clean.item()
    x0_guess = (xt - math.sqrt(1 - level) * guess.item()) / math.sqrt(level)
    low, high = math.log(beta * (1 - before) / (1 - level)), math.log(beta)
    log_var = 0.65 * high + 0.35 * low
    gap = posterior_mean(x0, xt) - posterior_mean(x0_guess, xt)
    want = 0.5 * (log_var - low - 1 + math.exp(low - log_var) + gap**2 * math.exp(-log_var)) / math.log(2)
    assert got.item() == pytest.approx(want, rel=1e-6, abs=1e-9)


def test_the_bound_has_no_gradient_towards_the_noise() -> None:
    x, noise, t = torch.randn(2, 16, 4, 4), torch.randn(2, 16, 4, 4), torch.tensor([0, 20])
    output = torch.randn(2, 32, 4, 4, requires_grad=True)
    training_loss(_Fixed(output), x, torch.zeros(2, 1, 4), timestep=t, noise=noise).sum().backward()
    with_bound = output.grad[:, :16].clone()  # type: ignore[index]
    alone = torch.randn(0)
    plain = output.detach()[:, :16].clone().requires_grad_(True)
    ((plain - noise).pow(2).flatten(1).mean(1)).sum().backward()
    alone = plain.grad  # type: ignore[assignment]
    assert torch.allclose(with_bound, alone, atol=1e-6)
    assert output.grad[:, 16:].abs().sum() > 0  # type: ignore[index]


def test_likelihood_at_step_zero_is_finite_and_prefers_the_truth() -> None:
    x, noise, t = torch.rand(1, 16, 4, 4) * 1.8 - 0.9, torch.randn(1, 16, 4, 4), torch.tensor([0])
    noisy = SCHEDULE.add_noise(x, noise, t)
    value = torch.zeros_like(x)
    right = variance_bound(SCHEDULE, x, noisy, noise, value, t)
    wrong = variance_bound(SCHEDULE, x, noisy, noise + 5, value, t)
    assert torch.isfinite(right).all()
    assert right.item() < wrong.item()


def test_kl_of_equal_gaussians_is_zero() -> None:
    a = torch.randn(4)
    assert torch.equal(_normal_kl(a, a, a, a), torch.zeros(4))


def test_dropping_replaces_whole_conditions_by_the_null() -> None:
    condition, null = torch.ones(1000, 4, 2), torch.zeros(4, 2)
    dropped = drop_condition(condition, null, 0.1, torch.Generator().manual_seed(0))
    share = (dropped.flatten(1).sum(1) == 0).float().mean().item()
    assert 0.07 < share < 0.13
    assert set(dropped.flatten(1).sum(1).tolist()) == {0.0, 8.0}
