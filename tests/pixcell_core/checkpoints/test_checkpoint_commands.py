"""`pixcell model info` and `convert`: what a newcomer sees of every kind of file, and what a wrong one is called."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

from pixcell_core.checkpoints.folders import load_transformer_folder
from pixcell_core.checkpoints.inspection import content_digest
from pixcell_core.checkpoints.lora import LoraAdapter, save_peft
from pixcell_core.cli.checkpoint_commands import register
from pixcell_core.models import PixCellTransformer2DModel
from pixcell_core.starter import starter_digest
from pixcell_core.starter.weights import STARTER

WEIGHTS = "diffusion_pytorch_model.safetensors"


def run(*arguments: object) -> Result:
    models = typer.Typer()
    register(models)
    return CliRunner().invoke(models, [str(argument) for argument in arguments])


def described(path: Path, *arguments: object) -> dict[str, Any]:
    """The JSON result of `info`."""
    result = run("info", path, *arguments, "--format", "json")
    assert result.exit_code == 0, result.output
    data: dict[str, Any] = json.loads(result.stdout)["data"]
    return data


def test_info_of_a_published_folder(
    tmp_path: Path, tiny: Callable[..., Any], write_folder: Callable[..., Path]
) -> None:
    model = tiny(16)
    folder = write_folder(tmp_path / "PixCell", model, dtype=torch.float16)
    found = described(folder)
    assert found["kind"] == "transformer folder (Diffusers form)" and found["problems"] == []
    assert found["parameters"] == sum(p.numel() for p in model.parameters())
    assert (found["dtypes"], found["stage"], found["condition_tokens"]) == (["float16"], 128, 16)
    null = model.caption_projection.uncond_embedding.half().float().norm(dim=-1).mean()
    assert found["null_embedding_norm"] == pytest.approx(float(null), rel=1e-5)
    assert found["digest"] == content_digest(folder)
    assert "only_cross_attention" in found["ignored_config_keys"]
    assert found["config"]["interpolation_scale"] == 0.5
    text = run("info", folder).stdout
    assert "128 px" in text and "float16" in text and "mean norm" in text and found["digest"] in text


def test_info_says_what_is_missing(
    tmp_path: Path, tiny: Callable[..., Any], write_folder: Callable[..., Path]
) -> None:
    folder = write_folder(tmp_path, tiny(1))
    state = load_file(folder / WEIGHTS)
    state.pop("caption_projection.uncond_embedding")
    save_file(state, folder / WEIGHTS)
    found = described(folder)
    assert "caption_projection.uncond_embedding" in found["problems"][0]
    assert found["null_embedding_norm"] is None
    text = run("info", folder).stdout
    assert "PROBLEM" in text and text.rstrip().endswith("no")
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-5])
    cut = run("info", folder, "--format", "json")
    assert cut.exit_code == 4 and json.loads(cut.stdout)["code"] == "weights-truncated"


def test_info_sees_broken_numbers_and_a_table_of_another_stage(
    tmp_path: Path, tiny: Callable[..., Any], write_folder: Callable[..., Path]
) -> None:
    model = tiny(4)
    model.proj_out.bias.data[3] = float("nan")
    found = described(write_folder(tmp_path, model))
    assert "NaN" in found["problems"][0] and "proj_out.bias" in found["problems"][0] and not found["notes"]
    # The published class lays this table at scale 2 whatever the stage; weights that learned it so are kept so.
    found = described(write_folder(tmp_path, tiny(4), interpolation_scale=1.0))
    assert found["problems"] == [] and "condition table" in found["notes"][0]


def test_info_of_the_starter_has_the_starters_digest() -> None:
    for kind in ("transformer", "autoencoder"):
        found = described(STARTER / kind)
        assert found["digest"] == starter_digest(kind) and found["problems"] == []
    assert "TileAutoencoder" in found["kind"]


def test_info_of_original_and_training_files(
    tmp_path: Path, original_state: Callable[..., dict[str, torch.Tensor]]
) -> None:
    state = original_state(16)
    released = tmp_path / "pixcell_1024.ckpt"
    torch.save({"state_dict": state}, released)
    found = described(released, "--head-dim", 8)
    assert found["kind"] == "original checkpoint (original form)" and found["problems"] == []
    assert (found["stage"], found["condition_tokens"]) == (128, 16)
    buffers = ("pos_embed", "y_pos_embed", "y_embedder.y_embedding")
    assert found["parameters"] == sum(t.numel() for k, t in state.items() if k not in buffers)
    assert "72" in described(released)["problems"][0], "the tiny width is no multiple of 72"
    training = tmp_path / "epoch_2_step_500.pth"
    torch.save({"state_dict": state, "state_dict_ema": state, "epoch": 2}, training)
    found = described(training, "--head-dim", 8)
    assert found["kind"].startswith("training") and "epoch 2, step 500" in found["notes"]
    torch.save({"state_dict": state, "state_dict_ema": {k: v * 0.5 for k, v in state.items()}}, training)
    found = described(training, "--head-dim", 8)
    assert any("another null embedding" in note for note in found["notes"])
    del state["blocks.0.attn.qkv.bias"]
    torch.save({"state_dict": state}, released)
    assert "blocks.0.attn.qkv.bias" in described(released, "--head-dim", 8)["problems"][0]


def test_info_of_adapters_pipelines_and_bare_tensors(
    tmp_path: Path, tiny: Callable[..., Any], write_folder: Callable[..., Path]
) -> None:
    layer = "transformer_blocks.0.attn2.to_q"
    adapter = LoraAdapter({layer: torch.ones(4, 16)}, {layer: torch.ones(16, 4)}, {layer: 0.5})
    save_peft(adapter, tmp_path / "adapter")
    found = described(tmp_path / "adapter")
    assert found["kind"] == "LoRA folder (peft form)" and found["parameters"] == 128
    assert found["config"] == {"layers": 1, "ranks": [4], "scales": [0.5], "targets": ["attn2.to_q"]}
    folder = tmp_path / "pipeline"
    model = tiny(4)
    write_folder(folder / "transformer", model)
    (folder / "model_index.json").write_text("{}")
    found = described(folder)
    assert found["kind"] == "pipeline folder" and found["stage"] == 128
    assert any("scheduler" in p for p in found["problems"]) and any("vae" in n for n in found["notes"])
    bare = described(folder / "transformer" / WEIGHTS)
    assert "without a configuration" in bare["kind"] and "config.json" in bare["problems"][0]
    state = dict(model.state_dict())
    state[f"{layer}.base_layer.weight"] = state.pop(f"{layer}.weight")
    state |= {f"{layer}.lora_A.default.weight": adapter.down[layer]}
    state |= {f"{layer}.lora_B.default.weight": adapter.up[layer]}
    torch.save(state, tmp_path / "her2_lora.pth")
    assert described(tmp_path / "her2_lora.pth")["kind"] == "LoRA (whole adapted state dict)"


def test_convert_there_and_back_is_the_same_bits(
    tmp_path: Path,
    original_state: Callable[..., dict[str, torch.Tensor]],
    inputs: Callable[..., Any],
) -> None:
    state, source = original_state(16), tmp_path / "pixcell_1024.ckpt"
    torch.save({"state_dict": state}, source)
    folder, back = tmp_path / "diffusers", tmp_path / "back.ckpt"
    result = run("convert", source, folder, "--to", "diffusers", "--head-dim", 8, "--format", "json")
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)["data"]
    assert (data["stage"], data["condition_tokens"], data["dtype"]) == (128, 16, "float32")
    assert data["digest"] == content_digest(folder)
    theirs = PixCellTransformer2DModel.from_pretrained(str(folder), low_cpu_mem_usage=False).eval()
    x, c, t = inputs(16)
    with torch.no_grad():
        ours = load_transformer_folder(folder)(x, c, t, return_dict=False)[0]
        assert torch.equal(ours, theirs(x, c, t, return_dict=False)[0])
    text = run("convert", folder, back, "--to", "original")
    assert text.exit_code == 0 and "128 px" in text.stdout, text.output
    again = torch.load(back, weights_only=True)["state_dict"]
    assert again.keys() == state.keys()
    assert all(torch.equal(again[k], state[k]) for k in state if k != "pos_embed")
    half = run("convert", folder, tmp_path / "half", "--to", "diffusers", "--dtype", "float16")
    assert half.exit_code == 0 and "float16" in half.stdout
    held = load_file(tmp_path / "half" / WEIGHTS)
    assert {v.dtype for v in held.values()} == {torch.float16}
    assert "/" not in json.loads((folder / "config.json").read_text()).get("_name_or_path", "")


def test_convert_takes_the_average_or_the_plain_weights(
    tmp_path: Path, original_state: Callable[..., dict[str, torch.Tensor]]
) -> None:
    state = original_state(1)
    average = {k: v * 0.5 for k, v in state.items() if k != "pos_embed"}
    source = tmp_path / "epoch_1_step_10.pth"
    torch.save({"state_dict": state, "state_dict_ema": average}, source)
    for flag, factor in ((None, 0.5), ("--ema", 0.5), ("--no-ema", 1.0)):
        out = tmp_path / f"out{flag}"
        options = ["--to", "diffusers", "--head-dim", 8, *([flag] if flag else [])]
        assert run("convert", source, out, *options).exit_code == 0
        held = load_file(out / WEIGHTS)["proj_out.bias"]
        assert torch.equal(held, state["final_layer.linear.bias"] * factor)


def test_convert_refuses_what_would_be_lost_or_cannot_be_used(
    tmp_path: Path, tiny: Callable[..., Any], write_folder: Callable[..., Path]
) -> None:
    folder = write_folder(tmp_path / "source", tiny(1))

    def code(*arguments: object) -> str:
        result = run("convert", *arguments, "--format", "json")
        assert result.exit_code == 4 and "Traceback" not in result.stderr, result.output
        error: str = json.loads(result.stdout)["code"]
        return error

    assert code(folder, folder, "--to", "diffusers") == "output-exists"
    assert code(folder, tmp_path / "out", "--to", "original") == "bad-input"
    assert code(folder, tmp_path / "out", "--to", "diffusers", "--ema") == "bad-input"
    assert code(tmp_path / "nowhere", tmp_path / "out", "--to", "diffusers") == "weights-missing"
    assert code(folder / WEIGHTS, tmp_path / "out", "--to", "diffusers") == "checkpoint-missing-keys"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]
    assert run("info", tmp_path / "nowhere").exit_code == 4
    assert run("info", tmp_path).exit_code == 4


def test_a_disk_that_refuses_is_no_bug_and_leaves_nothing(
    tmp_path: Path,
    tiny: Callable[..., Any],
    write_folder: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from pixcell_core.checkpoints import conversion

    folder = write_folder(tmp_path / "source", tiny(1))

    def full(model: object, path: Path) -> None:
        path.with_name(path.name + ".partial").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(conversion, "save_original", full)
    result = run("convert", folder, tmp_path / "out.ckpt", "--to", "original", "--format", "json")
    assert result.exit_code == 1 and json.loads(result.stdout)["code"] == "write-failed"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]


def test_help_is_for_a_newcomer_and_imports_nothing_heavy() -> None:
    for name in ("info", "convert"):
        result = run(name, "--help")
        assert result.exit_code == 0 and "Example" in result.stdout
    script = "import sys, pixcell_core.cli.checkpoint_commands; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
