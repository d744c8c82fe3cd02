"""Public patients of a feature store, as the private engine asks for them, for audits over data that anybody may see."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pixcell_core.errors import BadInputError
from pixcell_core.training.feature_store import FeatureStore

TIMESTEPS = 1000


class PublicPatients:
    """Rows of scaled latents (k,c,h,w), embeddings (k,n,d), time steps (k,) and noise, drawn anew at each call."""

    def __init__(self, store: FeatureStore) -> None:
        self._store = store
        self._shift = float(store.meta.get("shift_factor", 0.0))
        self._scale = float(store.meta.get("scaling_factor", 1.0))

    @property
    def patients(self) -> Sequence[str]:
        """Patients of the store, each once."""
        return self._store.patients

    def rows(self, patient: str, k: int, rng: torch.Generator) -> tuple[Tensor, ...]:
        """At most k tiles of a patient, without replacement."""
        latents, embeddings = self._store.latents(patient), self._store.embeddings(patient)
        chosen = torch.randperm(len(latents), generator=rng)[:k]
        mean, deviation = latents[chosen].float().chunk(2, dim=1)
        drawn = mean + deviation * torch.randn(mean.shape, generator=rng)
        timestep = torch.randint(0, TIMESTEPS, (len(chosen),), generator=rng)
        noise = torch.randn(mean.shape, generator=rng)
        return (drawn - self._shift) * self._scale, embeddings[chosen].float(), timestep, noise

    def require_fit(self, model: nn.Module) -> None:
        """Raise `BadInputError` unless latents and embeddings have the shapes a model was made for."""
        first = self._store.patients[0]
        config = model.config
        side = int(config["sample_size"])  # type: ignore[index,arg-type]
        wanted = (
            (int(config["in_channels"]), side, side),  # type: ignore[index,arg-type]
            (int(config["caption_num_tokens"]), int(config["caption_channels"])),  # type: ignore[index,arg-type]
        )
        latents, embeddings = self._store.latents(first), self._store.embeddings(first)
        found = ((latents.shape[1] // 2, *latents.shape[2:]), tuple(embeddings.shape[1:]))
        if found != wanted:
            raise BadInputError(
                f"The features have latents {found[0]} and embeddings {found[1]}; "
                f"the model takes {wanted[0]} and {wanted[1]}.",
                hint="Extract the public features at the model's tile size with its own encoder.",
                code="features-do-not-fit",
            )
