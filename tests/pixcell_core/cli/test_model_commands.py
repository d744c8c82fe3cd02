"""`pixcell model`: the shipped weights by name, size and digest; no training on a folder that is not there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from pixcell_core.cli.model_commands import register
from pixcell_core.starter import load_transformer, starter_digest


def run(*arguments: object) -> Result:
    root = typer.Typer()
    register(root)
    return CliRunner().invoke(root, [str(argument) for argument in arguments])


def test_show_names_every_shipped_model_with_its_digest() -> None:
    result = run("model", "show", "--format", "json")
    assert result.exit_code == 0, result.output
    models = {m["name"]: m for m in json.loads(result.stdout)["data"]["models"]}
    assert set(models) == {"autoencoder", "encoder", "transformer"}
    assert all(m["digest"] == starter_digest(name) for name, m in models.items())
    assert models["transformer"]["parameters"] == sum(p.numel() for p in load_transformer().parameters())
    text = run("model", "show").stdout
    assert all(name in text and m["digest"] in text for name, m in models.items())


def test_training_on_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run("model", "train-starter", "--data", tmp_path / "nowhere", "--out", out, "--format", "json")
    assert result.exit_code == 4
    assert json.loads(result.stdout)["code"] == "no-such-folder"
    assert not out.exists()


def test_a_folder_without_real_tiles_is_said_aloud(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pixcell_core.starter.recipe import run as recipe

    monkeypatch.setattr(recipe, "train_starter_models", lambda asked: {"drawn": asked.drawn})
    result = run("model", "train-starter", "--data", tmp_path, "--out", tmp_path / "out", "--drawn", 3)
    assert result.exit_code == 0
    assert "drawn tissue alone" in result.stderr and '"drawn": 3' in result.stdout
