"""Runs the room's commands as real processes, the way a person at a terminal would."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PROGRAM = """
import typer
from site_client.features import commands as features
from site_client.slides import commands as slides
root = typer.Typer()
slides.register(root)
features.register(root)
root()
"""
REPOSITORY = Path(__file__).resolve().parents[3]


def command(*words: object) -> list[str]:
    """The command line of `pixcell site ...` with this room's commands alone."""
    return [sys.executable, "-c", PROGRAM, "site", *map(str, words)]


def environment() -> dict[str, str]:
    """One thread, and the checkout's own code."""
    return {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}


def run(*words: object, prefix: list[str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run to the end."""
    return subprocess.run(
        [*(prefix or []), *command(*words)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def envelope(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """The JSON envelope on stdout; fails when stdout carries anything else."""
    return dict(json.loads(done.stdout))


def interrupt_when(ready: Callable[[], bool], *words: object) -> subprocess.CompletedProcess[str]:
    """Start, press Ctrl-C (SIGINT to the whole group, as a terminal does) once `ready()`, and wait."""
    started = subprocess.Popen(
        command(*words),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    limit = time.monotonic() + 120
    while not ready() and started.poll() is None and time.monotonic() < limit:
        time.sleep(0.01)
    if started.poll() is None:
        os.killpg(started.pid, signal.SIGINT)
    out, err = started.communicate(timeout=120)
    return subprocess.CompletedProcess(started.args, started.returncode, out, err)
