"""`pixcell model encoders|embed|reconstruct`: results, files, and refusals that say what was met and expected."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from PIL import Image
from safetensors import safe_open
from typer.testing import CliRunner, Result

from pixcell_core.cli.encoder_commands import register
from pixcell_core.encoders import load_tile_encoder
from pixcell_core.encoders.image_folder import list_images, read_equal_images
from pixcell_core.starter import STARTER


def run(*arguments: object) -> Result:
    models = typer.Typer()
    register(models)
    return CliRunner().invoke(models, [str(a) for a in arguments])


def data(result: Result) -> dict[str, object]:
    assert result.exit_code == 0, result.output
    found: dict[str, object] = json.loads(result.stdout)["data"]
    return found


@pytest.fixture()
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for name in ("b.png", "a.png", "c.png"):
        small = Image.fromarray(generator.integers(0, 256, (16, 16, 3), dtype=np.uint8))
        small.resize((128, 128), Image.Resampling.BICUBIC).save(folder / name)
    return folder


def test_encoders_lists_every_name_with_what_it_needs(tiny_uni2: Path) -> None:
    result = run("encoders", "--weights", tiny_uni2.parent, "--format", "json")
    models = {(m["kind"], m["name"]): m for m in data(result)["models"]}  # type: ignore[attr-defined]
    assert models["encoder", "starter"]["present"] and models["autoencoder", "starter"]["present"]
    assert not models["autoencoder", "sd3-vae"]["present"]
    assert models["encoder", "uni2-h"]["specifications"] == [f"uni2-h:{tiny_uni2}"]
    text = run("encoders").stdout
    for (_, name), model in models.items():
        assert name in text and model["licence"] in text and model["needs"] in text


def test_embed_writes_tokens_in_the_order_of_the_names(images: Path, tmp_path: Path) -> None:
    pixels = read_equal_images(list_images(images))
    expected = load_tile_encoder("starter", tile_size=64).encode(pixels)
    common = ("embed", "--encoder", "starter", "--images", images, "--tile-size", 64, "--format", "json")
    shown = data(run(*common, "--out", tmp_path / "e.safetensors"))
    assert (shown["images"], shown["tokens"], shown["embedding_dim"]) == (3, 4, 256)
    with safe_open(tmp_path / "e.safetensors", "pt") as file:
        assert torch.equal(file.get_tensor("embeddings"), expected)
        facts = json.loads(file.metadata()["pixcell"])
    assert facts == {"encoder": "starter", "tile_size": 64, "images": ["a.png", "b.png", "c.png"]}
    data(run(*common, "--out", tmp_path / "e.npy"))
    assert np.array_equal(np.load(tmp_path / "e.npy"), expected.numpy())
    assert json.loads((tmp_path / "e.json").read_text()) == facts
    assert not list(tmp_path.glob("*.partial"))


def refused(result: Result) -> dict[str, str]:
    assert result.exit_code == 4, result.output
    assert "Traceback" not in result.output
    found: dict[str, str] = json.loads(result.stdout)
    return found


def test_embed_refuses_what_the_model_cannot_read(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "e.npy"

    def embed(*more: object, encoder: str = "second-eye", to: Path = out) -> dict[str, str]:
        return refused(
            run("embed", "--encoder", encoder, "--images", images, "--out", to, *more, "--format", "json")
        )

    other = embed("--tile-size", 128, "--for", STARTER / "transformer")
    assert other["code"] == "embedding-width" and "2864 wide, expected 256" in other["message"]
    tokens = embed("--tile-size", 64, "--for", STARTER / "transformer", encoder="starter")
    assert tokens["code"] == "embedding-tokens" and "4 tokens per image, expected 1" in tokens["message"]
    assert embed("--for", tmp_path)["code"] == "weights-missing"
    assert "128 x 128 px" in embed()["message"]
    assert embed(encoder="uni2-h")["code"] == "weights-missing"
    assert embed(to=tmp_path / "e.csv")["code"] == "out-file"
    assert not out.exists()
    out.write_text("mine")
    assert embed("--tile-size", 64)["code"] == "out-file" and out.read_text() == "mine"


def test_reconstruct_measures_each_tile_and_draws_a_sheet(images: Path, tmp_path: Path) -> None:
    sheet = tmp_path / "sheet.png"
    found = data(
        run(
            "reconstruct", "--autoencoder", "starter", "--images", images, "--out", sheet, "--format", "json",
            "--shown", 2,
        )
    )  # fmt: skip
    tiles: list[dict[str, float]] = found["tiles"]  # type: ignore[assignment]
    assert [t["image"] for t in tiles] == ["a.png", "b.png", "c.png"]
    assert all(t["psnr_db"] > 15 and 0.3 < t["ssim"] < 1 for t in tiles)
    assert found["mean_psnr_db"] == pytest.approx(np.mean([t["psnr_db"] for t in tiles]))
    with Image.open(sheet) as drawn:
        assert drawn.size == (2 * (128 + 8), 2 * (128 + 8))
        left = np.asarray(drawn)[4:132, 4:132]
    assert np.array_equal(left, np.asarray(Image.open(images / "a.png")))
    assert "PSNR" in run("reconstruct", "--autoencoder", "starter", "--images", images).stdout
    wrong = refused(
        run("reconstruct", "--autoencoder", "starter", "--images", tmp_path, "--format", "json", "--out", "x")
    )
    assert wrong["code"] == "out-file"
