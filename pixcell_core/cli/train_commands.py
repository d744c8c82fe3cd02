"""`pixcell model train`: train the transformer on encoded tiles, from nothing, from weights, or from a smaller stage."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import BaseModel

from pixcell_core.cli.contract import FormatOption, OutputFormat, command, emit_note
from pixcell_core.cli.progress import progress
from pixcell_core.errors import BadInputError

if TYPE_CHECKING:
    from pixcell_core.models import PixCellTransformer2DModel
    from pixcell_core.training.parallel import Processes
    from pixcell_core.training.sample_sheet import SampleSheet
    from pixcell_core.training.settings import TrainingSettings
    from pixcell_core.training.tile_sources import TileSource

TRAIN_HELP = """Train the transformer on encoded tiles; run the same command again to resume.

Three ways to start: --init (go on from a model folder), --from-stage (grow a model of a smaller resolution), or
neither (fresh weights: the published size, or --config). The result is a model folder in --out/transformer, with
the averaged weights; --out/metrics.jsonl holds one line per step.

\b
One GPU or a CPU:
  pixcell model train --data features/train --init base --out run

\b
Two GPUs (or two CPU processes with --device cpu); --batch-size is per process:
  torchrun --nproc-per-node=2 -m pixcell_core.cli.main \\
    model train --data features/train --init base --out run

The published settings: --optimizer came --learning-rate 2e-5 --warmup-steps 1000 --max-grad-norm 0.01
--ema-decay 0.9999 --gradient-checkpointing; per GPU --batch-size 128, 64 or 12 and --steps 120000, 60000 or 80000
at 256, 512 or 1024 px, each stage started --from-stage of the one before.

Several machines: the same with torchrun's --nnodes, --node-rank and --rdzv-endpoint, and one shared --out folder.
"""


class TrainingResult(BaseModel):
    """A finished training: where the model is, how far it went, how the loss moved (means of a tenth of the steps)."""

    model: str
    digest: str
    resolution: int
    tiles: int
    steps: int
    processes: int
    loss_first: float
    loss_last: float
    replaced_tiles: int

    def __str__(self) -> str:
        lines = [
            f"{self.steps} steps on {self.tiles:,} tiles of {self.resolution} px, {self.processes} process(es)",
            f"loss {self.loss_first:.4f} → {self.loss_last:.4f}",
            f"model {self.model}   {self.digest}",
        ]
        if self.replaced_tiles:
            lines.append(
                f"{self.replaced_tiles} draws fell on a tile that cannot be read; another took its place"
            )
        return "\n".join(lines)


@dataclass(frozen=True)
class _Start:
    """What a run starts from; at most one of the three folders or files."""

    init: Path | None
    from_stage: Path | None
    config: Path | None
    resolution: int | None
    seed: int

    def model(self) -> PixCellTransformer2DModel:
        """The model to train, float32."""
        from pixcell_core.models import PixCellTransformer2DModel
        from pixcell_core.starter.weights import load_folder
        from pixcell_core.training.stages import new_model, next_stage, published_config, resolution_of

        given = [k for k in ("init", "from_stage", "config") if getattr(self, k) is not None]
        if len(given) > 1:
            named = " and ".join("--" + k.replace("_", "-") for k in given)
            raise BadInputError(
                f"{named} were given together.",
                hint="A training starts from one of them.",
                code="two-starts",
            )
        if self.from_stage is not None:
            if self.resolution is None:
                raise BadInputError(
                    "--from-stage needs --resolution, the image side to grow to.",
                    hint="Add e.g. --resolution 512.",
                    code="no-resolution",
                )
            smaller = load_folder(PixCellTransformer2DModel, self.from_stage)
            return next_stage(smaller, self.resolution, seed=self.seed)
        if self.init is not None:
            model = load_folder(PixCellTransformer2DModel, self.init)
        elif self.config is not None:
            model = new_model(_read_config(self.config), self.seed)
        else:
            model = new_model(published_config(self.resolution or 256), self.seed)
        if self.resolution is not None and resolution_of(model) != self.resolution:
            raise BadInputError(
                f"The model is made for {resolution_of(model)} px, not {self.resolution}.",
                hint="Leave --resolution out, or give the model to --from-stage to grow it.",
                code="resolution-differs",
            )
        return model


def _keep_start(out: Path, start: _Start) -> None:
    """Note what a run started from; refuse to resume it under another start, whose weights would be ignored.

    Raises:
        BadInputError: the folder holds a run that started from something else.
    """
    from pixcell_core.starter.weights import weights_digest

    now: dict[str, object] = {"resolution": start.resolution}
    for name in ("init", "from_stage"):
        folder = getattr(start, name)
        now[name] = None if folder is None else weights_digest(folder)
    now["config"] = None if start.config is None else _read_config(start.config)
    path = out / "start.json"
    if path.exists() and (out / "checkpoint.pt").exists():
        before = _read_config(path)
        changed = sorted("--" + k.replace("_", "-") for k in now if before.get(k) != now[k])
        if changed:
            raise BadInputError(
                f"{out} holds a training that started from something else ({', '.join(changed)}).",
                hint="Give the same start to resume it, or another --out to begin anew.",
                code="start-differs",
            )
        return
    out.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(now, indent=1, sort_keys=True))
    partial.replace(path)


def _read_config(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
        if not isinstance(found, dict):
            raise ValueError("no object")
    except (OSError, ValueError) as error:
        raise BadInputError(
            f"{path} is no transformer configuration.",
            hint="Give a JSON file such as the config.json of a model folder.",
            code="config-unreadable",
        ) from error
    return {k: v for k, v in found.items() if not k.startswith("_")}


def _open_tiles(data: Path, sample_size: int) -> tuple[TileSource, Callable[[], dict[str, float]]]:
    """The tiles of a feature store or of the published layout, cropped to the model's size; their latents' scaling."""
    from pixcell_core.training.crops import CroppedTiles, crops_per_side
    from pixcell_core.training.feature_store import FeatureStore
    from pixcell_core.training.published_layout import METADATA, PublishedLayout
    from pixcell_core.training.tile_sources import StoreTiles

    if not data.is_dir():
        raise BadInputError(
            f"There is no folder {data}.",
            hint="Give a feature store (made by `pixcell site features`) or a folder in the published layout.",
            code="no-such-folder",
        )
    if (data / METADATA).is_file():
        whole = PublishedLayout(data)
        factor = crops_per_side(whole.features(0), sample_size)

        def say(name: str, reason: str) -> None:
            emit_note(
                f"note: the features of {name} cannot be read ({reason}); another tile takes its place."
            )

        return PublishedLayout(data, factor=factor, on_unreadable=say), lambda: whole.scaling
    store = FeatureStore.open(data)
    tiles = StoreTiles(store)
    if not len(tiles):
        raise BadInputError(
            f"The feature store {data.name} holds no tile.", hint="Extract features first.", code="no-tiles"
        )
    factor = crops_per_side(tiles.features(0), sample_size)
    return (CroppedTiles(tiles, factor) if factor > 1 else tiles), lambda: tiles.scaling


def _sheet(
    out: Path,
    every: int,
    tiles: TileSource,
    autoencoder: Path | None,
    settings: TrainingSettings,
    processes: Processes,
) -> SampleSheet | None:
    """Sample sheets of up to nine fixed tiles, decoded by an autoencoder where one is given."""
    import torch

    from pixcell_core.training.sample_sheet import SampleSheet, latent_preview, sampling_draw

    if not every or not processes.leads:
        return None
    count = min(9, len(tiles))
    rows = [i * len(tiles) // count for i in range(count)]
    condition = torch.stack([tiles.features(row).embedding.float() for row in rows])
    decode: Callable[[torch.Tensor], torch.Tensor] = latent_preview
    if autoencoder is not None:
        vae = _load_autoencoder(autoencoder).to(processes.device)

        def decode(latents: torch.Tensor) -> torch.Tensor:
            plain = latents / settings.scaling_factor + settings.shift_factor
            return vae.decode(plain).sample.clamp(-1, 1)  # type: ignore[no-any-return]

    return SampleSheet(out / "samples", every, sampling_draw(condition, seed=settings.seed, decode=decode))


def _load_autoencoder(folder: Path) -> Any:
    """An autoencoder folder, told apart by the class its configuration names."""
    from diffusers import AutoencoderKL

    from pixcell_core.models import TileAutoencoder
    from pixcell_core.starter.weights import load_folder

    path = folder / "config.json"
    _read_config(path)
    own = json.loads(path.read_text()).get("_class_name") == TileAutoencoder.__name__
    kind: Any = TileAutoencoder if own else AutoencoderKL
    return load_folder(kind, folder)


@command
def train(
    data: Annotated[Path, typer.Option("--data", help="Feature store, or a folder in the published layout.")],
    out: Annotated[Path, typer.Option("--out", help="Checkpoint, metrics, samples and the model go here.")],
    init: Annotated[Path | None, typer.Option("--init", help="Model folder to go on from.")] = None,
    from_stage: Annotated[
        Path | None, typer.Option("--from-stage", help="Model folder of a smaller resolution to grow from.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option("--config", help="Transformer config.json for fresh weights.")
    ] = None,
    resolution: Annotated[
        int | None,
        typer.Option(min=16, help="Image side in px: 256, 512 or 1024; the model's own if absent."),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Optimiser steps in all.")] = 1000,
    batch_size: Annotated[int, typer.Option(min=1, help="Tiles per process and forward pass.")] = 16,
    accumulate: Annotated[int, typer.Option(min=1, help="Forward passes per optimiser step.")] = 1,
    optimizer: Annotated[str, typer.Option(help="adamw, or came as published.")] = "adamw",
    learning_rate: Annotated[float, typer.Option(help="Published: 2e-5.")] = 2e-5,
    schedule: Annotated[
        str, typer.Option(help="constant (published) or cosine, after the warm-up.")
    ] = "constant",
    warmup_steps: Annotated[int, typer.Option(min=0, help="Published: 1000.")] = 100,
    weight_decay: Annotated[
        float, typer.Option(min=0, help="Published: 0 with came, 0.03 with adamw.")
    ] = 0.0,
    max_grad_norm: Annotated[
        float, typer.Option(help="Clip the gradient to this norm. Published: 0.01.")
    ] = 1.0,
    ema_decay: Annotated[float, typer.Option(min=0, max=1, help="Of the averaged weights.")] = 0.9999,
    condition_drop: Annotated[
        float, typer.Option(min=0, max=1, help="Share of tiles trained without their condition.")
    ] = 0.1,
    shift_factor: Annotated[
        float | None, typer.Option(help="Of the latents; read from the data if absent.")
    ] = None,
    scaling_factor: Annotated[
        float | None, typer.Option(help="Of the latents; read from the data if absent.")
    ] = None,
    precision: Annotated[str, typer.Option(help="auto (bf16 on a GPU), fp32 or bf16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    checkpoint_every: Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")] = 500,
    sample_every: Annotated[int, typer.Option(min=0, help="Steps between sample sheets; 0 for none.")] = 0,
    autoencoder: Annotated[
        Path | None, typer.Option("--autoencoder", help="Decodes the sample sheets; without it, raw latents.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Decides order, noise and fresh weights.")] = 24,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory, about a third more time.")
    ] = False,
    compile: Annotated[
        bool, typer.Option("--compile", help="Compile the network with torch.compile.")
    ] = False,
    format: FormatOption = OutputFormat.TEXT,
) -> TrainingResult | None:
    """Train the transformer (the group shows TRAIN_HELP)."""
    from pixcell_core.models.devices import choose_device
    from pixcell_core.starter.weights import save_folder, weights_digest
    from pixcell_core.training.journal import Journal
    from pixcell_core.training.parallel import joined_processes
    from pixcell_core.training.precision import pick_precision
    from pixcell_core.training.settings import TrainingSettings
    from pixcell_core.training.stages import resolution_of
    from pixcell_core.training.trainer import Trainer

    place = choose_device(device)
    start = _Start(init, from_stage, config, resolution, seed)
    model = start.model()
    tiles, scaling = _open_tiles(data, int(model.config["sample_size"]))
    settings = TrainingSettings(
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        condition_drop=condition_drop,
        max_grad_norm=max_grad_norm,
        ema_decay=ema_decay,
        warmup_steps=warmup_steps,
        checkpoint_every=checkpoint_every,
        seed=seed,
        shift_factor=scaling()["shift_factor"] if shift_factor is None else shift_factor,
        scaling_factor=scaling()["scaling_factor"] if scaling_factor is None else scaling_factor,
        optimizer=optimizer,
        schedule=schedule,
        accumulate=accumulate,
        precision=pick_precision(precision, place),
        gradient_checkpointing=gradient_checkpointing,
        compile=compile,
    )
    journal = Journal(out / "metrics.jsonl")
    with joined_processes(place) as processes:
        sheet = _sheet(out, sample_every, tiles, autoencoder, settings, processes)
        trainer = Trainer(model, tiles, settings, processes=processes, journal=journal, sheet=sheet)
        if processes.leads:
            _keep_start(out, start)
        shown = progress("training", total=steps, unit="steps") if processes.leads else nullcontext(None)
        with shown as bar:
            done = 0

            def on_step(step: int, loss: float) -> None:
                nonlocal done
                if bar is not None:
                    bar.advance(step - done)
                done = step

            trainer.run(out / "checkpoint.pt", on_step)
        if not processes.leads:
            raise typer.Exit
        save_folder(model, out / "transformer")
        losses = [float(row["loss"]) for row in journal.rows()]
        tenth = max(1, len(losses) // 10)
        return TrainingResult(
            model=str(out / "transformer"),
            digest=weights_digest(out / "transformer"),
            resolution=resolution_of(model),
            tiles=len(tiles),
            steps=trainer.step,
            processes=processes.world,
            loss_first=sum(losses[:tenth]) / tenth,
            loss_last=sum(losses[-tenth:]) / tenth,
            replaced_tiles=int(getattr(tiles, "replaced", 0)),
        )


def register(models: typer.Typer) -> None:
    """Add `train` to the group `pixcell model`."""
    models.command("train", help=TRAIN_HELP)(train)
