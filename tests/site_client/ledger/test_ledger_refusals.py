"""Whatever stands in a ledger's way is refused with the reason, and the ledger it was is the ledger it stays."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pixcell_core.errors import BadInputError, PixcellError
from pixcell_core.private.ledger_record import ReserveRecord, encode_line, head_of
from pixcell_core.trust.keys import SigningKey
from site_client.ledger.journal import Journal, LedgerWriteError
from site_client.ledger.ledger import ForeignLedgerError, Ledger, RoundCharge
from site_client.ledger.site import ledger_folder, ledger_key_path, open_site_ledger
from site_client.ledger.view import BudgetCap, LedgerBrokenError, read_ledger
from tests.site_client.ledger.disk_calls import RefusingCall, watched_disk

CAP = BudgetCap(8.0, 1e-5)
Opener = Callable[..., Ledger]
Charger = Callable[..., RoundCharge]


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "lock"}


@pytest.fixture
def north(tmp_path: Path, charge: Charger) -> Path:
    """A site with one round in its ledger."""
    with (
        open_site_ledger(tmp_path / "north", site="north", cap=CAP) as ledger,
        ledger.reserve(charge(2)) as steps,
    ):
        steps(0)
    return tmp_path / "north"


def test_a_ledger_copied_from_another_site_is_refused(north: Path, tmp_path: Path) -> None:
    south = tmp_path / "south"
    open_site_ledger(south, site="south", cap=CAP).close()
    shutil.rmtree(ledger_folder(south))
    shutil.rmtree(south / "private")
    shutil.copytree(ledger_folder(north), ledger_folder(south))
    before = files(ledger_folder(south))
    with pytest.raises(LedgerBrokenError, match="another key"):
        open_site_ledger(south, site="south", cap=CAP)
    assert files(ledger_folder(south)) == before


def test_a_ledger_copied_with_its_key_is_refused_by_its_name(north: Path, tmp_path: Path) -> None:
    shutil.copytree(north, tmp_path / "south")
    before = files(ledger_folder(tmp_path / "south"))
    with pytest.raises(ForeignLedgerError, match="made by the site 'north'; this is 'south'") as caught:
        open_site_ledger(tmp_path / "south", site="south", cap=CAP)
    assert caught.value.code == "ledger-of-another-site"
    assert files(ledger_folder(tmp_path / "south")) == before
    open_site_ledger(north, site="north").close()
    open_site_ledger(north).close()


def test_a_record_of_another_site_is_found_though_the_right_key_signed_it(north: Path) -> None:
    key = SigningKey.load(ledger_key_path(north))
    folder = ledger_folder(north)
    last = read_ledger(folder).records[-1]
    before = head_of(last)
    foreign = last.model_copy(
        update={"site": "south", "sequence": before.sequence + 1, "previous_hash": before.hash}
    )
    journal = Journal.lock(folder)
    journal.append(encode_line(foreign, key), head_of(foreign))
    journal.close()
    check = read_ledger(folder, key.verify_key).check
    assert check.first_bad == before.sequence + 1 and "another site" in check.reason


def test_a_lost_key_is_said_and_no_new_one_is_made(north: Path) -> None:
    ledger_key_path(north).unlink()
    with pytest.raises(BadInputError, match="key that signs it is missing") as caught:
        open_site_ledger(north, site="north")
    assert caught.value.code == "ledger-key-missing" and not ledger_key_path(north).exists()


def test_a_key_that_others_can_read_is_refused(north: Path) -> None:
    ledger_key_path(north).chmod(0o644)
    with pytest.raises(BadInputError, match="can be read by other users"):
        open_site_ledger(north, site="north")


@pytest.mark.parametrize("known_cap", [True, False])
def test_a_delta_above_a_tenth_of_one_over_n_is_refused_at_opening(north: Path, known_cap: bool) -> None:
    cap = CAP if known_cap else None
    before = files(ledger_folder(north))
    for patients in (10_001, 200_000):
        with pytest.raises(BadInputError) as caught:
            open_site_ledger(north, cap=cap, patients=patients)
        assert caught.value.code == "delta"
    assert files(ledger_folder(north)) == before
    open_site_ledger(north, cap=cap, patients=10_000).close()
    open_site_ledger(north, cap=BudgetCap(8.0, 1e-7), patients=200_000).close()


@pytest.mark.parametrize(
    "cap", [BudgetCap(8.0, 0.0), BudgetCap(8.0, -1e-6), BudgetCap(-1.0, 1e-6), BudgetCap(8.0, float("nan"))]
)
def test_a_cap_that_promises_nothing_is_refused(tmp_path: Path, cap: BudgetCap) -> None:
    with pytest.raises(BadInputError):
        open_site_ledger(tmp_path, cap=cap)
    assert not (ledger_folder(tmp_path) / "ledger.jsonl").exists()


@pytest.mark.parametrize(
    ("state", "code"),
    [("new", errno.ENOSPC), ("old", errno.EROFS), ("torn", errno.EACCES)],
)
def test_a_disk_that_refuses_any_call_leaves_a_ledger_that_verifies(
    north: Path, tmp_path: Path, charge: Charger, state: str, code: int
) -> None:
    """Every call in turn fails, of making, mending and charging; what was taken is charged, and it goes on after."""
    at, refused = 0, True
    while refused:
        site_dir, taken = tmp_path / f"{at}", 0
        if state != "new":
            shutil.copytree(north, site_dir)
        if state == "torn":
            with (ledger_folder(site_dir) / "ledger.jsonl").open("ab") as stream:
                stream.write(b'{"hash":"sha256:12')
        start = charged(site_dir)
        disk = RefusingCall(at, code)
        try:
            with (
                watched_disk(disk),
                open_site_ledger(site_dir, site="north", cap=CAP) as ledger,
                ledger.reserve(charge(2)) as steps,
            ):
                for index in range(2):
                    steps(index)
                    taken += 1
        except PixcellError as error:
            assert disk.refused and os.strerror(code) in error.message and error.hint
        assert taken <= charged(site_dir) - start <= taken + 1, at
        middle = charged(site_dir)
        open_site_ledger(site_dir, site="north", cap=CAP).close()
        assert charged(site_dir) == middle
        refused = disk.refused
        at += 1
    assert taken == 2 and at >= 20


def charged(site_dir: Path) -> int:
    return sum(event.steps for event in read_ledger(ledger_folder(site_dir)).require_whole().totals())


def test_what_cannot_be_read_is_said(north: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(path: Path, *args: object, **kwargs: object) -> bytes:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "read_bytes", denied)
    with pytest.raises(BadInputError, match="Permission denied") as caught:
        read_ledger(ledger_folder(north))
    assert caught.value.code == "ledger-unreadable"


def test_a_folder_in_the_files_place_is_said(tmp_path: Path, open_ledger: Opener) -> None:
    (tmp_path / "ledger" / "ledger.jsonl").mkdir(parents=True)
    with pytest.raises(BadInputError, match="Is a directory"):
        open_ledger()


def test_a_second_writer_after_the_lock_was_deleted_is_noticed(
    open_ledger: Opener, charge: Charger, tmp_path: Path
) -> None:
    """Deleting the lock lets two processes in; the one that comes second to the file stops, and nothing is lost."""
    first = open_ledger()
    mine = first.reserve(charge(3))
    mine(0)
    (tmp_path / "ledger" / "lock").unlink()
    with open_ledger() as second, second.reserve(charge(1, 2)) as steps:
        steps(0)
        with pytest.raises(LedgerWriteError, match="Another process wrote") as caught:
            mine(1)
        assert caught.value.code == "ledger-changed"
        steps.close()
    first.close()
    view = read_ledger(tmp_path / "ledger").require_whole()
    assert sum(event.steps for event in view.totals()) == 2


def test_a_worker_that_outlives_its_trainer_does_not_keep_the_ledger(
    open_ledger: Opener, tmp_path: Path
) -> None:
    open_ledger().close()
    code = (
        "import os, signal, sys, time; from pathlib import Path; from site_client.ledger.journal import Journal\n"
        "journal = Journal.lock(Path(sys.argv[1]))\n"
        "worker = os.fork()\n"
        "if worker == 0:\n    time.sleep(120); os._exit(0)\n"
        "print(worker, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    trainer = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "ledger")], stdout=subprocess.PIPE, text=True
    )
    assert trainer.stdout is not None
    worker = int(trainer.stdout.readline())
    trainer.wait()
    try:
        open_ledger(wait_seconds=5.0).close()
        os.kill(worker, 0)
    finally:
        os.kill(worker, 9)
        trainer.stdout.close()


def test_a_ledger_edited_by_hand_is_refused_and_left_alone(north: Path) -> None:
    path = ledger_folder(north) / "ledger.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"noise_multiplier":20', b'"noise_multiplier":90', 1))
    before = files(ledger_folder(north))
    with pytest.raises(LedgerBrokenError, match="record 1"):
        open_site_ledger(north, site="north")
    assert files(ledger_folder(north)) == before


def test_a_truncated_ledger_is_refused_and_left_alone(north: Path) -> None:
    path = ledger_folder(north) / "ledger.jsonl"
    whole = path.read_bytes()
    assert any(isinstance(r, ReserveRecord) for r in read_ledger(ledger_folder(north)).records)
    for keep in (0, 1, len(whole) // 3, len(whole) // 2, len(whole) - 2):
        path.write_bytes(whole[:keep])
        with pytest.raises(LedgerBrokenError):
            open_site_ledger(north, site="north")
        assert path.read_bytes() == whole[:keep]
    path.write_bytes(whole)
    open_site_ledger(north, site="north").close()
