"""`pixcell site budget`: an epsilon with its unit, delta and limits; exit codes of the contract; nothing private."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from pixcell_core.contracts.canonical import canonical_bytes
from pixcell_core.private.ledger_record import decode_chained
from pixcell_core.trust.keys import VerifyKey
from site_client.ledger.commands import register
from site_client.ledger.ledger import RoundCharge
from site_client.ledger.site import ledger_folder, ledger_key_path, open_site_ledger
from site_client.ledger.view import BudgetCap
from tests.site_client.ledger.studies import make_study


def run(*arguments: str) -> tuple[int, str, str]:
    root = typer.Typer()
    register(root)
    result = CliRunner().invoke(root, ["site", "budget", *arguments])
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture
def site_dir(tmp_path: Path) -> Path:
    with open_site_ledger(tmp_path, site="north", cap=BudgetCap(8.0, 1e-5)) as ledger:
        for number in (1, 2):
            charge = RoundCharge("lung", number, 1.0, 8.5, 20, 0.1, "sha256:" + "c0de" * 16)
            with ledger.reserve(charge, at_a_time=10) as steps:
                for index in range(20):
                    steps(index)
    return tmp_path


def test_show_prints_epsilon_with_unit_delta_bar_and_limits(site_dir: Path) -> None:
    code, out, _ = run("show", "--site-dir", str(site_dir))
    assert code == 0
    text = " ".join(out.split())
    for part in (
        "epsilon 3.12 of 8",
        "per patient",
        "delta 1e-05",
        "does not cover",
        "█",
        "░",
        "lung",
        "head 6",
    ):
        assert part in text, part


def test_show_as_json_is_one_envelope(site_dir: Path) -> None:
    code, out, _ = run("show", "--site-dir", str(site_dir), "--format", "json")
    body = json.loads(out)
    assert code == 0 and body["status"] == "ok"
    data = body["data"]
    assert data["epsilon_spent"] == pytest.approx(3.118, abs=1e-3)
    assert (data["unit"], data["delta"], data["epsilon_cap"]) == ("patient", 1e-5, 8.0)
    assert data["does_not_cover"] and [r["steps_charged"] for r in data["rounds"]] == [20, 20]


def test_the_key_is_made_for_the_owner_alone(site_dir: Path) -> None:
    assert ledger_key_path(site_dir).stat().st_mode & 0o777 == 0o600


def test_verify_says_ok_and_names_the_first_bad_record(site_dir: Path) -> None:
    code, out, _ = run("verify", "--site-dir", str(site_dir))
    assert code == 0 and out.startswith("ok: 7 records")
    path = ledger_folder(site_dir) / "ledger.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:2], lines[2].replace(b'"steps":10', b'"steps":1'), *lines[3:]]))
    code, out, _ = run("verify", "--site-dir", str(site_dir))
    assert code == 1 and "BROKEN at record 2" in out
    code, out, _ = run("verify", "--site-dir", str(site_dir), "--format", "json")
    assert code == 1 and json.loads(out)["data"]["first_bad"] == 2
    for verb in ("show", "export"):
        code, out, err = run(verb, "--site-dir", str(site_dir), "--format", "json")
        assert code == 1 and json.loads(out)["code"] == "ledger-broken" and "Traceback" not in err


def test_verify_says_when_only_the_ledger_itself_vouches_for_its_key(site_dir: Path) -> None:
    path = ledger_key_path(site_dir)
    path.with_name(path.name + ".pub").unlink()
    code, out, _ = run("verify", "--site-dir", str(site_dir))
    assert code == 0 and "the ledger names itself" in out


def test_an_export_verifies_anywhere_and_holds_no_path_or_secret(site_dir: Path, tmp_path: Path) -> None:
    target = tmp_path / "export.json"
    code, out, _ = run("export", "--site-dir", str(site_dir), "--out", str(target))
    assert code == 0 and "7 records" in out
    text = target.read_text()
    assert str(site_dir) not in text and "PRIVATE" not in text
    exported = json.loads(text)
    key = VerifyKey.from_pem(exported["public_key"].encode())
    head = None
    for line in exported["lines"]:
        head = decode_chained(canonical_bytes(line), head, key).head
    assert head is not None and exported["statement"]["head"] == f"{head.sequence} {head.hash}"
    code, _, err = run("export", "--site-dir", str(site_dir), "--out", str(target))
    assert code == 4 and "exists already" in err


def test_a_site_that_never_trained_has_spent_nothing(tmp_path: Path) -> None:
    code, out, _ = run("show", "--site-dir", str(tmp_path))
    assert code == 0 and "epsilon 0.00 per patient" in out and "nothing was charged" in out
    assert list(tmp_path.iterdir()) == [], "looking makes nothing"
    assert run("verify", "--site-dir", str(tmp_path))[0] == 0


def test_a_missing_site_folder_is_bad_input(tmp_path: Path) -> None:
    code, _, err = run("show", "--site-dir", str(tmp_path / "absent"))
    assert code == 4 and "no site folder" in err and "→" in err


def test_show_tells_cohorts_apart_and_names_the_purposes(site_dir: Path) -> None:
    with open_site_ledger(site_dir) as ledger:
        for cohort, purpose in (("east", "training"), ("west", "conditions")):
            charge = RoundCharge("kidney", 1, 1.0, 9.0, 2, 0.1, "sha256:" + "c0de" * 16, purpose, cohort)
            with ledger.reserve(charge, at_a_time=2) as steps:
                steps(0)
    code, out, _ = run("show", "--site-dir", str(site_dir))
    text = " ".join(out.split())
    assert code == 0
    for part in (
        "the cap holds for every cohort",
        "cohort east",
        "cohort west",
        "conditions",
        "own and blend",
    ):
        assert part in text, part
    data = json.loads(run("show", "--site-dir", str(site_dir), "--format", "json")[1])["data"]
    by_cohort = {c["cohort"]: c["epsilon_spent"] for c in data["cohorts"]}
    assert by_cohort["all"] < by_cohort["east"] == by_cohort["west"] == data["epsilon_spent"]
    studies = {s["study"]: s for s in data["studies"]}
    assert studies["lung"]["epsilon_spent"] == pytest.approx(3.118, abs=1e-3)
    assert (
        studies["kidney"]["purposes"] == ["training", "conditions"]
        and studies["kidney"]["steps_charged"] == 4
    )


def test_show_forecasts_a_study_and_charges_nothing(site_dir: Path, tmp_path: Path) -> None:
    study = make_study(True, rounds=600, epsilon_cap=50.0)
    (tmp_path / "study.json").write_bytes(study.to_bytes())
    before = (ledger_folder(site_dir) / "ledger.jsonl").read_bytes()
    code, out, _ = run(
        "show", "--site-dir", str(site_dir), "--study", str(tmp_path / "study.json"), "--format", "json"
    )
    forecast = json.loads(out)["data"]["forecast"]
    assert code == 0 and [c["what"] for c in forecast["charges"]] == [
        "one round",
        "private conditions",
        "all that is left",
    ]
    assert [c["admitted"] for c in forecast["charges"]] == [True, True, False]
    assert (
        forecast["charges"][0]["epsilon_after"] > 3.118
        and forecast["charges"][2]["reason"] == "over the site's cap"
    )
    narrow = study.model_copy(update={"epsilon_cap": 0.5})
    (tmp_path / "narrow.json").write_bytes(narrow.to_bytes())
    where = ("--site-dir", str(site_dir), "--study", str(tmp_path / "narrow.json"))
    answers = json.loads(run("show", *where, "--format", "json")[1])["data"]["forecast"]["charges"]
    assert {c["reason"] for c in answers[:2]} == {"over the study's cap", ""}
    code, out, _ = run("show", *where)
    assert code == 0 and "study lung" in out and "refused:" in out and "admitted" in out
    assert (ledger_folder(site_dir) / "ledger.jsonl").read_bytes() == before
    (tmp_path / "bad.json").write_text("{}")
    assert run("show", "--site-dir", str(site_dir), "--study", str(tmp_path / "bad.json"))[0] == 4


def test_a_forecast_is_what_the_ledger_then_answers(site_dir: Path) -> None:
    """Round by round until the ledger refuses: the forecast said so each time, to the digit."""
    from pixcell_core.private.study_charges import round_event
    from site_client.ledger.forecast import forecast_of
    from site_client.ledger.ledger import BudgetExceededError
    from site_client.ledger.view import read_ledger

    study = make_study(rounds=60, noise_multiplier=4.0, epsilon_cap=50.0)
    for number in range(60):
        found = forecast_of(read_ledger(ledger_folder(site_dir)), study).charges[0]
        charge = RoundCharge(
            study.digest,
            number,
            1.0,
            study.noise_multiplier,
            round_event(study).steps,
            1.0,
            study.code_digest,
        )
        with open_site_ledger(site_dir) as ledger:
            if not found.admitted:
                with pytest.raises(BudgetExceededError):
                    ledger.reserve(charge)
                break
            with ledger.reserve(charge, at_a_time=charge.steps) as steps:
                steps(0)
            assert ledger.epsilon(1e-5).value == found.epsilon_after
    assert 2 <= number < 59


def test_a_stranger_verifies_an_export_without_the_sites_folder(site_dir: Path, tmp_path: Path) -> None:
    first, later = str(tmp_path / "first.json"), str(tmp_path / "later.json")
    assert run("export", "--site-dir", str(site_dir), "--out", first)[0] == 0
    with open_site_ledger(site_dir, cap=BudgetCap(9.0, 1e-5)):
        pass
    assert run("export", "--site-dir", str(site_dir), "--out", later)[0] == 0
    code, out, _ = run("verify", "--export", later, "--against", first)
    assert code == 0 and "every record of the earlier export, unchanged" in out and "names itself" in out
    key = ledger_key_path(site_dir)
    code, out, _ = run("verify", "--export", later, "--key", str(key.with_name(key.name + ".pub")))
    assert code == 0 and "names itself" not in out
    code, out, _ = run("verify", "--export", first, "--against", later)
    assert code == 1 and "missing now" in out
    assert run("verify", "--site-dir", str(site_dir), "--against", first)[0] == 0
    broken = json.loads(Path(first).read_text())
    broken["lines"][1]["record"]["steps"] = 1
    (tmp_path / "broken.json").write_text(json.dumps(broken))
    assert run("verify", "--export", str(tmp_path / "broken.json"))[0] == 1
    code, _, err = run("verify", "--export", later, "--against", str(tmp_path / "broken.json"))
    assert code == 4 and "itself broken at record 1" in err


def test_verify_wants_a_folder_or_an_export(site_dir: Path, tmp_path: Path) -> None:
    assert run("verify")[0] == 4
    code, _, err = run("verify", "--site-dir", str(site_dir), "--export", str(tmp_path / "x.json"))
    assert code == 4 and "either a site's folder or an export" in err
    assert run("verify", "--export", str(tmp_path / "absent.json"))[0] == 4
    assert run("verify", "--site-dir", str(site_dir), "--key", str(ledger_key_path(site_dir)))[0] == 4


def test_verify_finds_a_ledger_put_back_with_its_head(site_dir: Path) -> None:
    code, out, _ = run("verify", "--site-dir", str(site_dir))
    assert code == 0 and "remembered outside" in out
    kept = {path: path.read_bytes() for path in ledger_folder(site_dir).iterdir()}
    with open_site_ledger(site_dir) as ledger:
        charge = RoundCharge("lung", 3, 1.0, 8.5, 1, 0.1, "sha256:" + "c0de" * 16)
        with ledger.reserve(charge) as steps:
            steps(0)
    for path, content in kept.items():
        path.write_bytes(content)
    code, out, _ = run("verify", "--site-dir", str(site_dir))
    assert code == 1 and "BROKEN at record 8: it is not the record that was remembered" in out


def test_verify_knows_the_head_that_the_agent_passed_on(site_dir: Path) -> None:
    (site_dir / "agent").mkdir()
    head = {"sequence": 30, "hash": "sha256:" + "0" * 64}
    (site_dir / "agent" / "ledger-head.json").write_text(json.dumps(head))
    code, out, _ = run("verify", "--site-dir", str(site_dir))
    assert code == 1 and "record 30" in out


def test_correcting_the_clock_asks_and_records(site_dir: Path) -> None:
    from datetime import UTC, datetime, timedelta

    from pixcell_core.trust.keys import SigningKey
    from site_client.ledger.ledger import Ledger

    code, out, _ = run("correct-clock", "--site-dir", str(site_dir), "--yes")
    assert code == 0 and "nothing was recorded" in out
    key = SigningKey.load(ledger_key_path(site_dir))
    later = datetime.now(UTC) + timedelta(days=400)
    Ledger.open(ledger_folder(site_dir), key, BudgetCap(9.0, 1e-5), clock=lambda: later).close()
    before = (ledger_folder(site_dir) / "ledger.jsonl").read_bytes()
    code, _, err = run("correct-clock", "--site-dir", str(site_dir))
    assert (
        code == 4
        and "Not confirmed" in err
        and (ledger_folder(site_dir) / "ledger.jsonl").read_bytes() == before
    )
    code, out, _ = run("correct-clock", "--site-dir", str(site_dir), "--yes")
    assert code == 0 and "Recorded: the clock was wrong" in out
    assert run("verify", "--site-dir", str(site_dir))[0] == 0


def test_there_is_no_time_to_correct_without_a_ledger(tmp_path: Path) -> None:
    code, _, err = run("correct-clock", "--site-dir", str(tmp_path), "--yes")
    assert code == 4 and "no privacy ledger yet" in err


def test_a_long_ledger_shows_its_last_rounds_and_lists_all_in_json(tmp_path: Path) -> None:
    with open_site_ledger(tmp_path, site="north", cap=BudgetCap(8.0, 1e-5)) as ledger:
        for number in range(40):
            charge = RoundCharge("long", 1000 + number, 1.0, 200.0, 1, 0.1, "sha256:" + "c0de" * 16)
            with ledger.reserve(charge) as steps:
                steps(0)
    code, out, _ = run("show", "--site-dir", str(tmp_path))
    assert code == 0 and "the last 30 rounds" in out and " 1039 " in out and " 1009 " not in out
    data = json.loads(run("show", "--site-dir", str(tmp_path), "--format", "json")[1])["data"]
    assert len(data["rounds"]) == 40


def test_a_study_that_charged_everything_leaves_nothing_to_forecast(site_dir: Path, tmp_path: Path) -> None:
    study = make_study(True, rounds=1, steps_per_round=2, epsilon_cap=8.0)
    (tmp_path / "study.json").write_bytes(study.to_bytes())
    with open_site_ledger(site_dir, site="north") as ledger:
        for purpose, number, norm in (("training", 1, 0.1), ("conditions", 0, 1.0)):
            charge = RoundCharge(study.digest, number, 1.0, 20.0, 2, norm, study.code_digest, purpose)
            with ledger.reserve(charge) as steps:
                steps(0)
    where = ("--site-dir", str(site_dir), "--study", str(tmp_path / "study.json"))
    code, out, _ = run("show", *where)
    assert code == 0 and "nothing is left" in " ".join(out.split())
    assert json.loads(run("show", *where, "--format", "json")[1])["data"]["forecast"]["charges"] == []
