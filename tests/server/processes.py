"""Starts the real processes of a consortium on loopback, through the command line, and ends every one of them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

PIXCELL = [sys.executable, "-c", "from pixcell_core.cli.main import run; run()"]


def pixcell(*arguments: str | Path, expect: int = 0, timeout: float = 120.0) -> dict[str, Any]:
    """Run a command to its end; returns the data of its JSON envelope (or the error)."""
    done = subprocess.run(
        [*PIXCELL, *map(str, arguments), "--format", "json"],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == expect, f"{arguments}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    envelope = json.loads(done.stdout) if done.stdout.strip() else {}
    return envelope.get("data", envelope) if expect == 0 else envelope


def wait_until(true: Callable[[], bool], seconds: float, what: str) -> None:
    """Wait for a condition or fail."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"waited {seconds} s for {what}"
        time.sleep(0.05)


@dataclass
class Processes:
    """Long-running commands, each with its log; `stop` leaves none behind."""

    folder: Path
    running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def start(self, name: str, *arguments: str | Path) -> None:
        """Start a command that stays."""
        with (self.folder / f"{name}.log").open("wb") as log:
            self.running[name] = subprocess.Popen(
                [*PIXCELL, *map(str, arguments)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )

    def log(self, name: str) -> str:
        """What a command said."""
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def end(self, name: str, patience: float = 30.0) -> int:
        """SIGTERM one command and wait; returns its exit code. No child of it may be left."""
        process = self.running.pop(name)
        family = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        process.send_signal(signal.SIGTERM)
        code = process.wait(patience)
        _, alive = psutil.wait_procs(family, timeout=10)
        for orphan in alive:
            orphan.kill()
        assert not alive, f"{name} left {[' '.join(p.cmdline()) for p in alive]}"
        return code

    def stop(self) -> None:
        """End everything."""
        for name in reversed(list(self.running)):
            self.end(name)


def site_process(processes: Processes, name: str, part: str) -> psutil.Process:
    """A child of a site's supervisor whose command line holds `part`."""
    for child in psutil.Process(processes.running[name].pid).children(recursive=True):
        if part in " ".join(child.cmdline()):
            return child
    raise AssertionError(f"{name} runs no {part}")
