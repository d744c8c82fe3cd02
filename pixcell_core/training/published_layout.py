"""The layout PixCell's training features are published in: one HDF5 list of names, two .npy files per tile.

    patches/metadata/patch_names_all.hdf5   one key per source, with `_1024` in its name; values: relative paths, bytes
    patches/<path>.jpeg                     the image, 1024 px at 0.5 microns per pixel (not needed for training)
    features/<path>_sd3_vae.npy             float16 (2 C, h, w): latent mean, then standard deviation, unscaled
    features/<path>_uni.npy                 float16 (n, d)

Legend: C latent channels (16), h w latent pixels, n condition tokens, d embedding width, f crops per side.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch

from pixcell_core.errors import BadInputError
from pixcell_core.training.crops import CropGeometry
from pixcell_core.training.tile_sources import Features

METADATA = Path("patches") / "metadata" / "patch_names_all.hdf5"
SOURCE_MARK = "_1024"
SHIFT_FACTOR, SCALING_FACTOR = 0.0609, 1.5305
"""Scaling of the autoencoder that the published features were made with."""

TRIES = 10
"""Other tiles tried in place of one that cannot be read, before the training stops."""

IMAGE_SUFFIXES = (".jpeg", ".jpg")


def safe_name(value: bytes | str) -> str:
    """A tile's path below `features/`, without an image suffix.

    Raises:
        BadInputError: the path is absolute, climbs with `..`, or is no text: it could name a file elsewhere.
    """
    try:
        text = value.decode() if isinstance(value, bytes) else str(value)
    except UnicodeDecodeError:
        text = ""
    parts = text.split("/")
    if not text or "\\" in text or "\0" in text or text.startswith("/") or {"", ".", ".."} & set(parts):
        raise BadInputError(
            f"The list of tiles names {value!r}, which is no path inside the features folder.",
            hint=f"Correct {METADATA.as_posix()}: every value is a relative path without '..'.",
            code="unsafe-path",
        )
    suffix = PurePosixPath(text).suffix
    return text[: -len(suffix)] if suffix.lower() in IMAGE_SUFFIXES else text


class PublishedLayout:
    """Tiles of a folder in the published layout, read memory-mapped, as wholes or as f x f crops.

    Row i is crop i % f² of tile i // f². A tile that cannot be read is replaced by the tiles after it, up to `TRIES`
    of them; which ones were is kept in `unreadable` (path to reason) and `replaced` counts the replacements. The
    replacement of a row is always the same one, so that a resumed run sees the same data.

    Raises:
        BadInputError: no list of tiles, an empty or damaged one, an unsafe path in it, or nothing readable.
    """

    def __init__(
        self,
        root: Path | str,
        *,
        factor: int = 1,
        on_unreadable: Callable[[str, str], None] = lambda path, reason: None,
    ) -> None:
        import h5py

        self.root, self._factor, self._on_unreadable = Path(root), factor, on_unreadable
        self.unreadable: dict[str, str] = {}
        self.replaced = 0
        path = self.root / METADATA
        if not path.is_file():
            raise BadInputError(
                f"{self.root} is not in the published layout: {METADATA.as_posix()} is missing.",
                hint="Give the folder that holds patches/ and features/.",
                code="no-published-layout",
            )
        try:
            self._file: Any = h5py.File(path, "r")
            self._lists = [self._file[key] for key in sorted(self._file) if SOURCE_MARK in key]
            self._ends = np.cumsum([len(one) for one in self._lists], dtype=np.int64)
        except (OSError, KeyError, TypeError, RuntimeError) as error:
            raise BadInputError(
                f"{path.name} cannot be read as a list of tiles.",
                hint="Copy it again; it is an HDF5 file with one list of paths per source.",
                code="published-layout-damaged",
            ) from error
        if not self._lists or not self._ends[-1]:
            raise BadInputError(
                f"{path.name} lists no tile under a key with {SOURCE_MARK} in its name.",
                hint="Name every source's key with its tile size, e.g. tcga_1024.",
                code="no-tiles",
            )
        self._shapes: tuple[tuple[int, ...], tuple[int, ...]] | None = None
        self.features(0)  # the first readable tile says what all others must look like
        self.replaced = 0

    def __len__(self) -> int:
        return int(self._ends[-1]) * self._factor**2

    @property
    def scaling(self) -> dict[str, float]:
        """`shift_factor` and `scaling_factor` of the latents: noted in the list, else those of the published files."""
        known = {"shift_factor": SHIFT_FACTOR, "scaling_factor": SCALING_FACTOR}
        return {k: float(self._file.attrs.get(k, value)) for k, value in known.items()}

    @property
    def tiles(self) -> int:
        """Number of whole tiles."""
        return int(self._ends[-1])

    def name(self, tile: int) -> str:
        """Path of a tile below `features/`, without suffix."""
        source = int(np.searchsorted(self._ends, tile, side="right"))
        inside = tile - (int(self._ends[source - 1]) if source else 0)
        return safe_name(self._lists[source][inside])

    def _load(self, name: str, ending: str, dimensions: int) -> np.ndarray[Any, Any]:
        array: np.ndarray[Any, Any] = np.load(
            self.root / "features" / f"{name}{ending}", mmap_mode="r", allow_pickle=False
        )
        if array.ndim != dimensions or array.dtype.kind != "f" or 0 in array.shape:
            raise ValueError(f"{ending} holds {array.dtype} of shape {array.shape}")
        return array

    def _read(self, tile: int, crop: int) -> Features:
        name = self.name(tile)
        latents = self._load(name, "_sd3_vae.npy", 3)
        embedding = self._load(name, "_uni.npy", 2)
        if len(latents) % 2:
            raise ValueError(f"_sd3_vae.npy holds {len(latents)} channels, not mean and deviation")
        shapes = (latents.shape, embedding.shape)
        if self._shapes is not None and shapes != self._shapes:
            raise ValueError(f"shapes {shapes} differ from the other tiles' {self._shapes}")
        geometry = CropGeometry(latents.shape[1], latents.shape[2], len(embedding), self._factor)
        rows, columns = geometry.latent_block(crop)
        # Copied out of the map: only the crop's pages are read from disk.
        block = torch.from_numpy(np.array(latents[:, rows, columns]))
        tokens = torch.from_numpy(np.array(embedding[geometry.token_rows(crop)]))
        if not (torch.isfinite(block).all() and torch.isfinite(tokens).all()):
            raise ValueError("a value is infinite or not a number")
        self._shapes = shapes
        mean, std = block.chunk(2)
        return Features(mean, std, tokens)

    def features(self, row: int) -> Features:
        """Latents (C, h/f, w/f) and tokens (n/f², d) of one crop, or of its replacement."""
        tile, crop = divmod(row, self._factor**2)
        for attempt in range(1 + TRIES):
            other = (tile + attempt) % self.tiles
            try:
                found = self._read(other, crop)
            except (OSError, ValueError, EOFError) as error:
                name = self.name(other)
                if name not in self.unreadable:
                    self.unreadable[name] = f"{type(error).__name__}: {error}"
                    self._on_unreadable(name, self.unreadable[name])
                continue
            self.replaced += attempt > 0
            return found
        raise BadInputError(
            f"{1 + TRIES} tiles in a row cannot be read, from {self.name(tile)} on.",
            hint="Extract the features again, or take the missing tiles out of the list.",
            code="features-unreadable",
        )


class PublishedLayoutWriter:
    """Writes a folder in the published layout; the list of names comes last, so that it never names a missing file."""

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root)
        self._names: dict[str, list[str]] = {}

    def add(self, source: str, name: str, *, latents: torch.Tensor, embedding: torch.Tensor) -> None:
        """Write one tile: latents (2 C, h, w) mean then deviation, unscaled; embedding (n, d); both as float16."""
        safe = safe_name(name)
        for ending, tensor in (("_sd3_vae.npy", latents), ("_uni.npy", embedding)):
            path = self.root / "features" / f"{safe}{ending}"
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(path.name + ".partial")
            with partial.open("wb") as handle:
                np.save(handle, tensor.detach().cpu().half().numpy())
            partial.replace(path)
        key = source if SOURCE_MARK in source else f"{source}{SOURCE_MARK}"
        self._names.setdefault(key, []).append(safe)

    def close(self, notes: Mapping[str, str | float] | None = None) -> None:
        """Write the list of names, with optional notes as attributes of the file (e.g. the latents' scaling)."""
        import h5py

        path = self.root / METADATA
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        with h5py.File(partial, "w") as file:
            for key, names in self._names.items():
                longest = max(len(name.encode()) for name in names)
                file.create_dataset(key, data=np.array([n.encode() for n in names], dtype=f"S{longest}"))
            for note, value in (notes or {}).items():
                file.attrs[note] = value
        with partial.open("rb") as handle:
            os.fsync(handle.fileno())
        partial.replace(path)
