"""Patient-level DP-SGD: a plain loop, one patient per backward pass.

The mechanism (Abadi et al. 2016, "Deep learning with differential privacy", algorithm 1, with the patient
as its unit, as in McMahan et al. 2018, "Learning differentially private recurrent language models"):

    for each step:
        for each sampled patient u:  g_u = gradient of the mean loss over k tiles x K noise draws
                                     s  += g_u * min(1, C / |g_u|)
        update = (s + N(0, sigma^2 C^2)) / expected patients        # released
        optimiser step on the update                                # post-processing

Adding or removing one patient moves `s` by at most C, whatever the patient's tiles are and however many
there are. A loop needs no per-sample hooks, so that any module, gradient checkpointing and autocast keep
working.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from pixcell_core.errors import BadInputError
from pixcell_core.private.noise import NoiseSource, gaussian_like
from pixcell_core.private.parameters import LocalStepTrace, PrivacyParameters, PrivateRoundReport
from pixcell_core.private.sampling import PatientSampler
from pixcell_core.private.signal import require_signal, unchanged_buffers

CLIP_MARGIN = 1.0 - 1e-6
"""Clipping aims this much below C, so that rounding can never carry a contribution over it."""

PerRowLoss = Callable[[nn.Module, tuple[Tensor, ...]], Tensor]
"""Takes the model and rows (each tensor: rows first), returns one loss per row, shape (rows,)."""


class PatientBatchSource(Protocol):
    """Gives the rows of one patient. They may depend on that patient alone."""

    @property
    def patients(self) -> Sequence[str]:
        """The patients of the cohort, each once."""
        ...

    def rows(self, patient: str, k: int, rng: torch.Generator) -> tuple[Tensor, ...]:
        """Return at most `k` chosen tiles, rows first, such as latents (k,C,h,w) and conditions (k,n,d)."""
        ...


@dataclass
class UnitGradient:
    """The gradient of one patient's mean loss: one float32 tensor per trainable parameter."""

    tensors: list[Tensor]
    loss: float
    norm: float

    @property
    def usable(self) -> bool:
        """False when the gradient overflowed or is not a number; such a patient adds zero."""
        return math.isfinite(self.norm)


@dataclass
class GradientSum:
    """The running sum of clipped unit gradients of one step, in float64, with its private diagnostics."""

    tensors: list[Tensor]
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    discarded: int = 0

    def add(self, unit: UnitGradient, max_grad_norm: float) -> None:
        """Add one patient's contribution: its gradient, scaled down to at most `max_grad_norm`."""
        if not unit.usable:
            self.discarded += 1
            return
        scale = clip_scale(unit.norm, max_grad_norm)
        for total, gradient in zip(self.tensors, unit.tensors, strict=True):
            total.add_(gradient.to(torch.float64), alpha=scale)
        self.losses.append(unit.loss)
        self.norms.append(unit.norm)


def clip_scale(norm: float, max_grad_norm: float) -> float:
    """Return the factor that brings an L2 norm of `norm` to at most `max_grad_norm` times CLIP_MARGIN."""
    bound = max_grad_norm * CLIP_MARGIN
    return 1.0 if norm <= bound else bound / norm


def global_norm(tensors: Sequence[Tensor]) -> float:
    """Return the L2 norm over all tensors together, accumulated in float64."""
    return math.sqrt(sum(float(t.to(torch.float64).pow(2).sum()) for t in tensors))


class PatientGradientEngine:
    """Computes, clips, sums and noises patient gradients of a model's trainable parameters.

    Args:
        model: parameters with `requires_grad` are trained; the rest is left alone.
        per_row_loss: one loss per row. Must not mix rows of different calls.
        parameters: the public settings.
        rows_per_backward: split a patient's rows into passes of at most this many, to bound memory.
    """

    def __init__(
        self,
        model: nn.Module,
        per_row_loss: PerRowLoss,
        parameters: PrivacyParameters,
        *,
        rows_per_backward: int | None = None,
    ) -> None:
        self.model = model
        self.per_row_loss = per_row_loss
        self.parameters = parameters
        self.rows_per_backward = rows_per_backward
        self.trainable: list[nn.Parameter] = [p for p in model.parameters() if p.requires_grad]
        if not self.trainable:
            raise BadInputError(
                "The model has no trainable parameter.",
                hint="Attach an adapter, or set requires_grad on the parameters to train.",
                code="nothing-to-train",
            )

    @property
    def trainable_count(self) -> int:
        """How many numbers are trained, and noised."""
        return sum(p.numel() for p in self.trainable)

    def unit_gradient(self, rows: tuple[Tensor, ...]) -> UnitGradient:
        """Return the gradient of the mean loss over a patient's rows times `noise_draws`.

        Args:
            rows: tensors with the same number of rows first; each row is repeated for every noise draw.
        """
        repeated = tuple(tensor.repeat_interleave(self.parameters.noise_draws, dim=0) for tensor in rows)
        count = repeated[0].shape[0]
        for parameter in self.trainable:
            parameter.grad = None
        loss = 0.0
        for piece in _pieces(repeated, self.rows_per_backward):
            losses = self.per_row_loss(self.model, piece)
            if losses.shape != (piece[0].shape[0],):
                raise BadInputError(
                    f"The loss has shape {tuple(losses.shape)}; one value per row is needed: "
                    f"({piece[0].shape[0]},).",
                    hint="Return unreduced losses: mean over pixels and channels, never over rows.",
                    code="loss-shape",
                )
            part = losses.to(torch.promote_types(losses.dtype, torch.float32)).sum() / count
            part.backward()  # type: ignore[no-untyped-call]
            loss += float(part.detach())
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.trainable]
        tensors = [g.detach().to(torch.float32) for g in gradients]
        for parameter in self.trainable:
            parameter.grad = None
        return UnitGradient(tensors, loss, global_norm(tensors))

    def empty_sum(self) -> GradientSum:
        """Return a sum with no patient in it."""
        return GradientSum([torch.zeros_like(p, dtype=torch.float64) for p in self.trainable])

    def clipped_sum(
        self, source: PatientBatchSource, patients: Sequence[str], rng: torch.Generator
    ) -> GradientSum:
        """Return the sum of the clipped unit gradients of `patients`. Private: it carries no noise yet."""
        total = self.empty_sum()
        with unchanged_buffers(self.model):
            for patient in patients:
                rows = source.rows(patient, self.parameters.tiles_per_patient, rng)
                if not rows or rows[0].shape[0] == 0:
                    total.discarded += 1
                    continue
                if any(t.shape[0] != rows[0].shape[0] for t in rows) or (
                    rows[0].shape[0] > self.parameters.tiles_per_patient
                ):
                    raise BadInputError(
                        "A patient's tensors have differing or too many rows.",
                        hint="A batch source returns at most k rows, the same number in every tensor.",
                        code="row-count",
                    )
                total.add(self.unit_gradient(rows), self.parameters.max_grad_norm)
        return total

    def release(self, total: GradientSum, noise_source: NoiseSource) -> list[Tensor]:
        """Add the step's noise, divide by the public constant, round once. The result may be looked at."""
        deviation = self.parameters.noise_standard_deviation
        released = []
        for parameter, summed in zip(self.trainable, total.tensors, strict=True):
            noisy = summed + gaussian_like(noise_source, summed, deviation)
            released.append((noisy / self.parameters.expected_patients).to(parameter.dtype))
        return released


def private_step(
    engine: PatientGradientEngine,
    source: PatientBatchSource,
    patients: Sequence[str],
    optimizer: torch.optim.Optimizer,
    noise_source: NoiseSource,
    rng: torch.Generator,
    step: int = 0,
) -> LocalStepTrace:
    """Take one private step on the sampled `patients`; an empty sample is a step like any other.

    The caller has charged the step before this is called. Returns diagnostics that must stay at the site.
    """
    total = engine.clipped_sum(source, patients, rng)
    for parameter, update in zip(engine.trainable, engine.release(total, noise_source), strict=True):
        parameter.grad = update
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    bound = engine.parameters.max_grad_norm * CLIP_MARGIN
    seen = len(total.norms)
    return LocalStepTrace(
        step=step,
        patients_sampled=len(patients),
        mean_loss=sum(total.losses) / seen if seen else math.nan,
        mean_gradient_norm=sum(total.norms) / seen if seen else math.nan,
        clipped_fraction=sum(n > bound for n in total.norms) / seen if seen else math.nan,
        discarded=total.discarded,
    )


def run_private_steps(
    model: nn.Module,
    per_row_loss: PerRowLoss,
    source: PatientBatchSource,
    params: PrivacyParameters,
    optimizer: torch.optim.Optimizer,
    *,
    noise_source: NoiseSource,
    sampler: PatientSampler,
    reserve: Callable[[int], None],
    on_step: Callable[[LocalStepTrace], None] | None = None,
    rng: torch.Generator | None = None,
    rows_per_backward: int | None = None,
) -> PrivateRoundReport:
    """Train for `params.steps` private steps and return what may be told about it.

    Args:
        model: its trainable parameters are updated in place.
        per_row_loss: `(model, rows) -> (rows,)` losses; draws its own diffusion noise and time steps.
        source: the patients of this site.
        params: the public settings.
        optimizer: over exactly the trainable parameters; what it does with the update costs no privacy.
        noise_source: `SystemNoiseSource()` in real use.
        sampler: must have the sample rate of `params`.
        reserve: called with the step's index; returns only after the charge is on disk. Noise is drawn later.
        on_step: receives each step's private diagnostics, at home.
        rng: chooses tiles; seeded by the operating system when not given.
        rows_per_backward: bounds memory, see `PatientGradientEngine`.

    Raises:
        RefusedError: a trainable parameter carries no signal, or the model keeps statistics of patients.
        BadInputError: settings, sampler and optimiser do not fit together, or there is no patient.
    """
    engine = PatientGradientEngine(model, per_row_loss, params, rows_per_backward=rows_per_backward)
    rng = rng if rng is not None else _system_seeded()
    patients = list(source.patients)
    _check_fit(engine, patients, sampler, optimizer)
    require_signal(model, per_row_loss, _some_rows(source, patients, params.tiles_per_patient, rng))
    for step in range(params.steps):
        reserve(step)
        trace = private_step(engine, source, sampler.sample(patients), optimizer, noise_source, rng, step)
        if on_step is not None:
            on_step(trace)
    return PrivateRoundReport(
        steps=params.steps,
        noise_multiplier=params.noise_multiplier,
        max_grad_norm=params.max_grad_norm,
        sample_rate=params.sample_rate,
        expected_patients=params.expected_patients,
        trainable_parameters=engine.trainable_count,
    )


def _check_fit(
    engine: PatientGradientEngine,
    patients: Sequence[str],
    sampler: PatientSampler,
    optimizer: torch.optim.Optimizer,
) -> None:
    if not patients:
        raise BadInputError(
            "There is no patient to train on.",
            hint="Check that slides were added and tiled, and that patients are in the training part.",
            code="no-patients",
        )
    if len(set(patients)) != len(patients):
        raise BadInputError(
            "A patient is listed twice: its contribution would be counted twice and break the bound C.",
            hint="List each patient once, with all of its slides.",
            code="patient-twice",
        )
    if sampler.sample_rate != engine.parameters.sample_rate:
        raise BadInputError(
            f"The sampler draws with q = {sampler.sample_rate}, "
            f"the account says {engine.parameters.sample_rate}.",
            hint="Build the sampler from the same settings, with sampler_for(params.sample_rate, source).",
            code="sample-rate-mismatch",
        )
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if held != {id(p) for p in engine.trainable}:
        raise BadInputError(
            "The optimiser does not hold exactly the trainable parameters of the model.",
            hint="Build it from the parameters with requires_grad, after the adapter is attached.",
            code="optimizer-parameters",
        )


def _some_rows(
    source: PatientBatchSource, patients: Sequence[str], k: int, rng: torch.Generator
) -> tuple[Tensor, ...]:
    for patient in patients:
        rows = source.rows(patient, k, rng)
        if rows and rows[0].shape[0] > 0:
            return rows
    raise BadInputError(
        "No patient has a tile.",
        hint="Check the tissue mask and the tile quality thresholds: every tile was left out.",
        code="no-tiles",
    )


def _pieces(rows: tuple[Tensor, ...], size: int | None) -> Iterator[tuple[Tensor, ...]]:
    count = rows[0].shape[0]
    step = count if size is None else max(1, size)
    for start in range(0, count, step):
        yield tuple(tensor[start : start + step] for tensor in rows)


def _system_seeded() -> torch.Generator:
    rng = torch.Generator()
    rng.seed()
    return rng
