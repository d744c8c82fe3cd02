"""Keeps a site's agent up: SuperNode, executor and, if asked, the trainer; restarts what falls, stops all together.

The supervisor starts the trainer first (its imports take longest), imports Flower once, forks the two network
processes, and then only watches. A SuperNode that crashed cannot rejoin before the hub has forgotten it, some
20 s: it is started again every few seconds until it is let in, and the site's state says so meanwhile.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from pixcell_core.contracts.atomic import write_atomically
from pixcell_core.errors import PixcellError
from pixcell_core.flower.processes import Child, die_with_parent, quiet_flower, stop_children
from site_client.agent.network import (
    CONNECTED,
    LOOPBACK,
    NetworkSettings,
    explain,
    import_flower,
    run_executor,
    run_supernode,
)
from site_client.approvals.site_folder import SiteFolder
from site_client.trainer.spool import Spool

LOOK_S = 0.2
FIRST_PAUSE_S = 2.0
LONGEST_PAUSE_S = 10.0


@dataclass(frozen=True)
class SupervisorSettings:
    """How a site is started. `trainer` is the command line of the trainer to keep up, or empty."""

    folder: SiteFolder
    hub: str | None = None
    poll_s: float = 3.0
    runtime_port: int = 0
    trainer: tuple[str, ...] = ()
    ready_file: Path | None = None


class Supervisor:
    """Starts and watches a site's processes until it is told to stop."""

    def __init__(self, settings: SupervisorSettings, say: Callable[[str], None]) -> None:
        self._settings, self._say = settings, say
        self._folder = settings.folder
        self._stopping = False
        self._trainer: subprocess.Popen[bytes] | None = None
        self._trainer_due = 0.0
        self._pause = FIRST_PAUSE_S
        self._due: dict[str, float] = {}
        self._last_code = ""
        self._announced = False

    def run(self) -> None:
        """Serve until SIGTERM or SIGINT; returns when every process is gone."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)
        identity = self._folder.identity()
        Spool(self._folder.spool).open()
        self._start_trainer()
        quiet_flower(self._folder.agent / "flower")
        import_flower()
        children = self._children(self._settings.hub or identity.hub)
        try:
            for child in children:
                child.start()
            while not self._stopping:
                self._look(children)
                time.sleep(LOOK_S)
        finally:
            self._say("stopping")
            self._signal_trainer(signal.SIGTERM)
            stop_children(children)
            self._end_trainer()
            self._state("stopped", "")
            if self._settings.ready_file is not None:
                self._settings.ready_file.unlink(missing_ok=True)

    def _children(self, hub: str) -> list[Child]:
        secret_file = self._folder.agent / "executor.secret"
        secret_file.unlink(missing_ok=True)
        descriptor = os.open(secret_file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(secrets.token_bytes(32))
        port = self._settings.runtime_port or free_port()
        network = NetworkSettings(self._folder, hub, port, secret_file, self._settings.poll_s)
        return [
            Child("supernode", lambda: run_supernode(network), self._folder.logs / "supernode.log"),
            Child("executor", lambda: run_executor(network), self._folder.logs / "executor.log"),
        ]

    def _look(self, children: list[Child]) -> None:
        now = time.monotonic()
        for child in children:
            if child.poll():
                continue
            if child.name not in self._due:
                code, reason = explain(child.words()) if child.name == "supernode" else ("executor-ended", "")
                if code != self._last_code:
                    self._say(f"{child.name} ended ({child.exit_code}): {reason or 'starting it again'}")
                self._state(code, reason)
                self._due[child.name] = now + self._pause
                self._pause = min(self._pause * 1.5, LONGEST_PAUSE_S)
            elif now >= self._due[child.name]:
                del self._due[child.name]
                child.start()
        self._look_at_trainer(now)
        supernode = children[0]
        if supernode.pid is not None and self._last_code != "connected" and CONNECTED in supernode.words():
            self._pause = FIRST_PAUSE_S
            self._state("connected", "")
            self._say("connected to the hub")
        if self._last_code == "connected":
            self._announce()

    def _announce(self) -> None:
        """Write the ready file once the hub let us in and the trainer, if it is ours, stands ready."""
        if self._announced or self._settings.ready_file is None:
            return
        if self._settings.trainer and not self._trainer_ready():
            return
        self._announced = True
        write_atomically(
            self._settings.ready_file, json.dumps({"process": os.getpid(), "connected": True}).encode()
        )

    def _trainer_ready(self) -> bool:
        try:
            beat = Spool(self._folder.spool).beat()
        except PixcellError:
            return False
        return (
            beat is not None
            and beat.ready
            and self._trainer is not None
            and beat.process == self._trainer.pid
        )

    def _start_trainer(self) -> None:
        if not self._settings.trainer:
            return
        self._folder.logs.mkdir(parents=True, exist_ok=True, mode=0o700)
        with (self._folder.logs / "trainer.log").open("ab") as log:
            parent = os.getpid()
            self._trainer = subprocess.Popen(
                self._settings.trainer,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                preexec_fn=lambda: die_with_parent(parent),
            )

    def _look_at_trainer(self, now: float) -> None:
        if self._trainer is None or self._trainer.poll() is None:
            return
        if self._trainer_due == 0.0:
            self._say(f"the trainer ended ({self._trainer.returncode}); see logs/trainer.log")
            self._trainer_due = now + (FIRST_PAUSE_S if self._trainer.returncode < 0 else LONGEST_PAUSE_S)
        elif now >= self._trainer_due:
            self._trainer_due = 0.0
            self._start_trainer()

    def _signal_trainer(self, number: int) -> None:
        if self._trainer is not None and self._trainer.poll() is None:
            self._trainer.send_signal(number)

    def _end_trainer(self, patience_s: float = 10.0) -> None:
        if self._trainer is None:
            return
        try:
            self._trainer.wait(patience_s)
        except subprocess.TimeoutExpired:
            self._signal_trainer(signal.SIGKILL)
            self._trainer.wait()

    def _state(self, code: str, reason: str) -> None:
        self._last_code = code
        body = {"state": code, "reason": reason, "at": datetime.now(UTC).isoformat(timespec="seconds")}
        write_atomically(self._folder.agent / "state.json", json.dumps(body).encode())

    def _stop(self, _number: int, _frame: object) -> None:
        self._stopping = True


def trainer_command(folder: SiteFolder, base: Path, extra: tuple[str, ...] = ()) -> tuple[str, ...]:
    """The command line of the trainer, run by this very interpreter."""
    return (
        *(sys.executable, "-m", "site_client.trainer", "site", "trainer"),
        *("--site-dir", str(folder.root), "--base", str(base)),
        *extra,
    )


def free_port() -> int:
    """A port of the loopback interface that is free now."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])
