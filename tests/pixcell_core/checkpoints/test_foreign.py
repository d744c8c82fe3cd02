"""Original names to ours and back: the network they describe is the same, the bits are the same, mutants are not."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from pixcell_core.checkpoints import foreign
from pixcell_core.checkpoints.folders import build_empty, fill
from pixcell_core.checkpoints.foreign import from_original, lora_tensors, peft_names, to_original
from pixcell_core.errors import BadInputError
from pixcell_core.models import PixCellTransformer2DModel

State = dict[str, torch.Tensor]


def original_forward(
    state: State, x: torch.Tensor, c: torch.Tensor, t: torch.Tensor, head_dim: int = 8
) -> torch.Tensor:
    """The original network as plain formulas over its own names: fused rows used fused, in float64."""
    s = {k: v.double() for k, v in state.items()}
    x, c = x.double(), c.double()

    def linear(name: str, value: torch.Tensor) -> torch.Tensor:
        return value @ s[f"{name}.weight"].T + s[f"{name}.bias"]

    def norm(value: torch.Tensor) -> torch.Tensor:
        centred = value - value.mean(-1, keepdim=True)
        return centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        def heads(value: torch.Tensor) -> torch.Tensor:
            return value.reshape(*value.shape[:2], -1, head_dim).transpose(1, 2)

        weight = (heads(q) @ heads(k).transpose(-1, -2) / head_dim**0.5).softmax(-1)
        return (weight @ heads(v)).transpose(1, 2).reshape(q.shape)

    batch, _, height, width = x.shape
    rows, columns = height // 2, width // 2
    patches = x.reshape(batch, 16, rows, 2, columns, 2).permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, 64)
    h = patches @ s["x_embedder.proj.weight"].flatten(1).T + s["x_embedder.proj.bias"] + s["pos_embed"]
    # The sinusoid of the timestep is float32 in the published network: its rounding is part of the weights' world.
    angles = t.float()[:, None] * torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float32) / 128)
    wave = torch.cat([angles.cos(), angles.sin()], 1).double()
    e = linear("t_embedder.mlp.2", F.silu(linear("t_embedder.mlp.0", wave)))
    m = linear("t_block.1", F.silu(e)).reshape(batch, 6, -1)
    if "y_pos_embed" in s:
        c = c + s["y_pos_embed"]
    c = linear("y_embedder.y_proj.fc2", F.gelu(linear("y_embedder.y_proj.fc1", c), approximate="tanh"))
    for n in range(2):
        b = f"blocks.{n}"
        shift1, scale1, gate1, shift2, scale2, gate2 = (s[f"{b}.scale_shift_table"] + m)[:, :, None].unbind(1)
        q, k, v = linear(f"{b}.attn.qkv", norm(h) * (1 + scale1) + shift1).chunk(3, dim=-1)
        h = h + gate1 * linear(f"{b}.attn.proj", attend(q, k, v))
        k, v = linear(f"{b}.cross_attn.kv_linear", c).chunk(2, dim=-1)
        h = h + linear(f"{b}.cross_attn.proj", attend(linear(f"{b}.cross_attn.q_linear", h), k, v))
        hidden = F.gelu(linear(f"{b}.mlp.fc1", norm(h) * (1 + scale2) + shift2), approximate="tanh")
        h = h + gate2 * linear(f"{b}.mlp.fc2", hidden)
    shift, scale = (s["final_layer.scale_shift_table"] + e[:, None]).chunk(2, dim=1)
    out = linear("final_layer.linear", norm(h) * (1 + scale) + shift)
    out = out.reshape(batch, rows, columns, 2, 2, 32).permute(0, 5, 1, 3, 2, 4)
    return out.reshape(batch, 32, height, width)


def difference(
    state: State,
    config: dict[str, Any],
    given: tuple[torch.Tensor, ...],
    convert: Callable[[State], State] = from_original,
) -> float:
    """Largest difference between the formulas on the original tensors and our model on the converted ones."""
    model = build_empty(PixCellTransformer2DModel, config, "test")
    fill(model, convert(state), config, "test")
    with torch.no_grad():
        got = model(given[0], encoder_hidden_states=given[1], timestep=given[2], return_dict=False)[0]
    return float((got - original_forward(state, *given)).abs().max())


@pytest.mark.parametrize(("tokens", "scale"), [(1, 0.5), (4, 1.0), (16, 2.0)])
def test_a_converted_checkpoint_is_the_same_network(
    tokens: int,
    scale: float,
    original_state: Callable[..., State],
    published_config: Callable[..., dict[str, Any]],
    inputs: Callable[..., Any],
) -> None:
    state = original_state(tokens, scale=scale)
    assert difference(state, published_config(tokens, scale=scale), inputs(tokens)) < 2e-5


@pytest.mark.parametrize(
    ("fused", "parts"),
    [
        ("cross_attn.kv_linear", ("attn2.to_v", "attn2.to_k")),
        ("attn.qkv", ("attn1.to_k", "attn1.to_q", "attn1.to_v")),
        ("attn.qkv", ("attn1.to_q", "attn1.to_v", "attn1.to_k")),
        ("attn.qkv", ("attn1.to_v", "attn1.to_k", "attn1.to_q")),
    ],
)
def test_mutant_rows_in_another_order_are_another_network(
    fused: str,
    parts: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
    original_state: Callable[..., State],
    published_config: Callable[..., dict[str, Any]],
    inputs: Callable[..., Any],
) -> None:
    monkeypatch.setitem(foreign._FUSED, fused, parts)
    assert difference(original_state(4), published_config(4), inputs(4)) > 1e-2


def test_mutants_column_major_rows_and_tokens_are_another_network(
    original_state: Callable[..., State],
    published_config: Callable[..., dict[str, Any]],
    inputs: Callable[..., Any],
) -> None:
    def rows_interleaved(state: State) -> State:
        fused = {
            k: v.unflatten(0, (-1, 3)).transpose(0, 1).flatten(0, 1) for k, v in state.items() if "qkv" in k
        }
        return from_original(state | fused)

    def tokens_by_column(state: State) -> State:
        table = state["y_pos_embed"]
        turned = table.unflatten(1, (4, 4)).transpose(1, 2).flatten(1, 2)
        return from_original({**state, "y_pos_embed": turned})

    state, config, given = original_state(16), published_config(16), inputs(16)
    assert difference(state, config, given) < 2e-5
    assert difference(state, config, given, rows_interleaved) > 1e-2
    assert difference(state, config, given, tokens_by_column) > 1e-2


@pytest.mark.parametrize("tokens", [1, 4, 16])
def test_both_round_trips_are_equal_to_the_bit(
    tokens: int, original_state: Callable[..., State], position_table: Callable[..., torch.Tensor]
) -> None:
    state = original_state(tokens)
    again = to_original(from_original(state), sample_size=16, patch_size=2, interpolation_scale=0.5)
    assert again.keys() == state.keys()
    assert all(torch.equal(again[name], state[name]) for name in state if name != "pos_embed")
    assert torch.allclose(again["pos_embed"], position_table(16, 8, base=8, scale=0.5)[None], atol=1e-6)
    ours = from_original(state)
    back = from_original(to_original(ours, sample_size=16, patch_size=2, interpolation_scale=0.5))
    assert back.keys() == ours.keys() and all(torch.equal(back[name], ours[name]) for name in ours)


def test_splitting_copies_nothing(original_state: Callable[..., State]) -> None:
    state = original_state(1)
    ours, fused = from_original(state), state["blocks.0.attn.qkv.weight"]
    parts = [ours[f"transformer_blocks.0.attn1.to_{x}.weight"] for x in "qkv"]
    assert {p.untyped_storage().data_ptr() for p in parts} == {fused.untyped_storage().data_ptr()}
    assert all(p.is_contiguous() for p in parts)


@pytest.mark.parametrize(("tokens", "size", "scale", "entries"), [(1, 32, 0.5, 604), (16, 128, 2.0, 605)])
def test_published_size_on_the_meta_device(tokens: int, size: int, scale: float, entries: int) -> None:
    with torch.device("meta"):
        model = PixCellTransformer2DModel(
            sample_size=size, interpolation_scale=scale, caption_num_tokens=tokens
        )
    state = model.state_dict()
    assert (sum(p.numel() for p in model.parameters()), len(state)) == (608_072_960, entries)
    theirs = to_original(state, sample_size=size, patch_size=2, interpolation_scale=scale)
    # 28 blocks of 15 tensors, 16 outside them, the latent table, and at 1024 px the condition's.
    assert len(theirs) == 28 * 15 + 16 + 1 + (tokens > 1)
    assert theirs["blocks.27.attn.qkv.weight"].shape == (3456, 1152)
    assert theirs["pos_embed"].shape == (1, (size // 2) ** 2, 1152)
    back = from_original(theirs)
    assert {k: v.shape for k, v in back.items()} == {k: v.shape for k, v in state.items()}


def test_names_missing_left_over_and_rows_that_do_not_divide_are_named(
    original_state: Callable[..., State],
) -> None:
    def refusal(state: State) -> BadInputError:
        with pytest.raises(BadInputError) as refused:
            from_original(state)
        return refused.value

    state = original_state(1)
    missing = refusal({k: v for k, v in state.items() if k != "blocks.1.mlp.fc2.bias"})
    assert missing.code == "checkpoint-missing-keys" and "blocks.1.mlp.fc2.bias" in missing.message
    extra = refusal({**state, "csize_embedder.mlp.0.weight": torch.zeros(1)})
    assert extra.code == "checkpoint-extra-keys" and "csize_embedder.mlp.0.weight" in extra.message
    rows = refusal({**state, "blocks.0.attn.qkv.bias": torch.zeros(47)})
    assert rows.code == "checkpoint-wrong-shape" and "47" in rows.message
    assert refusal({}).code == "checkpoint-missing-keys"
    gap = {k.replace("blocks.1.", "blocks.2."): v for k, v in state.items()}
    assert "blocks.1." in refusal(gap).message
    with pytest.raises(BadInputError) as refused:
        to_original({"proj_out.weight": torch.zeros(1)}, sample_size=16, patch_size=2, interpolation_scale=1)
    assert refused.value.code == "checkpoint-missing-keys"
    wrapped = {f"module._orig_mod.{k}": v for k, v in state.items()}
    assert from_original(wrapped).keys() == from_original(state).keys()


@pytest.mark.parametrize(
    "spelling",
    [
        "base_model.model.{}.lora_A.weight base_model.model.{}.lora_B.weight",
        "base_model.model.transformer.{}.lora_A.weight base_model.model.transformer.{}.lora_B.weight",
        "transformer.{}.lora_A.weight transformer.{}.lora_B.weight",
        "{}.lora_A.default.weight {}.lora_B.default.weight",
        "transformer.{}.lora.down.weight transformer.{}.lora.up.weight",
    ],
)
def test_every_spelling_of_a_lora_layer_is_one(spelling: str) -> None:
    layer = "transformer_blocks.0.attn2.to_out.0"
    down, up = (name.format(layer) for name in spelling.split())
    found = lora_tensors({down: torch.zeros(4, 16), up: torch.ones(16, 4)})
    assert list(found.down) == list(found.up) == [layer] and not found.rest
    assert found.down[layer].shape == (4, 16) and bool(found.up[layer].all())
    assert list(lora_tensors(peft_names(found.down, found.up)).down) == [layer]


def test_adapters_that_are_not_one_whole_adapter_are_refused() -> None:
    a, b = torch.zeros(4, 16), torch.zeros(16, 4)
    for state, code in (
        ({"x.lora_A.weight": a}, "adapter-incomplete"),
        ({"x.lora_A.one.weight": a, "x.lora_B.two.weight": b}, "adapter-ambiguous"),
        ({"x.lora_A.weight": a, "transformer.x.lora_A.weight": a, "x.lora_B.weight": b}, "adapter-ambiguous"),
        ({"x.base_layer.weight": b, "x.weight": b}, "adapter-ambiguous"),
    ):
        with pytest.raises(BadInputError) as refused:
            lora_tensors(state)
        assert refused.value.code == code
