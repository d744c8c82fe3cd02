"""The bound at step 0 and the detached noise, each against a plain formula and with the mutant that must fail."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from pixcell_core.diffusion import linear_schedule, loss, training_loss
from pixcell_core.diffusion.loss import variance_bound

SCHEDULE = linear_schedule()
BETA = 1e-4
"""At step 0 the posterior mean is the predicted clean value: alphas_cumprod before it is 1."""


def _plain(clean: float, noise: float, guess: float, value: float, *, exact: bool) -> float:
    """Bits to code `clean` in a bin of 2/255 under the predicted Gaussian, with Python floats."""
    noisy = math.sqrt(1 - BETA) * clean + math.sqrt(BETA) * noise
    mean = (noisy - math.sqrt(BETA) * guess) / math.sqrt(1 - BETA)
    second, level = 1e-4 + (0.02 - 1e-4) / 999, 1 - BETA
    posterior = second * (1 - level) / (1 - level * (1 - second))
    share = (value + 1) / 2
    scale = math.exp(0.5 * (share * math.log(BETA) + (1 - share) * math.log(posterior)))

    def cdf(x: float) -> float:
        if exact:
            return 0.5 * (1 + math.erf(x / math.sqrt(2)))
        return 0.5 * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    upper, lower = cdf((clean - mean + 1 / 255) / scale), cdf((clean - mean - 1 / 255) / scale)
    mass = upper if clean < -0.999 else 1 - lower if clean > 0.999 else upper - lower
    return -math.log2(max(mass, 1e-12))


def _ours(clean: float, noise: float, guess: float, value: float) -> float:
    x, n, g, v = (torch.full((1, 1, 1, 1), z, dtype=torch.float64) for z in (clean, noise, guess, value))
    t = torch.tensor([0])
    return variance_bound(SCHEDULE, x, SCHEDULE.add_noise(x, n, t), g, v, t).item()


CASES = [
    (0.2, 0.5, 0.4, 0.3),
    (-0.7, -1.2, -1.0, -1.0),
    (0.0, 0.1, 0.6, 1.0),
    (-1.0, 0.3, 0.2, 0.0),
    (1.0, 0.3, 0.9, 0.5),
    (2.5, 0.3, 0.1, 0.5),
]


@pytest.mark.parametrize("case", CASES)
def test_likelihood_equals_the_plain_formula(case: tuple[float, float, float, float]) -> None:
    assert _ours(*case) == pytest.approx(_plain(*case, exact=False), rel=1e-5, abs=1e-7)
    assert _ours(*case) == pytest.approx(_plain(*case, exact=True), rel=0.02, abs=2e-3)


def test_mutant_nats_or_a_bin_of_another_width_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    case, right = CASES[0], loss._discretised_log_likelihood
    for wrong in (
        lambda x, mean, log: right(x, mean, log) * math.log(2.0),
        lambda x, mean, log: right(x, mean, 2.0 * log),
    ):
        monkeypatch.setattr(loss, "_discretised_log_likelihood", wrong)
        assert _ours(*case) != pytest.approx(_plain(*case, exact=False), rel=0.02)


class _Answer(nn.Module):
    def __init__(self, output: torch.Tensor) -> None:
        super().__init__()
        self.output = output

    def forward(self, *args: torch.Tensor, **kwargs: object) -> tuple[torch.Tensor]:
        return (self.output,)


def _noise_gradient() -> tuple[torch.Tensor, torch.Tensor]:
    """The gradient of the loss towards the predicted noise, and that of the squared error alone."""
    generator = torch.Generator().manual_seed(4)
    x, noise = (torch.randn(3, 16, 4, 4, generator=generator) for _ in range(2))
    output = torch.randn(3, 32, 4, 4, generator=generator, requires_grad=True)
    t = torch.tensor([0, 3, 700])
    total = training_loss(_Answer(output), x, torch.zeros(3, 1, 4), timestep=t, noise=noise).sum()
    (gradient,) = torch.autograd.grad(total, output)
    return gradient[:, :16], 2 * (output.detach()[:, :16] - noise) / noise[0].numel()


def test_the_noise_learns_from_its_squared_error_alone() -> None:
    found, wanted = _noise_gradient()
    assert torch.allclose(found, wanted, atol=1e-7)


def test_mutant_a_bound_that_reaches_the_noise_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "detach", lambda self: self)
    found, _ = _noise_gradient()
    monkeypatch.undo()
    _, wanted = _noise_gradient()
    assert not torch.allclose(found, wanted.detach(), atol=1e-4)
