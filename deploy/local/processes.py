"""Starts the platform's commands as an operator would: as processes, with logs, and ends what it started."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pixcell_core.errors import PixcellError, TimedOutError

COMMAND = (sys.executable, "-m", "pixcell_core.cli.main")


class StageFailedError(PixcellError):
    """A command of the demonstration did not end well."""

    default_code = "stage-failed"


def environment(threads: int) -> dict[str, str]:
    """The environment of every child: few threads, no telemetry, no hub, no downloads."""
    return os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "PYTHONUNBUFFERED": "1",
    }


@dataclass
class Processes:
    """Runs commands to their end or in the background; every one logs into `logs`."""

    logs: Path
    stamps: Path
    threads: int = 1
    _running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _aborted: bool = False

    def call(
        self, name: str, arguments: Sequence[str], *, accept: Sequence[int] = (0,), once: bool = True
    ) -> dict[str, Any]:
        """Run `pixcell ARGUMENTS --format json` and return its envelope.

        A command that ended well is not run again with the same arguments: its envelope is kept under `stamps`.

        Raises:
            StageFailedError: its exit code is not among `accept`.
        """
        stamp = (
            self.stamps
            / f"{name}-{hashlib.sha256(json.dumps(list(arguments)).encode()).hexdigest()[:12]}.json"
        )
        if once and stamp.exists():
            kept: dict[str, Any] = json.loads(stamp.read_text())
            return kept
        log = self.logs / f"{name}.log"
        with log.open("ab") as errors:
            child = self._start(name, [*arguments, "--format", "json"], subprocess.PIPE, errors)
            try:
                output, _ = child.communicate()
            finally:
                self._forget(name)
        try:
            envelope: dict[str, Any] = json.loads(output.decode().strip().splitlines()[-1])
        except (ValueError, IndexError):
            envelope = {
                "status": "error",
                "code": "no-answer",
                "message": f"exit code {child.returncode}",
                "hint": "",
            }
        envelope["exit_code"] = child.returncode
        if child.returncode not in accept:
            raise StageFailedError(
                f"{name}: {envelope.get('message') or f'exit code {child.returncode}'}",
                hint=f"{envelope.get('hint', '')} Log: {log}. Run the demo again: it goes on where it stopped.".strip(),
                code=str(envelope.get("code", "stage-failed")),
            )
        partial = stamp.with_suffix(".partial")
        partial.write_text(json.dumps(envelope))
        partial.replace(stamp)
        return envelope

    def background(
        self, name: str, arguments: Sequence[str], ready: Path, timeout: float = 120.0
    ) -> dict[str, Any]:
        """Start a service and wait for its ready file; returns what the file says."""
        ready.unlink(missing_ok=True)
        log = self.logs / f"{name}.log"
        with log.open("ab") as handle:
            child = self._start(name, [*arguments, "--ready-file", str(ready)], handle, handle)
        end = time.monotonic() + timeout
        while not ready.exists():
            if child.poll() is not None:
                self._forget(name)
                raise StageFailedError(
                    f"{name} ended before it was ready (exit code {child.returncode}).",
                    hint=f"Its log says why: {log}",
                )
            if time.monotonic() > end:
                raise TimedOutError(f"{name} was not ready after {timeout:.0f} s.", hint=f"Its log: {log}")
            time.sleep(0.1)
        try:
            said: dict[str, Any] = json.loads(ready.read_text() or "{}")
        except ValueError:
            said = {}
        return said

    def _start(
        self, name: str, arguments: Sequence[str], output: Any, errors: Any
    ) -> subprocess.Popen[bytes]:
        child = subprocess.Popen(
            [*COMMAND, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=errors,
            env=environment(self.threads),
            start_new_session=True,
        )
        with self._lock:
            self._running[name] = child
            aborted = self._aborted
        if aborted:
            self.stop()
        return child

    def abort(self) -> None:
        """End everything and start nothing more: after Ctrl-C, or when a stage failed."""
        with self._lock:
            self._aborted = True
        self.stop()

    def _forget(self, name: str) -> None:
        with self._lock:
            self._running.pop(name, None)

    def stop(self, timeout: float = 15.0) -> None:
        """End everything still running, newest first: ask, wait, then insist on the whole process group."""
        with self._lock:
            children = list(reversed(self._running.values()))
            self._running.clear()
        for child in children:
            if child.poll() is None:
                child.terminate()
        end = time.monotonic() + timeout
        for child in children:
            try:
                child.wait(max(0.1, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
