"""Progress of long work: a bar with rate and time left on a terminal, a plain line every few seconds elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

PLAIN_SECONDS = 5.0


class Bar(Protocol):
    """Anything that can be told that work went on."""

    def advance(self, amount: int = 1) -> None:
        """Say that `amount` more units are done."""


class _PlainBar:
    def __init__(self, label: str, total: int | None, unit: str) -> None:
        self._label, self._total, self._unit = label, total, unit
        self._done, self._start, self._said = 0, time.monotonic(), time.monotonic()

    def advance(self, amount: int = 1) -> None:
        self._done += amount
        if time.monotonic() - self._said >= PLAIN_SECONDS:
            self._said = time.monotonic()
            self.say()

    def say(self) -> None:
        spent = max(time.monotonic() - self._start, 1e-9)
        of = f"/{self._total}" if self._total is not None else ""
        print(
            f"{self._label}: {self._done}{of} {self._unit}, {self._done / spent:.1f} {self._unit}/s",
            file=sys.stderr,
            flush=True,
        )


class _RichBar:
    def __init__(self, bar: object, task: object) -> None:
        self._bar, self._task = bar, task

    def advance(self, amount: int = 1) -> None:
        self._bar.advance(self._task, amount)  # type: ignore[attr-defined]


@contextmanager
def progress(label: str, total: int | None = None, unit: str = "items") -> Iterator[Bar]:
    """Show the progress of `total` units of work on stderr.

    Yields an object whose `advance(k)` says that k more units are done.
    """
    if not sys.stderr.isatty():
        plain = _PlainBar(label, total, unit)
        try:
            yield plain
        finally:
            plain.say()
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        Task,
        TextColumn,
        TimeRemainingColumn,
    )
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text(f"{task.speed or 0.0:.1f} {unit}/s")

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        Rate(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        yield _RichBar(bar, bar.add_task(label, total=total))
