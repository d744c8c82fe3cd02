"""Reads a site's tiles, encodes them, and writes one feature store for training and one for the holdout.

Legend: n tiles of a patient, B tiles of a batch, H W pixels, h w latent pixels, d embedding width.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pixcell_core.cli.contract import emit_note
from pixcell_core.cli.progress import Bar, progress
from pixcell_core.errors import RefusedError
from pixcell_core.training.feature_store import FeatureStore, FeatureStoreWriter
from site_client.catalogue.catalogue import Catalogue
from site_client.catalogue.records import SlideRecord
from site_client.catalogue.split import HOLDOUT, TRAIN
from site_client.features.protocols import LatentEncoder, TileEncoderProtocol, weights_digest
from site_client.slides.parallel import default_workers, ordered_map
from site_client.slides.quality import MAX_INK, MIN_FOCUS
from site_client.slides.reader import SlideReader
from site_client.slides.storage import atomic_path, exclusive, storage_errors
from site_client.slides.tiling import Tile, TilingPlan

FOLDER = "features"


@dataclass(frozen=True)
class Selection:
    """Which tiles of a patient are encoded. `tiles_per_patient` 0 takes all that are good enough."""

    tiles_per_patient: int = 16
    max_ink: float = MAX_INK
    min_focus: float = MIN_FOCUS

    def choose(self, tiles: list[tuple[SlideRecord, Tile]]) -> list[tuple[SlideRecord, Tile]]:
        """A sample that depends on nothing but the tiles' names, in slide and reading order."""
        good = [
            (s, t) for s, t in tiles if t.quality.ink <= self.max_ink and t.quality.focus >= self.min_focus
        ]
        if self.tiles_per_patient and len(good) > self.tiles_per_patient:
            good.sort(key=lambda pair: hashlib.sha256(pair[1].tile.encode()).digest())
            good = good[: self.tiles_per_patient]
        return sorted(good, key=lambda pair: (pair[0].id, pair[1].y, pair[1].x))


@dataclass(frozen=True)
class Models:
    """The two encoders and where they run."""

    encoder: TileEncoderProtocol
    autoencoder: LatentEncoder
    device: str = "cpu"


@dataclass(frozen=True)
class PartOutcome:
    """What one store holds now. `without_tiles` counts patients of the part who gave no usable tile."""

    part: str
    patients: int
    tiles: int
    without_tiles: int


@dataclass(frozen=True)
class ExtractionOutcome:
    """What `extract` did; the rate counts only tiles encoded by this call."""

    parts: list[PartOutcome]
    encoded: int
    seconds: float

    @property
    def tiles_per_second(self) -> float:
        """Tiles read, encoded and written per second."""
        return self.encoded / self.seconds if self.seconds > 0 else 0.0


@dataclass(frozen=True)
class _Job:
    patient: str
    tiles: list[tuple[SlideRecord, Tile]]


def extract(
    catalogue: Catalogue, plan: TilingPlan, selection: Selection, models: Models, batch_size: int = 32
) -> ExtractionOutcome:
    """Encode the chosen tiles of every patient that is not stored yet.

    Writes `SITE_DIR/features/train` (pixels, latents, embeddings) and `SITE_DIR/features/holdout` (pixels,
    embeddings: the holdout never trains, so it has no latents). A patient is stored whole or not at all.

    Raises:
        RefusedError: `split-missing`, `no-usable-tiles`.
        BadInputError: a slide cannot be read any more, or the stores hold other settings.
        StorageFullError: the disk is full.
    """
    _write_split(catalogue)
    start = time.monotonic()
    encoded = 0
    parts = []
    for part in (TRAIN, HOLDOUT):
        folder = catalogue.site_dir / FOLDER / part
        what = "writing features"
        with storage_errors(what, folder.parent), exclusive(folder.parent, what):
            made, outcome = _extract_part(catalogue, folder, part, plan, selection, models, batch_size)
        encoded += made
        parts.append(outcome)
    return ExtractionOutcome(parts, encoded, time.monotonic() - start)


def _write_split(catalogue: Catalogue) -> None:
    """Leave beside the stores when the holdout was drawn and who is on each side: the audit's evidence, site-only."""
    drawn = catalogue.require_split()
    sides = {part: sorted({slide.patient for slide in catalogue.slides(part)}) for part in (TRAIN, HOLDOUT)}
    folder = catalogue.site_dir / FOLDER
    with storage_errors("writing the split", catalogue.site_dir):
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_path(folder / "split.json") as partial:
            partial.write_text(
                json.dumps({"drawn_at": drawn.drawn_at, "seed_source": drawn.seed_source, **sides})
            )


def _jobs(catalogue: Catalogue, part: str, plan: TilingPlan, selection: Selection) -> list[_Job]:
    by_patient: dict[str, list[tuple[SlideRecord, Tile]]] = {}
    for slide in catalogue.slides(part):
        pairs = by_patient.setdefault(slide.patient, [])
        pairs += [(slide, tile) for tile in catalogue.tiles(plan.key, slide.id)]
    return [_Job(patient, selection.choose(tiles)) for patient, tiles in by_patient.items()]


def _extract_part(
    catalogue: Catalogue,
    folder: Path,
    part: str,
    plan: TilingPlan,
    selection: Selection,
    models: Models,
    batch_size: int,
) -> tuple[int, PartOutcome]:
    everyone = _jobs(catalogue, part, plan, selection)
    jobs = [job for job in everyone if job.tiles]
    empty = len(everyone) - len(jobs)
    if not jobs:
        raise RefusedError(
            f"No patient of the {part} part has a usable tile of {plan.tile_size} px at "
            f"{plan.mpp:g} microns per pixel.",
            hint="Look at `pixcell site data show --sheet OUT.png`: too little tissue, blur or "
            "pen ink all exclude tiles.",
            code="no-usable-tiles",
        )
    if empty:
        emit_note(
            f"note: {empty} of {len(everyone)} patients of the {part} part have no usable tile and "
            "are left out."
        )
    writer = FeatureStoreWriter(
        folder,
        {
            "part": part,
            "tile_size": plan.tile_size,
            "mpp": plan.mpp,
            "min_tissue": plan.min_tissue,
            "tiles_per_patient": selection.tiles_per_patient,
            "encoder": weights_digest(models.encoder),
            "autoencoder": weights_digest(models.autoencoder) if part == TRAIN else None,
            "embedding_dim": models.encoder.embedding_dim,
            **(_latent_scaling(models.autoencoder) if part == TRAIN else {}),
        },
    )
    stored = _stored_tiles(folder)

    def finished(job: _Job) -> bool:
        """A shard is finished unless it is known to hold other tiles (a slide was added since)."""
        known = stored.get(job.patient)
        return writer.has(job.patient) and (known is None or known == [t.tile for _, t in job.tiles])

    waiting = [job for job in jobs if not finished(job)]
    total = sum(len(job.tiles) for job in waiting)

    def pixels_of(job: _Job) -> torch.Tensor:
        return read_tiles(job.tiles, plan)

    with progress(f"encoding {part} tiles", total=total, unit="tiles") as bar:
        results = ordered_map(pixels_of, waiting, default_workers(), ahead=2)
        for job, pixels in zip(waiting, results, strict=True):
            embeddings, latents = _encode(pixels, models, batch_size, with_latents=part == TRAIN, bar=bar)
            writer.add(job.patient, _rows(job), pixels=pixels, latents=latents, embeddings=embeddings)
    writer.close({job.patient for job in jobs})
    return total, PartOutcome(part, len(jobs), sum(len(job.tiles) for job in jobs), empty)


def _stored_tiles(folder: Path) -> dict[str, list[str]]:
    if not (folder / "index.parquet").is_file():
        return {}
    store = FeatureStore.open(folder)
    return {patient: store.tiles(patient) for patient in store.patients}


def read_tiles(tiles: list[tuple[SlideRecord, Tile]], plan: TilingPlan) -> torch.Tensor:
    """Pixels of the tiles, uint8 (n, 3, H, W); each slide is opened once."""
    images = []
    for slide, group in _by_slide(tiles):
        with SlideReader(slide.path, assumed_mpp=slide.mpp if slide.mpp_assumed else None) as reader:
            size = (plan.tile_size, plan.tile_size)
            images += [reader.read(tile.x, tile.y, size, tile.mpp) for tile in group]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()


def _by_slide(tiles: list[tuple[SlideRecord, Tile]]) -> Iterator[tuple[SlideRecord, list[Tile]]]:
    groups: dict[int, tuple[SlideRecord, list[Tile]]] = {}
    for slide, tile in tiles:
        groups.setdefault(slide.id, (slide, []))[1].append(tile)
    yield from groups.values()


@torch.inference_mode()
def _encode(
    pixels: torch.Tensor, models: Models, batch_size: int, *, with_latents: bool, bar: Bar
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Embeddings float16 (n, tokens, d) and, if wanted, latent mean and std float16 (n, 32, h, w)."""
    embeddings, latents = [], []
    for batch in pixels.split(batch_size):
        on_device = batch.to(models.device)
        embeddings.append(models.encoder.encode(on_device).to("cpu", torch.float16))
        if with_latents:
            moments = models.autoencoder.encode(on_device.float().div(127.5).sub(1.0)).latent_dist
            latents.append(torch.cat([moments.mean, moments.std], dim=1).to("cpu", torch.float16))
        bar.advance(len(batch))
    return torch.cat(embeddings), torch.cat(latents) if with_latents else None


def _rows(job: _Job) -> list[dict[str, Any]]:
    return [
        {
            "tile": tile.tile,
            "slide": slide.public_name,
            "label": slide.label,
            "x": tile.x,
            "y": tile.y,
            "level": tile.level,
            "mpp": tile.mpp,
            "tissue": tile.quality.tissue,
            "focus": tile.quality.focus,
            "ink": tile.quality.ink,
        }
        for slide, tile in job.tiles
    ]


def _latent_scaling(autoencoder: object) -> dict[str, float]:
    """Shift and scale of an autoencoder's latents, so that whoever trains on a store cannot forget them."""
    config = getattr(autoencoder, "config", {})
    return {name: float(config[name]) for name in ("shift_factor", "scaling_factor") if name in config}
