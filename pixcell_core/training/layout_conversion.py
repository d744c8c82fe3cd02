"""Feature stores to the published layout and back.

A store is kept by patient and holds pixels; the layout is a flat list without either. Going out, patients appear
under the hash their shard already has, never by name, and pixels stay at home. Coming in, whoever knows the names
says which patient a tile belongs to.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from pixcell_core.errors import BadInputError
from pixcell_core.training.feature_store import FeatureStore, FeatureStoreWriter, shard_name
from pixcell_core.training.published_layout import PublishedLayout, PublishedLayoutWriter
from pixcell_core.training.tile_sources import StoreTiles


def store_to_layout(store: FeatureStore, root: Path | str, *, source: str = "store_1024") -> int:
    """Write a store's latents and embeddings in the published layout; return the number of tiles.

    Raises:
        BadInputError: the store holds no latents or no embeddings.
    """
    writer, written = PublishedLayoutWriter(root), 0
    for patient in store.patients:
        latents, embeddings = store.latents(patient), store.embeddings(patient)
        for row, (latent, embedding) in enumerate(zip(latents, embeddings, strict=True)):
            tokens = embedding[None] if embedding.ndim == 1 else embedding
            writer.add(source, f"{shard_name(patient)}/{row:06d}", latents=latent, embedding=tokens)
            written += 1
    writer.close(StoreTiles(store).scaling)
    return written


def folder_of(name: str) -> str:
    """The folder a tile lies in: in the published lists, its slide."""
    return str(PurePosixPath(name).parent)


def layout_to_store(
    root: Path | str,
    path: Path | str,
    *,
    patient_of: Callable[[str], str] = folder_of,
    meta: dict[str, Any] | None = None,
) -> FeatureStore:
    """Make a feature store of whole tiles in the published layout.

    Args:
        root: folder in the published layout.
        path: the store to write.
        patient_of: the patient of a tile by its name; its folder when absent.
        meta: settings of the store; the latents' scaling is added from the layout.

    Raises:
        BadInputError: the layout cannot be read, or a tile in it is damaged: a store never replaces one silently.
    """
    layout = PublishedLayout(root)
    tiles: dict[str, list[tuple[int, str]]] = {}
    for tile in range(layout.tiles):
        name = layout.name(tile)
        tiles.setdefault(patient_of(name), []).append((tile, name))
    writer = FeatureStoreWriter(path, {**layout.scaling, **(meta or {})})
    for patient, members in tiles.items():
        found = [layout.features(tile) for tile, _ in members]
        if layout.unreadable:
            name, reason = next(iter(layout.unreadable.items()))
            raise BadInputError(
                f"The features of {name} cannot be read ({reason}).",
                hint="Extract them again, or take the tile out of the list.",
                code="features-unreadable",
            )
        latents = torch.stack([torch.cat([f.mean, f.std]) for f in found])
        rows = [{"tile": name, "slide": folder_of(name), "x": 0, "y": 0, "level": 0} for _, name in members]
        writer.add(
            patient,
            rows,
            # The layout carries no pixels; an empty image says so, where a black one would be a lie.
            pixels=torch.zeros(len(members), 3, 0, 0, dtype=torch.uint8),
            latents=latents,
            embeddings=torch.stack([f.embedding for f in found]),
        )
    writer.close(tiles.keys())
    return FeatureStore.open(path)
