"""Trains a transformer on encoded tiles, with an exact resume, on one process or several.

A checkpoint holds the model, its moving average, the optimiser, the step, the place in the epoch and the state of
the one random generator every draw comes from; a resumed run is therefore bit-equal to one that was never
interrupted.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, cast

import torch
from torch import nn

from pixcell_core.diffusion import training_loss
from pixcell_core.errors import BadInputError, PixcellError
from pixcell_core.models import PixCellTransformer2DModel
from pixcell_core.training.batches import Batch, BatchStream
from pixcell_core.training.ema import Ema
from pixcell_core.training.journal import Journal, StepReport
from pixcell_core.training.optimizers import learning_rate_at, make_optimizer
from pixcell_core.training.parallel import Processes
from pixcell_core.training.precision import autocast_for, memory_in_use
from pixcell_core.training.sample_sheet import SampleSheet
from pixcell_core.training.settings import TrainingSettings
from pixcell_core.training.tile_sources import EncodedTiles, Features, TileSource

__all__ = ["EncodedTiles", "Trainer", "TrainingSettings"]


def check_fit(model: PixCellTransformer2DModel, features: Features) -> None:
    """Refuse features that this model cannot be trained on.

    Raises:
        BadInputError: another number of latent channels or tokens, another embedding width, or an odd latent size.
    """
    config = model.config
    channels, height, width = features.mean.shape
    tokens, wide = features.embedding.shape
    patch = int(config["patch_size"])
    facts: list[tuple[str, str, int, int]] = [
        ("latent-channels-differ", "latent channels", channels, int(config["in_channels"])),
        ("token-count-differs", "condition tokens", tokens, int(config["caption_num_tokens"])),
        ("embedding-width-differs", "numbers per condition token", wide, int(config["caption_channels"])),
    ]
    for code, what, met, wanted in facts:
        if met != wanted:
            raise BadInputError(
                f"The features have {met} {what}; the model expects {wanted}.",
                hint="Train on features of the model's own autoencoder, encoder and resolution.",
                code=code,
            )
    if height % patch or width % patch:
        raise BadInputError(
            f"Latents of {height}×{width} do not divide into patches of {patch}×{patch}.",
            hint="Extract features of tiles whose sides are multiples of 16 px.",
            code="latent-size-impossible",
        )


class Trainer:
    """Trains `model` in place on `tiles`, on the device of `processes`.

    Args:
        model: a transformer; all its parameters are trained, its buffers (tables, null condition) never.
        tiles: any source of encoded tiles.
        settings: settings of the run.
        processes: this process among several; alone on the CPU when absent.
        journal: gets a report of every step.
        sheet: draws samples with the averaged weights.

    Raises:
        BadInputError: no tile, or tiles that do not fit the model.
    """

    def __init__(
        self,
        model: PixCellTransformer2DModel,
        tiles: TileSource,
        settings: TrainingSettings,
        *,
        processes: Processes | None = None,
        journal: Journal | None = None,
        sheet: SampleSheet | None = None,
    ) -> None:
        if not len(tiles):
            raise BadInputError(
                "There is no tile to train on.", hint="Give a folder of tiles.", code="no-tiles"
            )
        check_fit(model, tiles.features(0))
        self.processes = processes or Processes()
        self.device = self.processes.device
        nn.Module.to(model, self.device)
        self.model, self.tiles, self.settings = model.train().requires_grad_(True), tiles, settings
        if settings.gradient_checkpointing:
            model.enable_gradient_checkpointing()
        if settings.compile:
            model.compile()
        one_token = int(model.config["caption_num_tokens"]) == 1
        self._network = self.processes.wrap(model, may_leave_unused=one_token)
        self._dropout = float(model.config.get("dropout") or 0.0) > 0
        self.optimizer = make_optimizer(model.parameters(), settings)
        self.ema = Ema(model, settings.ema_decay)
        self.batches = BatchStream(tiles, settings, self.processes, ahead=self.device.type == "cuda")
        self.journal = journal if self.processes.leads else None
        self.sheet = sheet if self.processes.leads else None
        self.step = 0

    def _identity(self) -> dict[str, Any]:
        """What must not change between the parts of one run, or the resume would be another run."""
        settings = self.settings
        same: dict[str, Any] = {
            "optimizer": settings.optimizer,
            "schedule": settings.schedule,
            "seed": settings.seed,
            "tiles": len(self.tiles),
            "tiles per step": self.batches.step_size,
        }
        if settings.schedule == "cosine":
            same["steps"] = settings.steps
        return same

    def save(self, path: Path) -> None:
        """Write a checkpoint beside its place and rename it there."""
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "ema": self.ema.state_dict(),
            "step": self.step,
            "identity": self._identity(),
            **self.batches.state_dict(),
        }
        torch.save(state, partial)
        with partial.open("rb") as handle:
            os.fsync(handle.fileno())
        partial.replace(path)

    def resume(self, path: Path) -> bool:
        """Load a checkpoint where one exists; return whether it did.

        Raises:
            BadInputError: the file is no checkpoint, one of another model, or one of a run with other settings.
        """
        if not path.exists():
            return False
        try:
            state = torch.load(path, weights_only=True, map_location="cpu")
            before, now = dict(state["identity"]), self._identity()
            changed = sorted(k for k in {*before, *now} if before.get(k) != now.get(k))
            if changed:
                raise BadInputError(
                    f"{path.name} belongs to a run with other settings: "
                    + ", ".join(f"{k} {before.get(k)} there, {now.get(k)} here" for k in changed)
                    + ".",
                    hint="Use the same settings to resume it, or give another output folder.",
                    code="checkpoint-differs",
                )
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.ema.load_state_dict(state["ema"])
            self.batches.load_state_dict(state)
            self.step = int(state["step"])
        except (RuntimeError, UnpicklingError, KeyError, TypeError, ValueError, EOFError) as error:
            raise BadInputError(
                f"{path.name} is damaged, or a checkpoint of another model.",
                hint="Remove it to train from the start, or give another output folder.",
                code="checkpoint-unreadable",
            ) from error
        return True

    @contextmanager
    def _own_dropout(self) -> Iterator[None]:
        """Dropout draws from the global generator: give it a seed of this step and process, then put it back."""
        if not self._dropout:
            yield
            return
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(hash((self.settings.seed, self.step, self.processes.rank)) & 0x7FFFFFFFFFFFFFFF)
            yield

    def _loss(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean loss of a batch, to be differentiated, and the part of it that is the noise error."""
        null = self.model.caption_projection.uncond_embedding
        # All tokens of a tile give way together.
        condition = torch.where(batch.dropped[:, None, None], null.to(batch.condition), batch.condition)
        outputs: list[torch.Tensor] = []

        def network(*args: Any, **kwargs: Any) -> Any:
            found = self._network(*args, **kwargs)
            outputs.append(found[0].detach())
            return found

        with autocast_for(self.settings.precision, self.device):
            loss = training_loss(
                cast(nn.Module, network),
                batch.latents,
                condition,
                timestep=batch.timestep,
                noise=batch.noise,
            ).mean()
        predicted = outputs[0][:, : batch.noise.shape[1]].float()
        return loss, (predicted - batch.noise).pow(2).mean()

    def advance(self) -> StepReport:
        """One optimiser step over all processes and accumulated parts.

        Raises:
            PixcellError: the loss or its gradient is no finite number any more; the weights are left as they were.
        """
        settings, start = self.settings, time.perf_counter()
        rate = learning_rate_at(self.step, settings)
        for part in self.optimizer.param_groups:
            part["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        batches = self.batches.take()
        total = torch.zeros(2, device=self.device)
        with self._own_dropout():
            for k, batch in enumerate(batches):
                quiet = self.processes.without_averaging(self._network, when=k + 1 < len(batches))
                with quiet:
                    loss, error = self._loss(batch.to(self.device))
                    (loss / len(batches)).backward()
                total += torch.stack([loss.detach(), error]) / len(batches)
        norm = float(nn.utils.clip_grad_norm_(self.model.parameters(), settings.max_grad_norm))
        loss_now, error_now = self.processes.mean([float(v) for v in total])
        if not (math.isfinite(norm) and math.isfinite(loss_now)):
            raise PixcellError(
                f"The training diverged at step {self.step + 1}: loss {loss_now}, gradient norm {norm}.",
                hint="Resume from the last checkpoint's folder with a lower learning rate or a longer warm-up.",
                code="training-diverged",
            )
        self.optimizer.step()
        self.ema.update(self.model)
        self.step += 1
        return StepReport(
            step=self.step,
            epoch=self.batches.epoch,
            loss=loss_now,
            noise_error=error_now,
            variance_bound=loss_now - error_now,
            learning_rate=rate,
            grad_norm=norm,
            images_per_second=self.batches.step_size / max(time.perf_counter() - start, 1e-9),
            memory_bytes=memory_in_use(self.device),
        )

    def train_step(self) -> float:
        """One optimiser step; returns the mean loss of its batch."""
        return self.advance().loss

    def run(
        self,
        checkpoint: Path | None,
        on_step: Callable[[int, float], None] = lambda step, loss: None,
        *,
        stop: Callable[[], bool] | None = None,
    ) -> bool:
        """Train to the last step, resuming from and writing to `checkpoint`; the model ends as its average.

        Only the leading process writes; every process reads the checkpoint, so several machines share its folder.
        `stop` is asked after each checkpoint but the last; what it says in the leading process counts for all.

        Returns:
            Whether the last step was reached; where `stop` ended the run, the model is not its average.
        """
        if checkpoint is not None:
            self.resume(checkpoint)
        self.processes.check_same(self.step)
        if self.journal is not None:
            self.journal.reopen(self.step)
        try:
            while self.step < self.settings.steps:
                report = self.advance()
                if self.journal is not None:
                    self.journal.note(report)
                on_step(self.step, report.loss)
                last = self.step == self.settings.steps
                due = last or self.step % self.settings.checkpoint_every == 0
                if checkpoint is not None and due and self.processes.leads:
                    self.save(checkpoint)
                if stop is not None and due and not last and self.processes.leader_says(stop):
                    return False
                if self.sheet is not None and self.sheet.due(self.step):
                    with self.ema.swapped_into(self.model):
                        self.sheet.write(self.step, self.model)
        finally:
            self.batches.close()
        self.ema.copy_to(self.model)
        self.model.eval()
        return True
