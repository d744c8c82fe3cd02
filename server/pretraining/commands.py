"""`pixcell pretrain`: the first phase of a study, on tiles that anybody may see."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pixcell_core.cli.contract import FormatOption, OutputFormat, command
from pixcell_core.cli.progress import progress
from pixcell_core.errors import BadInputError

if TYPE_CHECKING:
    from server.pretraining.session import PretrainingResult


@command
def pretrain_command(
    out: Annotated[Path, typer.Option("--out", help="Where checkpoint and model folder are written.")],
    tiles: Annotated[
        Path | None, typer.Option("--tiles", help="Folder of public tiles (any images).")
    ] = None,
    draw: Annotated[
        int, typer.Option("--draw", min=0, help="Draw this many procedural tiles as public data.")
    ] = 0,
    base: Annotated[
        Path | None, typer.Option("--base", help="Model folder to start from; the starter if absent.")
    ] = None,
    tile_size: Annotated[int, typer.Option("--tile-size", help="Pixels per tile side.")] = 128,
    steps: Annotated[int, typer.Option("--steps", min=1)] = 40,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1)] = 32,
    learning_rate: Annotated[float, typer.Option("--learning-rate", min=0.0)] = 1e-4,
    checkpoint_every: Annotated[
        int, typer.Option("--checkpoint-every", min=1, help="Steps between checkpoints.")
    ] = 20,
    seed: Annotated[int, typer.Option("--seed", help="Seed of drawing and training.")] = 0,
    threads: Annotated[int, typer.Option("--threads", min=0, help="CPU threads; 0 lets torch choose.")] = 0,
    format: FormatOption = OutputFormat.TEXT,
) -> PretrainingResult:
    """Central pretraining: continue the base model on public tiles. Run again to resume."""
    from pixcell_core.starter import STARTER
    from server.pretraining.public_tiles import draw_public_tiles
    from server.pretraining.session import PretrainingRequest, pretrain

    if (tiles is None) == (draw == 0):
        raise BadInputError(
            "Pretraining needs public tiles: either a folder or a number to draw.",
            hint="Give --tiles DIR or --draw N, not both.",
            code="no-public-tiles",
        )
    folder = tiles or out / "public-tiles"
    if draw:
        with progress("drawing public tiles", total=draw, unit="tiles") as bar:
            draw_public_tiles(folder, draw, tile_size, seed, bar.advance)
    request = PretrainingRequest(
        base=base or STARTER / "transformer",
        tiles=folder,
        out=out,
        tile_size=tile_size,
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        seed=seed,
        threads=threads,
        checkpoint_every=checkpoint_every,
    )
    with progress("pretraining", total=steps, unit="steps") as bar:
        return pretrain(request, bar.advance)


def register(root: typer.Typer) -> None:
    """Add `pixcell pretrain`."""
    root.command("pretrain")(pretrain_command)
