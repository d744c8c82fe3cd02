"""Patient-level DP-SGD: a plain loop, one patient per backward pass.

The mechanism (Abadi et al. 2016, "Deep learning with differential privacy", algorithm 1, with the patient
as its unit, as in McMahan et al. 2018, "Learning differentially private recurrent language models"):

    for each step:
        for each sampled patient u:  g_u = gradient of the mean loss over k tiles x K noise draws
                                     s  += g_u * min(1, C / |g_u|)
        update = (s + N(0, sigma^2 C^2)) / expected patients        # released
        optimiser step on the update                                # post-processing

Adding or removing one patient moves `s` by at most C, whatever the patient's tiles are and however many
there are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from pixcell_core.errors import BadInputError
from pixcell_core.private.clipping import CLIP_MARGIN, GradientSum, clip_scale
from pixcell_core.private.joint_gradients import PerRowLoss, rows_stay_apart
from pixcell_core.private.noise import NoiseSource
from pixcell_core.private.parameters import LocalStepTrace, PrivacyParameters, PrivateRoundReport
from pixcell_core.private.patient_gradients import PatientBatchSource, PatientGradientEngine, Precision
from pixcell_core.private.sampling import PatientSampler
from pixcell_core.private.signal import probing, require_signal

__all__ = [
    "GradientSum",
    "PatientBatchSource",
    "PatientGradientEngine",
    "clip_scale",
    "private_step",
    "run_private_steps",
]


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
    precision: Precision = "float32",
    joint: bool | None = None,
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
        precision: `bfloat16` for the forward and backward passes on an accelerator that has it.
        joint: let patients share passes; tried on random rows beforehand. By default where the trial succeeds and the
            precision is float32: in bfloat16 what else is in a pass moves more than the last digits of a gradient.

    Raises:
        RefusedError: a trainable parameter carries no signal, or the model keeps statistics of patients.
        BadInputError: settings, sampler and optimiser do not fit together, or there is no patient.
    """
    engine = PatientGradientEngine(
        model, per_row_loss, params, rows_per_backward=rows_per_backward, precision=precision
    )
    rng = rng if rng is not None else _system_seeded()
    patients = list(source.patients)
    _check_fit(engine, patients, sampler, optimizer)
    rows_like = _some_rows(source, patients, params.tiles_per_patient, rng)
    require_signal(model, per_row_loss, rows_like)
    if joint if joint is not None else precision == "float32":
        with probing(model, rows_like, count=3) as rows:
            apart = rows_stay_apart(model, per_row_loss, engine.trainable, rows)
        engine.share_passes(apart)
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


def _system_seeded() -> torch.Generator:
    rng = torch.Generator()
    rng.seed()
    return rng
