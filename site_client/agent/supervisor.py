"""Keeps a site's agent up: SuperNode, executor and, if asked, the trainer; restarts what falls, stops all together.

The supervisor starts the trainer first (its imports take longest), imports Flower once, forks the two network
processes, and then only watches. A SuperNode that crashed cannot rejoin before the hub has forgotten it, some
20 s: it is started again every few seconds until it is let in, and the site's state says so meanwhile.

Connected means that the hub accepted a heartbeat of the process that runs now, and lately. A SuperNode that lives but
neither has a heartbeat accepted nor says what fails is stuck: it is killed and started again.
"""

from __future__ import annotations

import fcntl
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
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import IO

from pixcell_core.contracts.atomic import write_atomically
from pixcell_core.errors import PixcellError, RefusedError
from pixcell_core.flower.processes import Child, die_with_parent, quiet_flower, stop_children
from site_client.agent.hub_client import require_kit
from site_client.agent.link_record import LinkState, read_link
from site_client.agent.link_trouble import LINK_TROUBLES
from site_client.agent.network import (
    LOOPBACK,
    NetworkSettings,
    import_flower,
    run_executor,
    run_supernode,
)
from site_client.agent.proxy import STRAIGHT, WayOut
from site_client.agent.site_log import SiteLog
from site_client.approvals.site_folder import SiteFolder
from site_client.trainer.spool import Spool

LOCK_FILE = "agent.lock"
LOOK_S = 0.2
FIRST_PAUSE_S = 2.0
LONGEST_PAUSE_S = 10.0
FRESH_S = 30.0
"""A heartbeat accepted longer ago does not count; Flower sends one every 4 s or so, the hub forgets a site after 20 s."""
STUCK_S = 60.0
"""A SuperNode that says nothing for so long is killed. Its own slowest retry is 20 s, its slowest request 30 s."""


@dataclass(frozen=True)
class SupervisorSettings:
    """How a site is started. `trainer` is the command line of the trainer to keep up, or empty."""

    folder: SiteFolder
    hub: str | None = None
    poll_s: float = 3.0
    runtime_port: int = 0
    trainer: tuple[str, ...] = ()
    ready_file: Path | None = None
    way_out: WayOut = STRAIGHT
    guarded: bool = True
    stuck_s: float = STUCK_S


class Supervisor:
    """Starts and watches a site's processes until it is told to stop."""

    def __init__(self, settings: SupervisorSettings, say: Callable[[str], None]) -> None:
        self._settings, self._say = settings, say
        self._folder = settings.folder
        self._log = SiteLog(settings.folder.logs)
        self._stopping = False
        self._trainer: subprocess.Popen[bytes] | None = None
        self._trainer_due = 0.0
        self._pause = FIRST_PAUSE_S
        self._due: dict[str, float] = {}
        self._last_code = ""
        self._announced = False

    def run(self) -> None:
        """Serve until SIGTERM or SIGINT; returns when every process is gone."""
        identity = self._folder.identity()
        require_kit(self._folder)
        self._lock = lock_agent(self._folder)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)
        Spool(self._folder.spool).open()
        self._set_state("starting")
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
            self._set_state("stopped")
            if self._settings.ready_file is not None:
                self._settings.ready_file.unlink(missing_ok=True)

    def _children(self, hub: str) -> list[Child]:
        secret_file = self._folder.agent / "executor.secret"
        secret_file.unlink(missing_ok=True)
        descriptor = os.open(secret_file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(secrets.token_bytes(32))
        port = self._settings.runtime_port or free_port()
        self._say(f"hub {hub}, {self._settings.way_out}")
        network = NetworkSettings(
            self._folder,
            hub,
            port,
            secret_file,
            self._settings.poll_s,
            proxy=self._settings.way_out.proxy,
            guarded=self._settings.guarded,
        )
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
                code = self._why(child) if child.name == "supernode" else "executor-ended"
                self._say(f"{child.name} ended ({child.exit_code}); starting it again")
                self._log.say("restarting", process=child.name, code=code)
                self._set_state(code)
                self._due[child.name] = now + self._pause
                self._pause = min(self._pause * 1.5, LONGEST_PAUSE_S)
            elif now >= self._due[child.name]:
                del self._due[child.name]
                child.start()
        self._look_at_trainer(now)
        self.look_at_link(children[0])

    def look_at_link(self, supernode: Child) -> None:
        """Read what the SuperNode wrote of its link: announce, explain, or end one that is stuck."""
        link = read_link(self._folder.agent)
        if supernode.pid is None or link is None or link.process != supernode.pid:
            return
        now = datetime.now(UTC)
        if link.heartbeats and (link.age_s(now) or 0.0) < FRESH_S:
            self._pause = FIRST_PAUSE_S
            if self._last_code != "connected":
                self._say("connected to the hub")
                self._log.say("connected")
            self._set_state("connected")
            self._announce()
        elif link.trouble:
            self._set_state(link.trouble)
        elif link.heartbeats:
            self._set_state("silent")
        if now - link.spoke_at > timedelta(seconds=self._settings.stuck_s):
            self._say("the SuperNode lives but says nothing; killing it")
            self._log.say("stuck", process="supernode")
            supernode.signal(signal.SIGKILL)

    def _why(self, supernode: Child) -> str:
        """Why the SuperNode ended, as it wrote down itself."""
        link: LinkState | None = read_link(self._folder.agent)
        recent = link is not None and link.trouble_at is not None and link.trouble_at >= link.started_at
        return link.trouble if recent and link is not None and link.trouble else "link-failed"

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

    def _set_state(self, code: str) -> None:
        """Write the site's state when it changes, and say it once with its remedy."""
        if code == self._last_code:
            return
        self._last_code = code
        reason, remedy = LINK_TROUBLES.get(code, (_STATES.get(code, ""), ""))
        if code in LINK_TROUBLES:
            self._say(f"[{code}] {reason} {remedy}")
            self._log.say("link-trouble", code=code)
        body = {
            "state": code,
            "reason": f"{reason} {remedy}".strip(),
            "at": datetime.now(UTC).isoformat(timespec="seconds"),
            "process": os.getpid(),
        }
        write_atomically(self._folder.agent / "state.json", json.dumps(body).encode())

    def _stop(self, _number: int, _frame: object) -> None:
        self._stopping = True


_STATES = {
    "connected": "",
    "starting": "The agent is starting.",
    "silent": "The hub has not accepted a heartbeat lately.",
    "executor-ended": "The process that runs tasks ended; it is started again.",
    "stopped": "The agent was stopped.",
}


def lock_agent(folder: SiteFolder) -> IO[bytes]:
    """Hold the site's agent lock until the returned file is closed or this process is gone, however it ends.

    The kernel keeps the lock, so none is ever stale. Raises `RefusedError` (`agent-running`).
    """
    folder.agent.mkdir(parents=True, exist_ok=True, mode=0o700)
    stream = (folder.agent / LOCK_FILE).open("ab")
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        stream.close()
        raise RefusedError(
            "Another agent of this site is running.",
            hint="One folder is one agent: stop the other one, or use it (`pixcell site status`).",
            code="agent-running",
        ) from error
    return stream


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
