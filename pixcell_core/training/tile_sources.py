"""What a trainer can train on: anything with a length that gives one tile's features at a time.

Three sources exist: tensors in memory, a feature store, and the published layout of files (`published_layout`).
Legend: N tiles, C latent channels (16), h w latent pixels, n condition tokens, d embedding width.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from pixcell_core.errors import BadInputError
from pixcell_core.training.feature_store import FeatureStore, shard_name

OPEN_SHARDS = 64
"""Shards of a feature store kept open (memory-mapped, not read) at a time."""


@dataclass(frozen=True)
class Features:
    """One tile as the transformer sees it: latent `mean` and `std` (C, h, w) unscaled, `embedding` (n, d)."""

    mean: torch.Tensor
    std: torch.Tensor
    embedding: torch.Tensor


class TileSource(Protocol):
    """Encoded tiles by row number."""

    def __len__(self) -> int: ...

    def features(self, row: int) -> Features:
        """The features of one tile."""
        ...


@dataclass(frozen=True)
class EncodedTiles:
    """Tiles in memory: latent `mean` and `std` (N, 16, h, w), `embedding` (N, n, d)."""

    mean: torch.Tensor
    std: torch.Tensor
    embedding: torch.Tensor

    def __post_init__(self) -> None:
        if not len(self.mean) == len(self.std) == len(self.embedding):
            raise ValueError("one latent, one deviation and one embedding per tile")

    def __len__(self) -> int:
        return len(self.mean)

    def features(self, row: int) -> Features:
        """The features of one tile."""
        return Features(self.mean[row], self.std[row], self.embedding[row])

    def draw(
        self, rows: torch.Tensor, *, shift_factor: float, scaling_factor: float, generator: torch.Generator
    ) -> torch.Tensor:
        """Draw the rows' latents afresh and scale them: (mean + std · noise − shift) · scale."""
        noise = torch.randn(self.mean[rows].shape, generator=generator)
        drawn: torch.Tensor = self.mean[rows].float() + self.std[rows].float() * noise
        return (drawn - shift_factor) * scaling_factor


class StoreTiles:
    """The tiles of a feature store, patient after patient; one row is read at a time from memory-mapped shards."""

    def __init__(self, store: FeatureStore) -> None:
        self._store = store
        self._patients = store.patients
        counts = [len(store.tiles(patient)) for patient in self._patients]
        self._ends = np.cumsum(counts, dtype=np.int64)
        self._open: OrderedDict[str, Any] = OrderedDict()

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    @property
    def scaling(self) -> dict[str, float]:
        """`shift_factor` and `scaling_factor` of the latents: from the store's settings, else the starter's.

        Raises:
            BadInputError: the store was made with an autoencoder of which neither is known.
        """
        from pixcell_core.starter import STARTER, starter_digest

        names, meta = ("shift_factor", "scaling_factor"), self._store.meta
        if all(name in meta for name in names):
            return {name: float(meta[name]) for name in names}
        if meta.get("autoencoder") not in {None, starter_digest("autoencoder")}:
            raise BadInputError(
                f"The feature store {self._store.path.name} does not say how its latents are scaled, and was made "
                f"with an autoencoder we do not know ({meta['autoencoder']}).",
                hint="Give --shift-factor and --scaling-factor, from that autoencoder's config.json.",
                code="scaling-unknown",
            )
        config = json.loads((STARTER / "autoencoder" / "config.json").read_text())
        return {name: float(config[name]) for name in names}

    def _shard(self, patient: str) -> Any:
        from safetensors import SafetensorError, safe_open

        if patient in self._open:
            self._open.move_to_end(patient)
            return self._open[patient]
        path = self._store.path / "shards" / f"{shard_name(patient)}.safetensors"
        try:
            handle: Any = safe_open(path, framework="pt")
            keys = set(handle.keys())
        except (OSError, SafetensorError) as error:
            raise BadInputError(
                f"The feature store {self._store.path.name} is damaged: shard {path.stem} cannot be read.",
                hint="Remove the store folder and run `pixcell site features` again.",
                code="feature-store-damaged",
            ) from error
        for key in ("latents", "embeddings"):
            if key not in keys:
                raise BadInputError(
                    f"The feature store {self._store.path.name} holds no {key}.",
                    hint="Holdout stores carry no latents; train on the train store.",
                    code="feature-missing",
                )
        self._open[patient] = handle
        if len(self._open) > OPEN_SHARDS:
            self._open.popitem(last=False)
        return handle

    def features(self, row: int) -> Features:
        """The features of one tile; the store keeps mean and deviation as the two halves of 2 C channels."""
        at = int(np.searchsorted(self._ends, row, side="right"))
        patient = self._patients[at]
        inside = row - (int(self._ends[at - 1]) if at else 0)
        shard = self._shard(patient)
        latents = shard.get_slice("latents")[inside : inside + 1][0]
        embedding = shard.get_slice("embeddings")[inside : inside + 1][0]
        if embedding.ndim == 1:
            embedding = embedding[None]
        mean, std = latents.chunk(2)
        return Features(mean, std, embedding)
