"""What cannot be sampled is refused by name, with the value met and the value expected."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from PIL import Image

from pixcell_core.diffusion import PixCellPipeline, Windowing, sampler_named
from pixcell_core.errors import BadInputError


@pytest.fixture(scope="module")
def pipeline(tiny_transformer: Any, tiny_vae: Any) -> PixCellPipeline:
    return PixCellPipeline(tiny_vae, tiny_transformer(4))


def _refused(pipeline: PixCellPipeline, code: str, *words: str, **options: Any) -> None:
    settings = {"uni_embeds": torch.zeros(2, 4, 12), "num_inference_steps": 2, "output_type": "latent"}
    with pytest.raises(BadInputError) as caught:
        pipeline(**{**settings, **options})
    assert caught.value.code == code
    assert caught.value.hint
    missing = [word for word in words if word not in caught.value.message]
    assert not missing, caught.value.message


def test_conditions_that_do_not_fit(pipeline: PixCellPipeline) -> None:
    _refused(pipeline, "condition-tokens", "16", "4", uni_embeds=torch.zeros(2, 16, 12))
    _refused(pipeline, "condition-width", "1536", "12", uni_embeds=torch.zeros(2, 4, 1536))
    _refused(pipeline, "condition-shape", "(2, 12)", "4, 12", uni_embeds=torch.zeros(2, 12))
    _refused(pipeline, "condition-shape", "no row", uni_embeds=torch.zeros(0, 4, 12))
    null = torch.zeros(3, 4, 12)
    _refused(pipeline, "condition-shape", "(3, 4, 12)", "(2, 4, 12)", negative_uni_embeds=null)
    _refused(pipeline, "condition-tokens", "negative_uni_embeds", negative_uni_embeds=torch.zeros(2, 1, 12))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_embeddings_that_are_not_finite(pipeline: PixCellPipeline, value: float) -> None:
    bad = torch.zeros(2, 4, 12)
    bad[1, 3, 5] = value
    _refused(pipeline, "condition-not-finite", "1 value", "row 1", "finite", uni_embeds=bad)
    _refused(pipeline, "condition-not-finite", "negative_uni_embeds", negative_uni_embeds=bad)


@pytest.mark.parametrize("scale", [0.99, 0.0, -1.0, float("nan"), float("inf")])
def test_guidance_below_one(pipeline: PixCellPipeline, scale: float) -> None:
    _refused(pipeline, "guidance-below-one", str(scale), "1 or more", guidance_scale=scale)


@pytest.mark.parametrize("steps", [0, -3, 1001])
def test_steps_out_of_range(pipeline: PixCellPipeline, steps: int) -> None:
    _refused(pipeline, "steps-out-of-range", str(steps), "1 to 1000", num_inference_steps=steps)


def test_latents_that_do_not_fit(pipeline: PixCellPipeline) -> None:
    _refused(pipeline, "latent-channels", "4 channels", "16", latents=torch.zeros(2, 4, 16, 16))
    _refused(pipeline, "latent-shape", "(2, 16, 8, 16)", "(2, 16, 16, 16)", latents=torch.zeros(2, 16, 8, 16))
    _refused(pipeline, "latent-not-finite", "NaN", latents=torch.full((2, 16, 16, 16), float("nan")))
    _refused(pipeline, "latent-size", "7 x 16", "multiples of 2", latent_size=(7, 16))
    _refused(pipeline, "latent-size", "0 x 16", latent_size=(0, 16))


def test_settings_that_do_not_exist(pipeline: PixCellPipeline) -> None:
    _refused(pipeline, "output-type", "jpeg", "pil", output_type="jpeg")
    _refused(pipeline, "no-images-asked", "0 images", num_images_per_prompt=0)
    _refused(pipeline, "eta-unused", "0.5", eta=0.5)
    with pytest.raises(BadInputError, match="plms") as caught:
        sampler_named("plms")
    assert caught.value.code == "unknown-sampler"
    assert all(name in caught.value.hint for name in ("dpm", "dpm-uniform", "ddim", "euler"))
    with pytest.raises(BadInputError):
        PixCellPipeline(pipeline.vae, pipeline.transformer, "plms")


def test_images_to_start_from_that_do_not_fit(pipeline: PixCellPipeline) -> None:
    picture = Image.new("RGB", (128, 128))
    for strength in (0.0, -0.1, 1.1, float("nan")):
        _refused(pipeline, "strength-out-of-range", str(strength), image=picture, strength=strength)
    _refused(pipeline, "init-image-size", "125 x 128", image=Image.new("RGB", (125, 128)))
    _refused(pipeline, "init-image-size", "2 different", image=[picture, Image.new("RGB", (64, 128))])
    _refused(pipeline, "init-image-count", "3", "1 or 2", image=[picture] * 3)
    _refused(pipeline, "init-image-range", "255", image=torch.full((1, 3, 128, 128), 255.0))
    _refused(pipeline, "init-image-shape", "uint8", image=torch.zeros(1, 3, 128, 128, dtype=torch.uint8))
    _refused(
        pipeline, "latent-shape", "(2, 16, 8, 8)", image=Image.new("RGB", (64, 64)), latent_size=(16, 16)
    )


def test_grids_and_windows_that_do_not_fit(pipeline: PixCellPipeline) -> None:
    grid = torch.zeros(1, 3, 4, 12)
    _refused(pipeline, "condition-grid", "3 rows", "4 columns", uni_embeds=grid, latent_size=(32, 32))
    _refused(pipeline, "window-stride", "3", "multiple of 2", uni_embeds=grid, windowing=Windowing(stride=3))
    _refused(pipeline, "window-stride", "18", "16", uni_embeds=grid, windowing=Windowing(stride=18))
