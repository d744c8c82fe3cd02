"""`pixcell model train` on tiny data: it trains, resumes, grows a stage, crops, and names what it cannot use."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from PIL import Image
from typer.testing import CliRunner, Result

from pixcell_core.cli.train_commands import register
from pixcell_core.models import PixCellTransformer2DModel
from pixcell_core.starter.weights import load_folder, save_folder
from pixcell_core.training.feature_store import FeatureStoreWriter
from pixcell_core.training.published_layout import PublishedLayoutWriter
from pixcell_core.training.stages import new_model

CONFIG = {
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "num_layers": 1,
    "cross_attention_dim": 16,
    "sample_size": 4,
    "caption_channels": 12,
    "interpolation_scale": 0.5,
}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """Three tiles of 128 px: latents of 16 x 16, a grid of 4 x 4 tokens; a model of 32 px sees a sixteenth each."""
    writer, generator = PublishedLayoutWriter(tmp_path / "data"), torch.Generator().manual_seed(0)
    for i in range(3):
        latents = torch.cat([torch.randn(16, 16, 16, generator=generator), torch.full((16, 16, 16), 0.1)])
        writer.add(
            "some_1024", f"slide/{i}", latents=latents, embedding=torch.randn(16, 12, generator=generator)
        )
    writer.close()
    return tmp_path / "data"


def run(*arguments: object) -> Result:
    root = typer.Typer()

    @root.callback()
    def group() -> None: ...

    register(root)
    return CliRunner().invoke(root, ["train", *(str(a) for a in arguments)])


def data_of(result: Result) -> dict[str, Any]:
    assert result.exit_code == 0, result.output
    return dict(json.loads(result.stdout)["data"])


def config_file(tmp_path: Path, **changes: object) -> Path:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**CONFIG, **changes, "_class_name": "PixCellTransformer2DModel"}))
    return path


def test_it_trains_resumes_and_grows(tmp_path: Path, published: Path) -> None:
    common = [
        "--data",
        published,
        "--batch-size",
        4,
        "--device",
        "cpu",
        "--format",
        "json",
        "--warmup-steps",
        1,
    ]
    common += ["--learning-rate", 1e-3, "--checkpoint-every", 2, "--optimizer", "came"]
    whole = data_of(run(*common, "--out", tmp_path / "a", "--config", config_file(tmp_path), "--steps", 5))
    assert (whole["resolution"], whole["tiles"], whole["steps"], whole["processes"]) == (32, 48, 5, 1)
    data_of(run(*common, "--out", tmp_path / "b", "--config", config_file(tmp_path), "--steps", 2))
    rest = data_of(
        run(
            *common, "--out", tmp_path / "b", "--config", config_file(tmp_path), "--steps", 5, "--sample-every", 5,
            "--gradient-checkpointing",
        )
    )  # fmt: skip
    assert rest["digest"] == whole["digest"], "in two parts it ends the same, and so with less memory"
    rows = [json.loads(line) for line in (tmp_path / "b" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    with Image.open(tmp_path / "b" / "samples" / "sheet-00000005.png") as sheet:
        assert sheet.size == (12, 12)
    grown = data_of(
        run(
            *common, "--out", tmp_path / "c", "--from-stage", tmp_path / "a" / "transformer", "--resolution", 64,
            "--steps", 1, "--accumulate", 2, "--precision", "bf16",
        )
    )  # fmt: skip
    assert (grown["resolution"], grown["tiles"]) == (64, 12)
    model = load_folder(PixCellTransformer2DModel, tmp_path / "c" / "transformer")
    assert (model.config["caption_num_tokens"], model.config["interpolation_scale"]) == (4, 1.0)
    text = run(*common[:-4], "--out", tmp_path / "a", "--config", config_file(tmp_path), "--steps", 5)
    assert text.exit_code == 4 and "optimizer came there, adamw here" in text.stderr
    start = ["--from-stage", tmp_path / "a" / "transformer", "--resolution", 32]
    other = run(*common, "--out", tmp_path / "a", *start, "--steps", 9)
    assert other.exit_code == 4
    assert json.loads(other.stdout)["code"] == "start-differs" and "--config" in other.stderr


def test_it_trains_on_a_feature_store_with_the_scaling_it_names(tmp_path: Path) -> None:
    meta = {"shift_factor": 0.5, "scaling_factor": 2.0}
    writer = FeatureStoreWriter(tmp_path / "store", meta)
    rows = [{"tile": f"t{i}", "slide": "s", "x": 0, "y": 0, "level": 0} for i in range(3)]
    writer.add(
        "p",
        rows,
        pixels=torch.zeros(3, 3, 32, 32),
        latents=torch.randn(3, 32, 4, 4),
        embeddings=torch.randn(3, 1, 12),
    )
    writer.close()
    save_folder(new_model(CONFIG, 0), tmp_path / "base")
    result = run(
        "--data", tmp_path / "store", "--init", tmp_path / "base", "--out", tmp_path / "o", "--steps", 2
    )
    assert result.exit_code == 0, result.output
    assert "2 steps on 3 tiles of 32 px" in result.stdout


def test_a_tile_that_cannot_be_read_is_said_once_and_counted(tmp_path: Path, published: Path) -> None:
    (published / "features" / "slide" / "1_uni.npy").unlink()
    common = ["--data", published, "--config", config_file(tmp_path), "--out", tmp_path / "o", "--steps", 3]
    result = run(*common, "--batch-size", 16, "--format", "json")
    assert data_of(result)["replaced_tiles"] == 16, "an epoch of 48 crops holds 16 of the missing tile"
    assert result.stderr.count("slide/1 cannot be read") == 1


@pytest.mark.parametrize(
    ("options", "code"),
    [
        (["--resolution", "64"], "resolution-differs"),
        (["--init", "nowhere"], "two-starts"),
        (["--optimizer", "sgd"], "bad-training-setting"),
        (["--precision", "fp8"], "bad-training-setting"),
        (["--learning-rate", "0"], "bad-training-setting"),
        (["--device", "tpu"], "device-unknown"),
        (["--data", "nowhere"], "no-such-folder"),
    ],
)
def test_what_cannot_be_used_is_named(tmp_path: Path, published: Path, options: list[str], code: str) -> None:
    result = run(
        "--data", published, "--config", config_file(tmp_path), "--out", tmp_path / "o", "--format", "json", *options
    )  # fmt: skip
    assert result.exit_code == 4, result.output
    assert json.loads(result.stdout)["code"] == code
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"caption_channels": 16}, "embedding-width-differs"),
        ({"caption_num_tokens": 4}, "token-count-differs"),
        ({"in_channels": 8, "out_channels": 16}, "latent-channels-differ"),
        ({"sample_size": 6}, "resolution-differs"),
        ({"sample_size": 32}, "resolution-differs"),
    ],
)
def test_data_that_do_not_fit_the_model_are_named(
    tmp_path: Path, published: Path, changes: dict[str, int], code: str
) -> None:
    path = config_file(tmp_path, **changes)
    result = run("--data", published, "--config", path, "--out", tmp_path / "o", "--format", "json")
    assert result.exit_code == 4, result.output
    assert json.loads(result.stdout)["code"] == code
