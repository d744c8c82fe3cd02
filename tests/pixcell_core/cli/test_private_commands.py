"""`pixcell private plan` as a person calls it: words, envelope, picture, a study, earlier charges, refusals."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner, Result

from pixcell_core.cli.private_commands import register
from pixcell_core.private.accounting import GaussianEvent, epsilon

from ..private.test_planning import study

SHORT = ("--patients", "200", "--rounds", "5", "--steps", "10", "--epsilon", "8", "--delta", "1e-5")
COUNTED = ("--trainable-parameters", "20000")


def run(*arguments: object) -> Result:
    root = typer.Typer()
    root.callback()(lambda: None)
    register(root)
    return CliRunner().invoke(root, ["private", "plan", *(str(argument) for argument in arguments)])


def data_of(*arguments: object) -> dict[str, Any]:
    result = run(*arguments, "--format", "json")
    assert result.exit_code == 0, result.output
    body = json.loads(result.stdout)
    assert (body["schema_version"], body["status"]) == (1, "ok")
    found: dict[str, Any] = body["data"]
    return found


def export(path: Path, records: list[dict[str, Any]]) -> Path:
    lines = [{"hash": "h", "key_id": "k", "record": r, "signature": "s"} for r in records]
    path.write_text(
        json.dumps(
            {"schema_version": "budget-export/v1", "statement": {}, "public_key": None, "lines": lines}
        )
    )
    return path


def reserve(sigma: float, steps: int, **more: Any) -> dict[str, Any]:
    return {"kind": "reserve", "sample_rate": 1.0, "noise_multiplier": sigma, "steps": steps, **more}


def test_a_plan_in_words_never_shows_epsilon_without_its_unit_and_delta(tmp_path: Path) -> None:
    picture = tmp_path / "plan.svg"
    result = run(*SHORT, "--sites", 3, "--votes-noise", 20, "--out", picture)
    assert result.exit_code == 0, result.output
    words = " ".join(result.stdout.split())
    for part in (
        "noise multiplier 4.2",
        "trains 36,864 numbers (ffa-lora, rank 4, 48 layers of the shipped starter)",
        "epsilon 8.00 per patient (all slides and tiles of one patient) at delta 1e-05",
        "private conditions 0.",
        "add-or-remove-one",
        "does not cover tiles conditioned on private embeddings",
        "over 3 sites: epsilon 8.00 per patient at delta 1e-05, declared by the sites, not proved",
        "noise per coordinate of a step 0.0213 C",
    ):
        assert part in words, part
    assert picture.read_text().startswith("<svg")
    again = run(*SHORT, *COUNTED, "--out", picture)
    assert again.exit_code == 4 and "exists already" in again.output


def test_the_json_plan_is_complete_and_exact() -> None:
    plan = data_of(*SHORT, *COUNTED, "--max-grad-norm", 0.5, "--sites", 2)
    event = GaussianEvent(1.0, plan["noise_multiplier"], 50)
    assert plan["cost"]["together"] == epsilon([event], 1e-5).value <= 8.0
    assert (plan["cost"]["unit"], plan["cost"]["delta"], plan["cost"]["within_target"]) == (
        "patient",
        1e-5,
        True,
    )
    update = plan["expected_update"]
    assert update["noise_per_coordinate"] == pytest.approx(plan["noise_multiplier"] / 200)
    assert update["noise_per_coordinate_absolute"] == pytest.approx(update["noise_per_coordinate"] / 2)
    assert plan["over_sites"]["without_assumption_epsilon"] > plan["over_sites"]["stated_epsilon"]
    assert {(r["epsilon"], r["patients"]) for r in plan["table"]} >= {(1.0, 50), (8.0, 200), (8.0, 1000)}
    assert plan["warnings"] == [] and plan["study"] is None


def test_a_study_file_says_what_it_will_cost(tmp_path: Path) -> None:
    path = tmp_path / "study.json"
    path.write_bytes(study().to_bytes())
    plan = data_of("--study", path, "--patients", 100)
    assert plan["study"] == "planned" and plan["trainable_parameters"] == 4 * 192 * 8
    expected = epsilon([GaussianEvent(1.0, 5.0, 40), GaussianEvent(1.0, 20.0, 2)], 1e-5).value
    assert plan["cost"]["together"] == pytest.approx(expected)
    twice = run("--study", path, "--patients", 100, "--rounds", 3, "--rank", 2)
    assert twice.exit_code == 4 and "--rank, --rounds cannot be given beside --study" in twice.output
    (tmp_path / "broken.json").write_text("{")
    assert run("--study", tmp_path / "broken.json", "--patients", 100).exit_code == 4
    assert run("--study", tmp_path / "absent.json", "--patients", 100).exit_code == 4


def test_earlier_charges_count_by_cohort(tmp_path: Path) -> None:
    spent = export(
        tmp_path / "export.json",
        [
            {"kind": "opened"},
            reserve(10.0, 25),
            reserve(10.0, 25, cohort="2026"),
            {"kind": "spent", "steps_taken": 25},
            reserve(10.0, 50, cohort="2027"),
        ],
    )
    asked = (*SHORT, *COUNTED, "--already-spent", spent)
    everyone, one = data_of(*asked), data_of(*asked, "--cohort", "2026")
    assert everyone["cost"]["spent_before"] == epsilon([GaussianEvent(1.0, 10.0, 100)], 1e-5).value
    assert one["cost"]["spent_before"] == epsilon([GaussianEvent(1.0, 10.0, 50)], 1e-5).value
    assert (
        everyone["noise_multiplier"] > one["noise_multiplier"] > data_of(*SHORT, *COUNTED)["noise_multiplier"]
    )
    full = export(tmp_path / "full.json", [reserve(1.0, 100)])
    refused = run(*SHORT, *COUNTED, "--already-spent", full)
    assert refused.exit_code == 1 and "already spent" in refused.output


@pytest.mark.parametrize(
    "text",
    ["{}", "[]", "no json", '{"schema_version":"budget-export/v1","lines":[{"record":{"kind":"reserve"}}]}',
     '{"schema_version":"budget-export/v1","lines":[{"record":{"kind":"reserve","sample_rate":1,'
     '"noise_multiplier":1,"steps":1.5}}]}'],
)  # fmt: skip
def test_what_is_no_export_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "export.json"
    path.write_text(text)
    result = run(*SHORT, *COUNTED, "--already-spent", path)
    assert result.exit_code == 4 and "→" in result.output


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (("--patients", 1), "no cohort"),
        (("--delta", 0), "A delta of 0 cannot be used"),
        (("--delta", "nan"), "delta"),
        (("--delta", 1e-3), "at most 1e-05"),
        (("--epsilon", 0), "target epsilon of 0"),
        (("--epsilon", "-2"), "target epsilon of -2"),
        (("--sample-rate", 0), "sample rate of 0"),
        (("--sample-rate", 1.5), "sample rate of 1.5"),
        (("--votes-iterations", 2), "needs --votes-noise"),
        (("--votes-noise", 0), "noise multiplier of 0"),
        (("--trainable-parameters", 0), "parameters is 0"),
        (("--out", "/nowhere/at/all.svg"), "Cannot write"),
    ],
)
def test_bad_input_exits_4_with_the_reason(changed: tuple[object, ...], words: str) -> None:
    result = run(*SHORT, *COUNTED, *changed)
    assert result.exit_code == 4, result.output
    assert words in result.output and "→" in result.output and "Traceback" not in result.output


def test_what_is_missing_is_named() -> None:
    result = run("--patients", 100, "--rounds", 3)
    assert result.exit_code == 4
    assert "--steps, --epsilon, --delta" in result.output and "STUDY.json" in result.output


def test_warnings_stand_at_the_end() -> None:
    result = run(*SHORT, "--patients", 20, *COUNTED)
    words = " ".join(result.stdout.split())
    assert "warning: 20 patients are too few for this promise to be useful" in words
    assert math.isfinite(data_of(*SHORT, "--patients", 20, *COUNTED)["expected_update"]["patients_needed"])
