"""The privacy statement of a release comes from the site's ledger, whole, or the draft is refused."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pixcell_core.errors import PixcellError
from pixcell_core.trust.bundle import verify_bundle
from pixcell_core.trust.bundle_files import open_bundle
from site_client.ledger.ledger import RoundCharge
from site_client.ledger.site import open_site_ledger
from site_client.ledger.view import BudgetCap
from site_client.release.export import export_release

if TYPE_CHECKING:
    from tests.site_client.release.conftest import Room

CODE = "sha256:" + "c0de" * 16


def spend(room: Room, steps: int = 3, number: int = 1) -> float:
    """Charge a round and return the epsilon the ledger then shows."""
    with open_site_ledger(room.workspace.site_dir, site="north", cap=BudgetCap(8.0, 1e-5)) as ledger:
        with ledger.reserve(RoundCharge("lung-study", number, 1.0, 20.0, steps, 0.1, CODE)) as reserved:
            for index in range(steps):
                reserved(index)
        return float(ledger.epsilon(1e-5).value)


def test_the_statement_is_the_ledgers_and_names_what_it_does_not_cover(room: Room, tmp_path: Path) -> None:
    spent = spend(room)
    manifest = room.draft().manifest()
    statement = manifest.privacy
    assert statement is not None
    assert (statement.epsilon, statement.unit, statement.delta) == (spent, "patient", 1e-5)
    assert manifest.ledger_head is not None
    assert statement.does_not_cover[-1].startswith(
        "the conditions and labels of these tiles (policy blend): Each"
    )
    assert "DP-SGD with" in statement.mechanism and "votes" not in statement.mechanism
    room.signed()
    out = export_release(room.workspace, tmp_path / "out", now=room.now).path
    words = (out / "README.txt").read_text()
    for said in (f"epsilon {spent:.3g} per patient at delta 1e-05", "does NOT cover"):
        assert said in words
    with open_bundle(out) as files:
        assert verify_bundle(files, trusted_keys=None, now=room.now).privacy == statement


def test_spending_after_sealing_makes_another_release(room: Room) -> None:
    spend(room)
    first = room.draft()
    spend(room, number=2)
    second = room.draft()
    assert first.release_id != second.release_id
    one, two = first.manifest().privacy, second.manifest().privacy
    assert one is not None and two is not None and two.epsilon > one.epsilon


def test_a_broken_ledger_refuses_the_draft(room: Room) -> None:
    spend(room)
    journal = next(p for p in (room.workspace.site_dir / "ledger").iterdir() if p.suffix == ".jsonl")
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join([lines[0], *lines[2:]]))
    with pytest.raises(PixcellError, match="ledger"):
        room.draft()
    assert not room.workspace.all_releases()
