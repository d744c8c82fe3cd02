"""Published folders: loaded as they lie, costing no copy; patient with configurations, strict with tensors."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, PixArtTransformer2DModel
from safetensors.torch import load_file, save_file
from torch import nn

from pixcell_core.checkpoints.folders import (
    build_empty,
    fill,
    load_autoencoder_folder,
    load_model_folder,
    load_pipeline,
    load_scheduler_folder,
    load_transformer_folder,
)
from pixcell_core.diffusion import PixCellPipeline
from pixcell_core.errors import BadInputError
from pixcell_core.models import PixCellTransformer2DModel
from pixcell_core.starter import load_transformer
from pixcell_core.starter.weights import STARTER, save_folder

WEIGHTS = "diffusion_pytorch_model.safetensors"
Tiny = Callable[..., PixCellTransformer2DModel]
Write = Callable[..., Path]


def same(one: PixCellTransformer2DModel, other: PixCellTransformer2DModel) -> bool:
    """Whether every tensor and every fixed table is equal."""
    a, b = one.state_dict(), other.state_dict()
    return (
        a.keys() == b.keys()
        and all(torch.equal(a[k], b[k]) for k in a)
        and torch.equal(one.pos_embed.pos_embed, other.pos_embed.pos_embed)
    )


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("tokens", [1, 16])
def test_a_published_folder_loads_as_it_lies(
    tokens: int, shards: int, tmp_path: Path, tiny: Tiny, write_folder: Write, inputs: Callable[..., Any]
) -> None:
    model = tiny(tokens)
    folder = write_folder(tmp_path / "transformer", model, shards=shards)
    again = load_transformer_folder(folder)
    assert same(again, model) and not again.training
    assert {k for k, _ in again.named_parameters()} == {k for k, _ in model.named_parameters()}
    assert {k for k, _ in again.named_buffers()} == {k for k, _ in model.named_buffers()}
    assert all(isinstance(p, nn.Parameter) and p.requires_grad for p in again.parameters())
    x, c, t = inputs(tokens)
    with torch.no_grad():
        assert torch.equal(again(x, c, t, return_dict=False)[0], model(x, c, t, return_dict=False)[0])


def test_stock_diffusers_reads_the_same_folder_to_the_same_output(
    tmp_path: Path, tiny: Tiny, write_folder: Write, inputs: Callable[..., Any]
) -> None:
    folder = write_folder(tmp_path, tiny(1))
    ours = load_transformer_folder(folder)
    stock = PixArtTransformer2DModel.from_pretrained(str(folder), low_cpu_mem_usage=False).eval()
    x, c, t = inputs(1)
    with torch.no_grad():
        want = stock(x, encoder_hidden_states=c, timestep=t).sample
        assert torch.allclose(ours(x, c, t, return_dict=False)[0], want, atol=1e-6)


def test_weights_are_mapped_not_copied_and_writing_to_them_leaves_the_file(
    tmp_path: Path, tiny: Tiny, write_folder: Write
) -> None:
    folder = write_folder(tmp_path, tiny(1))
    before = (folder / WEIGHTS).read_bytes()
    model = load_transformer_folder(folder)
    storages = {p.untyped_storage().data_ptr() for p in model.parameters()}
    mapped = [line for line in Path("/proc/self/maps").read_text().splitlines() if str(folder) in line]
    spans = [[int(x, 16) for x in line.split()[0].split("-")] for line in mapped]
    assert storages and all(any(a <= s < b for a, b in spans) for s in storages)
    with torch.no_grad():
        model.proj_out.weight.add_(1.0)
    assert (folder / WEIGHTS).read_bytes() == before


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_type_of_the_weights_is_the_files_or_the_wanted_one(
    dtype: torch.dtype, tmp_path: Path, tiny: Tiny, write_folder: Write
) -> None:
    folder = write_folder(tmp_path, tiny(16), dtype=torch.float16)
    model = load_transformer_folder(folder, dtype=dtype)
    held = load_file(folder / WEIGHTS)
    assert all(torch.equal(t, held[k].to(dtype)) for k, t in model.state_dict().items())
    kept = load_transformer_folder(folder)
    assert {t.dtype for t in kept.state_dict().values()} == {torch.float16}


def test_tables_no_file_holds_are_laid_even_where_the_model_left_them_empty(
    tiny: Tiny, published_config: Callable[..., dict[str, Any]]
) -> None:
    want, config = tiny(16), published_config(16)
    empty = build_empty(PixCellTransformer2DModel, config, "test")
    assert all(p.is_meta for p in empty.parameters())
    empty.pos_embed.pos_embed = empty.pos_embed.pos_embed.to("meta")
    filled = fill(empty, want.state_dict(), config, "test")
    assert same(filled, want) and "pos_embed.pos_embed" not in filled.state_dict()


def test_folders_written_by_the_platform_and_the_starter_load_too(tmp_path: Path, tiny: Tiny) -> None:
    model = tiny(4)
    save_folder(model, tmp_path / "saved")
    assert same(load_transformer_folder(tmp_path / "saved"), model)
    starter = load_transformer_folder(STARTER / "transformer", dtype=torch.float32)
    assert same(starter, load_transformer())


def test_a_folder_can_be_saved_over_the_file_it_was_loaded_from(tmp_path: Path, tiny: Tiny) -> None:
    save_folder(tiny(4), tmp_path / "m")
    model = load_transformer_folder(tmp_path / "m")
    with torch.no_grad():
        model.proj_out.bias.add_(1.0)
    save_folder(model, tmp_path / "m")
    assert same(load_transformer_folder(tmp_path / "m"), model)
    assert torch.equal(model.proj_out.bias, tiny(4).proj_out.bias + 1.0)


def refusal(act: Callable[[], object]) -> BadInputError:
    """The error `act` must raise; every one has advice."""
    with pytest.raises(BadInputError) as refused:
        act()
    assert refused.value.hint
    return refused.value


def test_tensors_missing_left_over_or_mis_shaped_are_named(
    tmp_path: Path, tiny: Tiny, write_folder: Write
) -> None:
    folder = write_folder(tmp_path, tiny(1))
    held = load_file(folder / WEIGHTS)
    null, bias = "caption_projection.uncond_embedding", "proj_out.bias"

    def after(change: Callable[[dict[str, torch.Tensor]], object]) -> BadInputError:
        changed = dict(held)
        change(changed)
        save_file(changed, folder / WEIGHTS)
        return refusal(lambda: load_transformer_folder(folder))

    missing = after(lambda s: (s.pop(null), s.pop(bias)))
    assert missing.code == "checkpoint-missing-keys" and null in missing.message and bias in missing.message
    assert "2 of" in missing.message
    extra = after(lambda s: s.update({"cond_pos_embed.proj.bias": torch.zeros(2)}))
    assert extra.code == "checkpoint-extra-keys" and "cond_pos_embed.proj.bias" in extra.message
    shape = after(lambda s: s.update({null: torch.zeros(16, 12)}))
    assert shape.code == "checkpoint-wrong-shape"
    assert null in shape.message and "(16, 12)" in shape.message and "(1, 12)" in shape.message


def test_a_stage_that_is_not_the_weights_is_named(tmp_path: Path, tiny: Tiny, write_folder: Write) -> None:
    folder = write_folder(tmp_path, tiny(1), caption_num_tokens=16)
    assert "y_pos_embed.y_pos_embed" in refusal(lambda: load_transformer_folder(folder)).message
    write_folder(tmp_path, tiny(1), num_layers=3)
    assert "transformer_blocks.2." in refusal(lambda: load_transformer_folder(folder)).message
    write_folder(tmp_path, tiny(1), caption_channels=24)
    assert refusal(lambda: load_transformer_folder(folder)).code == "checkpoint-wrong-shape"


def test_files_cut_off_at_any_place_are_named(tmp_path: Path, tiny: Tiny, write_folder: Write) -> None:
    folder = write_folder(tmp_path, tiny(1))
    path = folder / WEIGHTS
    whole = path.read_bytes()
    for size in (len(whole) - 1, len(whole) // 2, 4000, 100):
        path.write_bytes(whole[:size])
        error = refusal(lambda: load_transformer_folder(folder))
        assert error.code == "weights-truncated" and str(size) in error.message, size
    nested = (100_000).to_bytes(8, "little") + b"[" * 100_000
    for content in (b"", b"abc", b"\xff" * 4000, b"\x02" + b"\0" * 7 + b"[]", nested, whole + b"more"):
        path.write_bytes(content)
        assert refusal(lambda: load_transformer_folder(folder)).code == "weights-damaged"


def test_configurations_that_cannot_be_used_are_named(
    tmp_path: Path, tiny: Tiny, write_folder: Write
) -> None:
    folder = write_folder(tmp_path, tiny(1))
    path = folder / "config.json"
    whole = json.loads(path.read_text())

    def after(content: str) -> BadInputError:
        path.write_text(content)
        return refusal(lambda: load_transformer_folder(folder))

    assert after("{").code == after("[1]").code == "weights-damaged"
    for key in ("sample_size", "interpolation_scale", "num_attention_heads", "attention_head_dim"):
        error = after(json.dumps({k: v for k, v in whole.items() if k != key}))
        assert error.code == "bad-configuration" and key in error.message
    assert after(json.dumps(whole | {"use_additional_conditions": True})).code == "bad-configuration"
    for key, value in (("num_layers", "two"), ("sample_size", 10**6), ("num_attention_heads", 0)):
        error = after(json.dumps(whole | {key: value}))
        assert error.code == "bad-configuration" and key in error.message and repr(value) in error.message
    assert after(json.dumps(whole | {"activation_fn": "unheard"})).code == "bad-configuration"
    assert after("[" * 100_000).code == "weights-damaged"
    assert after(json.dumps(whole | {"caption_num_tokens": 5})).code == "bad-configuration"
    other = after(json.dumps(whole | {"_class_name": "AutoencoderKL"}))
    assert other.code == "weights-of-another-model" and "AutoencoderKL" in other.message
    path.unlink()
    assert refusal(lambda: load_transformer_folder(folder)).code == "weights-missing"
    assert refusal(lambda: load_transformer_folder(tmp_path / "nowhere")).code == "weights-missing"


def test_folders_without_their_files_are_named(tmp_path: Path, tiny: Tiny, write_folder: Write) -> None:
    folder = write_folder(tmp_path / "sharded", tiny(1), shards=3)
    index = folder / f"{WEIGHTS}.index.json"
    shard = sorted(folder.glob("*.safetensors"))[1]
    kept, content = shard.read_bytes(), json.loads(index.read_text())
    shard.unlink()
    gone = refusal(lambda: load_transformer_folder(folder))
    assert gone.code == "weights-missing" and shard.name in gone.message
    shard.write_bytes(kept)
    name = next(k for k, v in content["weight_map"].items() if v == shard.name)
    content["weight_map"][name] = "../" + shard.name
    index.write_text(json.dumps(content))
    assert "outside" in refusal(lambda: load_transformer_folder(folder)).message
    del content["weight_map"][name]
    index.write_text(json.dumps(content))
    assert name in refusal(lambda: load_transformer_folder(folder)).message
    index.write_text("{}")
    assert refusal(lambda: load_transformer_folder(folder)).code == "weights-damaged"
    index.unlink()
    assert "3 safetensors" in refusal(lambda: load_transformer_folder(folder)).message
    pickled = write_folder(tmp_path / "pickled", tiny(1))
    (pickled / WEIGHTS).rename(pickled / "diffusion_pytorch_model.bin")
    assert "diffusion_pytorch_model.bin" in refusal(lambda: load_transformer_folder(pickled)).message


def write_pipeline(folder: Path, model: PixCellTransformer2DModel, write_folder: Write) -> AutoencoderKL:
    """A whole pipeline as published: model_index.json, transformer/, vae/, scheduler/."""
    write_folder(folder / "transformer", model)
    torch.manual_seed(5)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    vae = AutoencoderKL(
        **blocks,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=4,
        scaling_factor=1.5305,
        shift_factor=0.0609,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).eval()
    vae.save_pretrained(str(folder / "vae"))
    (folder / "scheduler").mkdir()
    scheduler = {
        "_class_name": "DPMSolverMultistepScheduler",
        "_diffusers_version": "0.32.2",
        "algorithm_type": "dpmsolver++",
        "beta_start": 0.0001,
        "beta_end": 0.02,
        "beta_schedule": "linear",
        "solver_order": 2,
    }
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    index = {
        "_class_name": ["pixcell", "PixCellPipeline"],
        "_diffusers_version": "0.32.2",
        "transformer": ["pixcell_transformer_2d", "PixCellTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", "DPMSolverMultistepScheduler"],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    return vae


def test_a_whole_pipeline_loads_with_its_scale_and_shift(
    tmp_path: Path, tiny: Tiny, write_folder: Write
) -> None:
    model = tiny(4)
    vae = write_pipeline(tmp_path, model, write_folder)
    pipeline = load_pipeline(tmp_path)
    assert same(pipeline.transformer, model) and same(load_transformer_folder(tmp_path), model)
    assert (pipeline.vae.config["scaling_factor"], pipeline.vae.config["shift_factor"]) == (1.5305, 0.0609)
    latents = torch.randn(1, 16, 4, 4)
    with torch.no_grad():
        assert torch.equal(pipeline.vae.decode(latents).sample, vae.decode(latents).sample)
    assert type(pipeline.scheduler).__name__ == "DPMSolverMultistepScheduler"
    assert pipeline.scheduler.config["beta_end"] == 0.02
    half = load_pipeline(tmp_path, dtype=torch.float16)
    assert half.transformer.dtype == half.vae.dtype == torch.float16


def test_parts_of_a_pipeline_that_cannot_be_used_are_named(
    tmp_path: Path, tiny: Tiny, write_folder: Write
) -> None:
    folder = tmp_path / "pipeline"
    write_pipeline(folder, tiny(1), write_folder)
    scheduler = folder / "scheduler" / "scheduler_config.json"
    scheduler.write_text(json.dumps({"_class_name": "MagicScheduler"}))
    error = refusal(lambda: load_pipeline(folder))
    assert error.code == "unknown-scheduler" and "MagicScheduler" in error.message
    scheduler.write_text(json.dumps({"_class_name": "DDIMScheduler", "beta_schedule": "unheard"}))
    assert refusal(lambda: load_scheduler_folder(folder / "scheduler")).code == "bad-configuration"
    config = folder / "vae" / "config.json"
    whole = json.loads(config.read_text())
    config.write_text(json.dumps(whole | {"shift_factor": None}))
    error = refusal(lambda: load_pipeline(folder))
    assert "shift_factor" in error.message and "0.0609" in error.hint
    config.write_text(json.dumps(whole | {"_class_name": "VQModel"}))
    assert "VQModel" in refusal(lambda: load_pipeline(folder)).message
    (folder / "vae").rename(tmp_path / "elsewhere")
    assert "vae/" in refusal(lambda: load_pipeline(folder)).message
    scheduler.write_text(json.dumps({"_class_name": "DDIMScheduler"}))
    config = tmp_path / "elsewhere" / "config.json"
    config.write_text(json.dumps(whole))
    assert load_pipeline(folder, vae=tmp_path / "elsewhere").vae.config["shift_factor"] == 0.0609


def test_other_autoencoders_load_too(tmp_path: Path) -> None:
    taesd = AutoencoderTiny(
        latent_channels=16,
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    ).eval()
    taesd.save_pretrained(str(tmp_path))
    again = load_autoencoder_folder(tmp_path)
    latents = torch.randn(1, 16, 4, 4)
    with torch.no_grad():
        assert torch.equal(again.decode(latents).sample, taesd.decode(latents).sample)
    starter = load_autoencoder_folder(STARTER / "autoencoder", dtype=torch.float32)
    assert type(starter).__name__ == "TileAutoencoder"
    assert refusal(lambda: load_model_folder(AutoencoderKL, tmp_path)).code == "weights-of-another-model"


def test_the_published_call_loads_a_pipeline_by_changing_an_import(
    tmp_path: Path, tiny: Tiny, write_folder: Write
) -> None:
    vae = write_pipeline(tmp_path / "pixcell", tiny(16), write_folder)
    shutil.rmtree(tmp_path / "pixcell" / "vae")
    pipeline = PixCellPipeline.from_pretrained(
        str(tmp_path / "pixcell"), vae=vae, custom_pipeline="published", trust_remote_code=True
    )
    assert pipeline.vae is vae
    null = pipeline.get_unconditional_embedding(2)
    drawn = pipeline(
        uni_embeds=torch.randn(null.shape),
        negative_uni_embeds=null,
        guidance_scale=1.2,
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(0),
    )
    assert len(drawn.images) == 2
    assert "Download" in refusal(lambda: PixCellPipeline.from_pretrained("someone/a-model")).hint
