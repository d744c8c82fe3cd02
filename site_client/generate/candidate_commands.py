"""`pixcell site candidates make`: public tiles to the embeddings that patients may vote for."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from pydantic import BaseModel, ConfigDict

from pixcell_core.cli.contract import FormatOption, OutputFormat, command
from pixcell_core.cli.main import group
from pixcell_core.cli.progress import progress
from pixcell_core.errors import BadInputError

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch


class CandidatesMade(BaseModel):
    """Public embeddings that were written, and the digest a study names them by."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    out: Path
    candidates: int
    tokens: int
    width: int
    encoder: str
    source: str
    digest: str

    def __str__(self) -> str:
        return (
            f"✓ {self.out}: {self.candidates} public embeddings of {self.tokens} x {self.width} by {self.encoder}, "
            f"from {self.source}\n  digest   {self.digest}\n"
            "  next     name this digest in the study as conditioning.votes.candidates_digest, and give every site the "
            "file"
        )


@command
def make(
    out: Annotated[Path, typer.Option("--out", help="The .safetensors file to write.")],
    tiles: Annotated[
        Path | None, typer.Option("--tiles", help="Folder of public tiles (png, jpg, tif) of one size.")
    ] = None,
    draw: Annotated[
        int | None, typer.Option("--draw", min=2, max=100_000, help="Draw so many procedural tiles instead.")
    ] = None,
    encoder: Annotated[
        str, typer.Option("--encoder", help="The encoder of the sites' features: a name, or name:/path.")
    ] = "starter",
    tile_size: Annotated[
        int, typer.Option("--tile-size", min=32, max=4096, help="Edge in pixels of what makes one token.")
    ] = 128,
    mpp: Annotated[
        float, typer.Option("--mpp", min=0.1, max=4.0, help="Drawn tiles: microns per pixel.")
    ] = 0.5,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Drawn tiles: another seed, other tissue.")] = 0,
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")] = "cpu",
    format: FormatOption = OutputFormat.TEXT,
) -> CandidatesMade:
    """Embed public tiles, so that patients may vote for them. Give --tiles or --draw.

    Private conditions (`pixcell site generate --policy private`) choose among these embeddings, so nothing private may
    stand among them: use published tiles, or drawn ones. The study names the file by the digest printed here.
    """
    if (tiles is None) == (draw is None):
        raise BadInputError(
            "Give either --tiles, a folder of public tiles, or --draw, a number of procedural ones.",
            hint="For a first try: pixcell site candidates make --draw 512 --out candidates.safetensors",
            code="candidates-source",
        )
    from pixcell_core.encoders.image_folder import list_images, read_equal_images
    from pixcell_core.encoders.registry import load_tile_encoder
    from site_client.generate.candidates import embed_public_tiles, procedural_tiles

    chosen = load_tile_encoder(encoder, device=device, tile_size=tile_size)
    if tiles is not None:
        paths = list_images(tiles)

        def read() -> Iterator[torch.Tensor]:
            first = read_equal_images(paths[:1])
            size = (int(first.shape[2]), int(first.shape[3]))
            for start in range(0, len(paths), 32):
                yield read_equal_images(paths[start : start + 32], size)

        batches, count, source = read(), len(paths), "published tiles"
    else:
        assert draw is not None
        batches = procedural_tiles(draw, tile_size=tile_size, mpp=mpp, seed=seed)
        count, source = draw, "procedural tiles"
    with progress("embedding public tiles", total=count, unit="tiles") as bar:
        made = embed_public_tiles(batches, chosen.encode, bar.advance)
    made.write(out)
    return CandidatesMade(
        out=out,
        candidates=len(made.embeddings),
        tokens=made.embeddings.shape[1],
        width=made.embeddings.shape[2],
        encoder=chosen.name,
        source=source,
        digest=made.digest,
    )


def register(root: typer.Typer) -> None:
    """Add `pixcell site candidates make`."""
    group(root, "site", "candidates").command("make")(make)
