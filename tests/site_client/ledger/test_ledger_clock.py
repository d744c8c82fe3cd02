"""A clock that runs back: refused beyond a minute, repeated within it, corrected only by the owner and on record."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from pixcell_core.private.ledger_record import (
    FIRST_HASH,
    OpenedRecord,
    encode_line,
    encode_public_key,
    head_of,
    time_of,
)
from pixcell_core.trust.keys import SigningKey
from site_client.ledger.clock import CLOCK_TOLERANCE, ClockBackwardsError
from site_client.ledger.journal import Journal
from site_client.ledger.ledger import Ledger, RoundCharge
from site_client.ledger.view import BudgetCap, read_ledger

NOON = datetime(2026, 3, 4, 12, 0, 0, tzinfo=UTC)
SECOND = timedelta(seconds=1)
Opener = Callable[..., Ledger]
Charger = Callable[..., RoundCharge]


class Clock:
    """A clock that stands where it is put."""

    def __init__(self) -> None:
        self.now = NOON

    def __call__(self) -> datetime:
        return self.now


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "lock"}


def test_a_clock_set_back_is_refused_wherever_it_is_met_and_nothing_is_lost(
    open_ledger: Opener, charge: Charger, tmp_path: Path
) -> None:
    clock, folder = Clock(), tmp_path / "ledger"
    with open_ledger(clock=clock) as ledger:
        steps = ledger.reserve(charge(3))
        steps(0)
        before = files(folder)
        clock.now = NOON - timedelta(hours=1)
        with pytest.raises(ClockBackwardsError, match=r"2026-03-04T11:00:00.*2026-03-04T12:00:00") as caught:
            steps(1)
        assert caught.value.code == "clock-backwards" and "correct-clock" in caught.value.hint
        with pytest.raises(ClockBackwardsError):
            ledger.reserve(charge(1))
        # The open round is closed by the next reserve: a note for the reader, which charges nothing.
        assert files(folder)["ledger.jsonl"].startswith(before["ledger.jsonl"])
        assert sum(e.steps for e in ledger.totals()) == 1
    before = files(folder)
    with pytest.raises(ClockBackwardsError, match="Nothing was drawn"):
        open_ledger(clock=clock)
    assert files(folder) == before and read_ledger(folder).check.ok
    clock.now = NOON
    with open_ledger(clock=clock) as ledger, ledger.reserve(charge(1)) as more:
        more(0)
    assert read_ledger(folder).check.ok


def test_within_the_tolerance_the_last_time_is_repeated(
    open_ledger: Opener, charge: Charger, tmp_path: Path
) -> None:
    clock = Clock()
    with open_ledger(clock=clock) as ledger, ledger.reserve(charge(3)) as steps:
        steps(0)
        clock.now = NOON - CLOCK_TOLERANCE
        steps(1)
        clock.now = NOON + SECOND
        steps(2)
    times = [time_of(r) for r in read_ledger(tmp_path / "ledger").require_whole().records]
    assert times == [NOON, NOON, NOON, NOON + SECOND, NOON + SECOND]
    clock.now = NOON - CLOCK_TOLERANCE
    with pytest.raises(ClockBackwardsError):
        open_ledger(clock=clock)


def test_a_refusal_comes_before_anything_is_mended(open_ledger: Opener, tmp_path: Path) -> None:
    clock = Clock()
    open_ledger(clock=clock).close()
    with (tmp_path / "ledger" / "ledger.jsonl").open("ab") as stream:
        stream.write(b'{"torn')
    before = files(tmp_path / "ledger")
    clock.now -= timedelta(days=1)
    with pytest.raises(ClockBackwardsError):
        open_ledger(clock=clock)
    assert files(tmp_path / "ledger") == before


def test_the_owner_corrects_a_wrong_time_once_and_on_record(
    open_ledger: Opener, charge: Charger, tmp_path: Path
) -> None:
    clock = Clock()
    clock.now = NOON + timedelta(days=3650)
    with open_ledger(clock=clock) as ledger, ledger.reserve(charge(2)) as steps:
        steps(0)
    clock.now = NOON
    with open_ledger(clock=clock, correct_clock=True) as ledger:
        corrected = ledger.records[-1]
        assert isinstance(corrected, OpenedRecord) and corrected.reason == "clock-corrected"
        assert time_of(corrected) == NOON and sum(e.steps for e in ledger.totals()) == 1
        with ledger.reserve(charge(1)) as steps:
            steps(0)
    view = read_ledger(tmp_path / "ledger").require_whole()
    with open_ledger(clock=clock, correct_clock=True) as ledger:
        assert len(ledger.records) == len(view.records), "a clock that is right needs no correction"


@pytest.mark.parametrize(
    ("later", "reason", "ok"),
    [(SECOND, "cap-changed", True), (-SECOND, "cap-changed", False), (-SECOND, "clock-corrected", True)],
)
def test_verification_demands_times_that_do_not_run_back(
    tmp_path: Path, key: SigningKey, later: timedelta, reason: str, ok: bool
) -> None:
    """Records signed by the right key: only the time is wrong."""
    journal = Journal.lock(tmp_path / "ledger")
    before = None
    for number, (why, at) in enumerate((("created", NOON), (reason, NOON + later))):
        record = OpenedRecord.model_validate(
            {
                "sequence": number,
                "previous_hash": FIRST_HASH if before is None else before.hash,
                "site": "north",
                "time": at.isoformat(),
                "reason": why,
                "cap_epsilon": 8.0,
                "cap_delta": 1e-5,
                "public_key": encode_public_key(key.verify_key),
            }
        )
        before = head_of(record)
        journal.append(encode_line(record, key), before)
    journal.close()
    check = read_ledger(tmp_path / "ledger", key.verify_key).check
    assert check.ok is ok and (ok or (check.first_bad == 1 and "dated before" in check.reason))


def test_a_ledger_opened_by_another_zones_clock_is_the_same(open_ledger: Opener, tmp_path: Path) -> None:
    from datetime import timezone

    open_ledger(clock=lambda: NOON).close()
    east = NOON.astimezone(timezone(timedelta(hours=9)))
    with open_ledger(cap=BudgetCap(2.0, 1e-5), clock=lambda: east) as ledger:
        assert ledger.records[-1].time == "2026-03-04T12:00:00+00:00"
