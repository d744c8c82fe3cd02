"""Continues the base model on public tiles, on one process or several, with checkpoint and resume.

The result is a model folder whose digest the study then names. Nothing here touches a hospital's data.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict

from pixcell_core.errors import BadInputError, RefusedError
from server.pretraining.public_tiles import read_public_tiles

if TYPE_CHECKING:
    from pixcell_core.training.parallel import Processes
    from pixcell_core.training.tile_sources import EncodedTiles

ENCODED_AT_ONCE = 64
LOCK_PATIENCE_S = 30.0
"""How long a session waits for another one in its folder: one that was killed a moment ago is gone by then."""


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
    """Settings of a central pretraining. `batch_size` is per process; `threads` 0 lets torch choose."""

    base: Path
    tiles: Path
    out: Path
    tile_size: int
    steps: int
    batch_size: int
    learning_rate: float
    seed: int
    threads: int
    checkpoint_every: int = 20


class SessionWatch:
    """What a session tells while it goes on, and asks; this one is silent and never stops it."""

    def encoded(self, done: int, total: int) -> None:
        """So many tiles of all are encoded."""

    def stepped(self, step: int, loss: float) -> None:
        """A step is done; the first told of a resumed session comes after its checkpoint's."""

    def should_stop(self) -> bool:
        """Whether to end after this checkpoint."""
        return False


class _Counting(SessionWatch):
    def __init__(self, on_step: Callable[[int], None]) -> None:
        self._on_step = on_step

    def stepped(self, step: int, loss: float) -> None:
        self._on_step(1)


def check_tile_size(size: int) -> None:
    """Refuse tiles that cannot be cut into latent patches (`BadInputError`)."""
    if size < 16 or size % 16:
        raise BadInputError(
            f"A tile of {size} px cannot be cut into latent patches.",
            hint="Give a multiple of 16 px, e.g. 128 or 256.",
            code="tile-size-impossible",
        )


def pretrain(request: PretrainingRequest, on_step: Callable[[int], None]) -> PretrainingResult:
    """Continue training the base on public tiles, in this process, on the CPU; run again it goes on.

    Raises:
        BadInputError: no usable tiles or base, or a folder that holds a pretraining of other settings.
    """
    result = run_session(request, _Counting(on_step))
    assert result is not None  # nobody stops it, and this process leads
    return result


def run_session(
    request: PretrainingRequest, watch: SessionWatch, processes: Processes | None = None
) -> PretrainingResult | None:
    """Train to the last step, or until the watch of the leading process says to stop after a checkpoint.

    Killed and run again, with the same settings, threads and number of processes, it goes on from its checkpoint to the
    model an undisturbed session would have made, bit for bit on a CPU.

    Returns:
        The result, in the leading process; None in others, or where it was stopped.

    Raises:
        BadInputError: no usable tiles or base, or a folder that holds a pretraining of other settings.
        RefusedError: another session is at work in this folder.
    """
    from pixcell_core.models import PixCellTransformer2DModel
    from pixcell_core.starter import load_autoencoder
    from pixcell_core.starter.weights import load_folder, save_folder, weights_digest
    from pixcell_core.training.parallel import Processes
    from pixcell_core.training.trainer import Trainer, TrainingSettings

    ours = processes or Processes()
    if request.threads:
        torch.set_num_threads(request.threads)
    check_tile_size(request.tile_size)
    pixels = read_public_tiles(request.tiles, request.tile_size)
    model = load_folder(PixCellTransformer2DModel, request.base)
    config = load_autoencoder().config
    settings = TrainingSettings(
        steps=request.steps,
        batch_size=request.batch_size,
        learning_rate=request.learning_rate,
        seed=request.seed,
        checkpoint_every=request.checkpoint_every,
        shift_factor=float(config["shift_factor"]),
        scaling_factor=float(config["scaling_factor"]),
    )
    if ours.leads:
        _keep_settings(request, weights_digest(request.base), pixels)
    alone: AbstractContextManager[None] = _alone_in(request.out) if ours.leads else nullcontext()
    with alone:
        ours.check_same(0)  # nobody looks for a checkpoint before the leader has the folder to itself
        trainer = Trainer(model, _encode(pixels, ours, watch), settings, processes=ours)
        log = request.out / "metrics.jsonl"
        with log.open("a") if ours.leads else nullcontext(None) as metrics:

            def note(step: int, loss: float) -> None:
                if metrics is not None:
                    metrics.write(json.dumps({"step": step, "loss": round(loss, 6)}) + "\n")
                    metrics.flush()
                    watch.stepped(step, loss)

            finished = trainer.run(request.out / "checkpoint.pt", note, stop=watch.should_stop)
        if not finished or not ours.leads:
            return None
        folder = request.out / "transformer"
        save_folder(model.cpu(), folder)  # type: ignore[arg-type]
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


def _encode(pixels: torch.Tensor, processes: Processes, watch: SessionWatch) -> EncodedTiles:
    """Latents and embeddings of tiles, uint8 (N, 3, size, size); every process makes all of them on its device."""
    from pixcell_core.starter import load_autoencoder, load_encoder
    from pixcell_core.training.trainer import EncodedTiles

    autoencoder, encoder = load_autoencoder(), load_encoder()
    for network in (autoencoder, encoder):
        torch.nn.Module.to(network, processes.device)
    means, stds, embeddings = [], [], []
    with torch.inference_mode():
        for part in pixels.split(ENCODED_AT_ONCE):
            here = part.to(processes.device)
            latent = autoencoder.encode(here.float() / 127.5 - 1).latent_dist
            means.append(latent.mean.cpu())
            stds.append(latent.std.cpu())
            embeddings.append(encoder.encode(here).cpu())
            if processes.leads:
                watch.encoded(sum(len(m) for m in means), len(pixels))
    return EncodedTiles(*(torch.cat(x).clone() for x in (means, stds, embeddings)))


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Hold the folder's lock: two sessions would write one checkpoint. The kernel frees it when a process dies."""
    with (folder / "session.lock").open("w") as lock:
        end = time.monotonic() + LOCK_PATIENCE_S
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    raise RefusedError(
                        f"Another pretraining is at work in {folder.name}.",
                        hint="Wait for its end, or give another output folder.",
                        code="pretraining-busy",
                    ) from None
                time.sleep(0.1)
        yield


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
