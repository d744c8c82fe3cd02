"""Exports: checked by a stranger without the site's folder, held against the past, and silent about patients."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pixcell_core.errors import BadInputError
from pixcell_core.private.ledger_record import LedgerHead
from pixcell_core.trust.keys import SigningKey
from site_client.ledger.cohorts import CohortBook
from site_client.ledger.export import BudgetExport, export_of, first_forgotten, first_rewritten, verify_export
from site_client.ledger.ledger import Ledger, RoundCharge
from site_client.ledger.site import ledger_folder, ledger_key_path, ledger_public_key, open_site_ledger
from site_client.ledger.view import BudgetCap, LedgerView, read_ledger

CODE = "sha256:" + "c0de" * 16
CAP = BudgetCap(8.0, 1e-5)
PATIENTS = [f"Mustermann-{n:03d}" for n in range(137)]


def spend(
    site_dir: Path, number: int, sigma: float = 20.0, cohort: str = "all", purpose: str = "training"
) -> None:
    with open_site_ledger(site_dir, site="north", cap=CAP) as ledger:
        charge = RoundCharge("lung", number, 1.0, sigma, 3, 0.1, CODE, purpose, cohort)
        with ledger.reserve(charge, at_a_time=3) as steps:
            steps(0)


@pytest.fixture
def site_dir(tmp_path: Path) -> Path:
    """A site with two rounds, private conditions, and two cohorts of named patients."""
    site_dir = tmp_path / "Klinikum Nord"
    book = CohortBook.open(site_dir)
    book.require("east", PATIENTS[:100])
    book.require("west", PATIENTS[100:])
    spend(site_dir, 1)
    spend(site_dir, 2, cohort="east")
    spend(site_dir, 0, cohort="west", purpose="conditions")
    return site_dir


def read(site_dir: Path) -> LedgerView:
    return read_ledger(ledger_folder(site_dir), ledger_public_key(site_dir)).require_whole()


def exported(site_dir: Path) -> BudgetExport:
    return export_of(ledger_folder(site_dir), read(site_dir))


def changed(export: BudgetExport, change: Callable[[dict[str, Any]], None]) -> BudgetExport:
    value = json.loads(export.model_dump_json())
    change(value)
    return BudgetExport.model_validate(value)


def test_a_stranger_verifies_an_export_and_adds_it_up_again(site_dir: Path, tmp_path: Path) -> None:
    export, view = exported(site_dir), read(site_dir)
    (tmp_path / "export.json").write_text(export.model_dump_json(indent=2))
    shutil.rmtree(site_dir)
    seen = verify_export(BudgetExport.load(tmp_path / "export.json"))
    assert seen.check.ok and seen.records == view.records and seen.head == view.head and seen.key == view.key
    assert seen.epsilon(1e-5) == view.epsilon(1e-5)
    statement = export.statement
    assert {c.cohort for c in statement.cohorts} == {"all", "east", "west"}
    assert statement.epsilon_spent == max(c.epsilon_spent for c in statement.cohorts)
    assert (
        statement.studies[0].purposes == ["training", "conditions"]
        and "own and blend" in statement.does_not_cover
    )


def test_an_export_names_no_patient_no_tag_no_path_and_no_count(site_dir: Path, tmp_path: Path) -> None:
    text = exported(site_dir).model_dump_json()
    private = json.loads((site_dir / "private" / "cohorts.json").read_text())
    tags = [tag for members in private["cohorts"].values() for tag in members]
    assert len(tags) == len(PATIENTS)
    words = [*PATIENTS, *tags, "Klinikum", str(tmp_path), "PRIVATE", "secret"]
    assert [word for word in words if word in text] == []
    assert {100.0, 37.0, 137.0}.isdisjoint(numbers_in(json.loads(text))), "the sizes of the cohorts"


def numbers_in(value: object) -> set[float]:
    """Every number of a JSON value, and every number that is a whole text."""
    if isinstance(value, dict):
        return set().union(*map(numbers_in, value.values()))
    if isinstance(value, list):
        return set().union(*map(numbers_in, value))
    return {float(str(value))} if type(value) in (int, float) or str(value).isdigit() else set()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("epsilon_spent", 0.1),
        ("epsilon_cap", 3.0),
        ("delta", 1e-6),
        ("site", "south"),
        ("covers", "everything"),
        ("does_not_cover", "nothing"),
        ("accountant", "a guess"),
        ("records", 3),
        ("head", None),
        ("cohorts", []),
        ("studies", []),
        ("rounds", []),
        ("verified", False),
    ],
)
def test_a_statement_that_does_not_follow_from_the_records_is_found(
    site_dir: Path, name: str, value: object
) -> None:
    def change(export: dict[str, Any]) -> None:
        export["statement"][name] = value

    check = verify_export(changed(exported(site_dir), change)).check
    assert not check.ok and f"does not follow from its records: {name}" in check.reason


def drop(export: dict[str, Any]) -> None:
    del export["lines"][2]


def swap(export: dict[str, Any]) -> None:
    export["lines"][1:3] = export["lines"][2:0:-1]


def cheapen(export: dict[str, Any]) -> None:
    export["lines"][1]["record"]["noise_multiplier"] = 90.0


def extend(export: dict[str, Any]) -> None:
    export["lines"][1]["note"] = "kind regards"


def garble(export: dict[str, Any]) -> None:
    export["public_key"] = "not a key"


def strangers_key(export: dict[str, Any]) -> None:
    export["public_key"] = SigningKey.generate().verify_key.to_pem().decode()


@pytest.mark.parametrize("change", [drop, swap, cheapen, extend, garble, strangers_key])
def test_every_change_to_the_lines_is_found(site_dir: Path, change: Callable[[dict[str, Any]], None]) -> None:
    check = verify_export(changed(exported(site_dir), change)).check
    assert not check.ok and check.first_bad is not None and check.reason


def test_an_export_signed_by_somebody_else_is_found_with_the_sites_key(
    site_dir: Path, tmp_path: Path
) -> None:
    """Whoever has no key of the site can make a whole ledger of their own; only the site's key tells."""
    with Ledger.open(tmp_path / "forged", SigningKey.generate(), CAP, site="north"):
        pass
    forged = export_of(tmp_path / "forged", read_ledger(tmp_path / "forged"))
    key = ledger_public_key(site_dir)
    assert key is not None and verify_export(forged).check.ok
    assert "another key" in verify_export(forged, key).check.reason
    assert verify_export(exported(site_dir), key).check.ok


def test_a_ledger_holds_its_own_past_and_not_its_future(site_dir: Path) -> None:
    earlier = verify_export(exported(site_dir))
    spend(site_dir, 3)
    later = read(site_dir)
    assert first_rewritten(later, earlier) is None and first_rewritten(earlier, earlier) is None
    found = first_rewritten(earlier, later)
    assert found is not None and found[0] == len(earlier.records) and "missing" in found[1]


def test_a_past_rewritten_by_the_keys_owner_is_found_by_an_earlier_export(site_dir: Path) -> None:
    earlier = verify_export(exported(site_dir))
    key = SigningKey.load(ledger_key_path(site_dir))
    shutil.rmtree(ledger_folder(site_dir))
    with Ledger.open(ledger_folder(site_dir), key, CAP, site="north") as ledger:
        for number in range(8):
            with ledger.reserve(RoundCharge("lung", number, 1.0, 500.0, 1, 0.1, CODE)) as steps:
                steps(0)
    rewritten = read(site_dir)
    assert rewritten.check.ok and len(rewritten.records) > len(earlier.records)
    found = first_rewritten(rewritten, earlier)
    assert found is not None and "not the record that the earlier export has" in found[1]


def test_a_head_remembered_elsewhere_must_stand_in_it(site_dir: Path) -> None:
    view = read(site_dir)
    assert view.head is not None and first_forgotten(view, [view.head]) is None
    assert first_forgotten(view, [LedgerHead(2, "sha256:" + "0" * 64), view.head]) == (
        2,
        "it is not the record that was remembered outside of the ledger",
    )
    found = first_forgotten(view, [LedgerHead(99, view.head.hash)])
    assert found is not None and found[0] == 99


@pytest.mark.parametrize(
    "text", ["", "not json", "[]", "3", "{}", '{"schema_version":"budget-export/v2"}', '{"lines":NaN}']
)
def test_a_file_that_is_no_export_is_bad_input(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(BadInputError):
        BudgetExport.load(tmp_path / "x.json")
    with pytest.raises(BadInputError, match="does not exist"):
        BudgetExport.load(tmp_path / "absent.json")


def test_an_export_of_an_empty_ledger_verifies(tmp_path: Path) -> None:
    empty = export_of(tmp_path, read_ledger(tmp_path))
    assert verify_export(empty).check.ok and empty.public_key is None and empty.lines == []


def test_the_envelope_that_json_output_prints_is_read_too(site_dir: Path, tmp_path: Path) -> None:
    body = {"schema_version": 1, "status": "ok", "data": json.loads(exported(site_dir).model_dump_json())}
    (tmp_path / "x.json").write_text(json.dumps(body))
    assert verify_export(BudgetExport.load(tmp_path / "x.json")).check.ok
