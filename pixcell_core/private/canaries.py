"""Does the mechanism do what the accountant is told? Gradient canaries through the real engine, no model needed.

Pseudo-patients with known random gradient directions, longer than C, are each put in or left out by a coin. The
engine clips, sums, noises and releases as in training; the score of a canary is the inner product of what was
released with its direction. Under the claimed Gaussian mechanism, scores of the two groups are normal with equal
variance and means mu apart, with mu = sqrt(T) / sigma at q = 1. A mu measured well above that means that the code
protects less than the accountant says: too little noise, too wide a clip, noise left out or used twice (in the
spirit of Andrew et al. 2024, "One-shot empirical privacy estimation", and Nasr et al. 2023, "Tight auditing").

Half of the canaries push the same way in every step, half alternate: noise that repeats from step to step cancels in
alternating sums and is seen there alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from scipy.special import log_ndtr, ndtr, ndtri
from torch import Tensor, nn

from pixcell_core.private.accounting import UNIT, GaussianEvent, check_delta, epsilon
from pixcell_core.private.engine import run_private_steps
from pixcell_core.private.noise import NoiseSource
from pixcell_core.private.parameters import PrivacyParameters
from pixcell_core.private.sampling import EveryPatient

_LENGTH = 10.0
"""Length of a canary's gradient in units of C, so that clipping decides what it adds."""


@dataclass(frozen=True)
class CanaryFinding:
    """What the canaries measured.

    Attributes:
        canaries: how many, in and out together.
        claimed_mu: separation that the settings promise, in standard deviations.
        measured_mu: the larger of the two measured separations (steady and alternating canaries).
        epsilon_claimed: the accountant's epsilon at `delta`, per patient.
        epsilon_lower_bound: epsilon that the measurement proves the mechanism to spend at least, per patient.
        delta: of both.
        confidence: of the lower bound, both separations together.
    """

    canaries: int
    claimed_mu: float
    measured_mu: float
    epsilon_claimed: float
    epsilon_lower_bound: float
    delta: float
    confidence: float

    @property
    def consistent(self) -> bool:
        """False when the mechanism has been caught spending more than the accountant says."""
        return self.epsilon_lower_bound <= self.epsilon_claimed

    def __str__(self) -> str:
        verdict = "consistent with" if self.consistent else "CONTRADICTS"
        return (
            f"{self.canaries} gradient canaries: at least epsilon {self.epsilon_lower_bound:.2f} "
            f"({self.confidence:.0%} confidence) {verdict} the claimed {self.epsilon_claimed:.2f} per {UNIT} "
            f"at delta {self.delta:g}; covers the clipping and noise code, not sampling or the model"
        )


def gaussian_epsilon(mu: float, delta: float) -> float:
    """Return the exact epsilon at `delta` of two unit normals `mu` apart (Balle & Wang 2018, theorem 8)."""

    def overshoot(eps: float) -> float:
        return float(ndtr(mu / 2.0 - eps / mu) - math.exp(eps + log_ndtr(-mu / 2.0 - eps / mu)))

    if mu <= 0.0 or overshoot(0.0) <= delta:
        return 0.0
    low, high = 0.0, 1.0
    while overshoot(high) > delta:
        low, high = high, high * 2.0
    for _ in range(60):
        middle = (low + high) / 2.0
        low, high = (middle, high) if overshoot(middle) > delta else (low, middle)
    return high


def check_mechanism(
    noise_multiplier: float,
    steps: int,
    *,
    noise_source: NoiseSource,
    delta: float = 1e-5,
    canaries: int = 800,
    dimension: int = 20_000,
    max_grad_norm: float = 1.0,
    confidence: float = 0.95,
    seed: int = 0,
) -> CanaryFinding:
    """Run the engine on canaries and compare what it leaks with what the accountant says.

    Args:
        noise_multiplier: sigma.
        steps: T; at least 2, so that alternating canaries differ from steady ones.
        noise_source: the source in use.
        delta: at which both epsilons are stated.
        canaries: more of them sharpen the bound; 800 prove a sigma that is 20 % too small in most runs.
        dimension: of the canaries' gradients; large against their number.
        max_grad_norm: C.
        confidence: of the lower bound.
        seed: of the canaries' directions and coins, which are no secrets.
    """
    check_delta(delta)
    cohort = _CanaryCohort(canaries, dimension, seed)
    released = _released_sums(cohort, noise_multiplier, steps, max_grad_norm, noise_source)
    patterns = _patterns(steps)
    level = 1.0 - (1.0 - confidence) / len(patterns)
    measured, bound = -math.inf, -math.inf
    for group, pattern in enumerate(patterns):
        scores = (torch.from_numpy(pattern) @ released) @ cohort.directions.to(torch.float64).T
        mine = cohort.pattern == group
        inside = scores.numpy()[mine & cohort.included]
        outside = scores.numpy()[mine & ~cohort.included]
        mu, lower = _separation(inside, outside, level)
        measured, bound = max(measured, mu), max(bound, lower)
    claimed = epsilon([GaussianEvent(1.0, noise_multiplier, steps)], delta)
    return CanaryFinding(
        canaries=canaries,
        claimed_mu=math.sqrt(steps) / noise_multiplier,
        measured_mu=measured,
        epsilon_claimed=claimed.value,
        epsilon_lower_bound=gaussian_epsilon(bound, delta),
        delta=delta,
        confidence=confidence,
    )


class _CanaryCohort:
    """A batch source whose patients are single rows: a direction with the sign of its pattern in this step."""

    def __init__(self, canaries: int, dimension: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.directions = torch.randn(canaries, dimension, generator=generator)
        self.directions /= self.directions.norm(dim=1, keepdim=True)
        self.included = (torch.rand(canaries, generator=generator) < 0.5).numpy()
        self.pattern = np.arange(canaries) % 2
        self.step = 0

    @property
    def patients(self) -> Sequence[str]:
        return [str(index) for index in np.flatnonzero(self.included)]

    def rows(self, patient: str, k: int, rng: torch.Generator) -> tuple[Tensor, ...]:
        index = int(patient)
        sign = -1.0 if self.pattern[index] and self.step % 2 else 1.0
        return (self.directions[index : index + 1] * sign,)

    def at_step(self, step: int) -> None:
        self.step = step


class _Linear(nn.Module):
    """One vector of parameters; the loss below has the row itself, times a length, as its gradient."""

    def __init__(self, dimension: int) -> None:
        super().__init__()
        self.vector = nn.Parameter(torch.zeros(dimension))


class _Recorder(torch.optim.Optimizer):
    """An optimiser that keeps every released update and moves nothing."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__(parameters, {})
        self.released: list[Tensor] = []

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        (parameter,) = self.param_groups[0]["params"]
        self.released.append(parameter.grad.detach().to(torch.float64).clone())


def _released_sums(
    cohort: _CanaryCohort, noise_multiplier: float, steps: int, max_grad_norm: float, source: NoiseSource
) -> Tensor:
    """Return what the engine releases, shape (steps, dimension)."""
    model = _Linear(cohort.directions.shape[1])
    recorder = _Recorder([model.vector])

    def loss(module: nn.Module, rows: tuple[Tensor, ...]) -> Tensor:
        assert isinstance(module, _Linear)
        return _LENGTH * max_grad_norm * (rows[0] @ module.vector)

    run_private_steps(
        model,
        loss,
        cohort,
        PrivacyParameters(noise_multiplier, max_grad_norm, 1.0, steps, 1.0, 1, 1),
        recorder,
        noise_source=source,
        sampler=EveryPatient(),
        reserve=cohort.at_step,
    )
    return torch.stack(recorder.released)


def _patterns(steps: int) -> list[npt.NDArray[np.float64]]:
    return [np.ones(steps), np.where(np.arange(steps) % 2 == 0, 1.0, -1.0)]


def _separation(
    inside: npt.NDArray[np.float64], outside: npt.NDArray[np.float64], level: float
) -> tuple[float, float]:
    """Return the distance of two groups in pooled standard deviations, and its one-sided lower bound."""
    n, m = len(inside), len(outside)
    pooled = ((n - 1) * inside.var(ddof=1) + (m - 1) * outside.var(ddof=1)) / (n + m - 2)
    if pooled <= 0.0:
        return math.inf, math.inf
    mu = float((inside.mean() - outside.mean()) / math.sqrt(pooled))
    # Large-sample standard error of a standardised mean difference (Hedges & Olkin 1985, section 5).
    error = math.sqrt(1.0 / n + 1.0 / m + mu * mu / (2.0 * (n + m - 2)))
    return mu, mu - float(ndtri(level)) * error
