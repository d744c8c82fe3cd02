"""The pipeline against a plain loop over diffusers' own classes with the same weights, and mutants of the pipeline."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    PixArtTransformer2DModel,
)

from pixcell_core.diffusion import PixCellPipeline, decoding, guidance, sampler_named
from pixcell_core.models import PixCellTransformer2DModel

SCHEDULE: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "beta_schedule": "linear",
}
STOCK = {
    "dpm": lambda: DPMSolverMultistepScheduler(**SCHEDULE, algorithm_type="dpmsolver++", solver_order=2),
    "ddim": lambda: DDIMScheduler(**SCHEDULE, clip_sample=False, timestep_spacing="trailing"),
    "euler": lambda: EulerDiscreteScheduler(**SCHEDULE, timestep_spacing="linspace"),
}
STEPS, SCALE = 7, 2.5


def _stock_model(ours: PixCellTransformer2DModel) -> PixArtTransformer2DModel:
    config = {k: v for k, v in ours.config.items() if k != "caption_num_tokens" and not k.startswith("_")}
    stock = PixArtTransformer2DModel(**config).eval()
    extra = ("caption_projection.uncond_embedding", "y_pos_embed.y_pos_embed")
    stock.load_state_dict({k: v for k, v in ours.state_dict().items() if k not in extra})
    return stock


def _token_table(ours: PixCellTransformer2DModel) -> torch.Tensor | float:
    """The published table on the condition tokens, entry by entry from its formula."""
    config = ours.config
    n, width, base = config["caption_num_tokens"], config["caption_channels"], config["sample_size"] // 2
    if n == 1:
        return 0.0
    side, quarter = int(n**0.5), width // 4
    table = np.zeros((n, width))
    for row in range(side):
        for column in range(side):
            for half, position in enumerate((column, row)):
                where = position / (side / base) / config["interpolation_scale"] + base // n
                for k in range(quarter):
                    angle = where / 10000.0 ** (k / quarter)
                    table[row * side + column, half * 2 * quarter + k] = np.sin(angle)
                    table[row * side + column, half * 2 * quarter + quarter + k] = np.cos(angle)
    return torch.from_numpy(table).float()


@torch.inference_mode()
def _stock_latents(
    ours: PixCellTransformer2DModel, scheduler: Any, condition: torch.Tensor, start: torch.Tensor
) -> torch.Tensor:
    stock, table = _stock_model(ours), _token_table(ours)
    null = ours.caption_projection.uncond_embedding[None].expand(len(condition), -1, -1)
    tokens = torch.cat([null, condition]) + table
    nothing = {"resolution": None, "aspect_ratio": None}
    scheduler.set_timesteps(STEPS)
    x = start * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        twice = scheduler.scale_model_input(torch.cat([x, x]), t)
        out = stock(
            twice, encoder_hidden_states=tokens, timestep=t.expand(len(twice)), added_cond_kwargs=nothing
        ).sample
        without, conditional = out.chunk(2, dim=1)[0].chunk(2)
        x = scheduler.step(without + SCALE * (conditional - without), t, x).prev_sample
    return x


def _apart(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference, in standard deviations of the expected latents (those of a trained model have about one)."""
    return float((found - expected).abs().max() / expected.std())


def _case(tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    source = torch.Generator().manual_seed(tokens)
    return (
        torch.randn(2, tokens, 12, generator=source),
        torch.randn(2, 16, 32, 32, generator=source),
    )


def _ours(model: Any, vae: Any, sampler: str, tokens: int, output: str = "latent") -> torch.Tensor:
    condition, start = _case(tokens)
    images: Any = PixCellPipeline(vae, model, sampler)(
        condition,
        guidance_scale=SCALE,
        num_inference_steps=STEPS,
        latents=start,
        latent_size=(32, 32),
        output_type=output,
    ).images
    return images


@pytest.mark.parametrize("sampler", list(STOCK))
@pytest.mark.parametrize("tokens", [1, 4, 16])
def test_latents_equal_the_stock_loop(
    tiny_transformer: Any, tiny_vae: AutoencoderKL, tokens: int, sampler: str
) -> None:
    model = tiny_transformer(tokens, sample_size=32)
    condition, start = _case(tokens)
    expected = _stock_latents(model, STOCK[sampler](), condition, start)
    found = _ours(model, tiny_vae, sampler, tokens)
    assert _apart(found, expected) < 1e-4


def test_images_equal_the_stock_decode(tiny_transformer: Any, tiny_vae: AutoencoderKL) -> None:
    model = tiny_transformer(1)
    latents = _ours(model, tiny_vae, "dpm", 1)
    with torch.inference_mode():
        expected = tiny_vae.decode(latents / 1.5305 + 0.0609).sample.clamp(-1, 1)
    assert torch.allclose(_ours(model, tiny_vae, "dpm", 1, output="pt"), expected, atol=1e-5)


@pytest.mark.parametrize("mutant", ["three-channels", "swapped-chunks", "phase-0", "column-major"])
def test_a_wrong_formula_is_seen_by_the_comparison(
    tiny_transformer: Any, tiny_vae: AutoencoderKL, monkeypatch: pytest.MonkeyPatch, mutant: str
) -> None:
    model = tiny_transformer(16, sample_size=32)
    # A stronger condition than a random start gives: every mutant must be far outside the tolerance.
    with torch.no_grad():
        for block in model.transformer_blocks:
            block.attn2.to_out[0].weight.mul_(8)
            block.attn2.to_q.weight.mul_(8)
    condition, start = _case(16)
    expected = _stock_latents(model, STOCK["dpm"](), condition, start)
    assert _apart(_ours(model, tiny_vae, "dpm", 16), expected) < 1e-4
    right = guidance.combine

    def three(without: torch.Tensor, conditional: torch.Tensor, scale: float) -> torch.Tensor:
        return torch.cat([right(without, conditional, scale)[:, :3], conditional[:, 3:]], dim=1)

    table = model.y_pos_embed.y_pos_embed
    if mutant == "three-channels":
        monkeypatch.setattr(guidance, "combine", three)
    elif mutant == "swapped-chunks":
        monkeypatch.setattr(guidance, "combine", lambda a, b, w: right(b, a, w))
    elif mutant == "column-major":
        table.copy_(table.reshape(4, 4, -1).transpose(0, 1).reshape(1, 16, -1).clone())
    else:
        from pixcell_core.models.positions import sincos_table

        table.copy_(sincos_table(12, 4, 4, base=16, scale=2.0, phase=0)[None])
    assert _apart(_ours(model, tiny_vae, "dpm", 16), expected) > 1e-2


def test_a_forgotten_shift_is_seen_by_the_comparison(
    tiny_transformer: Any, tiny_vae: AutoencoderKL, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_transformer(1)
    right = _ours(model, tiny_vae, "dpm", 1, output="pt")
    monkeypatch.setattr(decoding, "plain_latents", lambda vae, z: z / vae.config["scaling_factor"])
    assert not torch.allclose(_ours(model, tiny_vae, "dpm", 1, output="pt"), right, atol=1e-5)


def test_ddim_with_noise_equals_the_stock_step(tiny_transformer: Any, tiny_vae: AutoencoderKL) -> None:
    model, (condition, start) = tiny_transformer(1), _case(1)
    found: Any = PixCellPipeline(tiny_vae, model, "ddim")(
        condition,
        guidance_scale=1.0,
        num_inference_steps=4,
        latents=start,
        latent_size=(32, 32),
        generator=torch.Generator().manual_seed(9),
        eta=1.0,
        output_type="latent",
    ).images
    stock, scheduler, source = _stock_model(model), STOCK["ddim"](), torch.Generator().manual_seed(9)
    scheduler.set_timesteps(4)
    x = start
    with torch.inference_mode():
        for t in scheduler.timesteps:
            nothing = {"resolution": None, "aspect_ratio": None}
            out = stock(x, condition, timestep=t.expand(2), added_cond_kwargs=nothing).sample[:, :16]
            x = scheduler.step(out, t, x, eta=1.0, generator=source).prev_sample
    assert _apart(found, x) < 1e-4


def test_the_default_is_the_published_scheduler() -> None:
    config = sampler_named("dpm").config
    published = {
        "algorithm_type": "dpmsolver++",
        "solver_order": 2,
        "solver_type": "midpoint",
        "prediction_type": "epsilon",
        "beta_start": 1e-4,
        "beta_end": 0.02,
        "beta_schedule": "linear",
        "timestep_spacing": "linspace",
        "final_sigmas_type": "zero",
        "lower_order_final": True,
        "num_train_timesteps": 1000,
    }
    assert {k: config[k] for k in published} == published
