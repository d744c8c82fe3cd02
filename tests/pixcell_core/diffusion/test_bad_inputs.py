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


def _refusal(pipeline: PixCellPipeline, *words: str, **options: Any) -> str:
    """The code of the refusal, whose message has all the words."""
    settings = {"uni_embeds": torch.zeros(2, 4, 12), "num_inference_steps": 2, "output_type": "latent"}
    with pytest.raises(BadInputError) as caught:
        pipeline(**{**settings, **options})
    assert caught.value.hint
    missing = [word for word in words if word not in caught.value.message]
    assert not missing, caught.value.message
    return caught.value.code


def test_conditions_that_do_not_fit(pipeline: PixCellPipeline) -> None:
    assert _refusal(pipeline, "16", "4", uni_embeds=torch.zeros(2, 16, 12)) == "condition-tokens"
    assert _refusal(pipeline, "1536", "12", uni_embeds=torch.zeros(2, 4, 1536)) == "condition-width"
    assert _refusal(pipeline, "(2, 12)", "4, 12", uni_embeds=torch.zeros(2, 12)) == "condition-shape"
    assert _refusal(pipeline, "no row", uni_embeds=torch.zeros(0, 4, 12)) == "condition-shape"
    null = torch.zeros(3, 4, 12)
    assert _refusal(pipeline, "(3, 4, 12)", "(2, 4, 12)", negative_uni_embeds=null) == "condition-shape"
    assert (
        _refusal(pipeline, "negative_uni_embeds", negative_uni_embeds=torch.zeros(2, 1, 12))
        == "condition-tokens"
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_embeddings_that_are_not_finite(pipeline: PixCellPipeline, value: float) -> None:
    bad = torch.zeros(2, 4, 12)
    bad[1, 3, 5] = value
    assert _refusal(pipeline, "1 value", "row 1", "finite", uni_embeds=bad) == "condition-not-finite"
    assert _refusal(pipeline, "negative_uni_embeds", negative_uni_embeds=bad) == "condition-not-finite"


@pytest.mark.parametrize("scale", [0.99, 0.0, -1.0, float("nan"), float("inf")])
def test_guidance_below_one(pipeline: PixCellPipeline, scale: float) -> None:
    assert _refusal(pipeline, str(scale), "1 or more", guidance_scale=scale) == "guidance-below-one"


@pytest.mark.parametrize("steps", [0, -3, 1001])
def test_steps_out_of_range(pipeline: PixCellPipeline, steps: int) -> None:
    assert _refusal(pipeline, str(steps), "1 to 1000", num_inference_steps=steps) == "steps-out-of-range"


def test_latents_that_do_not_fit(pipeline: PixCellPipeline) -> None:
    assert _refusal(pipeline, "4 channels", "16", latents=torch.zeros(2, 4, 16, 16)) == "latent-channels"
    assert (
        _refusal(pipeline, "(2, 16, 8, 16)", "(2, 16, 16, 16)", latents=torch.zeros(2, 16, 8, 16))
        == "latent-shape"
    )
    assert _refusal(pipeline, "NaN", latents=torch.full((2, 16, 16, 16), float("nan"))) == "latent-not-finite"
    assert _refusal(pipeline, "7 x 16", "multiples of 2", latent_size=(7, 16)) == "latent-size"
    assert _refusal(pipeline, "0 x 16", latent_size=(0, 16)) == "latent-size"


def test_settings_that_do_not_exist(pipeline: PixCellPipeline) -> None:
    assert _refusal(pipeline, "jpeg", "pil", output_type="jpeg") == "output-type"
    assert _refusal(pipeline, "0 images", num_images_per_prompt=0) == "no-images-asked"
    assert _refusal(pipeline, "0.5", eta=0.5) == "eta-unused"
    with pytest.raises(BadInputError, match="plms") as caught:
        sampler_named("plms")
    assert caught.value.code == "unknown-sampler"
    assert all(name in caught.value.hint for name in ("dpm", "dpm-uniform", "ddim", "euler"))
    with pytest.raises(BadInputError):
        PixCellPipeline(pipeline.vae, pipeline.transformer, "plms")


def test_images_to_start_from_that_do_not_fit(pipeline: PixCellPipeline) -> None:
    picture = Image.new("RGB", (128, 128))
    for strength in (0.0, -0.1, 1.1, float("nan")):
        assert _refusal(pipeline, str(strength), image=picture, strength=strength) == "strength-out-of-range"
    assert _refusal(pipeline, "125 x 128", image=Image.new("RGB", (125, 128))) == "init-image-size"
    assert (
        _refusal(pipeline, "2 different", image=[picture, Image.new("RGB", (64, 128))]) == "init-image-size"
    )
    assert _refusal(pipeline, "3", "1 or 2", image=[picture] * 3) == "init-image-count"
    assert _refusal(pipeline, "255", image=torch.full((1, 3, 128, 128), 255.0)) == "init-image-range"
    assert (
        _refusal(pipeline, "uint8", image=torch.zeros(1, 3, 128, 128, dtype=torch.uint8))
        == "init-image-shape"
    )
    assert (
        _refusal(pipeline, "(2, 16, 8, 8)", image=Image.new("RGB", (64, 64)), latent_size=(16, 16))
        == "latent-shape"
    )


def test_grids_and_windows_that_do_not_fit(pipeline: PixCellPipeline) -> None:
    grid = torch.zeros(1, 3, 4, 12)
    assert (
        _refusal(pipeline, "3 rows", "4 columns", uni_embeds=grid, latent_size=(32, 32)) == "condition-grid"
    )
    assert (
        _refusal(pipeline, "3", "multiple of 2", uni_embeds=grid, windowing=Windowing(stride=3))
        == "window-stride"
    )
    assert _refusal(pipeline, "18", "16", uni_embeds=grid, windowing=Windowing(stride=18)) == "window-stride"
