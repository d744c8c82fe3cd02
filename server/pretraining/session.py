"""Continues the base model on public tiles, with checkpoint and resume.

The result is a model folder whose digest the study then names. Nothing here touches a hospital's data.
"""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from pydantic import BaseModel, ConfigDict

from pixcell_core.errors import BadInputError

# Whatever the imaging library raises at files that are cut, garbled or hostile.
UNREADABLE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".tif", ".tiff"})


class PretrainingResult(BaseModel):
    """What pretraining left behind."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    base: str
    base_digest: str
    public_tiles: int
    steps: int
    loss_first: float
    loss_last: float

    def __str__(self) -> str:
        return (
            f"base {self.base_digest[:19]}… after {self.steps} steps on {self.public_tiles} public tiles "
            f"(loss {self.loss_first:.3f} → {self.loss_last:.3f}), in {self.base}"
        )


@dataclass(frozen=True)
class PretrainingRequest:
    """Settings of a central pretraining."""

    base: Path
    tiles: Path
    out: Path
    tile_size: int
    steps: int
    batch_size: int
    learning_rate: float
    seed: int
    threads: int


def draw_public_tiles(folder: Path, count: int, size: int, seed: int, on_tile: Callable[[int], None]) -> None:
    """Draw `count` procedural tiles of `size` px into `folder`; those that exist are kept."""
    from pixcell_core.procedural import TissueClass, patient_look, render_field, site_look

    folder.mkdir(parents=True, exist_ok=True)
    classes = list(TissueClass)
    side = 4
    for field_number in range(-(-count // side**2)):
        names = [folder / f"public-{field_number * side**2 + i:06d}.png" for i in range(side**2)]
        names = names[: count - field_number * side**2]
        if not all(n.exists() for n in names):
            site_seed = seed + field_number % 16
            drawn = render_field(
                side * size,
                side * size,
                mpp=0.5,
                site=site_look(site_seed),
                patient=patient_look(site_seed, seed + 5000 + field_number),
                tissue=classes[field_number % len(classes)],
                seed=seed + field_number,
            )
            for i, name in enumerate(names):
                y, x = (i // side) * size, (i % side) * size
                partial = name.with_suffix(".partial")
                Image.fromarray(drawn.rgb[y : y + size, x : x + size]).save(
                    partial, format="PNG", compress_level=1
                )
                partial.replace(name)
        on_tile(len(names))


def read_public_tiles(folder: Path, size: int) -> torch.Tensor:
    """Read every image below `folder` as centre crops, uint8 (N, 3, size, size).

    Raises:
        BadInputError: no image, an unreadable one, or one smaller than a tile.
    """
    images = []
    for path in sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES):
        try:
            with Image.open(path) as image:
                pixels = np.asarray(image.convert("RGB"))
        except UNREADABLE as error:
            raise BadInputError(
                f"{path.name} is no image we can read.",
                hint="Take it out of the folder of public tiles, or repair it.",
                code="unreadable-tile",
            ) from error
        y, x = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
        if y < 0 or x < 0:
            raise BadInputError(
                f"{path.name} is {pixels.shape[1]}×{pixels.shape[0]} px, smaller than a tile of {size} px.",
                hint="Give tiles of at least the study's tile size.",
                code="tile-too-small",
            )
        images.append(torch.from_numpy(pixels[y : y + size, x : x + size].copy()).permute(2, 0, 1))
    if not images:
        raise BadInputError(
            f"There is no image in {folder.name}.",
            hint="Put public tiles there, or let `--draw N` draw procedural ones.",
            code="no-public-tiles",
        )
    return torch.stack(images)


def pretrain(request: PretrainingRequest, on_step: Callable[[int], None]) -> PretrainingResult:
    """Continue training the base on public tiles; killed and run again it goes on from its checkpoint.

    Raises:
        BadInputError: no usable tiles or base, or a folder that holds a pretraining of other settings.
    """
    from pixcell_core.models import PixCellTransformer2DModel
    from pixcell_core.starter import load_autoencoder, load_encoder
    from pixcell_core.starter.weights import load_folder, save_folder, weights_digest
    from pixcell_core.training.trainer import EncodedTiles, Trainer, TrainingSettings

    if request.threads:
        torch.set_num_threads(request.threads)
    if request.tile_size < 16 or request.tile_size % 16:
        raise BadInputError(
            f"A tile of {request.tile_size} px cannot be cut into latent patches.",
            hint="Give a multiple of 16 px, e.g. 128 or 256.",
            code="tile-size-impossible",
        )
    pixels = read_public_tiles(request.tiles, request.tile_size)
    model = load_folder(PixCellTransformer2DModel, request.base)
    _keep_settings(request, weights_digest(request.base), pixels)
    autoencoder, encoder = load_autoencoder(), load_encoder()
    means, stds, embeddings = [], [], []
    with torch.inference_mode():
        for part in pixels.split(64):
            latent = autoencoder.encode(part.float() / 127.5 - 1).latent_dist
            means.append(latent.mean)
            stds.append(latent.std)
            embeddings.append(encoder.encode(part))
    tiles = EncodedTiles(*(torch.cat(x).clone() for x in (means, stds, embeddings)))
    settings = TrainingSettings(
        steps=request.steps,
        batch_size=request.batch_size,
        learning_rate=request.learning_rate,
        seed=request.seed,
        shift_factor=float(autoencoder.config["shift_factor"]),
        scaling_factor=float(autoencoder.config["scaling_factor"]),
    )
    trainer, log = Trainer(model, tiles, settings), request.out / "metrics.jsonl"
    with log.open("a") as metrics:

        def note(step: int, loss: float) -> None:
            metrics.write(json.dumps({"step": step, "loss": round(loss, 6)}) + "\n")
            metrics.flush()
            on_step(1)

        trainer.run(request.out / "checkpoint.pt", note)
    folder = request.out / "transformer"
    save_folder(model, folder)
    history = _losses(log)
    tenth = max(1, len(history) // 10)
    return PretrainingResult(
        base=str(folder),
        base_digest=weights_digest(folder),
        public_tiles=len(pixels),
        steps=trainer.step,
        loss_first=float(np.mean(history[:tenth])),
        loss_last=float(np.mean(history[-tenth:])),
    )


def _keep_settings(request: PretrainingRequest, base: str, pixels: torch.Tensor) -> None:
    """Note what this folder's pretraining is made of; refuse to go on with anything else under the same name."""
    settings = {
        "base": base,
        "tiles": f"sha256:{hashlib.sha256(pixels.numpy().tobytes()).hexdigest()}",
        "tile_size": request.tile_size,
        "batch_size": request.batch_size,
        "learning_rate": request.learning_rate,
        "seed": request.seed,
    }
    path = request.out / "pretraining.json"
    if path.exists() and (request.out / "checkpoint.pt").exists():
        before = json.loads(path.read_text())
        changed = sorted(k for k in settings if before.get(k) != settings[k])
        if changed:
            raise BadInputError(
                f"{request.out.name} holds a pretraining with other settings ({', '.join(changed)}).",
                hint="Use the same settings to resume it, or give another output folder.",
                code="pretraining-differs",
            )
        return
    request.out.mkdir(parents=True, exist_ok=True)
    (request.out / "metrics.jsonl").unlink(missing_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(settings, indent=1, sort_keys=True))
    partial.replace(path)


def _losses(log: Path) -> list[float]:
    """The loss of each step once, in order: a resumed run repeats the steps after its checkpoint."""
    losses: dict[int, float] = {}
    for line in log.read_text().splitlines():
        try:
            entry = json.loads(line)
        except ValueError:  # the line a killed run was writing
            continue
        losses[int(entry["step"])] = float(entry["loss"])
    return [losses[step] for step in sorted(losses)]
