"""The samplers by name; each is called as diffusers' schedulers are and fits the published noise schedule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler

from pixcell_core.diffusion.uniform_dpm import UniformDPMScheduler
from pixcell_core.errors import BadInputError

PUBLISHED_SCHEDULE: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 1e-4,
    "beta_end": 0.02,
}
"""1000 steps with linear beta: what every published PixCell model was trained with."""


def default_scheduler() -> DPMSolverMultistepScheduler:
    """DPM-Solver++ (order 2, midpoint) on the published schedule."""
    return DPMSolverMultistepScheduler(
        **PUBLISHED_SCHEDULE,
        beta_schedule="linear",
        algorithm_type="dpmsolver++",
        solver_order=2,
        prediction_type="epsilon",
    )


def _ddim() -> DDIMScheduler:
    # Trailing steps begin at the last training step, where the latents are noise, and end on the clean image.
    return DDIMScheduler(
        **PUBLISHED_SCHEDULE, beta_schedule="linear", clip_sample=False, timestep_spacing="trailing"
    )


def _euler() -> EulerDiscreteScheduler:
    return EulerDiscreteScheduler(**PUBLISHED_SCHEDULE, beta_schedule="linear", timestep_spacing="linspace")


SAMPLERS: dict[str, tuple[str, Callable[[], Any]]] = {
    "dpm": ("DPM-Solver++ on the grid of the published folders (the default)", default_scheduler),
    "dpm-uniform": (
        "DPM-Solver++ on the uniform grid of PixCell's own scripts",
        lambda: UniformDPMScheduler(**PUBLISHED_SCHEDULE),
    ),
    "ddim": ("DDIM; eta 0 is deterministic, eta 1 is as noisy as DDPM", _ddim),
    "euler": ("Euler's method on the probability-flow equation", _euler),
}
"""Name to (one line about it, a function that makes a fresh one)."""


def sampler_named(name: str) -> Any:
    """A fresh sampler.

    Raises:
        BadInputError: no sampler has this name; the message lists those there are.
    """
    if name not in SAMPLERS:
        raise BadInputError(
            f"There is no sampler {name!r}.",
            hint=f"Known samplers: {', '.join(SAMPLERS)}.",
            code="unknown-sampler",
        )
    return SAMPLERS[name][1]()
