"""Refuses what cannot be sampled: each check names the value it met, the value it expected and what to do."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from pixcell_core.errors import BadInputError


def check_guidance(guidance_scale: float) -> None:
    """Guidance w in eps = null + w (cond - null) is a finite number of 1 or more."""
    if not (math.isfinite(guidance_scale) and guidance_scale >= 1.0):
        raise BadInputError(
            f"The guidance scale is {guidance_scale}, it must be 1 or more.",
            hint="1 follows the condition as trained; 2 suits one token, 1.2 suits sixteen.",
            code="guidance-below-one",
        )


def check_steps(num_inference_steps: int, most: int) -> None:
    """The number of sampler steps lies in 1..most, the number of training steps."""
    if not 1 <= num_inference_steps <= most:
        raise BadInputError(
            f"The number of inference steps is {num_inference_steps}, it must be 1 to {most}.",
            hint="20 steps are the published default.",
            code="steps-out-of-range",
        )


def check_strength(strength: float) -> None:
    """The strength of image-to-image lies in (0, 1]."""
    if not 0.0 < strength <= 1.0:
        raise BadInputError(
            f"The strength is {strength}, it must be above 0 and at most 1.",
            hint="0.3 keeps the layout of the given image, 1 keeps next to nothing of it.",
            code="strength-out-of-range",
        )


def check_count(num_images_per_prompt: int) -> None:
    """At least one image per condition."""
    if num_images_per_prompt < 1:
        raise BadInputError(
            f"{num_images_per_prompt} images per condition were asked for, it must be 1 or more.",
            hint="Ask for one image per condition, or leave the option out.",
            code="no-images-asked",
        )


def check_condition(condition: torch.Tensor, *, tokens: int, channels: int, name: str = "uni_embeds") -> None:
    """Condition tokens (B, n, d), or a grid (B, rows, columns, d), fit the transformer and are finite.

    Args:
        condition: what was given.
        tokens: n the transformer was trained with (`caption_num_tokens`); a grid's shape is checked by its windows.
        channels: d the transformer was trained with (`caption_channels`).
        name: name of the argument, for the message.
    """
    if condition.ndim not in {3, 4}:
        raise BadInputError(
            f"{name} has the shape {tuple(condition.shape)}, expected (images, {tokens}, {channels}).",
            hint="Give one row of tokens per image; add the missing axis with `[:, None]` for a single token.",
            code="condition-shape",
        )
    if len(condition) == 0:
        raise BadInputError(
            f"{name} holds no row, expected at least one image's tokens.",
            hint="Give the embeddings of at least one tile.",
            code="condition-shape",
        )
    if condition.ndim == 3 and condition.shape[1] != tokens:
        raise BadInputError(
            f"{name} has {condition.shape[1]} token(s) per image, this transformer expects {tokens}.",
            hint="256-px models take 1 token, 512-px models 4, 1024-px models 16 (one per 256-px tile, row by row).",
            code="condition-tokens",
        )
    if condition.shape[-1] != channels:
        raise BadInputError(
            f"{name} has embeddings of {condition.shape[-1]} numbers, this transformer expects {channels}.",
            hint="Embed the tiles with the encoder this model was trained with.",
            code="condition-width",
        )
    finite = torch.isfinite(condition).flatten(1)
    if not bool(finite.all()):
        rows = (~finite.all(1)).nonzero().flatten().tolist()
        count = int((~finite).sum())
        raise BadInputError(
            f"{name} holds {count} value(s) that are NaN or infinite, first in row {rows[0]}; "
            "finite numbers are expected.",
            hint="Extract the features of these tiles again; half precision may have overflowed.",
            code="condition-not-finite",
        )


def check_latents(latents: torch.Tensor, shape: Sequence[int]) -> None:
    """Starting latents have exactly the wanted shape (B, C, h, w) and are finite."""
    if latents.ndim == 4 and latents.shape[1] != shape[1]:
        raise BadInputError(
            f"The latents have {latents.shape[1]} channels, this transformer expects {shape[1]}.",
            hint="Latents come from the autoencoder this model was trained with.",
            code="latent-channels",
        )
    if tuple(latents.shape) != tuple(shape):
        raise BadInputError(
            f"The latents have the shape {tuple(latents.shape)}, expected {tuple(shape)}.",
            hint="One row of latents per drawn image; give `latent_size` for another size.",
            code="latent-shape",
        )
    if not bool(torch.isfinite(latents).all()):
        raise BadInputError(
            "The latents hold NaN or infinite values; finite numbers are expected.",
            hint="Draw or encode the latents again.",
            code="latent-not-finite",
        )


def check_latent_size(size: tuple[int, int], patch: int) -> None:
    """Height and width of the latents are positive multiples of the transformer's patch."""
    if any(side < patch or side % patch for side in size):
        raise BadInputError(
            f"The latent size is {size[0]} x {size[1]}, both must be positive multiples of {patch}.",
            hint=f"In pixels both sides must be multiples of {8 * patch}.",
            code="latent-size",
        )


def check_grid(found: tuple[int, int], expected: tuple[int, int]) -> None:
    """The condition grid has one embedding per tile of the drawn image."""
    if found != expected:
        raise BadInputError(
            f"The condition grid has {found[0]} rows and {found[1]} columns, "
            f"an image of this size needs {expected[0]} and {expected[1]}.",
            hint="Give one embedding per tile of the whole image, or draw another size.",
            code="condition-grid",
        )
