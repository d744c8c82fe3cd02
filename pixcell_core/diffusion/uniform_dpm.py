"""DPM-Solver++ 2M on the grid PixCell's own sampling scripts use: uniform in time, ending at the first training step.

Differs from the scheduler of the published folders in three ways: times are uniform and fractional, the last one is
time 0 (training step 1 of 1000, not the clean image), and the first and the last step are first order whatever
their number. Legend: alpha and sigma scale clean latents and noise, lambda = log(alpha / sigma).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin, SchedulerOutput


class UniformDPMScheduler(SchedulerMixin, ConfigMixin):  # type: ignore[misc]
    """DPM-Solver++ (Lu et al. 2022, algorithm 2: multistep, order 2, data prediction) on a uniform time grid.

    Called as diffusers' schedulers are. Between the training steps log(alpha) is interpolated linearly in time, so
    the schedule is continuous; model times run from 999 down to 0 for 1000 training steps.
    """

    order = 1
    init_noise_sigma = 1.0

    @register_to_config
    def __init__(
        self, num_train_timesteps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02
    ) -> None:
        betas = np.linspace(beta_start, beta_end, num_train_timesteps, dtype=np.float64)
        self._log_alphas = 0.5 * np.cumsum(np.log1p(-betas))
        self._times = np.empty(0)
        self._begin: int | None = None
        self._index = 0
        self._last: torch.Tensor | None = None
        self.timesteps = torch.empty(0, dtype=torch.float64)
        self.num_inference_steps = 0

    def levels(self, times: Any) -> tuple[np.ndarray, np.ndarray]:
        """alpha and sigma at (fractional) model times 0..T-1, float64."""
        log_alpha = np.interp(
            np.asarray(times, dtype=np.float64), np.arange(len(self._log_alphas)), self._log_alphas
        )
        return np.exp(log_alpha), np.sqrt(-np.expm1(2.0 * log_alpha))

    def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
        """Lay out the grid and forget the previous run."""
        self.num_inference_steps = num_inference_steps
        self._times = np.linspace(len(self._log_alphas) - 1, 0.0, num_inference_steps + 1)
        self.timesteps = torch.from_numpy(self._times[:-1].copy()).to(device)
        self._begin, self._index, self._last = None, 0, None

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Start at a later step of the grid, as image-to-image does."""
        self._begin, self._index, self._last = begin_index, begin_index, None

    @property
    def begin_index(self) -> int | None:
        """The step the run starts at, where one was set."""
        return self._begin

    def scale_model_input(self, sample: torch.Tensor, timestep: Any = None) -> torch.Tensor:
        """The sample itself: this solver works at the variance the model was trained with."""
        return sample

    def add_noise(
        self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
    ) -> torch.Tensor:
        """alpha x0 + sigma noise at fractional times (B,)."""
        alpha, sigma = (
            torch.from_numpy(level).to(original_samples)[:, None, None, None]
            for level in self.levels(timesteps.double().cpu().numpy())
        )
        return alpha * original_samples + sigma * noise

    def step(
        self,
        model_output: torch.Tensor,
        timestep: Any,
        sample: torch.Tensor,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[torch.Tensor]:
        """One step towards the clean image.

        Args:
            model_output: predicted noise at the current step.
            timestep: unused, the steps are counted; part of the shared call.
            sample: latents at the current step.
            return_dict: return an object with `.prev_sample`, else a one-tuple.
        """
        first = self._begin or 0
        around = self._times[max(self._index - 1, 0) : self._index + 2]
        alpha, sigma = self.levels(around)
        lambdas = np.log(alpha / sigma)
        now = 0 if self._index == 0 else 1
        clean = (sample - float(sigma[now]) * model_output) / float(alpha[now])
        step = float(lambdas[now + 1] - lambdas[now])
        direction = clean
        ends = self._index == first or self._index == self.num_inference_steps - 1
        if not ends and self._last is not None:
            # Extrapolate the prediction to the middle of the step along the slope of the last two.
            before = float(lambdas[now] - lambdas[now - 1])
            direction = clean + (step / (2.0 * before)) * (clean - self._last)
        moved = float(sigma[now + 1] / sigma[now]) * sample
        moved = moved - float(alpha[now + 1] * np.expm1(-step)) * direction
        self._last = clean
        self._index += 1
        return SchedulerOutput(prev_sample=moved) if return_dict else (moved,)
