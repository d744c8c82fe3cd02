"""A consortium of real processes on loopback: a hub, its sites, and whoever answers their spools."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

import psutil

from pixcell_core.contracts.round import RunState
from pixcell_core.contracts.study import Study
from pixcell_core.errors import PixcellError
from server.registry.opening import open_registry
from server.rounds.board import RunBoard
from server.rounds.store import RoundStore
from server.studies.book import StudyBook
from site_client.agent.link_record import read_link
from site_client.approvals.site_folder import SiteFolder
from site_client.trainer.spool import Spool
from tests.server.enrolled import enrol_site, init_consortium
from tests.server.processes import PIXCELL, Processes, pixcell, wait_until


@dataclass
class Consortium:
    """Folders and processes of a running consortium. `base` is the base model of real trainers, None for stand-ins."""

    root: Path
    sites: tuple[str, ...]
    base: Path | None = None
    poll_s: float | None = None
    processes: Processes = field(init=False)
    address: str = ""

    def __post_init__(self) -> None:
        self.processes = Processes(self.root)

    @property
    def server(self) -> Path:
        """The coordinator's folder."""
        return self.root / "server"

    def site(self, name: str) -> Path:
        """A site's folder."""
        return self.root / name

    def folder(self, name: str) -> SiteFolder:
        """The same, with the names of its parts."""
        return SiteFolder(self.site(name))

    # --- starting ------------------------------------------------------------------------------------------

    def open(self) -> None:
        """Make the consortium, start the hub, enrol every site and start its agent (and its trainer, with a base)."""
        init_consortium(self.server)
        self.start_hub()
        wait_until(self.hub_is_ready, 120, "the hub")
        self.address = str(json.loads((self.root / "hub.json").read_text())["address"])
        for site in self.sites:
            enrol_site(self.server, self.site(site), site, self.address)

    def start_hub(self) -> None:
        """Start the hub, at the address it had before if there was one."""
        ready = self.root / "hub.json"
        ready.unlink(missing_ok=True)
        port = self.address.rsplit(":", 1)[-1] if self.address else "0"
        self._start("hub", "hub", "start", "--dir", self.server, "--ready-file", ready, "--port", port)

    def start_site(self, name: str) -> None:
        """Start a site's agent; its supervisor keeps everything else of it up."""
        ready = self.root / f"{name}.ready"
        ready.unlink(missing_ok=True)
        more = () if self.base is None else ("--with-trainer", "--base", str(self.base))
        if self.poll_s is not None:
            more = (*more, "--poll", f"{self.poll_s:g}")
        self._start(name, "site", "start", "--site-dir", self.site(name), "--ready-file", ready, *more)

    def start_sites(self) -> None:
        """Start every site and wait until the hub let all of them in."""
        for site in self.sites:
            self.start_site(site)
        for site in self.sites:
            ready = self.root / f"{site}.ready"
            wait_until(ready.exists, 400, f"{site}: {self.processes.log(site)}")

    def _start(self, name: str, *arguments: str | Path) -> None:
        """Start a command that stays; its log is appended to, since it may be started again."""
        with (self.root / f"{name}.log").open("ab") as log:
            self.processes.running[name] = subprocess.Popen(
                [*PIXCELL, *map(str, arguments)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )

    def stop(self) -> None:
        """End everything that still runs; processes that were killed are forgotten."""
        for name, process in list(self.processes.running.items()):
            if process.poll() is not None:
                del self.processes.running[name]
        self.processes.stop()

    # --- studies -------------------------------------------------------------------------------------------

    def approve(self, study_file: Path) -> None:
        """Every site approves a study."""
        for site in self.sites:
            pixcell("site", "approve", study_file, "--site-dir", self.site(site), "--yes")

    def study(self, name: str) -> Study:
        """A study as the coordinator keeps it."""
        return StudyBook(open_registry(self.server)).get(name)

    def board(self, name: str, *, history: bool = True) -> RunState:
        """The state of its run."""
        state = RunBoard(open_registry(self.server), name).read(history=history)
        assert state is not None
        return state

    def store(self, name: str) -> RoundStore:
        """Its committed rounds."""
        return RoundStore(open_registry(self.server), self.server / "runs" / name, self.study(name))

    # --- processes -----------------------------------------------------------------------------------------

    def running(self, name: str) -> bool:
        """Whether a command started here still runs."""
        return self.processes.running[name].poll() is None

    def process(self, part: str, site: str = "", study: str = "") -> int | None:
        """The process id of one part as it runs now, or None.

        `part`: hub, hub-executor, round-loop (of `study`), supervisor, supernode, executor, trainer (of `site`).
        """
        owner = self.processes.running["hub" if part in ("hub", "hub-executor") else site or "hub"]
        if part in ("hub", "supervisor"):
            return owner.pid if owner.poll() is None else None
        if part == "round-loop":
            state = self.board(study, history=False)
            return state.process if state.state in ("waiting", "running") else None
        try:
            children = psutil.Process(owner.pid).children()
        except psutil.Error:
            return None
        link = read_link(self.folder(site).agent) if site else None
        for child in children:
            try:
                words = " ".join(child.cmdline())
                if child.status() == psutil.STATUS_ZOMBIE:
                    continue
            except psutil.Error:
                continue
            if "site_client.trainer" in words:
                kind = "trainer"
            elif "hub start" in words:
                kind = "hub-executor"
            elif "site start" in words:
                kind = "supernode" if link is not None and link.process == child.pid else "executor"
            else:
                continue
            if kind == part:
                return child.pid
        return None

    def hub_is_ready(self) -> bool:
        """Whether the hub that runs now has announced itself."""
        try:
            said = json.loads((self.root / "hub.json").read_text())
        except (OSError, ValueError):
            return False
        return bool(said["process"] == self.processes.running["hub"].pid)

    def connected(self, site: str, since: datetime) -> bool:
        """Whether the hub accepted a heartbeat of the SuperNode that runs now, since a moment."""
        link = read_link(self.folder(site).agent)
        if link is None or not link.heartbeats or link.accepted_at is None or not _alive(link.process):
            return False
        return link.accepted_at > since

    def trainer_ready(self, site: str) -> int | None:
        """The process of the site's trainer, if it lives and says that it stands ready."""
        try:
            beat = Spool(self.folder(site).spool).beat()
        except PixcellError:
            return None
        return beat.process if beat is not None and beat.ready and _alive(beat.process) else None

    def logs(self) -> str:
        """The end of what everybody said."""
        texts = [
            f"{path.name}: {path.read_text(errors='replace')[-2000:]}" for path in self.root.glob("*.log")
        ]
        for path in (*self.root.rglob("trainer.log"), *self.root.rglob("executor.log")):
            texts.append(f"{path}: {path.read_text(errors='replace')[-1500:]}")
        return "\n-----\n".join(texts)


def _alive(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


def load() -> str:
    """The machine's load now."""
    one, five, fifteen = os.getloadavg()
    return f"load {one:.1f} {five:.1f} {fifteen:.1f} on {os.cpu_count()} cores"


def say(text: str) -> None:
    """One line to the terminal, with the time."""
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True, file=sys.stderr)
