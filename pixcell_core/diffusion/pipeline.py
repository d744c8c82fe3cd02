"""`PixCellPipeline`: from embeddings to tiles, called as the published pipeline is."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from PIL import Image

from pixcell_core.diffusion import inputs
from pixcell_core.diffusion.decoding import DecodeTiling, decode_latents
from pixcell_core.diffusion.guidance import GuidedNoise, default_guidance_scale
from pixcell_core.diffusion.image_to_image import encode_image, image_tensor, noisy_start
from pixcell_core.diffusion.samplers import default_scheduler, sampler_named
from pixcell_core.diffusion.windows import WindowedNoise, Windowing, WindowPlan
from pixcell_core.errors import BadInputError
from pixcell_core.models.transformer import PixCellTransformer2DModel

__all__ = ["PixCellPipeline", "default_scheduler", "to_uint8"]

FACTOR = 8
"""Image pixels per latent pixel, of every autoencoder PixCell was trained with."""
OUTPUTS = ("pil", "np", "pt", "latent")


class PixCellPipeline(DiffusionPipeline):  # type: ignore[misc]
    """Draws tiles conditioned on tile embeddings.

    Args:
        vae: an autoencoder with `decode(z).sample` and `scaling_factor` / `shift_factor` in its configuration.
        transformer: a `PixCellTransformer2DModel`.
        scheduler: any diffusers scheduler for noise prediction, or the name of a sampler ("dpm", "dpm-uniform",
            "ddim", "euler").
    """

    def __init__(self, vae: Any, transformer: PixCellTransformer2DModel, scheduler: Any = "dpm") -> None:
        super().__init__()
        chosen = sampler_named(scheduler) if isinstance(scheduler, str) else scheduler
        self.register_modules(vae=vae, transformer=transformer, scheduler=chosen)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        vae: Any = None,
        torch_dtype: torch.dtype | None = None,
        custom_pipeline: str | None = None,
        trust_remote_code: bool = False,
    ) -> PixCellPipeline:
        """Load a published pipeline folder from this machine's disk; called as users of the published model do.

        Args:
            pretrained_model_name_or_path: the folder, with model_index.json, transformer/ and scheduler/.
            vae: an autoencoder, or its folder, where the pipeline was published without one.
            torch_dtype: type of the weights; the files' own when absent.
            custom_pipeline: taken for the published call's sake and ignored: this class is the pipeline.
            trust_remote_code: the same; no code that lies beside weights is ever run.

        Raises:
            BadInputError: there is no such folder (nothing is fetched from a network), or a part cannot be used.
        """
        from pixcell_core.checkpoints import load_pipeline

        folder = Path(pretrained_model_name_or_path)
        if not folder.is_dir():
            raise BadInputError(
                f"There is no folder {folder}.",
                hint="Download the model first and give its folder: nothing is fetched from a network here.",
                code="weights-missing",
            )
        return load_pipeline(folder, vae=Path(vae) if isinstance(vae, str) else vae, dtype=torch_dtype)

    def get_unconditional_embedding(self, batch_size: int = 1) -> torch.Tensor:
        """The null condition kept in the checkpoint, (batch, n, caption_channels)."""
        null: torch.Tensor = self.transformer.unconditional(batch_size)
        return null

    def window_plan(self, latent_size: tuple[int, int], stride: int | None = None) -> WindowPlan:
        """The windows an image of (h, w) latent pixels is drawn from; says which grid of embeddings it needs."""
        config = self.transformer.config
        return WindowPlan.of(
            latent_size,
            sample_size=int(config["sample_size"]),
            tokens=int(config["caption_num_tokens"]),
            patch=int(config["patch_size"]),
            stride=stride,
        )

    def _noise(
        self, shape: tuple[int, ...], generator: torch.Generator | Sequence[torch.Generator] | None
    ) -> torch.Tensor:
        if generator is None or isinstance(generator, torch.Generator):
            device = generator.device if generator is not None else "cpu"
            return torch.randn(shape, generator=generator, device=device)
        if len(generator) != shape[0]:
            raise ValueError(f"one generator per image, or one for all: met {len(generator)} for {shape[0]}")
        return torch.stack([torch.randn(shape[1:], generator=g, device=g.device) for g in generator])

    def _null(self, negative: torch.Tensor | None, rows: int, repeats: int) -> torch.Tensor:
        """The null condition of every drawn image, (rows * repeats, n, d)."""
        if negative is None:
            return self.get_unconditional_embedding(rows * repeats)
        tokens, channels = (self.transformer.config[k] for k in ("caption_num_tokens", "caption_channels"))
        inputs.check_condition(negative, tokens=tokens, channels=channels, name="negative_uni_embeds")
        if negative.ndim != 3 or len(negative) not in {1, rows}:
            raise BadInputError(
                f"negative_uni_embeds has the shape {tuple(negative.shape)}, "
                f"expected ({rows}, {tokens}, {channels}) or one row.",
                hint="Use get_unconditional_embedding(), or leave the argument out.",
                code="condition-shape",
            )
        return negative.expand(rows, -1, -1).repeat_interleave(repeats, dim=0)

    def _latent_size(self, condition: torch.Tensor, asked: tuple[int, int] | None) -> tuple[int, int]:
        """(h, w): as asked, else as many cells as a grid has embeddings, else the transformer's own size."""
        config = self.transformer.config
        side = int(config["sample_size"])
        if asked is not None:
            inputs.check_latent_size(asked, int(config["patch_size"]))
            return asked
        if condition.ndim == 4:
            cell = side // math.isqrt(int(config["caption_num_tokens"]))
            return condition.shape[1] * cell, condition.shape[2] * cell
        return side, side

    def _step_options(self, eta: float, generator: Any) -> dict[str, Any]:
        """What the sampler's `step` takes beyond noise, time and latents."""
        takes = inspect.signature(self.scheduler.step).parameters
        if eta and "eta" not in takes:
            raise BadInputError(
                f"eta is {eta}, but {type(self.scheduler).__name__} has no such setting; expected 0.",
                hint='Leave eta at 0, or use the sampler "ddim".',
                code="eta-unused",
            )
        options = {"eta": eta, "generator": generator}
        return {name: value for name, value in options.items() if name in takes}

    @torch.inference_mode()
    def __call__(
        self,
        uni_embeds: torch.Tensor,
        negative_uni_embeds: torch.Tensor | None = None,
        guidance_scale: float | None = None,
        num_images_per_prompt: int = 1,
        num_inference_steps: int = 20,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        latent_size: tuple[int, int] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        *,
        image: Any = None,
        strength: float = 0.6,
        eta: float = 0.0,
        windowing: Windowing | None = None,
        decode_tiling: DecodeTiling | None = None,
        callback: Callable[[int, torch.Tensor, torch.Tensor], None] | None = None,
        callback_steps: int = 1,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Draw one tile per row of `uni_embeds` times `num_images_per_prompt`.

        Args:
            uni_embeds: condition tokens (B, n, d); or a grid (B, rows, columns, d) with one embedding per tile of a
                large image, which is then drawn from overlapping windows.
            negative_uni_embeds: null condition, (B, n, d) or (1, n, d); the checkpoint's own when absent.
            guidance_scale: w in eps = null + w (cond - null), on all latent channels; 1 makes one call per step.
                By the number of tokens when absent: 2.0 at one, 1.2 at sixteen.
            num_images_per_prompt: tiles per condition.
            num_inference_steps: sampler steps.
            generator: one for all tiles, or one per tile so that a tile does not depend on its batch.
            latents: starting noise (B, 16, h, w) instead of drawing it.
            latent_size: (h, w) of the latents; the transformer's own sample size, or the grid's, when absent.
            output_type: "pil", "np" (B, H, W, 3 uint8), "pt" (B, 3, H, W in [-1, 1]) or "latent".
            return_dict: return an object with `.images`.
            image: start from these images (pictures, or (B, 3, H, W) in [-1, 1]; one for all, or one per tile).
            strength: how far towards noise the images are taken, in (0, 1]; that share of the steps is run.
            eta: noise of the "ddim" sampler.
            windowing: draw from overlapping windows even where every window sees the same tokens; how to cut them.
            decode_tiling: how to cut the decode; by size when absent.
            callback: called as (step, timestep, latents) every `callback_steps` steps.
            callback_steps: see `callback`.

        Raises:
            BadInputError: anything that does not fit the model, named with what was met and what was expected.
        """
        config = self.transformer.config
        tokens, channels = int(config["caption_num_tokens"]), int(config["in_channels"])
        scale = default_guidance_scale(tokens) if guidance_scale is None else guidance_scale
        inputs.check_guidance(scale)
        inputs.check_count(num_images_per_prompt)
        most = int(getattr(self.scheduler.config, "num_train_timesteps", 1000))
        inputs.check_steps(num_inference_steps, most)
        inputs.check_condition(uni_embeds, tokens=tokens, channels=int(config["caption_channels"]))
        if output_type not in OUTPUTS:
            raise BadInputError(
                f"The output type is {output_type!r}, expected one of {', '.join(OUTPUTS)}.",
                hint='"pil" gives pictures.',
                code="output-type",
            )
        condition = uni_embeds.repeat_interleave(num_images_per_prompt, dim=0)
        condition = condition.to(self.device, self.transformer.dtype)
        null = self._null(negative_uni_embeds, len(uni_embeds), num_images_per_prompt).to(condition)
        clean = None if image is None else self._encode(image, strength, len(condition))
        if clean is not None and latent_size is None:
            latent_size = (clean.shape[2], clean.shape[3])
        size = self._latent_size(condition, latent_size)
        shape = (len(condition), channels, *size)
        for given in (latents, clean):
            if given is not None:
                inputs.check_latents(given, shape)

        # Latents are kept in at least single precision: half precision loses what the late steps change.
        working = torch.promote_types(self.transformer.dtype, torch.float32)
        noise = self._noise(shape, generator) if latents is None else latents
        noise = noise.to(self.device, working)
        predict: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
        if condition.ndim == 4 or windowing is not None:
            cut = windowing or Windowing()
            plan = self.window_plan(size, cut.stride)
            predict = WindowedNoise(self.transformer, condition, null, scale, plan=plan, windowing=cut)
        else:
            predict = GuidedNoise(self.transformer, condition, null, scale)
        self.scheduler.set_timesteps(num_inference_steps)
        if clean is None:
            state, times = noise * self.scheduler.init_noise_sigma, self.scheduler.timesteps
        else:
            state, times = noisy_start(self.scheduler, clean.to(noise), noise, strength)
        options = self._step_options(eta, generator)
        for step, timestep in enumerate(times):
            scaled = self.scheduler.scale_model_input(state, timestep)
            predicted = predict(scaled, timestep)
            state = self.scheduler.step(predicted, timestep, state, **options, return_dict=False)[0]
            if callback is not None and step % callback_steps == 0:
                callback(step, timestep, state)
        images: Any = state
        if output_type != "latent":
            images = decode_latents(self.vae, state, decode_tiling)
            if output_type in {"np", "pil"}:
                images = to_uint8(images)
            if output_type == "pil":
                images = [Image.fromarray(picture) for picture in images]
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _encode(self, image: Any, strength: float, count: int) -> torch.Tensor:
        """Scaled latents of the images to start from, one per drawn image."""
        inputs.check_strength(strength)
        pixels = image_tensor(image)
        if any(side % FACTOR for side in pixels.shape[-2:]):
            raise BadInputError(
                f"The given image is {pixels.shape[-1]} x {pixels.shape[-2]} pixels, "
                f"expected multiples of {FACTOR}.",
                hint="Crop the image first.",
                code="init-image-size",
            )
        if len(pixels) not in {1, count}:
            raise BadInputError(
                f"{len(pixels)} images to start from were given, expected 1 or {count}.",
                hint="Give one image for all, or one per drawn image.",
                code="init-image-count",
            )
        return encode_image(self.vae, pixels).expand(count, -1, -1, -1)


def to_uint8(images: torch.Tensor) -> np.ndarray:
    """Images (B, 3, H, W) in [-1, 1] to uint8 (B, H, W, 3)."""
    shown = ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return shown.permute(0, 2, 3, 1).cpu().numpy()
