"""LoRA files: every published form gives one adapter; attached, merged and read by peft and diffusers it is the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, inject_adapter_in_model
from safetensors.torch import load_file, save_file

from pixcell_core.checkpoints.attached_lora import (
    attach_as_ffa,
    attach_lora,
    detach_lora,
    extract_lora,
    merge_lora,
    unmerge_lora,
)
from pixcell_core.checkpoints.lora import LoraAdapter, adapter_from_state, load_lora, save_peft
from pixcell_core.errors import BadInputError, PixcellError
from pixcell_core.models import PixCellTransformer2DModel
from pixcell_core.training.adapters import adapter_state
from pixcell_core.training.adapters import attach_lora as attach_drawn_lora

Tiny = Callable[..., PixCellTransformer2DModel]
#: The layers the published stain adapters change, in all blocks.
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
LAYERS = [f"transformer_blocks.{n}.attn2.{t}" for n in range(2) for t in TARGETS]


def random_adapter(rank: int = 4, scale: float = 1.0) -> LoraAdapter:
    """An adapter of the tiny transformer's cross-attention with nothing at zero."""
    draw = torch.Generator().manual_seed(9)
    return LoraAdapter(
        {layer: torch.randn(rank, 16, generator=draw) / 4 for layer in LAYERS},
        {layer: torch.randn(16, rank, generator=draw) / 4 for layer in LAYERS},
        dict.fromkeys(LAYERS, scale),
    )


def run(model: torch.nn.Module, given: Any) -> torch.Tensor:
    """The model's output."""
    with torch.no_grad():
        return model(given[0], encoder_hidden_states=given[1], timestep=given[2], return_dict=False)[0]


def by_formula(model: PixCellTransformer2DModel, adapter: LoraAdapter, given: Any) -> torch.Tensor:
    """The adapted output from the definition: every weight plus scale · B A, no adapter library in sight."""
    plain = {k: v.clone() for k, v in model.state_dict().items()}
    for layer in adapter.layers:
        product = adapter.up[layer].double() @ adapter.down[layer].double() * adapter.scale[layer]
        weight = model.state_dict()[f"{layer}.weight"]
        weight.copy_((weight.double() + product).float())
    output = run(model, given)
    model.load_state_dict(plain)
    return output


def full_state(model: PixCellTransformer2DModel, adapter: LoraAdapter) -> dict[str, torch.Tensor]:
    """The published full-state form: the whole state dict, adapted layers called base_layer."""
    state = {}
    for name, tensor in model.state_dict().items():
        layer, _, end = name.rpartition(".")
        state[f"{layer}.base_layer.{end}" if layer in adapter.down else name] = tensor
    for layer in adapter.layers:
        state[f"{layer}.lora_A.default.weight"] = adapter.down[layer]
        state[f"{layer}.lora_B.default.weight"] = adapter.up[layer]
    return state


def same(one: LoraAdapter, other: LoraAdapter) -> bool:
    """Whether two adapters are equal to the bit."""
    return (
        one.layers == other.layers
        and all(
            torch.equal(one.down[k], other.down[k]) and torch.equal(one.up[k], other.up[k]) for k in one.down
        )
        and all(abs(one.scale[k] - other.scale[k]) < 1e-9 for k in one.scale)
    )


def refusal(act: Callable[[], object], kind: type[PixcellError] = BadInputError) -> PixcellError:
    """The error `act` must raise; every one has advice."""
    with pytest.raises(kind) as refused:
        act()
    assert refused.value.hint
    return refused.value


def test_attached_merged_and_defined_are_one_function(tiny: Tiny, inputs: Callable[..., Any]) -> None:
    model, adapter, given = tiny(4), random_adapter(scale=0.5), inputs(4)
    before, want = run(model, given), by_formula(model, adapter, given)
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    assert float((want - before).abs().max()) > 1e-2
    attach_lora(model, adapter)
    assert not any(p.requires_grad for p in model.parameters())
    assert torch.allclose(run(model, given), want, atol=1e-5)
    with torch.no_grad():
        prepared = model.prepare(given[1])
    assert torch.allclose(run(model, (given[0], prepared, given[2])), want, atol=1e-5)
    merge_lora(model)
    merge_lora(model)  # merging twice must not count twice
    assert torch.allclose(run(model, given), want, atol=1e-5)
    unmerge_lora(model)
    assert torch.allclose(run(model, given), want, atol=1e-5)
    assert same(extract_lora(model), adapter)
    detach_lora(model)
    assert model.state_dict().keys() == weights.keys()
    assert all(torch.allclose(v, weights[k], atol=1e-6) for k, v in model.state_dict().items())
    attach_lora(model, adapter, trainable=True)
    assert {k.split(".")[-3] for k, p in model.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}
    detach_lora(model, fold=True)
    assert model.state_dict().keys() == weights.keys()
    assert torch.allclose(run(model, given), want, atol=1e-5)


def test_mutants_a_forgotten_scale_and_halves_of_another_layer_are_noticed(
    tiny: Tiny, inputs: Callable[..., Any]
) -> None:
    adapter, given = random_adapter(scale=0.5), inputs(4)
    want = by_formula(tiny(4), adapter, given)
    unscaled = LoraAdapter(adapter.down, adapter.up, dict.fromkeys(LAYERS, 1.0))
    shuffled = LoraAdapter(
        dict(zip(LAYERS, reversed(list(adapter.down.values())), strict=True)), adapter.up, adapter.scale
    )
    for mutant in (unscaled, shuffled):
        model = tiny(4)
        attach_lora(model, mutant)
        assert float((run(model, given) - want).abs().max()) > 1e-3


def test_published_adapter_has_the_published_size() -> None:
    with torch.device("meta"):
        model = PixCellTransformer2DModel()
        inject_adapter_in_model(
            LoraConfig(r=4, lora_alpha=4, target_modules=[f"attn2.{t}" for t in TARGETS]), model
        )
        found = adapter_from_state(model.state_dict())
    assert found.parameters == 1_032_192 and len(found.layers) == 28 * 4
    assert set(found.ranks.values()) == {4} and set(found.scale.values()) == {1.0}


@pytest.mark.parametrize("form", ["pth", "wrapped", "safetensors"])
def test_the_published_full_state_form_gives_the_adapter_alone(form: str, tmp_path: Path, tiny: Tiny) -> None:
    adapter = random_adapter()
    state = {k: v.contiguous().clone() for k, v in full_state(tiny(4), adapter).items()}
    path = tmp_path / ("mist_her2_lora.safetensors" if form == "safetensors" else "mist_her2_lora.pth")
    if form == "safetensors":
        save_file(state, path)
    else:
        torch.save({"state_dict": state} if form == "wrapped" else state, path)
    assert same(load_lora(path), adapter)
    assert set(load_lora(path, alpha=8).scale.values()) == {2.0}


def test_what_we_write_peft_reads_to_the_same_output(
    tmp_path: Path, tiny: Tiny, inputs: Callable[..., Any]
) -> None:
    adapter, given = random_adapter(scale=0.75), inputs(4)
    want = by_formula(tiny(4), adapter, given)
    save_peft(adapter, tmp_path / "adapter")
    assert same(load_lora(tmp_path / "adapter"), adapter)
    theirs = PeftModel.from_pretrained(tiny(4), str(tmp_path / "adapter"))
    assert torch.allclose(run(theirs.base_model.model, given), want, atol=1e-5)
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"], "nothing half is left"
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] is None
    first = (tmp_path / "adapter" / "adapter_config.json").read_bytes()
    save_peft(adapter, tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_config.json").read_bytes() == first


def test_layers_of_different_rank_and_scale_keep_them(
    tmp_path: Path, tiny: Tiny, inputs: Callable[..., Any]
) -> None:
    adapter, given = random_adapter(), inputs(4)
    odd = LAYERS[5]
    adapter.down[odd], adapter.up[odd] = torch.randn(2, 16) / 4, torch.randn(16, 2) / 4
    adapter.scale[odd] = 3.0
    save_peft(adapter, tmp_path / "adapter")
    assert same(load_lora(tmp_path / "adapter"), adapter)
    want = by_formula(tiny(4), adapter, given)
    theirs = PeftModel.from_pretrained(tiny(4), str(tmp_path / "adapter"))
    assert torch.allclose(run(theirs.base_model.model, given), want, atol=1e-5)
    ours = tiny(4)
    attach_lora(ours, load_lora(tmp_path / "adapter"))
    assert torch.allclose(run(ours, given), want, atol=1e-5)


@pytest.mark.parametrize("rslora", [False, True])
def test_what_peft_writes_we_read_to_the_same_output(
    rslora: bool, tmp_path: Path, tiny: Tiny, inputs: Callable[..., Any]
) -> None:
    from peft import get_peft_model

    config = LoraConfig(
        r=4,
        lora_alpha=2,
        target_modules=[f"attn2.{t}" for t in TARGETS],
        init_lora_weights=False,
        use_rslora=rslora,
        alpha_pattern={"1.attn2.to_v": 12},
    )
    theirs = get_peft_model(tiny(4), config).eval()
    theirs.save_pretrained(str(tmp_path))
    ours = tiny(4)
    attach_lora(ours, load_lora(tmp_path))
    given = inputs(4)
    assert torch.allclose(run(ours, given), run(theirs.base_model.model, given), atol=1e-5)
    assert same(load_lora(tmp_path / "adapter_model.safetensors"), load_lora(tmp_path))


def test_what_diffusers_writes_we_read_and_back(
    tmp_path: Path, tiny: Tiny, inputs: Callable[..., Any]
) -> None:
    theirs, given = tiny(4), inputs(4)
    theirs.add_adapter(LoraConfig(r=4, lora_alpha=6, target_modules=LAYERS, init_lora_weights=False))
    theirs.save_lora_adapter(str(tmp_path))
    ours = tiny(4)
    attach_lora(ours, load_lora(tmp_path))
    assert torch.allclose(run(ours, given), run(theirs, given), atol=1e-5)
    bare = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    pipeline = {f"transformer.{name}": tensor for name, tensor in bare.items()}
    meta = {"r": 4, "lora_alpha": 6}
    for names in ({f"transformer.{k}": v for k, v in meta.items()}, meta):
        save_file(
            pipeline, tmp_path / "all.safetensors", metadata={"lora_adapter_metadata": json.dumps(names)}
        )
        assert same(load_lora(tmp_path / "all.safetensors"), load_lora(tmp_path))
    alphas = {f"transformer.{layer}.alpha": torch.tensor(6.0) for layer in LAYERS}
    save_file(pipeline | alphas, tmp_path / "alpha.safetensors")
    assert same(load_lora(tmp_path / "alpha.safetensors"), load_lora(tmp_path))


def test_the_platforms_federated_adapter_goes_to_peft_and_back(
    tmp_path: Path, tiny: Tiny, inputs: Callable[..., Any]
) -> None:
    federated, given = tiny(1), inputs(1)
    attach_drawn_lora(federated, kind="ffa-lora", rank=2, seed=7, alpha=4)
    with torch.no_grad():
        for name, parameter in federated.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn_like(parameter) / 4)
    want = run(federated, given)
    save_peft(extract_lora(federated), tmp_path / "adapter")
    plain = tiny(1)
    attach_lora(plain, load_lora(tmp_path / "adapter"))
    assert torch.allclose(run(plain, given), want, atol=1e-6)
    again = tiny(1)
    attach_as_ffa(again, load_lora(tmp_path / "adapter"), seed=7)
    held, wanted = adapter_state(again), adapter_state(federated)
    assert held.keys() == wanted.keys() and all(torch.equal(held[k], wanted[k]) for k in held)
    assert {k for k, p in again.named_parameters() if p.requires_grad} == wanted.keys()
    assert torch.equal(run(again, given), want)
    other = tiny(1)
    error = refusal(lambda: attach_as_ffa(other, load_lora(tmp_path / "adapter"), seed=8))
    assert "seed 8" in error.message
    assert not any("lora" in k for k in other.state_dict()), "a refused adapter leaves nothing behind"


def test_adapters_of_another_model_are_named(tiny: Tiny) -> None:
    adapter, model = random_adapter(), tiny(4)
    strange = LoraAdapter(
        {"unet.mid": torch.zeros(2, 16)}, {"unet.mid": torch.zeros(16, 2)}, {"unet.mid": 1.0}
    )
    assert "unet.mid" in refusal(lambda: attach_lora(model, strange)).message
    layer = LAYERS[0]
    wide = LoraAdapter({layer: torch.zeros(2, 1152)}, {layer: torch.zeros(1152, 2)}, {layer: 1.0})
    error = refusal(lambda: attach_lora(model, wide))
    assert "(1152, 1152)" in error.message and "(16, 16)" in error.message
    for act in (extract_lora, merge_lora, unmerge_lora, detach_lora):
        assert refusal(lambda act=act: act(model), PixcellError).code == "adapter-missing"
    attach_lora(model, adapter)
    assert refusal(lambda: attach_lora(model, adapter), PixcellError).code == "adapter-present"
    assert refusal(lambda: attach_as_ffa(model, adapter, seed=0), PixcellError).code == "adapter-present"
    adapter.scale[layer] = 2.0
    assert refusal(lambda: attach_as_ffa(tiny(4), adapter, seed=0), PixcellError).code == "adapter-mismatch"


def test_files_that_are_no_plain_adapter_are_named(tmp_path: Path) -> None:
    adapter, folder = random_adapter(), tmp_path / "adapter"
    assert refusal(lambda: load_lora(folder)).code == "weights-missing"
    save_peft(adapter, folder)
    config_file, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    config, whole = json.loads(config_file.read_text()), weights.read_bytes()
    for key, value in (
        ("use_dora", True),
        ("bias", "all"),
        ("peft_type", "LOHA"),
        ("modules_to_save", ["a"]),
    ):
        config_file.write_text(json.dumps(config | {key: value}))
        error = refusal(lambda: load_lora(folder))
        assert error.code == "adapter-unsupported" and key in error.message
    config_file.write_text(json.dumps(config | {"lora_alpha": "four"}))
    assert "'four'" in refusal(lambda: load_lora(folder)).message
    config_file.write_text(json.dumps(config))
    weights.write_bytes(whole[:-1])
    assert refusal(lambda: load_lora(folder)).code == "weights-truncated"
    tensors = {"x.lora_A.weight": torch.zeros(2, 4), "x.lora_B.weight": torch.zeros(4, 2)}
    save_file(tensors | {"x.lora_magnitude_vector": torch.zeros(4)}, weights)
    assert "lora_magnitude_vector" in refusal(lambda: load_lora(folder)).message
    save_file({"x.lora_A.weight": torch.zeros(2, 4), "x.lora_B.weight": torch.zeros(4, 3)}, weights)
    assert refusal(lambda: load_lora(folder)).code == "adapter-wrong-shape"
    save_file({"proj_out.weight": torch.zeros(2, 4)}, weights)
    assert refusal(lambda: load_lora(folder)).code == "adapter-missing"
    weights.unlink()
    assert refusal(lambda: load_lora(folder)).code == "weights-missing"
