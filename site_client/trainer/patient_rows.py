"""What one patient gives to one step: its tiles' latents and embeddings, and the time steps they are noised to.

A unit gradient is the mean over k tiles times K noise draws. Its n = k K time steps are spread evenly over the schedule,
one from each of n equal strata in random order: the mean over few independent time steps is dominated by where they
fell, and a gradient that points everywhere survives clipping and noise least. Strata are a patient's own. Spreading
them over a whole batch would let one patient decide the time steps of another, and the bound C would no longer hold.
Legend: n rows, c condition tokens, d embedding width, h w latent pixels.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pixcell_core.starter import STARTER
from pixcell_core.training.feature_store import FeatureStore

TIMESTEPS = 1000


@dataclass(frozen=True)
class LatentScaling:
    """Scaled latents are (z - shift) * scale."""

    shift: float
    scale: float


def latent_scaling(meta: dict[str, Any], autoencoder: Path | None = None) -> LatentScaling:
    """The scaling of the autoencoder that made the features: from the store, the given folder, or the starter."""
    if "scaling_factor" in meta and "shift_factor" in meta:
        return LatentScaling(float(meta["shift_factor"]), float(meta["scaling_factor"]))
    config = (autoencoder or STARTER / "autoencoder") / "config.json"
    if not config.is_file():
        return LatentScaling(0.0, 1.0)
    values = json.loads(config.read_text())
    return LatentScaling(float(values.get("shift_factor", 0.0)), float(values.get("scaling_factor", 1.0)))


class PatientRows:
    """The training patients of a feature store, as the private engine asks for them: one patient at a time.

    Features are read once and kept, in half precision: a round visits every patient at every step.

    Args:
        store: features of the site.
        scaling: of its latents.
        noise_draws: K; every chosen tile stands in so many rows, each with its own draw of the latent and its own
            time step, so that the engine itself has nothing left to repeat.
    """

    def __init__(self, store: FeatureStore, scaling: LatentScaling, noise_draws: int = 1) -> None:
        self._store, self._scaling = store, scaling
        self.noise_draws = noise_draws
        self._kept: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    @property
    def patients(self) -> Sequence[str]:
        """Patients of the store, each once."""
        return self._store.patients

    def rows(self, patient: str, k: int, rng: torch.Generator) -> tuple[torch.Tensor, ...]:
        """At most k rows: scaled latents (n,16,h,w), embeddings (n,c,d) and time steps (n,) as integers.

        n is the number of chosen tiles times `noise_draws`; k counts rows, not tiles.
        """
        if patient not in self._kept:
            self._kept[patient] = (self._store.latents(patient), self._store.embeddings(patient))
        latents, embeddings = self._kept[patient]
        tiles = max(1, k // self.noise_draws)
        chosen = torch.randperm(len(latents), generator=rng)[:tiles].repeat_interleave(self.noise_draws)[:k]
        mean, deviation = latents[chosen].float().chunk(2, dim=1)
        drawn = mean + deviation * torch.randn(mean.shape, generator=rng)
        scaled = (drawn - self._scaling.shift) * self._scaling.scale
        return scaled, embeddings[chosen].float(), stratified_timesteps(len(chosen), rng)


def stratified_timesteps(count: int, rng: torch.Generator) -> torch.Tensor:
    """Time steps (count,), one uniform draw from each of `count` equal parts of the schedule, in random order.

    Every single one is uniform over 0 … 999.
    """
    if count == 0:
        return torch.zeros(0, dtype=torch.long)
    strata = torch.randperm(count, generator=rng).double()
    places = (strata + torch.rand(count, generator=rng, dtype=torch.float64)) / count
    return (places * TIMESTEPS).long().clamp(max=TIMESTEPS - 1)
