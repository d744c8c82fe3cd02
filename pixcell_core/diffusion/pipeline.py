"""`PixCellPipeline`: from embeddings to tiles, called as the published pipeline is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from PIL import Image

from pixcell_core.models.transformer import PixCellTransformer2DModel


def default_scheduler() -> DPMSolverMultistepScheduler:
    """DPM-Solver++ (order 2, midpoint) on the published schedule."""
    return DPMSolverMultistepScheduler(
        num_train_timesteps=1000,
        beta_start=1e-4,
        beta_end=0.02,
        beta_schedule="linear",
        algorithm_type="dpmsolver++",
        solver_order=2,
        prediction_type="epsilon",
    )


class PixCellPipeline(DiffusionPipeline):  # type: ignore[misc]
    """Draws tiles conditioned on tile embeddings.

    Args:
        vae: an autoencoder with `decode(z).sample` and `scaling_factor` / `shift_factor` in its configuration.
        transformer: a `PixCellTransformer2DModel`.
        scheduler: any diffusers scheduler for noise prediction.
    """

    def __init__(self, vae: Any, transformer: PixCellTransformer2DModel, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(vae=vae, transformer=transformer, scheduler=scheduler)

    def get_unconditional_embedding(self, batch_size: int = 1) -> torch.Tensor:
        """The null condition kept in the checkpoint, (batch, n, caption_channels)."""
        null: torch.Tensor = self.transformer.unconditional(batch_size)
        return null

    def _start(
        self, shape: tuple[int, ...], generator: torch.Generator | Sequence[torch.Generator] | None
    ) -> Any:
        if generator is None or isinstance(generator, torch.Generator):
            return torch.randn(shape, generator=generator)
        if len(generator) != shape[0]:
            raise ValueError("one generator per image, or one for all")
        return torch.stack([torch.randn(shape[1:], generator=g) for g in generator])

    @torch.inference_mode()
    def __call__(
        self,
        uni_embeds: torch.Tensor,
        negative_uni_embeds: torch.Tensor | None = None,
        guidance_scale: float = 2.0,
        num_images_per_prompt: int = 1,
        num_inference_steps: int = 20,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        latent_size: tuple[int, int] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Draw one tile per row of `uni_embeds` times `num_images_per_prompt`.

        Args:
            uni_embeds: condition tokens (B, n, d).
            negative_uni_embeds: null condition, (B, n, d) or (1, n, d); the checkpoint's own when absent.
            guidance_scale: w in eps = null + w (cond - null), on all latent channels; 1 makes one call per step.
            num_images_per_prompt: tiles per condition.
            num_inference_steps: sampler steps.
            generator: one for all tiles, or one per tile so that a tile does not depend on its batch.
            latents: starting noise (B, 16, h, w) instead of drawing it.
            latent_size: (h, w) of the latents; the transformer's own sample size when absent.
            output_type: "pil", "np" (B, H, W, 3 uint8), "pt" (B, 3, H, W in [-1, 1]) or "latent".
            return_dict: return an object with `.images`.
        """
        model, channels = self.transformer, int(self.transformer.config["in_channels"])
        condition = uni_embeds.repeat_interleave(num_images_per_prompt, dim=0).to(self.device, model.dtype)
        batch = len(condition)
        side = int(model.config["sample_size"])
        height, width = latent_size or (side, side)
        if latents is None:
            latents = self._start((batch, channels, height, width), generator)
        guided = guidance_scale != 1.0
        if guided:
            null = self.get_unconditional_embedding(batch)
            if negative_uni_embeds is not None:
                null = negative_uni_embeds.expand(len(uni_embeds), -1, -1)
                null = null.repeat_interleave(num_images_per_prompt, dim=0)
            condition = torch.cat([null.to(condition), condition])
        self.scheduler.set_timesteps(num_inference_steps)
        latents = latents.to(self.device, model.dtype) * self.scheduler.init_noise_sigma
        for timestep in self.scheduler.timesteps:
            doubled = torch.cat([latents, latents]) if guided else latents
            doubled = self.scheduler.scale_model_input(doubled, timestep)
            times = timestep.expand(len(doubled)).to(self.device)
            noise = model(doubled, encoder_hidden_states=condition, timestep=times, return_dict=False)[0]
            noise = noise[:, :channels]
            if guided:
                without, with_condition = noise.chunk(2)
                noise = without + guidance_scale * (with_condition - without)
            latents = self.scheduler.step(noise, timestep, latents, return_dict=False)[0]
        images: Any = latents
        if output_type != "latent":
            config = self.vae.config
            plain = latents / config["scaling_factor"] + config["shift_factor"]
            images = self.vae.decode(plain.to(self.vae.dtype)).sample.clamp(-1, 1)
            if output_type in {"np", "pil"}:
                images = to_uint8(images)
            if output_type == "pil":
                images = [Image.fromarray(image) for image in images]
        return ImagePipelineOutput(images=images) if return_dict else (images,)


def to_uint8(images: torch.Tensor) -> np.ndarray:
    """Images (B, 3, H, W) in [-1, 1] to uint8 (B, H, W, 3)."""
    shown = ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return shown.permute(0, 2, 3, 1).cpu().numpy()
