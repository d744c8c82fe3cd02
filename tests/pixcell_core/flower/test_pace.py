"""Looking for news: soon after some, seldom in silence, at once when the bell rings."""

from __future__ import annotations

import threading
import time
from itertools import pairwise
from pathlib import Path

import pytest

from pixcell_core.flower.pace import GROWTH, Bell, Pace


def test_pauses_grow_to_the_longest_and_start_anew_with_news() -> None:
    pace = Pace(0.2, 3.0)
    pauses = [pace.pause() for _ in range(20)]
    assert pauses[0] == 0.2 and pauses[-1] == 3.0
    assert all(b == pytest.approx(min(a * GROWTH, 3.0)) for a, b in pairwise(pauses))
    silence = 0.0
    for pause in pauses:
        assert pause == pytest.approx(min(0.2 + (GROWTH - 1) * silence, 3.0))
        silence += pause
    pace.reset()
    assert pace.pause() == 0.2


@pytest.mark.parametrize("pair", [(0.0, 1.0), (2.0, 1.0), (-1.0, 1.0)])
def test_a_pace_that_is_none_is_refused(pair: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="shortest"):
        Pace(*pair)


def test_a_bell_rings_once_for_each_touch(tmp_path: Path) -> None:
    bell, watcher = Bell(tmp_path / "bell"), Bell(tmp_path / "bell")
    assert not watcher.rang()
    bell.ring()
    assert watcher.rang() and not watcher.rang()
    time.sleep(0.01)
    bell.ring()
    assert watcher.rang()
    assert (tmp_path / "bell").stat().st_size == 0 and (tmp_path / "bell").stat().st_mode & 0o777 == 0o600


def test_waiting_ends_with_the_bell_or_with_the_time(tmp_path: Path) -> None:
    bell = Bell(tmp_path / "bell")
    began = time.monotonic()
    assert not bell.wait(0.2) and time.monotonic() - began >= 0.2
    timer = threading.Timer(0.2, Bell(tmp_path / "bell").ring)
    timer.start()
    assert bell.wait(60.0) and time.monotonic() - began < 30.0
    timer.join()
