"""Charging: before the noise, once per step, under the cap, by one process, never given back."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pixcell_core.errors import BadInputError
from pixcell_core.private.accounting import GaussianEvent, epsilon
from pixcell_core.private.ledger_record import LedgerHead, OpenedRecord, ReserveRecord, SpentRecord
from pixcell_core.trust.keys import SigningKey
from site_client.ledger.journal import LedgerBusyError, LedgerWriteError
from site_client.ledger.ledger import (
    BudgetExceededError,
    Ledger,
    RoundCharge,
)
from site_client.ledger.reserved_steps import StepNotReservedError
from site_client.ledger.view import BudgetCap, LedgerBrokenError, read_ledger
from tests.site_client.ledger.disk_calls import REAL, watched_disk

Opener = Callable[..., Ledger]
Charger = Callable[..., RoundCharge]


def steps_charged(folder: Path) -> int:
    return sum(e.steps for e in read_ledger(folder).require_whole().totals())


def test_a_record_says_what_was_used_and_names_no_patient(open_ledger: Opener, charge: Charger) -> None:
    with open_ledger() as ledger, ledger.reserve(charge(2)) as steps:
        steps(0)
        record = ledger.records[-1]
    assert isinstance(record, ReserveRecord)
    said = record.model_dump()
    assert said == {
        "schema_version": "ledger-record/v1",
        "sequence": 1,
        "previous_hash": said["previous_hash"],
        "site": "north",
        "time": "2026-01-02T03:04:05+00:00",
        "kind": "reserve",
        "study": "lung-study",
        "round": 1,
        "purpose": "training",
        "unit": "patient",
        "adjacency": "add-or-remove-one",
        "sample_rate": 1.0,
        "noise_multiplier": 20.0,
        "steps": 1,
        "max_grad_norm": 0.1,
        "code_digest": "sha256:" + "c0de" * 16,
    }


def test_totals_and_epsilon_survive_a_reopen(open_ledger: Opener, charge: Charger, tmp_path: Path) -> None:
    with open_ledger() as ledger:
        with ledger.reserve(charge(3)) as steps:
            for index in range(3):
                steps(index)
        with ledger.reserve(charge(5, round=2, rate=0.5), at_a_time=5) as steps:
            steps(0)
        head = ledger.head
    with open_ledger(cap=None) as ledger:
        assert ledger.head == head and ledger.cap == BudgetCap(8.0, 1e-5)
        events = [GaussianEvent(0.5, 20.0, 5), GaussianEvent(1.0, 20.0, 3)]
        assert list(ledger.totals()) == events
        assert ledger.epsilon(1e-5) == epsilon(events, 1e-5)
    spent = [r for r in read_ledger(tmp_path / "ledger").records if isinstance(r, SpentRecord)]
    assert [(r.steps_reserved, r.steps_taken, r.first_reserve) for r in spent] == [(3, 3, 1), (5, 1, 5)]


def test_the_charge_is_on_disk_when_the_call_returns(
    open_ledger: Opener, charge: Charger, tmp_path: Path
) -> None:
    with open_ledger() as ledger:
        steps = ledger.reserve(charge(4))
        for index in range(4):
            steps(index)
            assert steps_charged(tmp_path / "ledger") == index + 1


def test_file_and_folder_are_synced_before_the_charge_returns(
    open_ledger: Opener, charge: Charger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    real = os.fsync

    def synced(descriptor: int) -> None:
        seen.append("sync " + Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        real(descriptor)

    with open_ledger() as ledger:
        steps = ledger.reserve(charge(2))
        steps(0)
        monkeypatch.setitem(REAL, "fsync", synced)
        monkeypatch.setitem(REAL, "fdatasync", synced)
        with watched_disk(lambda point: seen.append(point) if point.startswith("after") else None):
            steps(1)
        seen.append("noise")
        assert [point for point in seen if point != "after open"] == [
            "after write",
            "sync ledger.jsonl",
            "after fsync",
            "after pwrite",
            "sync head.json",
            "after fdatasync",
            "noise",
        ]


def test_steps_are_taken_in_order_once_and_no_further(open_ledger: Opener, charge: Charger) -> None:
    with open_ledger() as ledger:
        steps = ledger.reserve(charge(2))
        with pytest.raises(StepNotReservedError):
            steps(1)
        steps(0)
        with pytest.raises(StepNotReservedError, match="charged once"):
            steps(0)
        steps(1)
        with pytest.raises(StepNotReservedError):
            steps(2)
        steps.close()
        steps.close()
        assert sum(e.steps for e in ledger.totals()) == 2
        first = ledger.reserve(charge(2))
        ledger.reserve(charge(2))
        with pytest.raises(StepNotReservedError):
            first(0)


def test_a_round_that_would_pass_the_cap_is_refused_before_anything(
    open_ledger: Opener, charge: Charger, tmp_path: Path
) -> None:
    with open_ledger(cap=BudgetCap(1.0, 1e-5)) as ledger:
        before = (tmp_path / "ledger" / "ledger.jsonl").read_bytes()
        allowed = max(n for n in range(1, 60) if epsilon([GaussianEvent(1.0, 20.0, n)], 1e-5).value <= 1.0)
        with pytest.raises(BudgetExceededError, match=r"per patient at delta 1e-05, over its cap of 1\b"):
            ledger.reserve(charge(allowed + 1))
        assert (tmp_path / "ledger" / "ledger.jsonl").read_bytes() == before
        with ledger.reserve(charge(allowed), at_a_time=allowed) as steps:
            steps(0)
        with pytest.raises(BudgetExceededError):
            ledger.reserve(charge(1, round=2))
        assert ledger.epsilon(1e-5).value <= 1.0


def test_nothing_is_given_back_and_a_repeated_step_is_a_new_charge(
    open_ledger: Opener, charge: Charger, tmp_path: Path
) -> None:
    with pytest.raises(RuntimeError, match="training broke"), open_ledger() as ledger:
        steps = ledger.reserve(charge(4), at_a_time=4)
        steps(0)
        raise RuntimeError("training broke")
    assert steps_charged(tmp_path / "ledger") == 4
    with open_ledger() as ledger, ledger.reserve(charge(4)) as steps:
        steps(0)
    assert steps_charged(tmp_path / "ledger") == 5


def test_the_cap_can_be_changed_by_the_owner_and_the_change_is_recorded(
    open_ledger: Opener, charge: Charger
) -> None:
    open_ledger(cap=BudgetCap(1.0, 1e-5)).close()
    with open_ledger(cap=BudgetCap(2.0, 1e-6)) as ledger:
        changed = ledger.records[-1]
        assert isinstance(changed, OpenedRecord) and changed.reason == "cap-changed"
        assert ledger.cap == BudgetCap(2.0, 1e-6)


@pytest.mark.parametrize("cap", [BudgetCap(0.0, 1e-5), BudgetCap(float("inf"), 1e-5), BudgetCap(8.0, 1e-3)])
def test_a_cap_without_meaning_is_refused(open_ledger: Opener, cap: BudgetCap) -> None:
    with pytest.raises(BadInputError):
        open_ledger(cap=cap)


def test_a_new_ledger_needs_a_cap(open_ledger: Opener) -> None:
    with pytest.raises(BadInputError, match="no cap"):
        open_ledger(cap=None)


@pytest.mark.parametrize(
    "wrong", [{"code_digest": "none"}, {"study": "../evil"}, {"study": "given name, 1950"}, {"round": -1}]
)
def test_a_round_that_cannot_be_recorded_is_refused_before_it_begins(
    open_ledger: Opener, wrong: dict[str, object]
) -> None:
    settings = {"study": "s", "round": 1, "code_digest": "sha256:" + "0" * 64, **wrong}
    with open_ledger() as ledger:
        before = ledger.head
        with pytest.raises(BadInputError, match="cannot be charged"):
            ledger.reserve(
                RoundCharge(sample_rate=1.0, noise_multiplier=9.0, steps=1, max_grad_norm=1.0, **settings)  # type: ignore[arg-type]
            )
        assert ledger.head == before


def test_one_writer_at_a_time_and_a_dead_writers_lock_is_no_obstacle(
    open_ledger: Opener, tmp_path: Path
) -> None:
    open_ledger().close()
    code = (
        "import sys, time; from pathlib import Path; from site_client.ledger.journal import Journal\n"
        "j = Journal.lock(Path(sys.argv[1])); print('locked', flush=True); time.sleep(60)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "ledger")], stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None and other.stdout.readline() == "locked\n"
        with pytest.raises(LedgerBusyError, match=f"process {other.pid}"):
            open_ledger()
        assert read_ledger(tmp_path / "ledger").check.ok, "looking needs no lock"
        other.kill()
        other.wait()
    assert (tmp_path / "ledger" / "lock").exists()
    open_ledger(wait_seconds=5.0).close()


def test_a_full_disk_stops_before_noise_and_leaves_a_whole_ledger(
    open_ledger: Opener, charge: Charger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = open_ledger()
    steps = ledger.reserve(charge(3))
    steps(0)
    real = os.write

    def full(descriptor: int, data: bytes) -> int:
        if real(descriptor, bytes(data)[:10]) == 10:
            raise OSError(28, "No space left on device")
        return 0

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(LedgerWriteError, match="No space left"):
        steps(1)
    monkeypatch.setattr(os, "write", real)
    with pytest.raises(LedgerWriteError, match="failed to write before"):
        steps(1)
    ledger._journal.close()
    assert read_ledger(tmp_path / "ledger").check.ok and steps_charged(tmp_path / "ledger") == 1
    with open_ledger() as again, again.reserve(charge(1)) as more:
        more(0)
    assert steps_charged(tmp_path / "ledger") == 2


def test_a_forked_child_cannot_charge_for_its_parent(open_ledger: Opener, charge: Charger) -> None:
    with open_ledger() as ledger:
        steps = ledger.reserve(charge(2))
        child = os.fork()
        if child == 0:
            try:
                steps(0)
            except LedgerWriteError:
                os._exit(7)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        steps(0)


def test_a_ledger_of_another_key_is_refused(filled: Path) -> None:
    with pytest.raises(LedgerBrokenError, match="another key"):
        Ledger.open(filled, SigningKey.generate(), BudgetCap(8.0, 1e-5))


def test_an_exchanged_head_must_stand_in_the_chain(filled: Path) -> None:
    view = read_ledger(filled)
    assert view.head is not None and view.contains(view.head)
    assert not view.contains(LedgerHead(view.head.sequence, "sha256:" + "0" * 64))
    assert not view.contains(LedgerHead(view.head.sequence + 1, view.head.hash))
