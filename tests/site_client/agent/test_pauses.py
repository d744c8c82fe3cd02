"""The SuperNode's pauses: they follow messages, and its executor is told of one."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

from flwr.supernode import start_client_internal

from pixcell_core.flower.pace import Bell
from site_client.agent.pauses import (
    CONTENT_PATIENCE_S,
    CONTENT_WAIT,
    GAVE_UP,
    IDLE_S,
    SOON_S,
    SuperNodePauses,
)


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
    # The pause without an end is known by the function it stands in.
    source = inspect.getsource(start_client_internal._push_messages)
    body = source[source.index(f"def {CONTENT_WAIT}(") :]
    assert 'while (content := object_store.get(tree.object_id)) == b"":' in body and "time.sleep(0.5)" in body


class Hours:
    """A clock that only pauses move."""

    def __init__(self) -> None:
        self.now, self.ended_at = 0.0, -1.0

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def end(self) -> None:
        if self.ended_at < 0:
            self.ended_at = self.now


def yield_object_contents(pauses: SuperNodePauses, times: int) -> None:
    """Waits as Flower's function of this name does."""
    for _ in range(times):
        pauses.sleep(0.5)


def test_a_reply_whose_rest_never_comes_is_given_up_and_a_long_task_is_not(tmp_path: Path) -> None:
    hours = Hours()
    pauses = SuperNodePauses(3.0, Bell(tmp_path / "bell"), hours.sleep, lambda: hours.now, hours.end)
    while hours.now < 7200.0:  # training takes hours
        pauses.sleep(0.5)
    began = hours.now
    yield_object_contents(pauses, 100)  # five seconds for one part, then a part came and was sent
    hours.now += 30.0
    yield_object_contents(pauses, 1000)
    assert hours.ended_at == -1.0
    yield_object_contents(pauses, 1000)
    assert began + 30.0 + CONTENT_PATIENCE_S < hours.ended_at < began + 40.0 + CONTENT_PATIENCE_S


def test_giving_up_ends_the_process_for_the_supervisor_to_see(tmp_path: Path) -> None:
    script = "from site_client.agent.pauses import end_process\nend_process()\n"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == GAVE_UP and "starting anew" in done.stdout
