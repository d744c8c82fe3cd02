"""A ledger put back to an earlier day together with its head: true by itself, given away by who remembers."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from pixcell_core.errors import BadInputError, PixcellError
from pixcell_core.private.ledger_record import LedgerHead
from pixcell_core.trust.keys import SigningKey
from site_client.ledger.ledger import Ledger, RoundCharge
from site_client.ledger.site import ledger_folder, ledger_witness, open_site_ledger, remembered_heads
from site_client.ledger.view import BudgetCap, read_ledger
from site_client.ledger.witness import LedgerRewoundError, WitnessedHeads
from tests.site_client.ledger.disk_calls import RefusingCall, watched_disk

CAP = BudgetCap(8.0, 1e-5)
Charger = Callable[..., RoundCharge]


def one_round(site_dir: Path, charge: Charger, number: int) -> LedgerHead:
    with open_site_ledger(site_dir, site="north", cap=CAP) as ledger:
        with ledger.reserve(charge(2, number)) as steps:
            steps(0)
        return ledger.head


def put_back(site_dir: Path, charge: Charger, kept: Path) -> None:
    """Two rounds; then the whole ledger folder as it was after the first."""
    one_round(site_dir, charge, 1)
    shutil.copytree(ledger_folder(site_dir), kept)
    one_round(site_dir, charge, 2)
    shutil.rmtree(ledger_folder(site_dir))
    shutil.copytree(kept, ledger_folder(site_dir))


def test_a_ledger_put_back_is_refused_by_the_site_itself(tmp_path: Path, charge: Charger) -> None:
    site_dir = tmp_path / "site"
    put_back(site_dir, charge, tmp_path / "kept")
    view = read_ledger(ledger_folder(site_dir))
    assert view.check.ok, "it is a true past: without a witness nobody could tell"
    before = {p: p.read_bytes() for p in ledger_folder(site_dir).iterdir() if p.name != "lock"}
    with pytest.raises(LedgerRewoundError, match="does not have any more") as caught:
        one_round(site_dir, charge, 3)
    assert caught.value.code == "ledger-rewound" and "stays spent" in caught.value.hint
    assert {p: p.read_bytes() for p in before} == before
    with pytest.raises(LedgerRewoundError):
        ledger_witness(site_dir).require_contains(view)


def test_a_ledger_thrown_away_is_refused_too(tmp_path: Path, charge: Charger) -> None:
    one_round(tmp_path, charge, 1)
    shutil.rmtree(ledger_folder(tmp_path))
    with pytest.raises(LedgerRewoundError):
        one_round(tmp_path, charge, 1)
    assert read_ledger(ledger_folder(tmp_path)).records == ()


def test_a_past_written_anew_by_the_keys_owner_is_found(tmp_path: Path, charge: Charger) -> None:
    """The key's owner can sign another past that verifies to its end; the remembered head is not in it."""
    one_round(tmp_path, charge, 1)
    shutil.rmtree(ledger_folder(tmp_path))
    key = SigningKey.load(tmp_path / "keys" / "ledger.key")
    with Ledger.open(ledger_folder(tmp_path), key, CAP, site="north") as ledger:
        for number in range(4):
            with ledger.reserve(charge(1, number, 500.0)) as steps:
                steps(0)
    assert read_ledger(ledger_folder(tmp_path), key.verify_key).check.ok
    with pytest.raises(LedgerRewoundError):
        one_round(tmp_path, charge, 2)


def test_the_newest_copy_may_come_back(tmp_path: Path, charge: Charger) -> None:
    head = one_round(tmp_path, charge, 1)
    shutil.copytree(ledger_folder(tmp_path), tmp_path / "copy")
    shutil.rmtree(ledger_folder(tmp_path))
    shutil.copytree(tmp_path / "copy", ledger_folder(tmp_path))
    assert one_round(tmp_path, charge, 2).sequence == head.sequence + 2
    assert remembered_heads(tmp_path)[-1].sequence == head.sequence + 2


def test_heads_are_appended_once_for_the_owner_alone(tmp_path: Path) -> None:
    witness = WitnessedHeads(tmp_path / "elsewhere" / "heads.txt")
    assert witness.heads() == ()
    heads = [LedgerHead(n, "sha256:" + f"{n:x}" * 64) for n in (1, 5, 9)]
    for head in heads:
        witness.note(head)
        witness.note(head)
    assert witness.heads() == tuple(heads)
    assert (tmp_path / "elsewhere" / "heads.txt").stat().st_mode & 0o777 == 0o600


def test_a_line_cut_by_a_crash_is_dropped_by_the_next(tmp_path: Path) -> None:
    witness = WitnessedHeads(tmp_path / "heads.txt")
    first, second = (LedgerHead(n, "sha256:" + f"{n}" * 64) for n in (1, 2))
    witness.note(first)
    whole = (tmp_path / "heads.txt").read_bytes()
    for length in range(1, len(whole)):
        (tmp_path / "heads.txt").write_bytes(whole + whole[:length])
        assert witness.heads() == (first,)
        witness.note(second)
        assert witness.heads() == (first, second)


@pytest.mark.parametrize(
    "content", [b"garbage\n", b"\xff\xfe\n", b"1 sha256:12\n", b"\n", b"-1 sha256:" + b"0" * 64 + b"\n"]
)
def test_a_damaged_witness_is_refused_before_the_ledger_is_touched(
    tmp_path: Path, charge: Charger, content: bytes
) -> None:
    one_round(tmp_path, charge, 1)
    path = tmp_path / "private" / "ledger-heads.txt"
    path.write_bytes(path.read_bytes() + content)
    before = (ledger_folder(tmp_path) / "ledger.jsonl").read_bytes()
    with pytest.raises(BadInputError, match="damaged or edited"):
        one_round(tmp_path, charge, 2)
    assert (ledger_folder(tmp_path) / "ledger.jsonl").read_bytes() == before


def test_heads_out_of_order_are_damage(tmp_path: Path) -> None:
    lines = [f"{n} sha256:{'0' * 64}\n" for n in (5, 1)]
    (tmp_path / "heads.txt").write_text("".join(lines))
    with pytest.raises(BadInputError, match="damaged or edited"):
        WitnessedHeads(tmp_path / "heads.txt").heads()


def test_a_full_disk_is_said_and_the_known_heads_stay(tmp_path: Path) -> None:
    first, second = (LedgerHead(n, "sha256:" + f"{n}" * 64) for n in (1, 2))
    at, refused = 0, True
    while refused:
        witness, disk = WitnessedHeads(tmp_path / f"{at}.txt"), RefusingCall(at, errno.ENOSPC)
        witness.note(first)
        try:
            with watched_disk(disk):
                witness.note(second)
        except PixcellError as error:
            assert error.code == "witness-unwritten" and "No space left" in error.message
        assert witness.heads() in ((first,), (first, second))
        refused = disk.refused
        at += 1
    assert at >= 5 and witness.heads() == (first, second)
