"""The command `pixcell site features`: tiles to pixels, latents and embeddings."""

from __future__ import annotations

from typing import Annotated, Any, cast

import typer
from pydantic import BaseModel, ConfigDict

from pixcell_core.cli.contract import FormatOption, OutputFormat, command
from pixcell_core.cli.main import group
from site_client.slides.commands import MinTissue, Mpp, SiteDir, TileSize


class FeaturePart(BaseModel):
    """One store."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    part: str
    patients: int
    tiles: int
    without_tiles: int


class FeaturesResult(BaseModel):
    """Outcome of `site features`."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    parts: list[FeaturePart]
    encoded: int
    seconds: float
    tiles_per_second: float

    def __str__(self) -> str:
        lines = [
            f"{p.part}: {p.patients} patients, {p.tiles} tiles"
            + (f" ({p.without_tiles} patients had no usable tile)" if p.without_tiles else "")
            for p in self.parts
        ]
        lines.append(
            f"{self.encoded} tiles encoded now in {self.seconds:.1f} s ({self.tiles_per_second:.0f} tiles/s)."
        )
        return "\n".join(lines)


def register(root: typer.Typer) -> None:
    """Add `site features` to `root`."""
    group(root, "site").command("features")(features)


@command
def features(
    site_dir: SiteDir,
    tile_size: TileSize = 128,
    mpp: Mpp = 0.5,
    min_tissue: MinTissue = 0.5,
    tiles_per_patient: Annotated[int, typer.Option("--tiles-per-patient", min=0, help="0 takes all.")] = 16,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Tiles encoded at once.")] = 32,
    device: Annotated[str, typer.Option("--device", help="cpu, cuda or cuda:N.")] = "cpu",
    format: FormatOption = OutputFormat.TEXT,
) -> FeaturesResult:
    """Encode tiles into SITE_DIR/features/train and features/holdout; cuts slides first where needed."""
    from pixcell_core.errors import BadInputError
    from site_client.catalogue import Catalogue
    from site_client.catalogue.intake import tile_slides
    from site_client.slides.tiling import TilingPlan

    plan = TilingPlan(tile_size, mpp, min_tissue)
    if tile_size % 16:
        raise BadInputError(
            f"The encoder takes tiles whose edge is a multiple of 16, not {tile_size}.",
            hint="Use --tile-size 128 or 256.",
            code="bad-tile-size",
        )
    with Catalogue(site_dir) as catalogue:
        # Everything that can be refused cheaply is refused before the model libraries are loaded.
        catalogue.require_split()
        tile_slides(catalogue, plan)

        import torch

        from pixcell_core.starter import load_autoencoder, load_encoder
        from site_client.features.extraction import Models, Selection, extract

        if device != "cpu" and not (device.startswith("cuda") and torch.cuda.is_available()):
            raise BadInputError(
                f"The device '{device}' is not usable on this machine.",
                hint="Use --device cpu, or check the driver with `pixcell site doctor`.",
                code="bad-device",
            )
        encoder: torch.nn.Module = load_encoder()
        autoencoder: torch.nn.Module = load_autoencoder()
        models = Models(cast(Any, encoder.to(device)), cast(Any, autoencoder.to(device)), device)
        done = extract(catalogue, plan, Selection(tiles_per_patient), models, batch_size)
    return FeaturesResult(
        parts=[
            FeaturePart(part=p.part, patients=p.patients, tiles=p.tiles, without_tiles=p.without_tiles)
            for p in done.parts
        ],
        encoded=done.encoded,
        seconds=round(done.seconds, 2),
        tiles_per_second=round(done.tiles_per_second, 1),
    )
