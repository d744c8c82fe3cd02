"""A sampling run: loads the models, draws the images, and writes them with a manifest and a contact sheet."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from pixcell_core.diffusion import inputs
from pixcell_core.diffusion.condition_source import ConditionSource, from_features, from_images, unconditional
from pixcell_core.diffusion.contact_sheet import contact_sheet
from pixcell_core.diffusion.guidance import default_guidance_scale
from pixcell_core.diffusion.image_to_image import start_index
from pixcell_core.diffusion.pipeline import FACTOR, PixCellPipeline
from pixcell_core.diffusion.sample_manifest import SampledImage, SampleManifest
from pixcell_core.diffusion.seam import seam_ratio
from pixcell_core.diffusion.windows import Windowing
from pixcell_core.errors import BadInputError

LARGEST_SIDE = 4096
"""Pixels; larger images were never tried."""
SHEET_IMAGES = 48


@dataclass(frozen=True)
class SampleRequest:
    """What is to be drawn; `None` leaves a choice to the model.

    Exactly one of `images`, `features` and `unconditional` says where the conditions come from. `size` is (width,
    height) in pixels. Folders of `transformer` and `vae` are the published ones; without them the starter draws.
    """

    out: Path
    images: Path | None = None
    features: Path | None = None
    unconditional: bool = False
    transformer: Path | None = None
    vae: Path | None = None
    encoder: str = "starter"
    sampler: str = "dpm"
    steps: int = 20
    guidance_scale: float | None = None
    eta: float = 0.0
    count: int | None = None
    seed: int = 0
    size: tuple[int, int] | None = None
    init_image: Path | None = None
    strength: float = 0.6
    stride: int | None = None
    device: str = "auto"
    precision: str = "auto"
    compile: bool = False
    batch_size: int = 8


class SampleSession:
    """Loads and checks everything in the constructor, so that bad input is named before anything is drawn."""

    def __init__(self, request: SampleRequest) -> None:
        self.request = request
        self._check_request()
        from pixcell_core.models.devices import choose_device, sampling_dtype

        self._device = choose_device(request.device)
        by_device = str(sampling_dtype(self._device)).removeprefix("torch.")
        self._precision = by_device if request.precision == "auto" else request.precision
        self._weights: dict[str, str] = {}
        self._pipeline = self._load_pipeline(getattr(torch, self._precision))
        if request.compile:
            self._pipeline.transformer.compile()
        config: Any = self._pipeline.transformer.config
        self._picture = self._read_init_image()
        native = int(config["sample_size"])
        width, height = self._size(native * FACTOR, int(config["patch_size"]))
        self.latent_size = (height // FACTOR, width // FACTOR)
        self.plan = self._pipeline.window_plan(self.latent_size, request.stride)
        self.windowed = max(self.latent_size) > native
        self._source = self._load_conditions(native)
        tokens = int(config["caption_num_tokens"])
        scale = request.guidance_scale
        if scale is None:
            scale = 1.0 if request.unconditional else default_guidance_scale(tokens)
        inputs.check_guidance(scale)
        self.guidance_scale = scale
        inputs.check_steps(request.steps, 1000)
        if self._picture is not None:
            inputs.check_strength(request.strength)
        several = len(self._source.names) if request.images is not None else 8
        self.count = several if request.count is None else request.count
        inputs.check_count(self.count)

    @property
    def work(self) -> int:
        """Units of work `draw` reports: one per image and step, times the windows of an image."""
        steps = self.request.steps
        if self._picture is not None:
            steps -= start_index(steps, self.request.strength)
        return self.count * steps * (len(self.plan.places) if self.windowed else 1)

    def _check_request(self) -> None:
        request = self.request
        given = [
            name
            for name, value in (
                ("--images", request.images),
                ("--features", request.features),
                ("--unconditional", request.unconditional),
            )
            if value
        ]
        if len(given) != 1:
            raise BadInputError(
                f"Conditions come from {' and '.join(given) or 'nowhere'}, expected exactly one source.",
                hint="Give one of --images FOLDER, --features STORE or --unconditional.",
                code="condition-source",
            )
        if request.out.is_file() or (request.out.is_dir() and any(request.out.iterdir())):
            raise BadInputError(
                f"{request.out} is a file or a folder with content, expected a new folder.",
                hint="Give another --out, or remove the folder.",
                code="out-not-empty",
            )

    def _load_pipeline(self, dtype: torch.dtype) -> PixCellPipeline:
        from pixcell_core.starter import load_autoencoder, load_transformer, starter_digest
        from pixcell_core.starter.weights import weights_digest

        request = self.request
        transformer: Any
        vae: Any
        if request.transformer is None:
            transformer = load_transformer()
            self._weights["transformer"] = starter_digest("transformer")
        else:
            from pixcell_core.checkpoints.folders import load_transformer_folder, transformer_folder

            transformer = load_transformer_folder(request.transformer, dtype=dtype)
            self._weights["transformer"] = weights_digest(transformer_folder(request.transformer))
        if request.vae is None:
            vae = load_autoencoder()
            self._weights["autoencoder"] = starter_digest("autoencoder")
        else:
            from pixcell_core.checkpoints.folders import load_autoencoder_folder

            vae = load_autoencoder_folder(request.vae, dtype=torch.float32)
            self._weights["autoencoder"] = weights_digest(request.vae)
        for model, kept in ((transformer, dtype), (vae, torch.float32)):
            # The plain module's own: diffusers' wrapper warns of modules to keep in float32 where there are none.
            torch.nn.Module.to(model.eval().requires_grad_(False), device=self._device, dtype=kept)
        return PixCellPipeline(vae, transformer, request.sampler)

    def _read_init_image(self) -> Image.Image | None:
        if self.request.init_image is None:
            return None
        from pixcell_core.encoders.image_folder import read_image

        if not self.request.init_image.is_file():
            raise BadInputError(
                f"There is no file {self.request.init_image}.",
                hint="Give the image to start from.",
                code="no-such-file",
            )
        return Image.fromarray(read_image(self.request.init_image).permute(1, 2, 0).numpy())

    def _size(self, native: int, patch: int) -> tuple[int, int]:
        """(width, height) in pixels: as asked, else that of the image to start from, else the model's own."""
        picture = self._picture
        size = self.request.size or (picture.size if picture is not None else (native, native))
        multiple = FACTOR * patch
        if any(side % multiple or not multiple <= side <= LARGEST_SIDE for side in size):
            raise BadInputError(
                f"The size is {size[0]} x {size[1]} pixels, "
                f"both sides must be multiples of {multiple} up to {LARGEST_SIDE}.",
                hint="Give --size WIDTHxHEIGHT, for example 1024x768; crop an image to start from.",
                code="size-out-of-range",
            )
        if picture is not None and picture.size != size:
            raise BadInputError(
                f"The image to start from has {picture.size[0]} x {picture.size[1]} pixels, "
                f"expected {size[0]} x {size[1]}.",
                hint="Leave out --size, or crop the image.",
                code="init-image-size",
            )
        return size

    def _load_conditions(self, native: int) -> ConditionSource:
        request, config = self.request, self._pipeline.transformer.config
        if request.unconditional:
            return unconditional(self._pipeline.get_unconditional_embedding(1)[0])
        if request.features is not None:
            return from_features(request.features, request.seed, int(config["caption_num_tokens"]))
        from pixcell_core.encoders import load_tile_encoder

        tile = native * FACTOR // self.plan.rows.tokens
        encoder = load_tile_encoder(request.encoder, device=str(self._device), tile_size=tile)
        if encoder.embedding_dim != config["caption_channels"]:
            raise BadInputError(
                f"The encoder {request.encoder} gives embeddings of {encoder.embedding_dim} numbers, "
                f"this transformer expects {config['caption_channels']}.",
                hint="Give --encoder the one the transformer was trained with; published weights need uni2-h:FOLDER.",
                code="condition-width",
            )
        if request.images is None:
            raise ValueError("no source of conditions")
        return from_images(request.images, encoder, tile, self.plan.grid_shape)

    def _conditions(self, numbers: list[int]) -> torch.Tensor:
        """Conditions of these images: tokens (B, n, d), or grids (B, R, S, d) where windows share an image."""
        if self._source.kind == "unconditional":
            return self._pipeline.get_unconditional_embedding(len(numbers))
        grids = torch.stack([self._source.fitted(i, self.plan.grid_shape) for i in numbers])
        return grids if self.windowed else grids.flatten(1, 2)

    def draw(self, on_work: Callable[[int], None] = lambda units: None) -> SampleManifest:
        """Draw every image, write it as PNG as soon as it is there, then the sheet and the manifest.

        Image i is drawn from the seed `seed + i` whatever the batch, so a run can be continued or checked image by
        image.
        """
        request = self.request
        request.out.mkdir(parents=True, exist_ok=True)
        together = 1 if self.windowed else max(request.batch_size, 1)
        drawn: list[SampledImage] = []
        shown: list[np.ndarray] = []
        for first in range(0, self.count, together):
            numbers = list(range(first, min(first + together, self.count)))
            for number, pixels in zip(numbers, self._draw_batch(numbers, on_work), strict=True):
                name = f"{number + 1:06d}.png"
                Image.fromarray(pixels).save(request.out / name, compress_level=3)
                seam = self._seam(pixels)
                source = self._source.names[number % len(self._source.names)]
                drawn.append(
                    SampledImage(file=name, seed=request.seed + number, condition=source, seam_ratio=seam)
                )
                if len(shown) < SHEET_IMAGES:
                    shown.append(pixels)
        contact_sheet(shown).save(request.out / "sheet.png")
        manifest = self._manifest(drawn)
        from pixcell_core.contracts.atomic import write_atomically

        body = json.dumps(manifest.model_dump(mode="json"), indent=1, sort_keys=True) + "\n"
        write_atomically(request.out / "manifest.json", body.encode())
        return manifest

    def _draw_batch(self, numbers: list[int], on_work: Callable[[int], None]) -> np.ndarray:
        request = self.request
        windowing = Windowing(stride=request.stride, batch_size=request.batch_size, on_windows=on_work)
        drawn: Any = self._pipeline(
            self._conditions(numbers),
            guidance_scale=self.guidance_scale,
            num_inference_steps=request.steps,
            generator=[torch.Generator().manual_seed(request.seed + i) for i in numbers],
            latent_size=self.latent_size,
            output_type="np",
            image=self._picture,
            strength=request.strength,
            eta=request.eta,
            windowing=windowing if self.windowed else None,
            callback=None if self.windowed else lambda step, time, latents: on_work(len(numbers)),
        )
        return np.asarray(drawn.images)

    def _seam(self, pixels: np.ndarray) -> float | None:
        if not self.windowed:
            return None
        rows, columns = ([FACTOR * b for b in borders] for borders in self.plan.borders)
        return round(seam_ratio(pixels, rows, columns, period=FACTOR), 4)

    def _manifest(self, drawn: list[SampledImage]) -> SampleManifest:
        request = self.request
        return SampleManifest(
            width=self.latent_size[1] * FACTOR,
            height=self.latent_size[0] * FACTOR,
            sampler=request.sampler,
            num_inference_steps=request.steps,
            guidance_scale=self.guidance_scale,
            eta=request.eta,
            seed=request.seed,
            conditions=self._source.kind,
            encoder=request.encoder if self._source.kind == "images" else None,
            init_image=request.init_image.name if request.init_image is not None else None,
            strength=request.strength if request.init_image is not None else None,
            windows=len(self.plan.places) if self.windowed else 1,
            precision=self._precision,
            weights=self._weights,
            images=drawn,
        )
