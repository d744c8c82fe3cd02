"""The transformer equals diffusers' PixArt where PixArt is right, and differs where PixCell differs."""

from __future__ import annotations

import pytest
import torch
from diffusers import PixArtTransformer2DModel

from pixcell_core.models import PixCellTransformer2DModel
from pixcell_core.models.positions import sincos_table

TINY = {
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "in_channels": 16,
    "out_channels": 32,
    "num_layers": 2,
    "cross_attention_dim": 16,
    "sample_size": 8,
    "patch_size": 2,
    "caption_channels": 24,
    "interpolation_scale": 0.5,
}


def _pair(tokens: int, scale: float = 0.5) -> tuple[PixCellTransformer2DModel, PixArtTransformer2DModel]:
    torch.manual_seed(0)
    config = {**TINY, "interpolation_scale": scale}
    ours = PixCellTransformer2DModel(**config, caption_num_tokens=tokens).eval()
    stock = PixArtTransformer2DModel(**config, use_additional_conditions=False).eval()
    stock.load_state_dict(ours.state_dict(), strict=False)
    return ours, stock


@pytest.mark.parametrize("size", [(8, 8), (16, 8), (12, 20)])
def test_one_token_is_bit_identical_to_stock_pixart(size: tuple[int, int]) -> None:
    ours, stock = _pair(1)
    x, c, t = torch.randn(3, 16, *size), torch.randn(3, 1, 24), torch.tensor([0, 500, 999])
    with torch.no_grad():
        want = stock(x, encoder_hidden_states=c, timestep=t).sample
        got = ours(x, c, t).sample
    # Diffusers lays the coordinates of odd sizes in float32, we in float64: equal to the bit where they divide.
    assert torch.equal(got, want) or (size == (12, 20) and torch.allclose(got, want, atol=2e-6))


def test_sixteen_tokens_equal_stock_with_the_table_added_outside() -> None:
    ours, stock = _pair(16)
    x, c, t = torch.randn(2, 16, 8, 8), torch.randn(2, 16, 24), torch.tensor([3, 700])
    table = ours.y_pos_embed.y_pos_embed  # type: ignore[union-attr]
    with torch.no_grad():
        assert torch.equal(ours(x, c, t).sample, stock(x, encoder_hidden_states=c + table, timestep=t).sample)
        assert not torch.allclose(ours(x, c, t).sample, stock(x, encoder_hidden_states=c, timestep=t).sample)


def test_token_order_and_phase_matter() -> None:
    ours, _ = _pair(16)
    x, c, t = torch.randn(1, 16, 8, 8), torch.randn(1, 16, 24), torch.tensor([300])
    with torch.no_grad():
        right = ours(x, c, t).sample
        turned = c.reshape(1, 4, 4, 24).transpose(1, 2).reshape(1, 16, 24)
        assert not torch.allclose(ours(x, turned, t).sample, right)
        table = ours.y_pos_embed  # type: ignore[assignment]
        table.y_pos_embed.copy_(sincos_table(24, 4, 4, base=4, scale=0.5, phase=1.0)[None])
        assert not torch.allclose(ours(x, c, t).sample, right)


def test_published_size_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = PixCellTransformer2DModel()
        wide = PixCellTransformer2DModel(sample_size=128, interpolation_scale=2.0, caption_num_tokens=16)
    assert sum(p.numel() for p in model.parameters()) == 608_072_960
    assert (len(model.state_dict()), len(wide.state_dict())) == (604, 605)
    assert tuple(wide.state_dict()["y_pos_embed.y_pos_embed"].shape) == (1, 16, 1536)


def test_1024_condition_table_sits_at_the_centres_of_its_tiles() -> None:
    table = sincos_table(8, 4, 4, base=64, scale=2.0, phase=64 // 16)
    centres = torch.tensor([4.0, 12.0, 20.0, 28.0])
    assert torch.allclose(table[:4, 0], torch.sin(centres), atol=1e-6)  # first half encodes the column
    assert torch.allclose(table[::4, 4], torch.sin(centres), atol=1e-6)  # second half the row


def test_null_condition_is_kept_in_the_file_but_never_trained(tmp_path) -> None:  # type: ignore[no-untyped-def]
    model = PixCellTransformer2DModel(**TINY)
    assert "caption_projection.uncond_embedding" in model.state_dict()
    assert "caption_projection.uncond_embedding" not in dict(model.named_parameters())
    model.save_pretrained(str(tmp_path))
    again = PixCellTransformer2DModel.from_pretrained(str(tmp_path), low_cpu_mem_usage=False)
    assert torch.equal(again.unconditional(2), model.unconditional(2))


def test_dead_configuration_keys_are_tolerated() -> None:
    dead = {"double_self_attention": False, "num_vector_embeds": None, "only_cross_attention": False}
    model = PixCellTransformer2DModel.from_config({**TINY, **dead})
    assert model.config["caption_channels"] == 24


def test_gradient_checkpointing_changes_nothing() -> None:
    torch.manual_seed(1)
    model = PixCellTransformer2DModel(**TINY).train()
    x, c, t = torch.randn(2, 16, 8, 8), torch.randn(2, 1, 24), torch.tensor([1, 2])
    model(x, c, t).sample.pow(2).mean().backward()
    plain = model.transformer_blocks[0].attn1.to_q.weight.grad.clone()
    model.zero_grad()
    model.enable_gradient_checkpointing()
    model(x, c, t).sample.pow(2).mean().backward()
    assert torch.allclose(model.transformer_blocks[0].attn1.to_q.weight.grad, plain, atol=1e-7)
