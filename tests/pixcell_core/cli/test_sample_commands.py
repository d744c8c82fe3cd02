"""`pixcell model sample`: files, manifest, sheet, seeds; bad input by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from PIL import Image
from typer.testing import CliRunner, Result

from pixcell_core.cli.sample_commands import parse_size, register
from pixcell_core.errors import BadInputError
from pixcell_core.starter import load_encoder, starter_digest
from pixcell_core.training.feature_store import FeatureStoreWriter


def run(*arguments: object) -> Result:
    root = typer.Typer()
    root.callback()(lambda: None)
    register(root)
    return CliRunner().invoke(root, ["sample", *(str(argument) for argument in arguments)])


def told(result: Result) -> dict[str, Any]:
    assert result.exit_code == 0, result.output
    data: dict[str, Any] = json.loads(result.stdout)["data"]
    return data


def refused(result: Result, code: str, *words: str) -> None:
    assert result.exit_code == 4, result.output
    body = json.loads(result.stdout)
    assert body["code"] == code, body
    assert all(word in body["message"] for word in words), body


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name, shape in (("a.png", (128, 128, 3)), ("b.png", (260, 390, 3))):
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(folder / name)
    return folder


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def test_variants_of_images_with_manifest_and_sheet(pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run(
        "--images", pictures, "--out", out, "--steps", 2, "--seed", 5, "--count", 3, "--format", "json"
    )
    data = told(result)
    assert (data["images"], data["width"], data["height"], data["guidance_scale"]) == (3, 128, 128, 2.0)
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["images"][2] == {
        "file": "000003.png",
        "seed": 7,
        "condition": "a.png",
        "seam_ratio": None,
    }
    assert manifest["sampler"] == "dpm" and manifest["num_inference_steps"] == 2
    assert manifest["weights"] == {n: starter_digest(n) for n in ("transformer", "autoencoder")}
    assert sorted(p.name for p in out.iterdir()) == [
        "000001.png",
        "000002.png",
        "000003.png",
        "manifest.json",
        "sheet.png",
    ]
    assert Image.open(out / "000001.png").size == (128, 128)
    assert Image.open(out / "sheet.png").size == (3 * 132 + 4, 136)
    assert "no audit has looked at them" in result.stderr
    again = tmp_path / "again"
    options = ("--steps", 2, "--seed", 5, "--count", 3, "--batch-size", 1)
    told(run("--images", pictures, "--out", again, *options, "--format", "json"))
    for i in range(1, 4):
        name = f"{i:06d}.png"
        assert np.abs(pixels(out / name) - pixels(again / name)).max() <= 1


def test_no_condition_needs_one_call_per_step(tmp_path: Path) -> None:
    result = run(
        "--unconditional", "--out", tmp_path / "o", "--steps", 2, "--count", 2, "--sampler", "dpm-uniform"
    )
    assert result.exit_code == 0, result.output
    assert "guidance 1" in result.stdout and "dpm-uniform" in result.stdout
    assert "no audit" not in result.stderr


def test_a_large_image_from_windows(pictures: Path, tmp_path: Path) -> None:
    options = ("--size", "256x144", "--steps", 2, "--count", 2, "--sampler", "ddim", "--format", "json")
    data = told(run("--images", pictures, "--out", tmp_path / "o", *options))
    assert (data["width"], data["height"], data["windows"]) == (256, 144, 6)
    assert 0.5 < data["largest_seam_ratio"] < 1.6
    assert Image.open(tmp_path / "o" / "000002.png").size == (256, 144)


def test_every_tile_of_a_large_image_conditions_its_place(pictures: Path) -> None:
    from pixcell_core.diffusion.condition_source import from_images
    from pixcell_core.encoders import load_tile_encoder

    encoder = load_tile_encoder("starter", tile_size=128)
    source = from_images(pictures, encoder, 128, (2, 5))
    grid = source.fitted(1, (2, 5))
    image = torch.from_numpy(np.array(Image.open(pictures / "b.png"))).permute(2, 0, 1)
    model = load_encoder()
    for row in range(2):
        for column in range(5):
            y, x = 128 * row, 128 * (column % 3)
            own = model.encode(image[None, :, y : y + 128, x : x + 128])[0, 0]
            assert torch.allclose(grid[row, column], own, atol=1e-4)


def test_starting_from_an_image(pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "o"
    init = pictures / "a.png"
    options = ("--count", 1, "--steps", 10, "--format", "json", "--unconditional", "--init-image", init)
    told(run("--out", out, *options, "--strength", 0.1))
    manifest = json.loads((out / "manifest.json").read_text())
    assert (manifest["init_image"], manifest["strength"]) == ("a.png", 0.1)
    told(run("--out", tmp_path / "far", *options, "--strength", 1.0))
    near, far = (np.abs(pixels(f / "000001.png") - pixels(init)).mean() for f in (out, tmp_path / "far"))
    assert near < far


def _store(path: Path, tokens: int, width: int) -> Path:
    writer = FeatureStoreWriter(path, {"tile_size": 128})
    rows = [{"tile": f"private-{i}", "slide": "s", "x": 0, "y": 0, "level": 0, "mpp": 0.5} for i in range(3)]
    source = torch.Generator().manual_seed(0)
    writer.add(
        "patient-name",
        rows,
        pixels=torch.zeros(3, 3, 8, 8),
        embeddings=torch.randn(3, tokens, width, generator=source),
    )
    writer.close()
    return path


def test_variants_of_a_feature_store_name_nobody(tmp_path: Path) -> None:
    store = _store(tmp_path / "store", 1, 256)
    out = tmp_path / "o"
    told(run("--features", store, "--out", out, "--steps", 1, "--count", 4, "--format", "json"))
    text = (out / "manifest.json").read_text()
    assert "private" not in text and "patient" not in text
    assert [image["condition"] for image in json.loads(text)["images"]] == [
        "tile 1",
        "tile 2",
        "tile 3",
        "tile 1",
    ]
    for tokens, width, code in ((4, 256, "condition-tokens"), (1, 1536, "condition-width")):
        bad = _store(tmp_path / f"bad-{code}", tokens, width)
        refused(
            run("--features", bad, "--out", tmp_path / code, "--steps", 1, "--format", "json"),
            code,
            "256" if width != 256 else "4",
        )


def test_bad_input_is_named_before_anything_is_drawn(pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "o"
    ask = ("--out", out, "--unconditional", "--format", "json")
    refused(run("--out", out, "--format", "json"), "condition-source", "nowhere")
    refused(run(*ask, "--images", pictures), "condition-source", "--images", "--unconditional")
    refused(run(*ask, "--sampler", "plms"), "unknown-sampler", "plms")
    refused(run(*ask, "--steps", 0), "steps-out-of-range", "0")
    refused(run(*ask, "--guidance-scale", 0.5), "guidance-below-one", "0.5")
    refused(run(*ask, "--count", 0), "no-images-asked", "0")
    refused(run(*ask, "--size", "big"), "size-not-understood", "big")
    refused(run(*ask, "--size", "130x128"), "size-out-of-range", "130", "16")
    refused(run(*ask, "--size", "8192"), "size-out-of-range", "8192", "4096")
    refused(run(*ask, "--stride", 3, "--size", "256"), "window-stride", "3")
    refused(run(*ask, "--init-image", tmp_path / "none.png"), "no-such-file", "none.png")
    refused(run(*ask, "--init-image", pictures / "a.png", "--size", "256"), "init-image-size", "128", "256")
    refused(run(*ask, "--init-image", pictures / "a.png", "--strength", 0), "strength-out-of-range", "0")
    refused(run(*ask, "--init-image", pictures / "b.png"), "size-out-of-range", "390 x 260")
    refused(run(*ask, "--transformer", tmp_path), "weights-missing")
    asked = ("--out", out, "--images", pictures, "--format", "json", "--encoder")
    refused(run(*asked, "second-eye"), "condition-width", "256")
    assert not out.exists()
    out.mkdir()
    (out / "kept.txt").write_text("mine")
    refused(run(*ask), "out-not-empty", str(out))
    small = tmp_path / "small"
    small.mkdir()
    Image.new("RGB", (100, 200)).save(small / "s.png")
    refused(
        run("--images", small, "--out", tmp_path / "p", "--format", "json"),
        "image-too-small",
        "100 x 200",
        "128",
    )


@pytest.mark.parametrize(
    ("text", "size"), [("1024x768", (1024, 768)), ("512", (512, 512)), (" 16 X 32 ", (16, 32))]
)
def test_sizes(text: str, size: tuple[int, int]) -> None:
    assert parse_size(text) == size
    with pytest.raises(BadInputError):
        parse_size(text + "x")


def test_help_is_there() -> None:
    result = run("--help")
    assert result.exit_code == 0
    for word in (
        "--images",
        "--unconditional",
        "--sampler",
        "--guidance-scale",
        "--size",
        "--init-image",
        "--device",
    ):
        assert word in result.stdout
