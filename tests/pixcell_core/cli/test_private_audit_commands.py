"""`pixcell private canaries|audit`: findings with unit and delta, exit 1 when caught, clear refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from click.testing import Result
from typer.testing import CliRunner

from pixcell_core.cli.private_audit_commands import register
from pixcell_core.private.parameters import PrivacyParameters
from pixcell_core.training.feature_store import FeatureStoreWriter
from tests.pixcell_core.training.process_runs import transformer


def run(*arguments: object) -> Result:
    root = typer.Typer()
    root.callback()(lambda: None)
    register(root)
    return CliRunner().invoke(root, [str(argument) for argument in arguments])


def data_of(result: Result, exit_code: int = 0) -> dict[str, Any]:
    assert result.exit_code == exit_code, result.output
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[0])["data"]
    return found


def store(path: Path, width: int = 12) -> Path:
    writer = FeatureStoreWriter(path, {"encoder": "test", "scaling_factor": 1.0, "shift_factor": 0.0})
    for patient in ("a", "b"):
        rows = [{"tile": f"{patient}{i}", "slide": patient} for i in range(3)]
        writer.add(
            patient,
            rows,
            pixels=torch.zeros(3, 3, 8, 8, dtype=torch.uint8),
            latents=torch.randn(3, 32, 8, 8).half(),
            embeddings=torch.randn(3, 1, width).half(),
        )
    writer.close()
    return path


@pytest.fixture
def base(tmp_path: Path) -> Path:
    transformer().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def test_the_installed_mechanism_is_consistent_and_says_what_it_tried() -> None:
    # Three runs of a right installation fail together once in 10^8 times.
    for _ in range(3):
        result = run("canaries", "--format", "json", "--canaries", 200)
        if result.exit_code == 0:
            break
    found = data_of(result)
    assert found["consistent"] and found["unit"] == "patient" and found["delta"] == 1e-5
    assert found["epsilon_claimed"] == pytest.approx(8.0, abs=0.2)
    assert found["epsilon_lower_bound"] <= found["epsilon_claimed"]
    for word in ("per patient", "delta", "alpha 0.001", "sampling"):
        assert word in found["text"]


def test_a_mechanism_with_half_its_noise_exits_1(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = property(lambda self: 0.5 * self.noise_multiplier * self.max_grad_norm)
    monkeypatch.setattr(PrivacyParameters, "noise_standard_deviation", wrong)
    result = run("canaries", "--canaries", 200)
    assert result.exit_code == 1 and "CONTRADICTS" in result.stdout


@pytest.mark.parametrize("with_features", [False, True])
def test_an_audit_trains_for_real_and_states_bound_ceiling_and_limits(
    base: Path, tmp_path: Path, with_features: bool
) -> None:
    more = ("--features", store(tmp_path / "public")) if with_features else ()
    # A bound at 95 % contradicts a right installation once in twenty times; five such runs on end, once in 10^6.
    for _ in range(5):
        result = run(
            "audit", "--base", base, "--canaries", 40, "--steps", 2, "--noise-multiplier", 8, "--rank", 2,
            "--device", "cpu", "--format", "json", *more,
        )  # fmt: skip
        if result.exit_code == 0:
            break
    found = data_of(result)
    assert found["consistent"] and found["public_patients"] == (2 if with_features else 0)
    assert found["guesses"] == 20 and 0 <= found["correct"] <= 20
    assert found["epsilon_lower_bound"] <= found["epsilon_claimed"] and found["unit"] == "patient"
    assert "Not seen" in found["text"] and "at most" in found["text"]


def refusal(*arguments: object) -> str:
    """The code of a command that exits with 4 and a hint."""
    result = run(*arguments, "--format", "json")
    assert result.exit_code == 4, result.output
    body = json.loads(result.stdout.splitlines()[0])
    assert body["hint"]
    return str(body["code"])


def test_features_of_a_site_or_of_another_model_are_refused(base: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    (site / "features").mkdir(parents=True)
    (site / "site.json").write_text("{}")
    assert (
        refusal("audit", "--base", base, "--features", store(site / "features" / "train"))
        == "features-private"
    )
    assert (
        refusal("audit", "--base", base, "--features", store(tmp_path / "other", width=7))
        == "features-do-not-fit"
    )
    assert refusal("audit", "--base", base, "--features", tmp_path / "nothing") == "no-feature-store"


@pytest.mark.parametrize(
    ("code", "arguments"),
    [
        ("delta", ("canaries", "--delta", "0.1")),
        ("canary-settings", ("canaries", "--canaries", "3")),
        ("canary-settings", ("canaries", "--alpha", "0")),
        ("privacy-setting", ("canaries", "--noise-multiplier", "0")),
    ],
)
def test_settings_without_meaning_are_refused(code: str, arguments: tuple[str, ...]) -> None:
    assert refusal(*arguments) == code


def test_an_audit_refuses_what_it_cannot_use(base: Path) -> None:
    assert refusal("audit", "--base", base, "--kind", "dora") == "adapter-kind"
    assert refusal("audit", "--base", base, "--canaries", 5) == "canary-settings"
    assert (
        refusal("audit", "--base", base, "--canaries", 20, "--steps", 1, "--confidence", 1)
        == "canary-settings"
    )
    assert refusal("audit", "--base", base, "--device", "abacus") == "device-unknown"


def test_help_says_what_is_proved_and_gives_an_example() -> None:
    canaries, audit = run("canaries", "--help").output, run("audit", "--help").output
    assert "pixcell private canaries" in canaries and "Exit code 1" in canaries
    assert "never its absence" in audit and "PUBLIC" in audit
