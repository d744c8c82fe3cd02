"""`pixcell site budget`: an epsilon with its unit, delta and limits; exit codes of the contract; nothing private."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from pixcell_core.contracts.canonical import canonical_bytes
from pixcell_core.trust.keys import VerifyKey
from site_client.ledger.commands import register
from site_client.ledger.ledger import RoundCharge
from site_client.ledger.record import decode_line, head_of
from site_client.ledger.site import ledger_folder, ledger_key_path, open_site_ledger
from site_client.ledger.view import BudgetCap


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
        head = head_of(decode_line(canonical_bytes(line), head, key))
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
