"""`pixcell model info` and `pixcell model convert`: what weights are, and their other published form."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from pydantic import BaseModel

from pixcell_core.cli.contract import FormatOption, OutputFormat, command


class CheckpointForm(StrEnum):
    """A published form of the transformer's weights."""

    DIFFUSERS = "diffusers"
    ORIGINAL = "original"


class WeightType(StrEnum):
    """Type of the weights that are written."""

    KEEP = "keep"
    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"


class Conversion(BaseModel):
    """What was written."""

    source: str
    out: str
    form: CheckpointForm
    parameters: int
    dtype: str
    stage: int
    condition_tokens: int
    digest: str

    def __str__(self) -> str:
        return (
            f"{self.out}: {self.parameters:,} parameters ({self.dtype}), {self.stage} px, "
            f"{self.condition_tokens} condition token{'s' * (self.condition_tokens > 1)}, {self.form} form\n"
            f"{self.digest}"
        )


HeadDimOption = Annotated[
    int, typer.Option("--head-dim", min=1, help="Width of one attention head; original files do not say it.")
]


@command
def info(
    path: Annotated[
        Path,
        typer.Argument(
            metavar="PATH",
            help="A model, pipeline or adapter folder, or one .safetensors, .ckpt or .pth file.",
        ),
    ],
    head_dim: HeadDimOption = 72,
    format: FormatOption = OutputFormat.TEXT,
) -> object:
    """Say what weights are: kind, size, stage, tokens, null embedding, digest, and what is missing.

    PATH is a model, pipeline or adapter folder, or one .safetensors, .ckpt or .pth file.

    Pickled files are opened for their tensors alone; one that carries code is refused.

    Example: pixcell model info PixCell-1024/transformer
    """
    from pixcell_core.checkpoints.inspection import inspect_checkpoint

    return inspect_checkpoint(path, head_dim=head_dim)


@command
def convert(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SOURCE", help="A Diffusers folder, a pipeline folder, or an original .ckpt / .pth file."
        ),
    ],
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="What to write; must not exist. A folder, or a .ckpt file.")
    ],
    to: Annotated[CheckpointForm, typer.Option("--to", help="The form to write.")],
    ema: Annotated[
        bool | None,
        typer.Option(
            "--ema/--no-ema",
            help="Of a training checkpoint take the moving average or the plain weights (average where there is one).",
        ),
    ] = None,
    dtype: Annotated[
        WeightType, typer.Option("--dtype", help="Type of the weights; keep leaves them as they are.")
    ] = WeightType.KEEP,
    head_dim: HeadDimOption = 72,
    sample_size: Annotated[
        int | None,
        typer.Option("--sample-size", min=2, help="Latent pixels per side, where the file does not tell."),
    ] = None,
    interpolation_scale: Annotated[
        float | None,
        typer.Option(
            "--interpolation-scale", help="Scale of the latent table, where the file does not tell."
        ),
    ] = None,
    format: FormatOption = OutputFormat.TEXT,
) -> Conversion:
    """Write a transformer in its other published form; converting back gives the same bits.

    SOURCE is a Diffusers folder, a pipeline folder, or an original .ckpt or .pth file. OUT must not exist: a folder
    for `diffusers` (config.json, safetensors), one .ckpt, .pth or .pt file for `original` (a state_dict).

    Example: pixcell model convert pixcell_256.ckpt PixCell-256 --to diffusers
    """
    import torch

    from pixcell_core.checkpoints.conversion import OriginalReading, convert_checkpoint
    from pixcell_core.checkpoints.inspection import PIXELS_PER_LATENT, content_digest

    model = convert_checkpoint(
        source,
        out,
        to.value,
        dtype=None if dtype is WeightType.KEEP else getattr(torch, dtype.value),
        reading=OriginalReading(ema, head_dim, sample_size, interpolation_scale),
    )
    return Conversion(
        source=str(source),
        out=str(out),
        form=to,
        parameters=sum(p.numel() for p in model.parameters()),
        dtype=str(model.dtype).removeprefix("torch."),
        stage=int(model.config["sample_size"]) * PIXELS_PER_LATENT,
        condition_tokens=int(model.config["caption_num_tokens"]),
        digest=content_digest(out),
    )


def register(models: typer.Typer) -> None:
    """Add `info` and `convert` to `pixcell model`."""
    models.command("info")(info)
    models.command("convert")(convert)
