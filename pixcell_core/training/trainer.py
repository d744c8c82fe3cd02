"""Trains a transformer on encoded tiles, with an exact resume.

A checkpoint holds the model, its moving average, the optimiser, the step and the state of the one random generator
every draw comes from; a resumed run is therefore bit-equal to one that was never interrupted.
Legend: N tiles, h w latent pixels, n tokens, d embedding width.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError

import torch

from pixcell_core.diffusion import drop_condition, training_loss
from pixcell_core.errors import BadInputError
from pixcell_core.models import PixCellTransformer2DModel
from pixcell_core.training.ema import Ema


@dataclass(frozen=True)
class EncodedTiles:
    """Tiles as the transformer sees them: latent `mean` and `std` (N, 16, h, w), `embedding` (N, n, d)."""

    mean: torch.Tensor
    std: torch.Tensor
    embedding: torch.Tensor

    def __post_init__(self) -> None:
        if not len(self.mean) == len(self.std) == len(self.embedding):
            raise ValueError("one latent, one deviation and one embedding per tile")

    def __len__(self) -> int:
        return len(self.mean)

    def draw(
        self, rows: torch.Tensor, *, shift_factor: float, scaling_factor: float, generator: torch.Generator
    ) -> torch.Tensor:
        """Draw the rows' latents afresh and scale them: (mean + std · noise − shift) · scale."""
        noise = torch.randn(self.mean[rows].shape, generator=generator)
        drawn: torch.Tensor = self.mean[rows].float() + self.std[rows].float() * noise
        return (drawn - shift_factor) * scaling_factor


@dataclass(frozen=True)
class TrainingSettings:
    """Settings of a training run; all public."""

    steps: int
    batch_size: int = 32
    learning_rate: float = 1e-4
    weight_decay: float = 0.01
    condition_drop: float = 0.1
    max_grad_norm: float = 1.0
    ema_decay: float = 0.999
    warmup_steps: int = 10
    checkpoint_every: int = 20
    seed: int = 0
    shift_factor: float = 0.0
    scaling_factor: float = 1.0


class Trainer:
    """Trains `model` in place on `tiles`."""

    def __init__(
        self, model: PixCellTransformer2DModel, tiles: EncodedTiles, settings: TrainingSettings
    ) -> None:
        if not len(tiles):
            raise BadInputError(
                "There is no tile to train on.", hint="Give a folder of tiles.", code="no-tiles"
            )
        self.model, self.tiles, self.settings = model.train().requires_grad_(True), tiles, settings
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay
        )
        self.ema = Ema(model, settings.ema_decay)
        self.generator = torch.Generator().manual_seed(settings.seed)
        self.step = 0

    def save(self, path: Path) -> None:
        """Write a checkpoint beside its place and rename it there."""
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "ema": self.ema.state_dict(),
            "random": self.generator.get_state(),
            "step": self.step,
        }
        torch.save(state, partial)
        with partial.open("rb") as handle:
            os.fsync(handle.fileno())
        partial.replace(path)

    def resume(self, path: Path) -> bool:
        """Load a checkpoint where one exists; return whether it did.

        Raises:
            BadInputError: the file is no checkpoint, or one of another model.
        """
        if not path.exists():
            return False
        try:
            state = torch.load(path, weights_only=True)
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.ema.load_state_dict(state["ema"])
            self.generator.set_state(state["random"])
            self.step = int(state["step"])
        except (RuntimeError, UnpicklingError, KeyError, TypeError, ValueError, EOFError) as error:
            raise BadInputError(
                f"{path.name} is damaged, or a checkpoint of another model.",
                hint="Remove it to train from the start, or give another output folder.",
                code="checkpoint-unreadable",
            ) from error
        return True

    def train_step(self) -> float:
        """One optimiser step; returns the mean loss of its batch."""
        settings, generator = self.settings, self.generator
        rows = torch.randint(0, len(self.tiles), (settings.batch_size,), generator=generator)
        latents = self.tiles.draw(
            rows,
            shift_factor=settings.shift_factor,
            scaling_factor=settings.scaling_factor,
            generator=generator,
        )
        null = self.model.caption_projection.uncond_embedding
        condition = drop_condition(
            self.tiles.embedding[rows].float(), null, settings.condition_drop, generator
        )
        timestep = torch.randint(0, 1000, (len(rows),), generator=generator)
        noise = torch.randn(latents.shape, generator=generator)
        for part in self.optimizer.param_groups:
            part["lr"] = settings.learning_rate * min(1.0, (self.step + 1) / max(settings.warmup_steps, 1))
        loss = training_loss(self.model, latents, condition, timestep=timestep, noise=noise).mean()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), settings.max_grad_norm)
        self.optimizer.step()
        self.ema.update(self.model)
        self.step += 1
        return float(loss.item())

    def run(
        self, checkpoint: Path | None, on_step: Callable[[int, float], None] = lambda step, loss: None
    ) -> None:
        """Train to the last step, resuming from and writing to `checkpoint`; the model ends as its average."""
        if checkpoint is not None:
            self.resume(checkpoint)
        while self.step < self.settings.steps:
            loss = self.train_step()
            on_step(self.step, loss)
            last = self.step == self.settings.steps
            if checkpoint is not None and (last or self.step % self.settings.checkpoint_every == 0):
                self.save(checkpoint)
        self.ema.copy_to(self.model)
        self.model.eval()
