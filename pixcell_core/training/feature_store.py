"""Features on disk: one shard per patient, memory-mapped, with one Parquet index over all tiles.

Layout of a store::

    store.json                     settings every shard was made with (encoder, autoencoder, tile size, mpp)
    shards/<name>.safetensors      pixels, latents, embeddings of one patient
    shards/<name>.rows.json        the index rows of that shard, written before it
    index.parquet                  all rows, written when the store is closed

A shard is complete exactly when its `.safetensors` file exists: both files are written beside their place and
renamed, rows first. An interrupted extraction therefore resumes at the first missing patient.
Legend: n tiles, H W pixels, h w latent pixels, d embedding width.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from pixcell_core.errors import BadInputError

ROW_SCHEMA = pa.schema(
    [
        ("tile", pa.string()),
        ("slide", pa.string()),
        ("patient", pa.string()),
        ("label", pa.string()),
        ("x", pa.int64()),
        ("y", pa.int64()),
        ("level", pa.int32()),
        ("mpp", pa.float64()),
        ("tissue", pa.float64()),
        ("focus", pa.float64()),
        ("ink", pa.float64()),
        ("shard", pa.string()),
        ("row", pa.int32()),
    ]
)


def shard_name(patient: str) -> str:
    """Name of a patient's shard: a hash, so that a directory listing names nobody."""
    return hashlib.sha256(patient.encode()).hexdigest()[:16]


def _replace_text(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    with partial.open("w") as handle:
        handle.write(text)
        handle.flush()
        os.fsync(handle.fileno())
    partial.replace(path)


def _read_settings(store: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((store / "store.json").read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise _damaged(store, "store.json") from error


def _damaged(store: Path, part: str) -> BadInputError:
    return BadInputError(
        f"The feature store {store.name} is damaged: {part} is missing or cannot be read.",
        hint="Remove the store folder and run `pixcell site features` again.",
        code="feature-store-damaged",
    )


class FeatureStoreWriter:
    """Writes a store patient by patient; safe to kill and to run again."""

    def __init__(self, path: Path | str, meta: Mapping[str, Any]) -> None:
        self.path = Path(path)
        self._shards = self.path / "shards"
        self._shards.mkdir(parents=True, exist_ok=True)
        settings = self.path / "store.json"
        wanted = json.loads(json.dumps(dict(meta)))
        if settings.exists():
            found = _read_settings(self.path)
            if found != wanted:
                changed = sorted(k for k in {*found, *wanted} if found.get(k) != wanted.get(k))
                raise BadInputError(
                    f"{self.path.name} already holds features made with other settings ({', '.join(changed)}).",
                    hint="Use the same settings, or remove the store folder and extract again.",
                    code="feature-settings-differ",
                )
        else:
            _replace_text(settings, json.dumps(wanted, indent=1, sort_keys=True))
        for stale in self._shards.glob("*.partial"):
            stale.unlink()

    def has(self, patient: str) -> bool:
        """Whether this patient's shard is complete."""
        return (self._shards / f"{shard_name(patient)}.safetensors").exists()

    def add(
        self,
        patient: str,
        rows: Sequence[Mapping[str, Any]],
        *,
        pixels: torch.Tensor,
        latents: torch.Tensor | None = None,
        embeddings: torch.Tensor | None = None,
    ) -> None:
        """Write one patient's tiles.

        Args:
            patient: identifier inside the site.
            rows: one mapping per tile with the columns of `ROW_SCHEMA` (shard and row are filled in).
            pixels: uint8 (n, 3, H, W).
            latents: float16 (n, 32, h, w), mean then standard deviation, unscaled.
            embeddings: float16 (n, tokens, d).
        """
        name = shard_name(patient)
        tensors = {"pixels": pixels.to(torch.uint8)}
        if latents is not None:
            tensors["latents"] = latents.to(torch.float16)
        if embeddings is not None:
            tensors["embeddings"] = embeddings.to(torch.float16)
        if any(len(t) != len(rows) for t in tensors.values()):
            raise ValueError("every tensor needs one entry per row")
        body = [{**row, "patient": patient, "shard": name, "row": i} for i, row in enumerate(rows)]
        # A shard that is written anew must not stand complete beside rows that describe another one.
        (self._shards / f"{name}.safetensors").unlink(missing_ok=True)
        _replace_text(self._shards / f"{name}.rows.json", json.dumps(body))
        partial = self._shards / f"{name}.safetensors.partial"
        save_file({k: v.contiguous() for k, v in tensors.items()}, partial)
        with partial.open("rb") as handle:
            os.fsync(handle.fileno())
        partial.replace(self._shards / f"{name}.safetensors")

    def close(self, patients: Collection[str] | None = None) -> None:
        """Write the index over every complete shard.

        Args:
            patients: who belongs in the store; everyone else's shard is removed, so that a patient who was taken
                out of the catalogue is not trained on any more. None keeps all.
        """
        if patients is not None:
            keep = {shard_name(patient) for patient in patients}
            for left in [f for f in self._shards.iterdir() if f.name.split(".")[0] not in keep]:
                left.unlink()
        rows: list[dict[str, Any]] = []
        for shard in sorted(self._shards.glob("*.safetensors")):
            rows += json.loads(shard.with_name(f"{shard.stem}.rows.json").read_text())
        columns = {f.name: [row.get(f.name) for row in rows] for f in ROW_SCHEMA}
        partial = self.path / "index.parquet.partial"
        pq.write_table(pa.table(columns, schema=ROW_SCHEMA), partial)
        partial.replace(self.path / "index.parquet")


class FeatureStore:
    """Reads a store; tensors are memory-mapped and come one patient at a time."""

    def __init__(self, path: Path, index: pa.Table, meta: dict[str, Any]) -> None:
        self.path, self.index, self.meta = path, index, meta
        self._rows: dict[str, list[dict[str, Any]]] = {}
        for row in index.to_pylist():
            self._rows.setdefault(row["patient"], []).append(row)
        for rows in self._rows.values():
            rows.sort(key=lambda r: int(r["row"]))

    @classmethod
    def open(cls, path: Path | str) -> FeatureStore:
        """Open a closed store.

        Raises:
            BadInputError: no finished store there, or one whose files are damaged.
        """
        folder = Path(path)
        if not (folder / "index.parquet").is_file():
            raise BadInputError(
                f"{folder} is no finished feature store: index.parquet is missing.",
                hint="Run `pixcell site features` to the end for this site.",
                code="no-feature-store",
            )
        meta = _read_settings(folder)
        try:
            index = pq.read_table(folder / "index.parquet")
        except (pa.ArrowException, OSError) as error:
            raise _damaged(folder, "index.parquet") from error
        if not index.schema.equals(ROW_SCHEMA):
            raise _damaged(folder, "index.parquet")
        return cls(folder, index, meta)

    @property
    def patients(self) -> list[str]:
        """Patients in the store, sorted."""
        return sorted(self._rows)

    def tiles(self, patient: str) -> list[str]:
        """Tile identifiers of a patient in row order."""
        return [str(row["tile"]) for row in self._rows[patient]]

    def labels(self, patient: str) -> list[str | None]:
        """Label of each tile of a patient, where the site gave one."""
        return [row["label"] for row in self._rows[patient]]

    def _tensor(self, patient: str, key: str) -> torch.Tensor:
        shard = self.path / "shards" / f"{shard_name(patient)}.safetensors"
        try:
            with safe_open(shard, framework="pt") as handle:
                if key not in handle.keys():  # noqa: SIM118 - a safetensors handle is no mapping
                    raise BadInputError(
                        f"The feature store {self.path.name} holds no {key}.",
                        hint="Holdout stores carry no latents; train on the train store.",
                        code="feature-missing",
                    )
                tensor: torch.Tensor = handle.get_tensor(key)
        except (OSError, SafetensorError) as error:
            raise _damaged(self.path, f"shard {shard.stem}") from error
        if len(tensor) != len(self._rows[patient]):
            raise _damaged(self.path, f"shard {shard.stem}")
        return tensor

    def pixels(self, patient: str) -> torch.Tensor:
        """Tile pixels, uint8 (n, 3, H, W)."""
        return self._tensor(patient, "pixels")

    def latents(self, patient: str) -> torch.Tensor:
        """Latent mean and standard deviation, float16 (n, 32, h, w), unscaled."""
        return self._tensor(patient, "latents")

    def embeddings(self, patient: str) -> torch.Tensor:
        """Tile embeddings, float16 (n, tokens, d)."""
        return self._tensor(patient, "embeddings")
