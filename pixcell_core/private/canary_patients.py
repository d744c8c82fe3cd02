"""The one-run audit: a real private training with canary patients among public ones, and guesses about who took part.

Canary patients are made up: random latents under random conditions, so that nobody is in them and each pulls the
model its own way. A fair coin puts each into the cohort. The auditor sees what the strongest observer of a federated
study sees (every released update, every model between) and knows the canaries, not the coins; from the canaries' own
clipped gradients at each step it estimates all coins together (linear least squares with the coins' prior, the best
linear guess under Gaussian noise). The quarter with the highest scores is guessed in, the lowest quarter out, the rest is
left open; these numbers are fixed here, before any score exists.

It is a smoke alarm: it can prove that a training leaks more than it claims, never that it does not.
Legend: m canaries, d trained parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pixcell_core.diffusion import training_loss
from pixcell_core.errors import BadInputError
from pixcell_core.private.accounting import ADJACENCY, UNIT, epsilon
from pixcell_core.private.clipping import clip_scale
from pixcell_core.private.engine import run_private_steps
from pixcell_core.private.events import GaussianEvent
from pixcell_core.private.joint_gradients import rows_stay_apart
from pixcell_core.private.noise import NoiseSource
from pixcell_core.private.one_run_bound import one_run_ceiling, one_run_lower_bound
from pixcell_core.private.parameters import PrivacyParameters
from pixcell_core.private.patient_gradients import PatientBatchSource, PatientGradientEngine
from pixcell_core.private.sampling import EveryPatient
from pixcell_core.private.signal import probing

GUESSED_SHARE = 0.5
"""Share of the coins that is guessed, half of it in and half of it out."""

ASSUMED_NOISE = 0.25
"""Share of the claimed noise that the guesses reckon with: sharpest where noise is missing, which is what is looked for,
and little worse where it is not."""

FEWEST_CANARIES = 20
TIMESTEPS = 1000
_AT_ONCE = 16
_LEARNING_RATE = 1e-3


@dataclass(frozen=True)
class OneRunFinding:
    """What one audited run proved.

    Attributes:
        canaries: m, made-up patients, each in or out by a coin.
        public_patients: others that took part, all public.
        steps, noise_multiplier: of the run; everybody in every step.
        guesses, correct: coins guessed by the rule fixed beforehand, and how many of them rightly.
        epsilon_lower_bound: at least so much epsilon per patient at `delta` was spent, with `confidence`.
        ceiling: the bound had every guess been right; more than this cannot be seen with so many canaries.
        epsilon_claimed: the accountant's, per patient at `delta`.
    """

    canaries: int
    public_patients: int
    steps: int
    noise_multiplier: float
    guesses: int
    correct: int
    epsilon_lower_bound: float
    ceiling: float
    epsilon_claimed: float
    delta: float
    confidence: float
    unit: str = UNIT
    adjacency: str = ADJACENCY

    @property
    def consistent(self) -> bool:
        """False when the run has been caught spending more than the accountant says."""
        return self.epsilon_lower_bound <= self.epsilon_claimed

    def __str__(self) -> str:
        verdict = "consistent with" if self.consistent else "CONTRADICTS"
        return (
            f"{self.correct} of {self.guesses} guesses about {self.canaries} canary patients were right: at least epsilon "
            f"{self.epsilon_lower_bound:.2f} per {self.unit} at delta {self.delta:g} ({self.confidence:.0%} confidence), "
            f"{verdict} the claimed {self.epsilon_claimed:.2f}. So many guesses can prove {self.ceiling:.2f} at most. "
            "Not seen: leaks above that, patients other than these canaries, sampling below q = 1, conditions of "
            "surrogates, and whatever else leaves a site."
        )


def audit_with_canaries(
    model: nn.Module,
    *,
    noise_multiplier: float,
    steps: int,
    canaries: int,
    noise_source: NoiseSource,
    public: PatientBatchSource | None = None,
    public_patients: int = 0,
    tiles_per_patient: int = 4,
    max_grad_norm: float | None = None,
    delta: float = 1e-5,
    confidence: float = 0.95,
    seed: int = 0,
    on_step: Callable[[int], None] | None = None,
) -> OneRunFinding:
    """Train an adapted model with canaries, guess the coins, and say what the guesses prove.

    Args:
        model: a transformer with a trainable adapter; it is trained in place and of no use afterwards.
        noise_multiplier: sigma.
        steps: T.
        canaries: m, at least 20.
        noise_source: the source in use; it also throws the coins.
        public: patients who take part beside the canaries; rows of latents, conditions, time steps and noise.
        public_patients: how many `public` has.
        tiles_per_patient: k.
        max_grad_norm: C; by default one that clips nine tenths of the canaries (nobody private decides it).
        delta: of both epsilons.
        confidence: of the lower bound, one-sided.
        seed: of the canaries, who are no secret.
        on_step: called with each step's number.

    Raises:
        BadInputError: too few canaries to prove anything.
    """
    if canaries < FEWEST_CANARIES:
        raise BadInputError(
            f"{canaries} canary patients can prove next to nothing.",
            hint=f"Take at least {FEWEST_CANARIES}; 100 can prove an epsilon of up to 2.8, 1000 of up to 5.1.",
            code="canary-settings",
        )
    cohort = _Cohort(_made_up(model, canaries, seed), noise_source.uniform(canaries) < 0.5, public)
    bound = max_grad_norm if max_grad_norm is not None else _clipping_most(model, cohort.canary_rows)
    settings = PrivacyParameters(
        noise_multiplier, bound, 1.0, steps, float(canaries + public_patients), tiles_per_patient, 1
    )
    observer = _Observer(model, cohort, settings)

    def before_step(step: int) -> None:
        observer.look()
        if on_step is not None:
            on_step(step)

    optimizer = _Observed(list(observer.engine.trainable), observer)
    run_private_steps(
        model,
        _denoising,
        cohort,
        settings,
        optimizer,
        noise_source=noise_source,
        sampler=EveryPatient(),
        reserve=before_step,
    )
    each = int(canaries * GUESSED_SHARE / 2)
    ranked = torch.argsort(observer.scores(), descending=True).numpy()
    correct = int(cohort.included[ranked[:each]].sum() + (~cohort.included[ranked[-each:]]).sum())
    proven = one_run_lower_bound(canaries, 2 * each, correct, delta=delta, confidence=confidence)
    return OneRunFinding(
        canaries=canaries,
        public_patients=public_patients,
        steps=steps,
        noise_multiplier=noise_multiplier,
        guesses=2 * each,
        correct=correct,
        epsilon_lower_bound=proven,
        ceiling=one_run_ceiling(canaries, 2 * each, delta=delta, confidence=confidence),
        epsilon_claimed=epsilon([GaussianEvent(1.0, noise_multiplier, steps)], delta).value,
        delta=delta,
        confidence=confidence,
    )


class _Cohort:
    """The canaries whose coin fell that way, and the public patients."""

    def __init__(
        self, rows: list[tuple[Tensor, ...]], included: object, public: PatientBatchSource | None
    ) -> None:
        import numpy as np

        self.canary_rows = rows
        self.included = np.asarray(included, dtype=bool)
        self._public = public
        self._canaries = {f"canary {i}": rows[i] for i in np.flatnonzero(self.included)}

    @property
    def patients(self) -> Sequence[str]:
        return [*self._canaries, *(self._public.patients if self._public is not None else [])]

    def rows(self, patient: str, k: int, rng: torch.Generator) -> tuple[Tensor, ...]:
        if patient in self._canaries:
            return self._canaries[patient]
        assert self._public is not None
        return self._public.rows(patient, k, rng)


class _Observer:
    """Sees each model and each released sum; knows the canaries' gradients, not the coins."""

    def __init__(self, model: nn.Module, cohort: _Cohort, settings: PrivacyParameters) -> None:
        self.engine = PatientGradientEngine(model, _denoising, settings)
        self._rows, self._settings = cohort.canary_rows, settings
        with probing(model, self._rows[0], count=3) as rows:
            apart = rows_stay_apart(model, _denoising, self.engine.trainable, rows)
        self.engine.share_passes(apart)
        m = len(self._rows)
        self._gram = torch.zeros(m, m, dtype=torch.float64)
        self._seen = torch.zeros(m, dtype=torch.float64)
        self._gradients = torch.zeros(0)

    def look(self) -> None:
        """Compute every canary's clipped gradient (m, d) at the present model."""
        flat = []
        for start in range(0, len(self._rows), _AT_ONCE):
            for unit in self.engine.joint_unit_gradients(self._rows[start : start + _AT_ONCE]):
                scale = clip_scale(unit.norm, self._settings.max_grad_norm) if unit.usable else 0.0
                flat.append(torch.cat([t.flatten() for t in unit.tensors]).double().cpu() * scale)
        self._gradients = torch.stack(flat)

    def take(self, released: Tensor) -> None:
        """Take in a step's released update (d,)."""
        self._gram += self._gradients @ self._gradients.T
        self._seen += self._gradients @ (released.double().cpu() * self._settings.expected_patients)

    def scores(self) -> Tensor:
        """Posterior means (m,) of the coins, with their prior mean 1/2 and variance 1/4."""
        variance = (ASSUMED_NOISE * self._settings.noise_standard_deviation) ** 2
        system = self._gram / variance + 4.0 * torch.eye(len(self._seen), dtype=torch.float64)
        return torch.linalg.solve(system, self._seen / variance + 2.0)


class _Observed(torch.optim.Adam):
    """Adam that shows the observer each released update before it uses it."""

    def __init__(self, parameters: list[nn.Parameter], observer: _Observer) -> None:
        super().__init__(parameters, lr=_LEARNING_RATE)
        self._observer = observer

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        self._observer.take(torch.cat([p.grad.flatten() for p in self.param_groups[0]["params"]]))
        super().step()


def _made_up(model: nn.Module, canaries: int, seed: int) -> list[tuple[Tensor, ...]]:
    """One row per canary: latents, condition, time step and noise, all random."""
    config = model.config
    channels, side = int(config["in_channels"]), int(config["sample_size"])  # type: ignore[index,arg-type]
    tokens, width = int(config["caption_num_tokens"]), int(config["caption_channels"])  # type: ignore[index,arg-type]
    g = torch.Generator().manual_seed(seed)
    made: list[tuple[Tensor, ...]] = []
    for _ in range(canaries):
        latents, noise = (torch.randn(1, channels, side, side, generator=g) for _ in range(2))
        timestep = torch.randint(TIMESTEPS // 10, TIMESTEPS, (1,), generator=g)
        made.append((latents, torch.randn(1, tokens, width, generator=g), timestep, noise))
    return made


def _clipping_most(model: nn.Module, canary_rows: Sequence[tuple[Tensor, ...]]) -> float:
    """The tenth percentile of the norms of the canaries' gradients at the start."""
    engine = PatientGradientEngine(model, _denoising, PrivacyParameters(1.0, 1.0, 1.0, 1, 1.0, 1, 1))
    norms = sorted(engine.unit_gradient(rows).norm for rows in canary_rows)
    return max(norms[len(norms) // 10], 1e-12)


def _denoising(model: nn.Module, rows: tuple[Tensor, ...]) -> Tensor:
    device = next(model.parameters()).device
    latents, condition, timestep, noise = (tensor.to(device) for tensor in rows)
    return training_loss(model, latents, condition, timestep=timestep, noise=noise)
