"""Public embeddings that patients may vote for: read from a file, named by a digest, made from public tiles.

The digest is over the numbers alone (shape and float32 values), so the same embeddings have one name whether they lie in
a feature store, a .safetensors or a .npy file. A study names it; a site uses no others.
Legend: c candidates, n tokens, d embedding width, H W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from pixcell_core.contracts.canonical import canonical_bytes, digest
from pixcell_core.errors import BadInputError, RefusedError
from pixcell_core.training.feature_store import FeatureStore
from pixcell_core.trust.durable import write_whole

TENSOR = "embeddings"


@dataclass(frozen=True)
class PublicCandidates:
    """Public embeddings, float32 (c, n, d), all finite and none of them zero."""

    embeddings: torch.Tensor

    @property
    def digest(self) -> str:
        """`sha256:<hex>` over shape and values."""
        values = self.embeddings.numpy().astype("<f4", order="C")
        return digest(canonical_bytes(list(values.shape)) + values.tobytes())

    @classmethod
    def of(cls, embeddings: torch.Tensor, source: str) -> PublicCandidates:
        """Check embeddings (c, n, d) or (c, d) and take them as candidates.

        Raises:
            BadInputError: another shape, no numbers, or rows that are zero, NaN or infinite.
        """
        if embeddings.ndim == 2:
            embeddings = embeddings[:, None]
        if embeddings.ndim != 3 or not embeddings.is_floating_point() or 0 in embeddings.shape:
            raise BadInputError(
                f"{source} holds {embeddings.dtype} {list(embeddings.shape)}, expected floating point "
                "[candidates, tokens, width].",
                hint="Make the file with `pixcell site candidates make`, or from `pixcell model embed`.",
                code="candidates-shape",
            )
        values = embeddings.detach().float().contiguous()
        flat = values.flatten(1)
        useless = ~torch.isfinite(flat).all(dim=1) | (flat == 0).all(dim=1)
        if bool(useless.any()):
            first = int(useless.nonzero()[0])
            raise BadInputError(
                f"{int(useless.sum())} of {len(values)} embeddings in {source} are zero, NaN or infinite "
                f"(first: number {first}): nobody could vote for them.",
                hint="Embed those tiles again in float32.",
                code="candidates-not-finite",
            )
        return cls(values)

    @classmethod
    def read(cls, path: Path) -> PublicCandidates:
        """Read a .safetensors or .npy file, or all embeddings of a feature store made from public tiles.

        Raises:
            BadInputError: nothing there that can be read as embeddings.
        """
        if path.is_dir():
            store = FeatureStore.open(path)
            parts = [store.embeddings(patient).float() for patient in store.patients]
            return cls.of(torch.cat(parts) if parts else torch.empty(0, 1, 1), path.name)
        try:
            if path.suffix == ".npy":
                return cls.of(torch.from_numpy(np.load(path, allow_pickle=False)), path.name)
            with safe_open(path, framework="pt") as handle:
                return cls.of(handle.get_tensor(TENSOR), path.name)
        except (OSError, ValueError, EOFError, TypeError, SafetensorError) as error:
            raise BadInputError(
                f"{path} cannot be read as candidates: expected a feature store, or a .safetensors file with the "
                f"tensor {TENSOR!r}, or a .npy file.",
                hint="Fetch the file again that the study was written for, or make one: pixcell site candidates make.",
                code="candidates-unreadable",
            ) from error

    def write(self, path: Path) -> None:
        """Write a .safetensors file, whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, save({TENSOR: self.embeddings.contiguous()}))


def candidates_of_study(
    path: Path | None, *, wanted_digest: str, wanted_count: int, private_folder: Path
) -> PublicCandidates:
    """The candidates a study names, checked before a patient is asked.

    Args:
        path: where the site keeps them.
        wanted_digest: the study's `candidates_digest`.
        wanted_count: how many candidates a vote needs.
        private_folder: the site's own features, which can never be candidates.

    Raises:
        BadInputError: no path, or nothing that can be read there.
        RefusedError: private features, other embeddings than the study's, or too few.
    """
    if path is None:
        raise BadInputError(
            "The policy private needs the public embeddings that its study names.",
            hint="Add --candidates FILE; the coordinator publishes it with the study. No other policy is taken instead.",
            code="candidates-missing",
        )
    if path.resolve().is_relative_to(private_folder.resolve()):
        raise RefusedError(
            "These are this site's own features: patients may vote for public embeddings only.",
            hint="Give the public file of the study.",
            code="candidates-are-private",
        )
    found = PublicCandidates.read(path)
    if found.digest != wanted_digest:
        raise RefusedError(
            f"{path.name} holds other embeddings than the study was approved with: found {found.digest}, "
            f"approved {wanted_digest}.",
            hint="Fetch the study's own file, or approve a study with this digest.",
            code="candidates-differ",
        )
    if len(found.embeddings) < wanted_count:
        raise RefusedError(
            f"{path.name} holds {len(found.embeddings)} embeddings, the study's votes need {wanted_count}.",
            hint="Make a larger file and a study with its digest.",
            code="too-few-candidates",
        )
    return found


def embed_public_tiles(
    batches: Iterable[torch.Tensor],
    encode: Callable[[torch.Tensor], torch.Tensor],
    on_tiles: Callable[[int], None] = lambda count: None,
) -> PublicCandidates:
    """Candidates from batches of public tiles, uint8 (b, 3, H, W), by an encoder to (b, n, d)."""
    parts = []
    for batch in batches:
        parts.append(encode(batch).float())
        on_tiles(len(batch))
    return PublicCandidates.of(torch.cat(parts) if parts else torch.empty(0, 1, 1), "the tiles given")


def procedural_tiles(
    count: int, *, tile_size: int, mpp: float, seed: int, batch_size: int = 32
) -> Iterator[torch.Tensor]:
    """Drawn tissue in batches of uint8 (b, 3, H, W): all classes in turn, every tile of a pretend patient of its own."""
    from pixcell_core.procedural import TissueClass, patient_look, render_field, site_look

    kinds = list(TissueClass)
    batch: list[np.ndarray] = []
    for number in range(count):
        site = seed * 1000 + number % 7
        field = render_field(
            tile_size,
            tile_size,
            mpp=mpp,
            site=site_look(site),
            patient=patient_look(site, number),
            tissue=kinds[number % len(kinds)],
            seed=number,
            coverage=1.0,
        )
        batch.append(field.rgb)
        if len(batch) == batch_size or number == count - 1:
            yield torch.from_numpy(np.stack(batch)).permute(0, 3, 1, 2).contiguous()
            batch = []
