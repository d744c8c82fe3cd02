"""One private round: the study's settings, this site's features, the base model, and an update of the adapter.

The update is the difference of the adapter's trained matrices. It is a function of the noised sums and of public settings
alone; nothing else of the round leaves this module except to the site's own trace.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from pixcell_core.contracts.spool import Arrays
from pixcell_core.contracts.study import Study
from pixcell_core.diffusion import drop_condition, training_loss
from pixcell_core.errors import RefusedError
from pixcell_core.models import PixCellTransformer2DModel
from pixcell_core.private.averaging import AdapterAverage
from pixcell_core.private.engine import run_private_steps
from pixcell_core.private.noise import SystemNoiseSource
from pixcell_core.private.parameters import LocalStepTrace, PrivacyParameters
from pixcell_core.private.sampling import sampler_for
from pixcell_core.training.adapters import adapter_state, attach_lora, load_adapter_state
from pixcell_core.training.feature_store import FeatureStore
from site_client.trainer.patient_rows import LatentScaling, PatientRows

CONDITION_DROP = 0.1
"""Share of rows trained without their condition, so that guidance keeps working (as in pretraining)."""


class RoundTrainer:
    """Holds the base model and the features between rounds; one adapter configuration at a time.

    Raises `RefusedError` where the study does not fit the base model or the features.
    """

    def __init__(self, base: Path, store: FeatureStore, scaling: LatentScaling, device: str = "cpu") -> None:
        self._base, self._store, self._device = base, store, device
        self._source = PatientRows(store, scaling)
        self._model: torch.nn.Module | None = None
        self._adapted: str | None = None

    def warm_up(self) -> None:
        """Load the base and take one optimiser step on nothing: torch imports half of itself at the first one."""
        self._fresh()
        parameter = torch.nn.Parameter(torch.zeros(1))
        parameter.grad = torch.zeros(1)
        torch.optim.SGD([parameter], lr=0.1).step()

    def _fresh(self) -> torch.nn.Module:
        model = PixCellTransformer2DModel.from_pretrained(str(self._base), low_cpu_mem_usage=False)
        self._model, self._adapted = model.float().to(self._device), None
        assert isinstance(self._model, torch.nn.Module)
        return self._model

    def _adapted_model(self, study: Study) -> torch.nn.Module:
        wanted = study.adapter.digest
        if self._model is not None and self._adapted == wanted:
            return self._model
        model = self._fresh() if self._model is None or self._adapted is not None else self._model
        adapter = study.adapter
        attach_lora(model, kind=adapter.kind, rank=adapter.rank, seed=adapter.seed, targets=adapter.targets)
        self._adapted = wanted
        return model

    def train(
        self,
        study: Study,
        start: Arrays,
        reserve: Callable[[int], None],
        on_step: Callable[[LocalStepTrace], None] | None = None,
    ) -> Arrays:
        """Train T private steps from `start` and return the update, float32, in the names of `start`."""
        self._check_features(study)
        model = self._adapted_model(study)
        load_adapter_state(model, {name: torch.from_numpy(np.array(value)) for name, value in start.items()})
        model.eval()
        set_checkpointing(model, study.gradient_checkpointing)
        trainable = [p for p in model.parameters() if p.requires_grad]
        noise_source = SystemNoiseSource()
        self._source.noise_draws = study.noise_draws
        average = AdapterAverage(trainable, study.ema_decay)

        def after_step(trace: LocalStepTrace) -> None:
            # What was released may be averaged at will: it costs no privacy.
            average.update()
            if on_step is not None:
                on_step(trace)

        run_private_steps(
            model,
            self._loss,
            self._source,
            parameters_of(study),
            add_proximal_pull(make_optimizer(study, trainable), study.aggregation.proximal_mu),
            noise_source=noise_source,
            sampler=sampler_for(study.sample_rate, noise_source),
            reserve=reserve,
            on_step=after_step,
            precision=study.precision,
        )
        average.write()
        after = adapter_state(model)
        return {
            name: after[name].cpu().numpy().astype(np.float32) - value.astype(np.float32)
            for name, value in start.items()
        }

    def _loss(self, model: torch.nn.Module, rows: tuple[torch.Tensor, ...]) -> torch.Tensor:
        latents, condition, timestep = (tensor.to(self._device) for tensor in rows)
        null = model.unconditional(1)  # type: ignore[operator]
        return training_loss(
            model,
            latents,
            drop_condition(condition, null, CONDITION_DROP),
            timestep=timestep,
            noise=torch.randn_like(latents),
        )

    def _check_features(self, study: Study) -> None:
        meta = self._store.meta
        for name, wanted in (("tile_size", study.tile_size), ("mpp", study.mpp)):
            found = meta.get(name)
            if found is not None and abs(float(found) - float(wanted)) > 1e-6:
                raise RefusedError(
                    f"The features were made with {name} {found}, the study wants {wanted}.",
                    hint="Extract the features again with the study's settings.",
                    code="features-differ",
                )


def set_checkpointing(model: torch.nn.Module, wanted: bool) -> None:
    """Recompute activations in the backward pass, or keep them; the gradients are the same."""
    if wanted:
        model.enable_gradient_checkpointing()  # type: ignore[operator]
    else:
        model.disable_gradient_checkpointing()  # type: ignore[operator]


def parameters_of(study: Study) -> PrivacyParameters:
    """The engine's settings of one round of a study. `PatientRows` has spread the noise draws into rows already."""
    return PrivacyParameters(
        noise_multiplier=study.noise_multiplier,
        max_grad_norm=study.max_grad_norm,
        sample_rate=study.sample_rate,
        steps=study.steps_per_round,
        expected_patients=float(study.expected_patients),
        tiles_per_patient=study.tiles_per_patient * study.noise_draws,
        noise_draws=1,
    )


def make_optimizer(study: Study, parameters: Sequence[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """The study's optimiser; what it does with the released sums costs no privacy."""
    if study.optimizer == "adam":
        return torch.optim.Adam(parameters, lr=study.learning_rate, betas=(0.9, 0.999))
    return torch.optim.SGD(parameters, lr=study.learning_rate)


def add_proximal_pull(optimizer: torch.optim.Optimizer, mu: float) -> torch.optim.Optimizer:
    """Let every step also descend (mu / 2) |w - w_start|^2 (FedProx, Li et al. 2020, eq. 2); w_start is w now.

    The pull mu (w - w_start) is added to the gradient when the step is taken: after clipping, after the noise. It is a
    function of the round's start and of what earlier steps released, so it is post-processing: the sensitivity of
    the clipped sum stays C, and a round is charged what it is charged without it. Added to a patient's gradient before
    clipping, it would take room within C from the patient.
    """
    if mu == 0.0:
        return optimizer
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    starts = [p.detach().clone() for p in parameters]

    def pull(_optimizer: object, _args: object, _kwargs: object) -> None:
        with torch.no_grad():
            for parameter, start in zip(parameters, starts, strict=True):
                if parameter.grad is not None:
                    parameter.grad.add_(parameter - start, alpha=mu)

    optimizer.register_step_pre_hook(pull)
    return optimizer
