"""What the audit keeps of each tile: digests, haematoxylin thumbnail, keypoints, embedding. Computed once and cached."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pixcell_core.cli.progress import progress
from privacy_audit.eye import Eye
from privacy_audit.geometry import FINE_SIDE, ORIENTATIONS, evened, haematoxylin, orient, texture
from privacy_audit.keypoints import SIDE, Keypoints, find_keypoints
from privacy_audit.tiles import TileSource, pixel_digest

CACHE_VERSION = 3
CHUNK = 128


@dataclass(frozen=True)
class TileFeatures:
    """Features of n tiles in the order of their source.

    `digests` name the decoded pixels; `canonical` is the same for a tile and its eight mirror and turn images.
    """

    digests: tuple[str, ...]
    canonical: tuple[str, ...]
    thumbs: Tensor  # (n, 64, 64) float16
    texture: Tensor  # (n,) float32, optical density
    embeddings: Tensor  # (n, d) float32
    keypoints: Keypoints

    def __len__(self) -> int:
        return len(self.digests)

    def select(self, index: Sequence[int] | npt.NDArray[np.int64]) -> TileFeatures:
        """The same features for some of the tiles."""
        rows = [int(i) for i in index]
        return TileFeatures(
            tuple(self.digests[i] for i in rows),
            tuple(self.canonical[i] for i in rows),
            self.thumbs[rows],
            self.texture[rows],
            self.embeddings[rows],
            self.keypoints[rows],
        )


def join(parts: Sequence[TileFeatures]) -> TileFeatures:
    """Put several sets of features one after the other."""
    return TileFeatures(
        tuple(d for part in parts for d in part.digests),
        tuple(d for part in parts for d in part.canonical),
        torch.cat([part.thumbs for part in parts]),
        torch.cat([part.texture for part in parts]),
        torch.cat([part.embeddings for part in parts]),
        Keypoints.join([part.keypoints for part in parts]),
    )


def describe(pixels: Tensor, eye: Eye) -> TileFeatures:
    """Compute the features of uint8 (B, 3, H, W) tiles."""
    arrays = pixels.permute(0, 2, 3, 1).contiguous().numpy()
    density = haematoxylin(pixels)
    # Digests leave the interpreter's lock as the keypoint search does.
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        digests, canonical = tuple(pool.map(pixel_digest, arrays)), tuple(pool.map(canonical_digest, pixels))
    return TileFeatures(
        digests,
        canonical,
        evened(density, FINE_SIDE).half(),
        texture(density, FINE_SIDE),
        eye.embed(pixels).float(),
        find_keypoints(evened(density, SIDE)),
    )


def canonical_digest(tile: Tensor) -> str:
    """Smallest pixel digest among the eight symmetries of one (3, H, W) tile: equal for a copy in any of them."""
    return min(
        pixel_digest(orient(tile, which).permute(1, 2, 0).contiguous().numpy())
        for which in range(ORIENTATIONS)
    )


def load_features(source: TileSource, eye: Eye, cache: Path | None) -> TileFeatures:
    """Features of every tile of a source, from the cache where it holds them.

    The cache is one file per chunk of tiles, named by the tiles' pixels, the eye and the version of this code;
    an interrupted run therefore resumes, and no stale file is ever taken for a fresh one.
    """
    total = len(source.ids)
    if cache is not None:
        cache.mkdir(parents=True, exist_ok=True)
    parts: list[TileFeatures] = []
    with progress(f"looking at {source.name} tiles", total=total, unit="tiles") as bar:
        for start in range(0, total, CHUNK):
            stop = min(start + CHUNK, total)
            parts.append(_chunk(source.read(start, stop), eye, cache))
            bar.advance(stop - start)
    return join(parts)


def _chunk(pixels: Tensor, eye: Eye, cache: Path | None) -> TileFeatures:
    if cache is None:
        return describe(pixels, eye)
    key = hashlib.sha256(f"{CACHE_VERSION}|{eye.name}|{tuple(pixels.shape)}|{FINE_SIDE}|".encode())
    key.update(pixels.contiguous().numpy().tobytes())
    path = cache / f"{key.hexdigest()[:32]}.safetensors"
    if path.is_file():
        found = load_file(path)
        return TileFeatures(
            _from_bytes(found["digests"]),
            _from_bytes(found["canonical"]),
            found["thumbs"],
            found["texture"],
            found["embeddings"].float(),
            Keypoints(found["place"], found["descriptor"], found["count"]),
        )
    features = describe(pixels, eye)
    # Halves are enough for retrieval; round once here so that a cached run equals a fresh one.
    features = TileFeatures(
        features.digests,
        features.canonical,
        features.thumbs,
        features.texture,
        features.embeddings.half().float(),
        features.keypoints,
    )
    partial = path.with_suffix(".partial")
    save_file(
        {
            "digests": _to_bytes(features.digests),
            "canonical": _to_bytes(features.canonical),
            "thumbs": features.thumbs.contiguous(),
            "texture": features.texture.contiguous(),
            "embeddings": features.embeddings.half().contiguous(),
            "place": features.keypoints.place.contiguous(),
            "descriptor": features.keypoints.descriptor.contiguous(),
            "count": features.keypoints.count.contiguous(),
        },
        partial,
    )
    partial.replace(path)
    return features


def _to_bytes(digests: Sequence[str]) -> Tensor:
    raw = b"".join(bytes.fromhex(digest.removeprefix("sha256:")) for digest in digests)
    return torch.from_numpy(np.frombuffer(raw, dtype=np.uint8).reshape(len(digests), 32).copy())


def _from_bytes(rows: Tensor) -> tuple[str, ...]:
    return tuple("sha256:" + bytes(row.tolist()).hex() for row in rows)
