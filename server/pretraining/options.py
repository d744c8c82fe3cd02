"""The options of a pretraining on the command line, the same for `pixcell pretrain` and `pixcell run start`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

PhaseOption = Annotated[
    str | None, typer.Option("--phase", help="rounds, or pretrain: a job of central pretraining.")
]
TilesOption = Annotated[
    Path | None, typer.Option("--tiles", help="Pretraining: folder of public tiles (any images).")
]
DrawOption = Annotated[
    int | None, typer.Option("--draw", min=0, help="Pretraining: draw this many procedural tiles.")
]
BaseOption = Annotated[
    Path | None,
    typer.Option("--base", help="Pretraining: model folder to start from; the starter if absent."),
]
TileSizeOption = Annotated[
    int | None, typer.Option("--tile-size", help="Pretraining: pixels per tile side; 128 if absent.")
]
StepsOption = Annotated[int | None, typer.Option("--steps", min=1, help="Pretraining: steps; 40 if absent.")]
BatchOption = Annotated[
    int | None,
    typer.Option("--batch-size", min=1, help="Pretraining: tiles per process and step; 32 if absent."),
]
RateOption = Annotated[
    float | None, typer.Option("--learning-rate", min=0.0, help="Pretraining: step size; 1e-4 if absent.")
]
SeedOption = Annotated[
    int | None, typer.Option("--seed", min=0, help="Pretraining: seed of drawing and training; 0 if absent.")
]
ThreadsOption = Annotated[
    int | None,
    typer.Option("--threads", min=0, help="Pretraining: CPU threads per process; a fair share if absent."),
]
ProcessesOption = Annotated[
    int | None,
    typer.Option("--processes", min=1, help="Pretraining: processes that train together; 1 if absent."),
]
DeviceOption = Annotated[
    str | None, typer.Option("--device", help="Pretraining: auto, cpu or cuda (one GPU per process).")
]
CheckpointOption = Annotated[
    int | None,
    typer.Option("--checkpoint-every", min=1, help="Pretraining: steps between checkpoints; 20 if absent."),
]
StuckOption = Annotated[
    float | None,
    typer.Option("--stuck-after", min=0.1, help="Pretraining: seconds without progress; 900 if absent."),
]
RestartsOption = Annotated[
    int | None,
    typer.Option("--restarts", min=0, help="Pretraining: restarts in a row without a new checkpoint; 3."),
]
BaseFromOption = Annotated[
    str | None, typer.Option("--base-from", help="Finished pretraining job whose model is the base.")
]
