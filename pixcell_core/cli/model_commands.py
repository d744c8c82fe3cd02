"""`pixcell model`: the shipped weights, the recipe that made them, and the group of everything else done with a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from pydantic import BaseModel

from pixcell_core.cli import (
    checkpoint_commands,
    encoder_commands,
    evaluate_commands,
    sample_commands,
    train_commands,
)
from pixcell_core.cli.contract import FormatOption, OutputFormat, command, emit_note
from pixcell_core.cli.main import group
from pixcell_core.errors import BadInputError


class ModelList(BaseModel):
    """The shipped models: name, parameters, digest."""

    models: list[dict[str, str | int]]

    def __str__(self) -> str:
        rows = [f"{m['name']:<14}{m['parameters']:>12,} parameters   {m['digest']}" for m in self.models]
        return "\n".join(rows)


@command
def show(format: FormatOption = OutputFormat.TEXT) -> ModelList:
    """List the shipped models with their sizes and digests."""
    from pixcell_core.starter import load_autoencoder, load_encoder, load_transformer, starter_digest

    models = {"autoencoder": load_autoencoder(), "encoder": load_encoder(), "transformer": load_transformer()}
    return ModelList(
        models=[
            {"name": k, "parameters": sum(p.numel() for p in m.parameters()), "digest": starter_digest(k)}
            for k, m in models.items()
        ]
    )


@command
def train_starter(
    data: Annotated[Path, typer.Option("--data", help="Folder with tiles/ and slides/ (openly licensed).")],
    out: Annotated[Path, typer.Option("--out", help="Where the three model folders are written.")],
    work: Annotated[Path, typer.Option("--work", help="Checkpoints; run again to resume.")] = Path(
        "starter-work"
    ),
    autoencoder_steps: Annotated[int, typer.Option(min=1)] = 2200,
    encoder_steps: Annotated[int, typer.Option(min=1)] = 520,
    transformer_steps: Annotated[int, typer.Option(min=1)] = 6000,
    crops: Annotated[int, typer.Option(min=64, help="Encoded crops the transformer learns from.")] = 24000,
    drawn: Annotated[int, typer.Option(min=1, help="Procedural fields of 512 px to draw.")] = 480,
    minutes: Annotated[float | None, typer.Option(help="Time limit of the transformer's training.")] = None,
    threads: Annotated[int, typer.Option(min=0)] = 0,
    format: FormatOption = OutputFormat.TEXT,
) -> dict[str, object]:
    """Train the starter from nothing: autoencoder, then encoder, then transformer; measure it; write its cards."""
    if not data.is_dir():
        raise BadInputError(
            f"There is no folder {data}.",
            hint="Give the folder of openly licensed tiles; an empty one trains on drawn tissue alone.",
            code="no-such-folder",
        )
    if not (data / "MANIFEST.json").is_file():
        emit_note(
            f"note: {data} holds no MANIFEST.json: no real tile is used, the starter learns drawn tissue alone."
        )
    from pixcell_core.starter.recipe.run import StarterRecipe, train_starter_models

    recipe = StarterRecipe(
        data=data,
        out=out,
        work=work,
        autoencoder_steps=autoencoder_steps,
        encoder_steps=encoder_steps,
        transformer_steps=transformer_steps,
        crops=crops,
        drawn=drawn,
        minutes=minutes,
        threads=threads,
    )
    return train_starter_models(recipe)


def register(root: typer.Typer) -> None:
    """Add `pixcell model`."""
    models = group(root, "model")
    models.command("show")(show)
    for commands in (
        checkpoint_commands,
        encoder_commands,
        sample_commands,
        train_commands,
        evaluate_commands,
    ):
        commands.register(models)
    models.command("train-starter")(train_starter)
