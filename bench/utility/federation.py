"""Three sites train one adapter: an engine per site, the mean of their updates per round, as the platform does it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from pixcell_core.private.engine import private_step
from pixcell_core.private.noise import NoiseSource, SystemNoiseSource
from pixcell_core.private.parameters import LocalStepTrace, PrivacyParameters
from pixcell_core.private.patient_gradients import PatientGradientEngine
from pixcell_core.private.sampling import EveryPatient
from pixcell_core.training.adapters import DEFAULT_TARGETS, adapter_state, attach_lora, load_adapter_state
from pixcell_core.training.ema import Ema
from utility.loss import PatientLoss
from utility.setting import Setting
from utility.sites import PatientBatches, SitePatients

BATCH = 32
ROWS_AT_ONCE = 64
"""Rows that share a pass; at 64 px more of them are faster still."""


class _Silence:
    """No noise, for the runs without privacy."""

    def gaussian(self, count: int) -> np.ndarray:
        return np.zeros(count)


@dataclass
class Trained:
    """The adapted model, how many numbers were trained, and what the sites saw (never released)."""

    model: nn.Module
    trained_parameters: int
    traces: list[LocalStepTrace]


def adapted(base: nn.Module, setting: Setting, seed: int) -> nn.Module:
    """A copy of the base with the setting's adapter at its start."""
    model = copy.deepcopy(base)
    attach_lora(
        model, kind=setting.kind, rank=setting.rank, seed=seed, targets=setting.targets or DEFAULT_TARGETS
    )
    return model.eval()


def train(
    base: nn.Module,
    sites: Sequence[SitePatients],
    setting: Setting,
    seed: int,
    on_round: Callable[[int, nn.Module], None] = lambda _number, _model: None,
) -> Trained:
    """Run all rounds; the noise is cryptographic and differs from run to run, all else follows from the seed."""
    torch.manual_seed(seed)
    rng = torch.Generator().manual_seed(seed)
    model = adapted(base, setting, seed)
    traces: list[LocalStepTrace] = []
    sigma = setting.noise_multiplier() if setting.private else 1e-9
    for number in range(setting.rounds):
        start = adapter_state(model)
        updates = []
        for site in sites:
            load_adapter_state(model, start)
            local = _ordinary_round if setting.optimizer == "minibatch" else _private_round
            traces += local(model, site, setting, sigma, rng)
            updates.append(adapter_state(model))
        mean = {name: torch.stack([u[name].double() for u in updates]).mean(0).float() for name in start}
        load_adapter_state(model, mean)
        on_round(number, model)
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return Trained(model, count, traces)


def _private_round(
    model: nn.Module, site: SitePatients, setting: Setting, sigma: float, rng: torch.Generator
) -> list[LocalStepTrace]:
    """T steps of one site; the divisor is the study's public number of patients per site."""
    parameters = PrivacyParameters(
        noise_multiplier=sigma,
        max_grad_norm=setting.max_grad_norm if setting.private else 1e9,
        sample_rate=1.0,
        steps=setting.steps,
        expected_patients=float(len(site)),
        tiles_per_patient=setting.tiles,
        noise_draws=setting.draws,
    )
    loss = PatientLoss(setting.rows, setting.stratified, setting.weight_cap)
    engine = PatientGradientEngine(model, loss, parameters, rows_per_backward=ROWS_AT_ONCE, joint=True)
    rate = setting.step_length / (setting.max_grad_norm if setting.private else 1.0)
    optimizer: torch.optim.Optimizer
    if setting.optimizer == "adam":
        optimizer = torch.optim.Adam(engine.trainable, lr=setting.step_length)
    else:
        optimizer = torch.optim.SGD(engine.trainable, lr=rate)
    noise: NoiseSource = SystemNoiseSource() if setting.private else _Silence()  # type: ignore[assignment]
    source, average = PatientBatches(site), Ema(model, setting.ema)
    traces = []
    for step in range(setting.steps):
        patients = EveryPatient().sample(source.patients)
        traces.append(private_step(engine, source, patients, optimizer, noise, rng, step))
        average.update(model)
    if setting.ema:
        average.copy_to(model)
    return traces


def _ordinary_round(
    model: nn.Module, site: SitePatients, setting: Setting, sigma: float, rng: torch.Generator
) -> list[LocalStepTrace]:
    """Ordinary local training with as many rows as a private round of this site sees."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trainable, lr=setting.step_length)
    latents, embeddings = site.latents.flatten(0, 1), site.embeddings.flatten(0, 1)
    loss = PatientLoss(BATCH, setting.stratified, setting.weight_cap)
    for _ in range(max(1, round(len(site) * setting.rows * setting.steps / BATCH))):
        chosen = torch.randint(0, len(latents), (BATCH,), generator=rng)
        losses: Tensor = loss(model, (latents[chosen], embeddings[chosen]))
        optimizer.zero_grad(set_to_none=True)
        losses.mean().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return []
