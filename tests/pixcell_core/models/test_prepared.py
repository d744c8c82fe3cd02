"""A prepared condition gives the plain forward's numbers: fused or not, adapted or not, with and without gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import PixArtTransformer2DModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from pixcell_core.models import PixCellTransformer2DModel, block_forward, prepared
from pixcell_core.training.adapters import attach_lora

SIZES = {1: (16, 0.5), 4: (16, 1.0), 16: (32, 2.0)}


def tiny(tokens: int) -> PixCellTransformer2DModel:
    side, scale = SIZES[tokens]
    torch.manual_seed(tokens)
    return PixCellTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=3,
        cross_attention_dim=16,
        sample_size=side,
        caption_channels=12,
        caption_num_tokens=tokens,
        interpolation_scale=scale,
    ).eval()


def inputs(model: PixCellTransformer2DModel, batch: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    side, tokens = int(model.config["sample_size"]), int(model.config["caption_num_tokens"])
    generator = torch.Generator().manual_seed(5)
    latents = torch.randn(batch, 16, side, side, generator=generator)
    return latents, torch.randn(batch, tokens, 12, generator=generator)


def ask(model: Any, latents: torch.Tensor, condition: Any, time: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = model(latents, encoder_hidden_states=condition, timestep=time, return_dict=False)[0]
    return found


@torch.no_grad()
def stock_answer(
    model: PixCellTransformer2DModel, latents: torch.Tensor, condition: torch.Tensor, time: torch.Tensor
) -> torch.Tensor:
    """Stock diffusers with the same weights; the table of the tokens is added outside."""
    config = {k: v for k, v in model.config.items() if not k.startswith("_") and k != "caption_num_tokens"}
    stock = PixArtTransformer2DModel(**config).eval()
    _, foreign = stock.load_state_dict(model.state_dict(), strict=False)
    assert set(foreign) <= {"caption_projection.uncond_embedding", "y_pos_embed.y_pos_embed"}
    if model.y_pos_embed is not None:
        condition = model.y_pos_embed(condition)
    return ask(stock, latents, condition, time.expand(len(latents)))


@pytest.mark.parametrize("tokens", [1, 4, 16])
def test_every_road_gives_stock_diffusers_numbers(tokens: int) -> None:
    model = tiny(tokens)
    latents, condition = inputs(model)
    time = torch.tensor(417.25)
    wanted = stock_answer(model, latents, condition, time)
    with torch.no_grad():
        assert torch.equal(ask(model, latents, condition, time), wanted)  # diffusers' own blocks
        ready = model.prepare(condition)
        fused = ask(model, latents, ready, time)
        plain = ask(model, latents, ready, time.expand(len(latents)))
    assert len(ready.weights) == 3
    torch.testing.assert_close(fused, wanted, rtol=0, atol=5e-6)
    torch.testing.assert_close(plain, wanted, rtol=0, atol=5e-6)
    learning = ask(model, latents, condition, time)
    assert learning.requires_grad
    torch.testing.assert_close(learning.detach(), wanted, rtol=0, atol=5e-6)


@pytest.mark.parametrize("tokens", [1, 4])
def test_latents_shared_by_two_conditions_are_as_good_as_doubled_ones(tokens: int) -> None:
    model = tiny(tokens)
    latents, condition = inputs(model)
    both = torch.cat([model.unconditional(3), condition])
    time = torch.tensor(80)
    with torch.no_grad():
        wanted = ask(model, torch.cat([latents, latents]), both, time)
        torch.testing.assert_close(ask(model, latents, model.prepare(both), time), wanted, rtol=0, atol=5e-6)
        times = time.expand(6)
        torch.testing.assert_close(ask(model, latents, model.prepare(both), times), wanted, rtol=0, atol=5e-6)


def test_adapters_are_merged_when_the_condition_is_prepared() -> None:
    model = tiny(4)
    attach_lora(
        model,
        kind="ffa-lora",
        rank=2,
        seed=3,
        targets=("attn1.to_q", "attn1.to_out.0", "attn2.to_v", "attn2.to_q"),
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.3)
    latents, condition = inputs(model)
    time = torch.tensor(300)
    with torch.no_grad():
        wanted = ask(model, latents, condition, time)
        torch.testing.assert_close(
            ask(model, latents, model.prepare(condition), time), wanted, rtol=0, atol=5e-6
        )
        for module in model.modules():
            if isinstance(module, BaseTunerLayer):
                module.enable_adapters(False)
        bare = ask(model, latents, condition, time)
        assert (bare - wanted).abs().max() > 1e-3
        torch.testing.assert_close(
            ask(model, latents, model.prepare(condition), time), bare, rtol=0, atol=5e-6
        )


@pytest.mark.parametrize("tokens", [1, 4])
def test_gradients_equal_those_of_diffusers_blocks(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(tokens)
    latents, condition = inputs(model)
    times = torch.tensor([3, 500, 999])

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        ask(model, latents, condition, times).pow(2).mean().backward()
        return {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}

    ours = gradients()
    model.enable_gradient_checkpointing()
    recomputed = gradients()
    model.disable_gradient_checkpointing()

    def stock_block(block: Any, tokens: torch.Tensor, cross: Any, modulation: torch.Tensor) -> torch.Tensor:
        projected = model._project(condition)
        found: torch.Tensor = block(tokens, encoder_hidden_states=projected, timestep=modulation)
        return found

    monkeypatch.setattr("pixcell_core.models.transformer.run_block", stock_block)
    theirs = gradients()
    silent = {k for k in theirs if tokens == 1 and (".attn2.to_q" in k or ".attn2.to_k" in k)}
    assert set(ours) == set(theirs) - silent
    assert set(recomputed) == set(ours)
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-4, atol=1e-8)
        torch.testing.assert_close(gradient, recomputed[name], rtol=1e-5, atol=1e-9)
    assert all(theirs[name].abs().max() < 1e-7 for name in silent)


def test_a_fused_road_with_a_fault_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(4)
    latents, condition = inputs(model)
    time = torch.tensor(417)
    wanted = stock_answer(model, latents, condition, time)

    def away() -> float:
        with torch.no_grad():
            return float((ask(model, latents, model.prepare(condition), time) - wanted).abs().max())

    assert away() < 5e-6

    def swapped(blocks: Any, projected: torch.Tensor) -> prepared.PreparedCondition:
        ready = prepared.prepare_condition(blocks, projected)
        return prepared.PreparedCondition(ready.batch, (), ready.values, ready.keys, ready.weights)

    def erf(rows: torch.Tensor, weights: prepared.Weights) -> torch.Tensor:
        return nn.functional.gelu(nn.functional.linear(rows, *weights))

    def ungated(weights: prepared.Weights, gate: torch.Tensor) -> prepared.Weights:
        return weights

    faults: tuple[tuple[str, Any], ...] = (
        ("pixcell_core.models.transformer.prepare_condition", swapped),
        ("pixcell_core.models.block_forward._gelu_of_product", erf),
        ("pixcell_core.models.block_forward._gated", ungated),
    )
    for place, fault in faults:
        with monkeypatch.context() as patch:
            patch.setattr(place, fault)
            assert away() > 2e-5, place


def test_the_road_without_onednn_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(1)
    latents, condition = inputs(model)
    time = torch.tensor(12)
    with torch.no_grad():
        wanted = ask(model, latents, model.prepare(condition), time)
        monkeypatch.setattr(block_forward, "_onednn", lambda rows: False)
        torch.testing.assert_close(
            ask(model, latents, model.prepare(condition), time), wanted, rtol=0, atol=5e-6
        )


def test_a_compiler_is_given_plain_operations_only() -> None:
    model = tiny(1)
    latents, condition = inputs(model)
    time = torch.tensor(55)
    seen: list[str] = []

    def backend(graph: Any, given: Any) -> Any:
        seen.append(graph.code)
        return graph.forward

    with torch.no_grad():
        ready = model.prepare(condition)
        wanted = ask(model, latents, ready, time)
        compiled = torch.compile(model, backend=backend)
        torch.testing.assert_close(ask(compiled, latents, ready, time), wanted, rtol=0, atol=5e-6)
    torch.compiler.reset()
    assert any("gelu" in code for code in seen)
    assert not any("_linear_pointwise" in code for code in seen)
