"""The SuperNode's pauses: they follow messages, and its executor is told of one."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

from flwr.supernode import start_client_internal

from pixcell_core.flower.pace import Bell
from site_client.agent.pauses import IDLE_S, SOON_S, SuperNodePauses


def test_looks_grow_rare_in_silence_and_quick_after_a_message(tmp_path: Path) -> None:
    slept: list[float] = []
    bell = Bell(tmp_path / "bell")
    pauses = SuperNodePauses(3.0, bell, slept.append)
    for _ in range(15):
        pauses.sleep(3.0)
    assert slept[0] == SOON_S and slept[-1] == 3.0 and slept == sorted(slept)
    assert not bell.rang()
    # A message came: Flower waits for the reply in steps of half a second, and the executor is told once.
    slept.clear()
    for _ in range(20):
        pauses.sleep(0.5)
    assert slept[0] == 0.05 and max(slept) == 0.5 and bell.rang() and not bell.rang()
    slept.clear()
    pauses.sleep(3.0)
    assert slept == [SOON_S]
    pauses.sleep(0.5)
    assert bell.rang() and slept[-1] == 0.05


def test_a_site_that_wants_to_ask_seldom_or_often_is_obeyed(tmp_path: Path) -> None:
    for longest in (0.05, 60.0):
        slept: list[float] = []
        pauses = SuperNodePauses(longest, Bell(tmp_path / "bell"), slept.append)
        for _ in range(60):
            pauses.sleep(3.0)
        assert slept[-1] == longest
        pauses.sleep(0.5)
        assert slept[-1] <= min(0.5, longest)


def test_flower_still_pauses_as_it_did_when_this_was_written() -> None:
    found = re.findall(r"time\.sleep\(([\d.]+)\)", inspect.getsource(start_client_internal))
    assert sorted(map(float, found)) == [0.5, 0.5, IDLE_S]
