"""Seeds, batches, calls per step, and starting from an image."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pixcell_core.diffusion import SAMPLERS, PixCellPipeline, image_to_image
from pixcell_core.diffusion.guidance import default_guidance_scale
from pixcell_core.diffusion.image_to_image import encode_image, image_tensor, noisy_start, start_index
from pixcell_core.diffusion.samplers import sampler_named


def _pipeline(tiny_transformer: Any, tiny_vae: Any, sampler: str = "dpm", tokens: int = 1) -> PixCellPipeline:
    return PixCellPipeline(tiny_vae, tiny_transformer(tokens), sampler)


def _seeds(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def _draw(pipeline: PixCellPipeline, condition: torch.Tensor, **options: Any) -> torch.Tensor:
    images: Any = pipeline(condition, **{"num_inference_steps": 4, "output_type": "latent", **options}).images
    return images


@pytest.mark.parametrize("sampler", list(SAMPLERS))
def test_an_image_is_the_same_in_batches_of_1_3_and_4(
    tiny_transformer: Any, tiny_vae: Any, sampler: str
) -> None:
    pipeline = _pipeline(tiny_transformer, tiny_vae, sampler)
    condition = torch.randn(4, 1, 12, generator=torch.Generator().manual_seed(0))
    options = {"eta": 0.7} if sampler == "ddim" else {}
    four = _draw(pipeline, condition, generator=_seeds(0, 1, 2, 3), **options)
    three = _draw(pipeline, condition[:3], generator=_seeds(0, 1, 2), **options)
    ones = torch.cat(
        [_draw(pipeline, condition[i : i + 1], generator=_seeds(i), **options) for i in range(4)]
    )
    spread = float(four.std())
    assert float((three - four[:3]).abs().max()) < 2e-5 * spread
    assert float((ones - four).abs().max()) < 2e-5 * spread
    assert float((four[0] - four[1]).abs().max()) > 0.1 * spread


@pytest.mark.parametrize("sampler", list(SAMPLERS))
def test_guidance_of_one_calls_once_per_step_with_one_row_per_image(
    tiny_transformer: Any, tiny_vae: Any, sampler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = _pipeline(tiny_transformer, tiny_vae, sampler)
    rows: list[int] = []
    prepared: list[int] = []
    pipeline.transformer.register_forward_hook(lambda m, a, out: rows.append(len(out[0])))
    right = pipeline.transformer.prepare
    monkeypatch.setattr(
        pipeline.transformer, "prepare", lambda c: (prepared.append(len(c)), right(c))[1], raising=True
    )
    _draw(pipeline, torch.randn(3, 1, 12), guidance_scale=1.0)
    assert (rows, prepared) == ([3] * 4, [3])
    rows.clear(), prepared.clear()
    _draw(pipeline, torch.randn(3, 1, 12), guidance_scale=2.0)
    assert (rows, prepared) == ([6] * 4, [6])


def test_guidance_by_the_number_of_tokens(tiny_transformer: Any, tiny_vae: Any) -> None:
    assert [default_guidance_scale(n) for n in (1, 16)] == [2.0, 1.2]
    for tokens, scale in ((1, 2.0), (16, 1.2)):
        pipeline = _pipeline(tiny_transformer, tiny_vae, tokens=tokens)
        condition = torch.randn(1, tokens, 12)
        by_default = _draw(pipeline, condition, generator=_seeds(1))
        said = _draw(pipeline, condition, generator=_seeds(1), guidance_scale=scale)
        assert torch.equal(by_default, said)


@pytest.mark.parametrize("sampler", list(SAMPLERS))
def test_guidance_moves_the_last_channel(tiny_transformer: Any, tiny_vae: Any, sampler: str) -> None:
    pipeline = _pipeline(tiny_transformer, tiny_vae, sampler)
    condition = torch.randn(1, 1, 12)
    weak = _draw(pipeline, condition, guidance_scale=1.0, generator=_seeds(7))
    strong = _draw(pipeline, condition, guidance_scale=4.0, generator=_seeds(7))
    moved = (weak - strong).abs().amax(dim=(0, 2, 3))
    assert moved[15] > 1e-4 and (moved > 1e-5).all()


def test_the_call_keeps_its_published_names(tiny_transformer: Any, tiny_vae: Any) -> None:
    names = list(inspect.signature(PixCellPipeline.__call__).parameters)
    published = [
        "uni_embeds",
        "negative_uni_embeds",
        "guidance_scale",
        "num_images_per_prompt",
        "num_inference_steps",
        "generator",
        "latents",
    ]
    assert names[1:8] == published
    pipeline = _pipeline(tiny_transformer, tiny_vae)
    seen: list[int] = []
    _draw(pipeline, torch.randn(1, 1, 12), callback=lambda i, t, x: seen.append(i), callback_steps=2)
    assert seen == [0, 2]


def test_half_precision_keeps_the_latents_in_single(tiny_transformer: Any, tiny_vae: Any) -> None:
    model = tiny_transformer(1).to(torch.bfloat16)
    drawn = _draw(PixCellPipeline(tiny_vae, model), torch.randn(2, 1, 12), generator=_seeds(1, 2))
    assert drawn.dtype == torch.float32 and bool(drawn.isfinite().all())


# Image to image


def _picture(seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (128, 128, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def test_encode_undoes_the_decoder_scaling(tiny_vae: Any) -> None:
    images = image_tensor([_picture(1), _picture(2)])
    assert images.shape == (2, 3, 128, 128) and float(images.abs().max()) <= 1.0
    with torch.inference_mode():
        plain = tiny_vae.encode(images).latent_dist.mean
    expected = (plain - 0.0609) * 1.5305
    assert torch.allclose(encode_image(tiny_vae, images), expected, atol=1e-6)
    assert not torch.allclose(plain * 1.5305, expected, atol=1e-3)


@pytest.mark.parametrize(
    ("steps", "strength", "first"), [(20, 0.5, 10), (100, 0.29, 71), (10, 1.0, 0), (20, 0.01, 19)]
)
def test_the_first_step_of_a_strength(steps: int, strength: float, first: int) -> None:
    assert start_index(steps, strength) == first


@pytest.mark.parametrize("sampler", list(SAMPLERS))
def test_image_to_image_equals_a_plain_loop(tiny_transformer: Any, tiny_vae: Any, sampler: str) -> None:
    pipeline = _pipeline(tiny_transformer, tiny_vae, sampler)
    condition = torch.randn(2, 1, 12, generator=torch.Generator().manual_seed(5))
    pictures = [_picture(3), _picture(4)]
    found = _draw(
        pipeline,
        condition,
        image=pictures,
        strength=0.5,
        num_inference_steps=6,
        guidance_scale=1.0,
        generator=_seeds(8, 9),
    )
    clean = encode_image(tiny_vae, image_tensor(pictures))
    noise = torch.stack([torch.randn(16, 16, 16, generator=g) for g in _seeds(8, 9)])
    scheduler = sampler_named(sampler)
    scheduler.set_timesteps(6)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(3)
    times = scheduler.timesteps[3:]
    if sampler == "euler":
        x = clean + float(scheduler.sigmas[3]) * noise
    else:
        betas = np.linspace(1e-4, 0.02, 1000)
        level = np.interp(float(times[0]), np.arange(1000), np.log(np.cumprod(1 - betas)))
        x = clean * float(np.exp(level / 2)) + noise * float(np.sqrt(1 - np.exp(level)))
    with torch.inference_mode():
        for t in times:
            scaled = scheduler.scale_model_input(x, t)
            output = pipeline.transformer(
                scaled, encoder_hidden_states=condition, timestep=t.expand(2)
            ).sample
            x = scheduler.step(output[:, :16], t, x).prev_sample
    assert float((found - x).abs().max()) < 1e-4 * float(x.std())


def test_a_weak_strength_stays_nearer_to_the_image(tiny_transformer: Any, tiny_vae: Any) -> None:
    pipeline = _pipeline(tiny_transformer, tiny_vae)
    clean = encode_image(tiny_vae, image_tensor(_picture()))
    options = {"image": _picture(), "num_inference_steps": 20, "generator": _seeds(1)}
    away = [
        float((_draw(pipeline, torch.zeros(1, 1, 12), **{**options, "strength": s}) - clean).pow(2).mean())
        for s in (0.05, 0.95)
    ]
    assert away[0] < 0.1 * away[1]


def test_a_start_from_the_wrong_step_is_seen(
    tiny_transformer: Any, tiny_vae: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = _pipeline(tiny_transformer, tiny_vae)
    options = {"image": _picture(), "num_inference_steps": 6, "strength": 0.5}
    right = _draw(pipeline, torch.zeros(1, 1, 12), generator=_seeds(1), **options)
    monkeypatch.setattr(image_to_image, "start_index", lambda steps, strength: 4)
    wrong = _draw(pipeline, torch.zeros(1, 1, 12), generator=_seeds(1), **options)
    assert float((right - wrong).abs().max()) > 1e-2


def test_full_strength_runs_every_step() -> None:
    scheduler = sampler_named("dpm")
    scheduler.set_timesteps(10)
    _, left = noisy_start(scheduler, torch.zeros(1, 1, 2, 2), torch.ones(1, 1, 2, 2), 1.0)
    assert len(left) == 10
