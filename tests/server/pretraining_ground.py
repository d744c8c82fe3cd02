"""A coordinator's folder for pretraining jobs, its desk, and what an undisturbed session makes of the same settings."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from server.hub.jobs import JobDesk
from server.layout import ServerLayout
from server.pretraining.book import JobBook, JobFolder
from server.pretraining.phase import make_request
from server.pretraining.session import PretrainingResult

STEPS, EVERY = 200, 10
PATIENCE = 120.0


@dataclass
class Events:
    """What the hub would write to its event log."""

    said: list[dict[str, Any]] = field(default_factory=list)

    def say(self, event: str, **public: str | int | bool) -> None:
        self.said.append({"event": event, **public})


@dataclass
class Ground:
    """A coordinator's folder, public tiles, a tiny base, and what an undisturbed session makes of them."""

    root: Path
    layout: ServerLayout
    undisturbed: PretrainingResult
    events: Events = field(default_factory=Events)
    ahead: float = 0.0

    @property
    def book(self) -> JobBook:
        return JobBook(self.layout.pretraining)

    def settings(self, **changes: Any) -> dict[str, Any]:
        given: dict[str, Any] = {
            "tiles": self.root / "tiles",
            "base": self.root / "base",
            "tile_size": 32,
            "steps": STEPS,
            "batch_size": 4,
            "learning_rate": 1e-3,
            "seed": 4,
            "threads": 1,
            "device": "cpu",
            "checkpoint_every": EVERY,
        }
        return given | changes

    def submit(self, name: str, **changes: Any) -> JobFolder:
        self.book.submit(make_request(self.layout, name, self.settings(**changes)))
        return self.book.get(name)

    def desk(self) -> JobDesk:
        """A hub's desk; `ahead` moves its clock."""
        return JobDesk(self.layout, self.events, clock=lambda: time.monotonic() + self.ahead)


def tick_until(desk: JobDesk, true: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < end, f"waited for {what}"
        desk.tick()
        time.sleep(0.02)


def workers(job: JobFolder) -> list[psutil.Process]:
    """The processes that train, below the launcher."""
    launcher = psutil.Process(job.state().process)
    return [p for p in launcher.children() if p.status() != psutil.STATUS_ZOMBIE]


def gone(processes: list[psutil.Process]) -> bool:
    return not [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
