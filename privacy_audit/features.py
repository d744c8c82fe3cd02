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
from privacy_audit.geometry import FINE_SIDE, evened, evened_with_texture, haematoxylin
from privacy_audit.keypoints import SIDE, Keypoints, find_keypoints
from privacy_audit.tiles import TileSource, pixel_digest

CACHE_VERSION = 4
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
    embeddings: Tensor  # (n, d) float32, or float16 as the cache keeps them
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
    """Compute the features of uint8 (B, 3, H, W) tiles: densities and embeddings where the eye looks."""
    arrays = pixels.permute(0, 2, 3, 1).contiguous().numpy()
    density = haematoxylin(pixels.to(eye.device))
    thumbs, texture = evened_with_texture(density, FINE_SIDE)
    # Digests leave the interpreter's lock as the keypoint search does.
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        digests, canonical = tuple(pool.map(pixel_digest, arrays)), tuple(pool.map(canonical_digest, arrays))
    return TileFeatures(
        digests,
        canonical,
        thumbs.half().to("cpu"),
        texture.to("cpu"),
        eye.embed(pixels).float(),
        find_keypoints(evened(density, SIDE).to("cpu")),
    )


def canonical_digest(tile: npt.NDArray[np.uint8]) -> str:
    """Digest of the smallest of the eight symmetries of one (H, W, 3) tile: equal for a copy in any of them.

    Smallest is by shape, then by bytes, row after row; nearly always the first row decides.
    """
    turned = [np.rot90(side, turns) for side in (tile, tile[:, ::-1]) for turns in range(4)]
    shape = min(one.shape for one in turned)
    left = [one for one in turned if one.shape == shape]
    for row in range(shape[0]):
        rows = [one[row].tobytes() for one in left]
        least = min(rows)
        left = [one for one, here in zip(left, rows, strict=True) if here == least]
        if len(left) == 1:
            break
    return pixel_digest(left[0])


def load_features(source: TileSource, eye: Eye, cache: Path | None) -> TileFeatures:
    """Features of every tile of a source, from the cache where it holds them.

    The cache is one file per chunk of tiles, named by the tiles' pixels, the eye and the version of this code;
    an interrupted run therefore resumes, and no stale file is ever taken for a fresh one.
    """
    total = len(source.ids)
    if cache is not None:
        cache.mkdir(parents=True, exist_ok=True)
    digests: list[str] = []
    canonical: list[str] = []
    room: list[Tensor] = []
    with progress(f"looking at {source.name} tiles", total=total, unit="tiles") as bar:
        for start in range(0, total, CHUNK):
            stop = min(start + CHUNK, total)
            part = _chunk(source.read(start, stop), eye, cache)
            digests += part.digests
            canonical += part.canonical
            values = _tensors(part)
            # Filled in place: parts that are joined at the end would stand in memory twice.
            room = room or [value.new_empty(total, *value.shape[1:]) for value in values]
            for whole, value in zip(room, values, strict=True):
                whole[start:stop] = value
            bar.advance(stop - start)
    thumbs, texture, embeddings, place, descriptor, count = room
    return TileFeatures(
        tuple(digests), tuple(canonical), thumbs, texture, embeddings, Keypoints(place, descriptor, count)
    )


def _tensors(features: TileFeatures) -> list[Tensor]:
    points = features.keypoints
    return [
        features.thumbs,
        features.texture,
        features.embeddings,
        points.place,
        points.descriptor,
        points.count,
    ]


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
            found["embeddings"],
            Keypoints(found["place"], found["descriptor"], found["count"]),
        )
    features = describe(pixels, eye)
    # Halves are enough for retrieval; round once here so that a cached run equals a fresh one.
    features = TileFeatures(
        features.digests,
        features.canonical,
        features.thumbs,
        features.texture,
        features.embeddings.half(),
        features.keypoints,
    )
    partial = path.with_suffix(".partial")
    save_file(
        {
            "digests": _to_bytes(features.digests),
            "canonical": _to_bytes(features.canonical),
            "thumbs": features.thumbs.contiguous(),
            "texture": features.texture.contiguous(),
            "embeddings": features.embeddings.contiguous(),
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
