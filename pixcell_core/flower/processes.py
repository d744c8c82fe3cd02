"""Child processes forked from a parent that has already imported its code, and that never outlive it.

Importing Flower costs about three CPU seconds. A service imports it once and forks its workers; a worker that
crashed is forked again in milliseconds. Fork only while the parent has a single thread.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

PR_SET_PDEATHSIG = 1

FLOWER_ENVIRONMENT: Mapping[str, str] = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "UV_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "PYTHONUNBUFFERED": "1",
}
"""No telemetry, no update check, nothing installed at run time, one thread per process."""


def quiet_flower(home: Path) -> None:
    """Set the environment under which every Flower process of ours runs; `home` is its private folder."""
    home.mkdir(parents=True, exist_ok=True, mode=0o700)
    os.environ.update(FLOWER_ENVIRONMENT)
    os.environ["FLWR_HOME"] = str(home)


def die_with_parent(parent: int, number: int = signal.SIGTERM) -> None:
    """Ask the kernel to send this process a signal when its parent is gone (Linux; elsewhere the groups must do)."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, number)
        if os.getppid() != parent:
            os._exit(1)


@dataclass
class Child:
    """One forked worker: what it runs, where its words go, and how it ended last."""

    name: str
    body: Callable[[], None]
    log: Path
    pid: int | None = None
    exit_code: int | None = None
    started: float = 0.0
    starts: int = 0
    log_offset: int = field(default=0, repr=False)

    def start(self) -> None:
        """Fork; the child runs `body` with its output appended to `log`, then exits without returning here."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self.log_offset = self.log.stat().st_size if self.log.exists() else 0
        parent = os.getpid()
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid == 0:
            self._run(parent)
        self.pid, self.exit_code = pid, None
        self.started, self.starts = time.monotonic(), self.starts + 1

    def _run(self, parent: int) -> None:
        code = 1
        try:
            die_with_parent(parent)
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD):
                signal.signal(number, signal.SIG_DFL)
            with self.log.open("ab", buffering=0) as stream:
                os.dup2(stream.fileno(), 1)
                os.dup2(stream.fileno(), 2)
            self.body()
            code = 0
        except SystemExit as leave:
            code = leave.code if isinstance(leave.code, int) else (0 if leave.code is None else 1)
        except BaseException:
            traceback.print_exc()
        finally:
            with contextlib.suppress(OSError, ValueError):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)

    def poll(self) -> bool:
        """Whether it still runs; a child that ended leaves its exit code (negative: the signal)."""
        if self.pid is None:
            return False
        try:
            done, status = os.waitpid(self.pid, os.WNOHANG)
        except ChildProcessError:
            done, status = self.pid, 0
        if done:
            self.pid, self.exit_code = None, os.waitstatus_to_exitcode(status)
        return self.pid is not None

    def words(self, most: int = 65_536) -> str:
        """What it wrote since it was last started (the end of it)."""
        if not self.log.exists():
            return ""
        with self.log.open("rb") as stream:
            size = stream.seek(0, os.SEEK_END)
            stream.seek(max(self.log_offset, size - most))
            return stream.read(most).decode("utf-8", "replace")

    def signal(self, number: int) -> None:
        """Send a signal if it still runs."""
        if self.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)


def stop_children(children: list[Child], patience_s: float = 5.0) -> None:
    """Terminate all, wait, and kill what does not go."""
    for child in children:
        child.signal(signal.SIGTERM)
    end = time.monotonic() + patience_s
    while any([child.poll() for child in children]) and time.monotonic() < end:
        time.sleep(0.02)
    for child in children:
        child.signal(signal.SIGKILL)
    while any([child.poll() for child in children]):
        time.sleep(0.02)
