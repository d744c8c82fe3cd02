"""The register transformer against transformers' Dinov2WithRegisters with the same weights, and its published size."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

from pixcell_core.encoders import vision_transformer
from pixcell_core.encoders.uni2 import load_uni2
from pixcell_core.encoders.vision_transformer import RegisterVisionTransformer, VisionTransformerConfig
from pixcell_core.errors import BadInputError

from .conftest import TINY_VIT, randomise


def oracle(model: RegisterVisionTransformer) -> Dinov2WithRegistersModel:
    """The same function in transformers' class: its mlp_ratio 4 gives the same 2 * 2/3 * 4 gated width."""
    c = model.config
    other = Dinov2WithRegistersModel(
        Dinov2WithRegistersConfig(
            hidden_size=c.embed_dim,
            num_hidden_layers=c.depth,
            num_attention_heads=c.num_heads,
            image_size=c.img_size,
            patch_size=c.patch_size,
            mlp_ratio=4,
            use_swiglu_ffn=True,
            num_register_tokens=c.reg_tokens,
            layer_norm_eps=c.norm_eps,
        )
    )
    ours, theirs = model.state_dict(), {}
    theirs["embeddings.cls_token"] = ours["cls_token"]
    theirs["embeddings.mask_token"] = torch.zeros(1, c.embed_dim)
    theirs["embeddings.register_tokens"] = ours["reg_token"]
    theirs["embeddings.position_embeddings"] = torch.cat(
        [torch.zeros(1, 1, c.embed_dim), ours["pos_embed"]], dim=1
    )
    for kind in ("weight", "bias"):
        theirs[f"embeddings.patch_embeddings.projection.{kind}"] = ours[f"patch_embed.proj.{kind}"]
        theirs[f"layernorm.{kind}"] = ours[f"norm.{kind}"]
        for n in range(c.depth):
            here, there = f"blocks.{n}", f"encoder.layer.{n}"
            for norm in ("norm1", "norm2"):
                theirs[f"{there}.{norm}.{kind}"] = ours[f"{here}.{norm}.{kind}"]
            parts = ours[f"{here}.attn.qkv.{kind}"].chunk(3)
            for name, part in zip(("q_proj", "k_proj", "v_proj"), parts, strict=True):
                theirs[f"{there}.attention.{name}.{kind}"] = part
            theirs[f"{there}.attention.o_proj.{kind}"] = ours[f"{here}.attn.proj.{kind}"]
            gate, up = ours[f"{here}.mlp.fc1.{kind}"].chunk(2)
            theirs[f"{there}.mlp.gate_proj.{kind}"] = gate
            theirs[f"{there}.mlp.up_proj.{kind}"] = up
            theirs[f"{there}.mlp.down_proj.{kind}"] = ours[f"{here}.mlp.fc2.{kind}"]
            for scale in ("1", "2"):
                theirs[f"{there}.layer_scale{scale}.lambda1"] = ours[f"{here}.ls{scale}.gamma"]
    other.load_state_dict(theirs, strict=True)
    return other.eval()


def difference() -> float:
    """Largest relative difference to the oracle in float64, on random images."""
    model = randomise(TINY_VIT.build()).double()
    assert isinstance(model, RegisterVisionTransformer)
    images = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with torch.inference_mode():
        expected = oracle(model).double()(pixel_values=images).last_hidden_state[:, 0]
        return float((model(images) - expected).abs().max() / expected.abs().max())


def test_it_equals_the_same_weights_in_transformers_class() -> None:
    assert difference() < 1e-9


@pytest.mark.parametrize("mutant", ["halves swapped", "gate by sigmoid", "positions on no token"])
def test_a_wrong_formula_is_seen(mutant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def swapped(packed: torch.Tensor) -> torch.Tensor:
        first, second = packed.chunk(2, dim=-1)
        return first * torch.nn.functional.silu(second)

    def sigmoid(packed: torch.Tensor) -> torch.Tensor:
        first, second = packed.chunk(2, dim=-1)
        return torch.sigmoid(first) * second

    if mutant == "positions on no token":
        right = RegisterVisionTransformer.forward

        def without(self: RegisterVisionTransformer, images: torch.Tensor) -> torch.Tensor:
            kept, self.pos_embed.data = self.pos_embed.data, torch.zeros_like(self.pos_embed.data)
            out = right(self, images)
            self.pos_embed.data = kept
            return out

        monkeypatch.setattr(RegisterVisionTransformer, "forward", without)
    else:
        monkeypatch.setattr(
            vision_transformer, "gated_unit", swapped if mutant == "halves swapped" else sigmoid
        )
    assert difference() > 1e-3


def test_at_uni2_size_it_has_exactly_the_published_parameters_and_names() -> None:
    with torch.device("meta"):
        model = VisionTransformerConfig().build()
    assert sum(p.numel() for p in model.parameters()) == 681_394_176
    state = model.state_dict()
    # 14 tensors per block, four embeddings (one with two tensors) and the last norm.
    assert len(state) == 24 * 14 + 5 + 2
    assert tuple(state["pos_embed"].shape) == (1, 256, 1536)
    assert tuple(state["reg_token"].shape) == (1, 8, 1536)
    assert tuple(state["blocks.23.mlp.fc1.weight"].shape) == (8192, 1536)
    assert tuple(state["blocks.23.mlp.fc2.weight"].shape) == (1536, 4096)


def test_weights_load_strictly_from_folder_and_file_as_pickle_and_safetensors(
    tiny_uni2: Path, tiles: torch.Tensor
) -> None:
    from safetensors.torch import save_file

    first = load_uni2(tiny_uni2, config=TINY_VIT, tile_size=64)
    state = torch.load(tiny_uni2 / "pytorch_model.bin", weights_only=True)
    save_file(state, tiny_uni2 / "other.safetensors")
    second = load_uni2(tiny_uni2 / "other.safetensors", config=TINY_VIT, tile_size=64)
    assert first.embedding_dim == 24
    tokens = first.encode(tiles)
    assert tokens.shape == (3, 1, 24) and tokens.dtype == torch.float32
    assert torch.equal(tokens, second.encode(tiles))
    reference = TINY_VIT.build()
    reference.load_state_dict(state)
    resized = torch.nn.functional.interpolate(
        tiles.double() / 255, size=(28, 28), mode="bilinear", antialias=True, align_corners=False
    )
    mean = torch.tensor([0.485, 0.456, 0.406], dtype=torch.float64)[:, None, None]
    std = torch.tensor([0.229, 0.224, 0.225], dtype=torch.float64)[:, None, None]
    with torch.inference_mode():
        expected = reference.double().eval()((resized - mean) / std)
    assert torch.allclose(tokens[:, 0].double(), expected, atol=1e-4)


def test_bfloat16_weights_give_float32_tokens_near_the_exact_ones(
    tiny_uni2: Path, tiles: torch.Tensor
) -> None:
    exact = load_uni2(tiny_uni2, config=TINY_VIT, tile_size=64).encode(tiles).flatten(1)
    short = load_uni2(tiny_uni2, config=TINY_VIT, tile_size=64, dtype=torch.bfloat16).encode(tiles).flatten(1)
    assert short.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(exact, short).min() > 0.99


def test_another_models_weights_and_an_empty_folder_are_named(tiny_uni2: Path, tmp_path: Path) -> None:
    state = torch.load(tiny_uni2 / "pytorch_model.bin", weights_only=True)
    with pytest.raises(BadInputError, match=r"lacks \d+ of 343 tensors: blocks\.10") as too_few:
        load_uni2(tiny_uni2)
    assert too_few.value.code == "checkpoint-missing-keys"
    for changed, words, code in (
        (
            {"pos_embed": torch.zeros(1, 9, 24)},
            r"pos_embed has shape \(1, 9, 24\), expected \(1, 4, 24\)",
            "wrong-shape",
        ),
        ({"head.weight": torch.zeros(2)}, r"1 tensors .* does not have: head\.weight", "extra-keys"),
    ):
        torch.save(state | changed, tmp_path / "changed.pth")
        with pytest.raises(BadInputError, match=words) as refused:
            load_uni2(tmp_path / "changed.pth", config=TINY_VIT)
        assert refused.value.code == f"checkpoint-{code}"
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInputError, match=r"pytorch_model\.bin") as missing:
        load_uni2(tmp_path / "empty")
    assert missing.value.code == "weights-missing" and "MahmoodLab/UNI2-h" in missing.value.hint


def test_images_of_another_size_than_the_position_table_are_refused() -> None:
    with pytest.raises(BadInputError, match=r"\[3, 42, 42\], expected \[3, 28, 28\]"):
        TINY_VIT.build()(torch.zeros(1, 3, 42, 42))
