"""`pixcell model sample`: draw tiles or large images, with the starter or with weights brought along."""

from __future__ import annotations

import re
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from pydantic import BaseModel

from pixcell_core.cli.contract import FormatOption, OutputFormat, command, emit_note
from pixcell_core.cli.progress import progress
from pixcell_core.errors import BadInputError


class Precision(StrEnum):
    """Type of the transformer's weights while it runs."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


class Sampled(BaseModel):
    """What `pixcell model sample` wrote."""

    out: str
    images: int
    width: int
    height: int
    sampler: str
    num_inference_steps: int
    guidance_scale: float
    seed: int
    windows: int
    largest_seam_ratio: float | None
    manifest: str
    sheet: str

    def __str__(self) -> str:
        lines = [
            f"{self.images} image(s) of {self.width} x {self.height} px in {self.out}: {self.sampler}, "
            f"{self.num_inference_steps} steps, guidance {self.guidance_scale:g}, seed {self.seed}",
        ]
        if self.largest_seam_ratio is not None:
            lines.append(
                f"each from {self.windows} windows; largest seam ratio {self.largest_seam_ratio:.2f} "
                "(1 = borders cannot be told from the rest)"
            )
        return "\n".join([*lines, f"look at {self.sheet}; {self.manifest} says how to draw them again"])


def parse_size(text: str) -> tuple[int, int]:
    """(width, height) of WIDTHxHEIGHT or of one number for a square.

    Raises:
        BadInputError: anything else.
    """
    found = re.fullmatch(r"\s*(\d{1,6})\s*(?:[xX×]\s*(\d{1,6}))?\s*", text)
    if found is None:
        raise BadInputError(
            f"The size is {text!r}, expected WIDTHxHEIGHT in pixels.",
            hint="For example --size 1024x768.",
            code="size-not-understood",
        )
    return int(found.group(1)), int(found.group(2) or found.group(1))


@command
def sample(
    out: Annotated[Path, typer.Option("--out", help="New folder for the images, the manifest and a sheet.")],
    images: Annotated[
        Path | None, typer.Option("--images", help="Draw variants of these images (a folder).")
    ] = None,
    features: Annotated[
        Path | None, typer.Option("--features", help="Draw variants of a feature store's tiles.")
    ] = None,
    unconditional: Annotated[
        bool, typer.Option("--unconditional", help="Draw from the null condition, after no image.")
    ] = False,
    transformer: Annotated[
        Path | None,
        typer.Option("--transformer", help="Transformer or pipeline folder; the starter when left out."),
    ] = None,
    vae: Annotated[
        Path | None, typer.Option("--vae", help="Autoencoder folder (SD3's for published weights).")
    ] = None,
    encoder: Annotated[
        str, typer.Option("--encoder", help="Encoder of --images: starter, uni2-h:FOLDER and others.")
    ] = "starter",
    sampler: Annotated[
        str, typer.Option("--sampler", help="dpm (published), dpm-uniform (PixCell's scripts), ddim, euler.")
    ] = "dpm",
    steps: Annotated[int, typer.Option("--steps", help="Steps of the sampler, 1 to 1000.")] = 20,
    guidance_scale: Annotated[
        float | None,
        typer.Option("--guidance-scale", help="1 or more; 2 for one token, 1.2 for sixteen when left out."),
    ] = None,
    eta: Annotated[float, typer.Option("--eta", min=0.0, max=1.0, help="Noise of the ddim sampler.")] = 0.0,
    count: Annotated[
        int | None, typer.Option("--count", help="Images to draw; one per image of --images, else 8.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Image i is drawn from seed + i.")] = 0,
    size: Annotated[
        str | None, typer.Option("--size", help="WIDTHxHEIGHT in pixels, up to 4096; the model's own else.")
    ] = None,
    init_image: Annotated[
        Path | None, typer.Option("--init-image", help="Start from this image instead of noise.")
    ] = None,
    strength: Annotated[
        float, typer.Option("--strength", help="How far from --init-image to go: above 0, at most 1.")
    ] = 0.6,
    stride: Annotated[
        int | None,
        typer.Option(
            "--stride", help="Latent pixels (8 px) between windows of a large image; half a window."
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Images or windows per call.")] = 8,
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")] = "auto",
    compile: Annotated[
        bool,
        typer.Option(
            "--compile", help="Compile the network: minutes first (a C++ compiler on CPU), then faster."
        ),
    ] = False,
    precision: Annotated[
        Precision, typer.Option("--precision", help="auto is bfloat16 on CUDA and float32 elsewhere.")
    ] = Precision.AUTO,
    format: FormatOption = OutputFormat.TEXT,
) -> Sampled:
    """Draw images: variants of the ones you give, or of none.

    A size beyond the model's own is drawn from overlapping windows, seam-free and in any aspect; conditions are then
    read tile by tile from images of that size (smaller ones are continued by repeating their tiles).

    Example: pixcell model sample --images my-tiles --out variants --count 16
    """
    asked_size = parse_size(size) if size is not None else None
    from pixcell_core.diffusion.sample_session import SampleRequest, SampleSession

    session = SampleSession(
        SampleRequest(
            out=out,
            images=images,
            features=features,
            unconditional=unconditional,
            transformer=transformer,
            vae=vae,
            encoder=encoder,
            sampler=sampler,
            steps=steps,
            guidance_scale=guidance_scale,
            eta=eta,
            count=count,
            seed=seed,
            size=asked_size,
            init_image=init_image,
            strength=strength,
            stride=stride,
            device=device,
            precision=str(precision),
            compile=compile,
            batch_size=batch_size,
        )
    )
    if not unconditional:
        emit_note(
            "note: these images follow the given ones and no audit has looked at them; "
            "what leaves a site is drawn with `pixcell site generate` and audited."
        )
    with progress("drawing", session.work, "windows" if session.windowed else "image steps") as bar:
        manifest = session.draw(bar.advance)
    seams = [image.seam_ratio for image in manifest.images if image.seam_ratio is not None]
    return Sampled(
        out=str(out),
        images=len(manifest.images),
        width=manifest.width,
        height=manifest.height,
        sampler=manifest.sampler,
        num_inference_steps=manifest.num_inference_steps,
        guidance_scale=manifest.guidance_scale,
        seed=manifest.seed,
        windows=manifest.windows,
        largest_seam_ratio=max(seams) if seams else None,
        manifest=str(out / "manifest.json"),
        sheet=str(out / "sheet.png"),
    )


def register(models: typer.Typer) -> None:
    """Add `pixcell model sample`."""
    models.command("sample")(sample)
