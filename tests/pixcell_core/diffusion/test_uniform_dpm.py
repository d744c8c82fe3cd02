"""DPM-Solver++ on the uniform grid: against its plain formula, and against the exact solution for a Gaussian."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from pixcell_core.diffusion import PixCellPipeline
from pixcell_core.diffusion.uniform_dpm import UniformDPMScheduler

LOG_ALPHA = 0.5 * np.cumsum(np.log(1.0 - np.linspace(1e-4, 0.02, 1000)))


def _level(t: float) -> tuple[float, float, float]:
    """alpha, sigma, lambda at continuous time t in [1/1000, 1]: log(alpha) linear between the training steps."""
    place = t * 1000.0 - 1.0
    low = min(math.floor(place + 1e-12), 998)
    log_alpha = LOG_ALPHA[low] + (place - low) * (LOG_ALPHA[low + 1] - LOG_ALPHA[low])
    alpha = math.exp(log_alpha)
    sigma = math.sqrt(1.0 - alpha * alpha)
    return alpha, sigma, math.log(alpha) - math.log(sigma)


def _plain(noise_of, x: torch.Tensor, steps: int) -> torch.Tensor:
    """Algorithm 2 of DPM-Solver++, written out; first and last step first order. `noise_of(x, model_time)`."""
    times = [1.0 + i * (1.0 / 1000 - 1.0) / steps for i in range(steps + 1)]
    clean: list[torch.Tensor] = []
    for i, (s, t) in enumerate(itertools.pairwise(times)):
        alpha_s, sigma_s, lambda_s = _level(s)
        alpha_t, sigma_t, lambda_t = _level(t)
        clean.append((x - sigma_s * noise_of(x, (s - 1.0 / 1000) * 1000.0)) / alpha_s)
        h = lambda_t - lambda_s
        d = clean[-1]
        if 0 < i < steps - 1:
            r = (lambda_s - _level(times[i - 1])[2]) / h
            d = (1.0 + 1.0 / (2.0 * r)) * clean[-1] - 1.0 / (2.0 * r) * clean[-2]
        x = sigma_t / sigma_s * x - alpha_t * (math.exp(-h) - 1.0) * d
    return x


def _run(noise_of, x: torch.Tensor, steps: int) -> torch.Tensor:
    sampler = UniformDPMScheduler()
    sampler.set_timesteps(steps)
    for t in sampler.timesteps:
        x = sampler.step(noise_of(x, float(t)), t, x).prev_sample
    return x


def _odd_noise(x: torch.Tensor, time: float) -> torch.Tensor:
    return torch.tanh(x) + 0.3 * math.sin(time / 90.0) * x


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 20, 33])
def test_every_step_follows_the_formula(steps: int) -> None:
    start = torch.randn(2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(_run(_odd_noise, start, steps), _plain(_odd_noise, start, steps), atol=1e-10)


def test_the_grid_is_uniform_and_fractional() -> None:
    sampler = UniformDPMScheduler()
    sampler.set_timesteps(20)
    assert torch.allclose(sampler.timesteps, torch.arange(20, dtype=torch.float64) * -49.95 + 999.0)
    alpha, sigma = sampler.levels([0.0, 999.0, 0.5])
    assert np.allclose(alpha**2 + sigma**2, 1.0)
    betas = np.linspace(1e-4, 0.02, 1000)
    assert np.allclose(alpha[:2] ** 2, [1 - betas[0], np.prod(1 - betas)])
    assert alpha[2] == pytest.approx(
        math.sqrt(math.sqrt(1 - betas[0]) * math.sqrt((1 - betas[0]) * (1 - betas[1])))
    )


def _gaussian_error(steps: int, run, centre: float = 0.7, spread: float = 1.0) -> float:
    """Distance to the exact probability-flow solution for data N(centre, spread^2), where noise is known exactly."""

    def noise_of(x: torch.Tensor, time: float) -> torch.Tensor:
        alpha, sigma, _ = _level((time + 1.0) / 1000.0)
        return sigma * (x - alpha * centre) / (alpha**2 * spread**2 + sigma**2)

    start = torch.linspace(-2, 2, 9, dtype=torch.float64)
    (a1, s1, _), (a0, s0, _) = _level(1.0), _level(1.0 / 1000)
    width0, width1 = (math.sqrt(a * a * spread * spread + s * s) for a, s in ((a0, s0), (a1, s1)))
    exact = a0 * centre + width0 / width1 * (start - a1 * centre)
    return float((run(noise_of, start, steps) - exact).abs().max())


def test_second_order_convergence_to_the_exact_gaussian_solution() -> None:
    errors = [_gaussian_error(n, _run) for n in (160, 320, 640)]
    assert errors[-1] < 1e-4
    assert all(coarse / fine > 3.4 for coarse, fine in itertools.pairwise(errors))


def test_a_first_order_mutant_converges_slower() -> None:
    def first_order(noise_of, x: torch.Tensor, steps: int) -> torch.Tensor:
        sampler = UniformDPMScheduler()
        sampler.set_timesteps(steps)
        for t in sampler.timesteps:
            sampler._last = None
            x = sampler.step(noise_of(x, float(t)), t, x).prev_sample
        return x

    errors = [_gaussian_error(n, first_order) for n in (160, 320, 640)]
    assert all(coarse / fine < 2.5 for coarse, fine in itertools.pairwise(errors))
    assert errors[-1] > 5 * _gaussian_error(640, _run)


class _SecondOrderToTheEnd(UniformDPMScheduler):
    def set_timesteps(self, num_inference_steps: int, device=None) -> None:
        super().set_timesteps(num_inference_steps, device)
        self.num_inference_steps += 1


class _ToTheCleanImage(UniformDPMScheduler):
    def set_timesteps(self, num_inference_steps: int, device=None) -> None:
        super().set_timesteps(num_inference_steps, device)
        self._times = np.linspace(999.0, 0.0, num_inference_steps + 2)[:-1]


class _WholeTimes(UniformDPMScheduler):
    def levels(self, times):
        return super().levels(np.round(times))


@pytest.mark.parametrize("mutant", [_SecondOrderToTheEnd, _ToTheCleanImage, _WholeTimes])
def test_a_wrong_grid_or_order_is_seen_by_the_formula(mutant, monkeypatch: pytest.MonkeyPatch) -> None:
    start = torch.randn(2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    monkeypatch.setitem(globals(), "UniformDPMScheduler", mutant)
    assert float((_run(_odd_noise, start, 20) - _plain(_odd_noise, start, 20)).abs().max()) > 1e-5


def test_noise_is_added_at_fractional_times() -> None:
    clean, noise = torch.full((2, 1, 1, 1), 3.0), torch.full((2, 1, 1, 1), 5.0)
    noisy = UniformDPMScheduler().add_noise(clean, noise, torch.tensor([0.0, 499.5]))
    for row, t in zip(noisy.flatten().tolist(), (0.001, 0.5005), strict=True):
        alpha, sigma, _ = _level(t)
        assert row == pytest.approx(3.0 * alpha + 5.0 * sigma, abs=1e-5)


def test_a_run_of_the_pipeline_follows_the_formula(tiny_transformer, tiny_vae) -> None:
    model = tiny_transformer(1)
    source = torch.Generator().manual_seed(3)
    condition = torch.randn(1, 1, 12, generator=source)
    start = torch.randn(1, 16, 16, 16, generator=source)
    null = model.unconditional(1)

    def noise_of(x: torch.Tensor, time: float) -> torch.Tensor:
        at = torch.tensor([time])
        with torch.inference_mode():
            conditional, without = (
                model(x.float(), encoder_hidden_states=c, timestep=at).sample[:, :16].double()
                for c in (condition, null)
            )
        return without + 2.0 * (conditional - without)

    found = PixCellPipeline(tiny_vae, model, "dpm-uniform")(
        condition, num_inference_steps=9, latents=start, output_type="latent"
    ).images
    assert torch.allclose(found.double(), _plain(noise_of, start.double(), 9), atol=1e-4)
