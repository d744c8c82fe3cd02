"""`pixcell model evaluate` and `pixcell model study`: output, charts, exit codes, help."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import typer
from PIL import Image
from typer.testing import CliRunner, Result

from pixcell_core.cli.evaluate_commands import register


def run(*arguments: object) -> Result:
    models = typer.Typer()
    register(models)
    return CliRunner(env={"COLUMNS": "160"}).invoke(models, [str(a) for a in arguments])


@pytest.fixture
def sets(tmp_path: Path) -> tuple[Path, Path]:
    """Features of 8 patients, and surrogates near them."""
    rng = np.random.default_rng(0)
    patients = [f"p{i // 6}" for i in range(48)]
    labels = [("tumour", "normal")[int(p[1:]) % 2] for p in patients]
    features = rng.normal(size=(48, 5)) + np.array([[2.0 if x == "tumour" else -2.0] for x in labels])
    names = [f"t{i}" for i in range(48)]
    for name, moved in (("real", features), ("synthetic", features + rng.normal(size=features.shape) * 0.2)):
        np.savez(
            tmp_path / f"{name}.npz",
            features=moved,
            patients=patients,
            labels=labels,
            names=names,
            encoder="starter",
        )
    return tmp_path / "real.npz", tmp_path / "synthetic.npz"


def test_evaluate_prints_a_table_an_envelope_and_a_chart(sets: tuple[Path, Path], tmp_path: Path) -> None:
    real, made = sets
    arguments = ("evaluate", "--real", real, "--synthetic", made, "--metrics", "all", "--bootstrap", 30)
    chart = tmp_path / "chart.svg"
    text = run(*arguments, "--chart", chart)
    assert text.exit_code == 0, text.output
    assert "Frechet distance (encoder: starter)" in text.stdout and "Cosine of pairs" in text.stdout
    assert "FID" not in text.stdout and chart.read_text().count('class="interval"') == 5
    body = json.loads(run(*arguments, "--format", "json").stdout)
    rows = {row["metric"]: row for row in body["data"]["rows"]}
    assert body["status"] == "ok" and body["data"]["patients"] == 8 and len(rows) == 10
    assert rows["similarity"]["low"] <= rows["similarity"]["value"] <= rows["similarity"]["high"]
    assert rows["frechet"]["direction"] == "lower is better" and rows["frechet"]["warnings"]


@pytest.mark.parametrize("study", ["augmentation", "replacement"])
def test_studies_print_scores_differences_and_a_chart(
    study: str, sets: tuple[Path, Path], tmp_path: Path
) -> None:
    chart = tmp_path / "chart.svg"
    arguments = ("study", study, "--real", sets[0], "--synthetic", sets[1], "--repeats", 2, "--bootstrap", 50)
    text = run(*arguments, "--chart", chart)
    assert text.exit_code == 0, text.output
    assert "linear probe" in text.stdout and "held-out patients" in text.stdout and chart.is_file()
    data = json.loads(run(*arguments, "--format", "json").stdout)["data"]
    assert data["study"] == study and data["settings"]["repeats"] == 2 and len(data["differences"]) == 2
    assert data == json.loads(run(*arguments, "--format", "json").stdout)["data"], "a seed repeats"


def test_a_study_that_could_leak_is_refused_with_1(sets: tuple[Path, Path], tmp_path: Path) -> None:
    table = tmp_path / "unknown.csv"
    table.write_text("file,label\n" + "".join(f"t{i},tumour\n" for i in range(48)))
    arguments = (
        "study",
        "augmentation",
        "--real",
        sets[0],
        "--synthetic",
        sets[1],
        "--synthetic-patients",
        table,
    )
    refused = run(*arguments, "--format", "json")
    assert refused.exit_code == 1 and json.loads(refused.stdout)["code"] == "synthetic-patients-unknown"
    assert run(*arguments, "--independent", "--repeats", 1, "--bootstrap", 0).exit_code == 0


def test_folders_of_tiles_are_looked_at_and_different_formats_are_said(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    for name, ending in (("real", "jpg"), ("synthetic", "png")):
        for i in range(6):
            path = tmp_path / name / f"p{i // 2}" / f"{i}.{ending}"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (48, 48, 3), dtype=np.uint8)).save(path)
    found = run(
        "evaluate", "--real", tmp_path / "real", "--synthetic", tmp_path / "synthetic", "--encoder", "starter",
        "--metrics", "kernel,similarity", "--bootstrap", 20, "--device", "cpu",
    )  # fmt: skip
    assert found.exit_code == 0, found.output
    assert "the real set is JPEG, the synthetic set is PNG" in found.stdout.replace("\n", " ")
    assert (
        "Kernel distance, cubic (encoder: starter)" in found.stdout
        and "sub-folders are taken" in found.stderr
    )


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (("--metrics", "fid"), "no-such-metric"),
        (("--metrics", "frechet", "--bootstrap", "5"), "too-few-draws"),
        (("--encoder", "uni2-h"), "encoders-differ"),
        (("--chart", "chart.pdf"), "bad-chart"),
        (("--patients", "nowhere.csv"), "no-such-table"),
        (("--real", "nowhere"), "no-such-set"),
        (("--neighbours", "48"), "bad-neighbours"),
        (("--metrics", " , "), "no-metric"),
    ],
)
def test_bad_arguments_exit_4(sets: tuple[Path, Path], change: tuple[str, ...], code: str) -> None:
    found = run("evaluate", "--real", sets[0], "--synthetic", sets[1], *change, "--format", "json")
    assert found.exit_code == 4, found.output
    assert json.loads(found.stdout)["code"] == code


def test_an_unknown_encoder_is_named_before_tiles_are_looked_at(tmp_path: Path) -> None:
    for i in range(2):
        Image.new("RGB", (48, 48), (i, 0, 0)).save(tmp_path / f"{i}.png")
    found = run(
        "evaluate", "--real", tmp_path, "--synthetic", tmp_path, "--encoder", "startr", "--format", "json"
    )
    assert found.exit_code == 4 and json.loads(found.stdout)["code"] == "encoder-unknown"


def test_help_tells_a_newcomer_what_to_give() -> None:
    for words in (("evaluate",), ("study", "augmentation"), ("study", "replacement")):
        text = run(*words, "--help").stdout
        assert "--real" in text and "--synthetic" in text and "Resamples of patients" in text
