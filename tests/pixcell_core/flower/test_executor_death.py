"""A task whose executor is killed must fall silent, not say goodbye: Flower takes the goodbye for an end without reply."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

EXECUTOR = """
import signal, sys, time
from pathlib import Path
from pixcell_core.flower.executor import _fork_task

folder = Path(sys.argv[1])

def task(_runtime, _token):
    def goodbye(*_):
        (folder / "goodbye").touch()
        sys.exit(0)
    signal.signal(signal.SIGTERM, goodbye)   # as Flower's client app does
    (folder / "begun").touch()
    time.sleep(60)

print(_fork_task("", "", task), flush=True)
time.sleep(60)
"""


def wait_for(true: object, seconds: float = 30.0) -> None:
    """Wait until a function is true."""
    end = time.monotonic() + seconds
    while not true():  # type: ignore[operator]
        assert time.monotonic() < end
        time.sleep(0.02)


def started(folder: Path) -> tuple[subprocess.Popen[str], psutil.Process]:
    """An executor with one task in hand."""
    executor = subprocess.Popen(
        [sys.executable, "-c", EXECUTOR, str(folder)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert executor.stdout is not None
    task = psutil.Process(int(executor.stdout.readline()))
    wait_for((folder / "begun").exists)
    return executor, task


def test_a_task_of_a_killed_executor_is_gone_without_a_goodbye(tmp_path: Path) -> None:
    executor, task = started(tmp_path)
    executor.kill()
    executor.wait()
    wait_for(lambda: not task.is_running() or task.status() == psutil.STATUS_ZOMBIE)
    assert not (tmp_path / "goodbye").exists()


def test_the_goodbye_would_be_seen(tmp_path: Path) -> None:
    executor, task = started(tmp_path)
    task.send_signal(signal.SIGTERM)
    wait_for((tmp_path / "goodbye").exists)
    assert executor.poll() is None, "it was the task that was ended, not its executor"
    executor.kill()
    executor.wait()
