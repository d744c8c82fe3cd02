"""Follows a run to its end: a live table on a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from pixcell_core.cli.contract import emit_note
from pixcell_core.contracts.round import RunState
from pixcell_core.errors import ConnectionFailedError, RefusedError, TimedOutError
from server.layout import ServerLayout
from server.rounds.board import UNFINISHED, RunBoard
from server.rounds.run_view import RunShown, show_run

POLL_S = 0.3
SAY_EVERY_S = 5.0


def read_run(layout: ServerLayout, study_id: str) -> RunState:
    """The state of a run. Raises `RefusedError` where none was started."""
    state = RunBoard(layout.registry(), study_id).read()
    if state is None:
        raise RefusedError(
            f"No run of {study_id} was started.",
            hint=f"Start it: pixcell run start {study_id} --dir {layout.root}",
            code="no-run",
        )
    return state


def follow(layout: ServerLayout, study_id: str, timeout_s: float) -> RunState:
    """Show the run until it is finished, failed or stopped, and return its last state.

    Raises `ConnectionFailedError` where the hub is gone, `TimedOutError` after `timeout_s`; the run goes on then.
    """
    end = time.monotonic() + timeout_s
    with _display() as show:
        while True:
            state = read_run(layout, study_id)
            show(show_run(layout.run(study_id), state))
            if state.state not in UNFINISHED:
                return state
            if not layout.ready.is_file():
                raise ConnectionFailedError(
                    "The hub stopped while the run was going on.",
                    hint="Start the hub, then: "
                    f"pixcell run resume {study_id} --dir {layout.root}. Committed rounds are kept.",
                    code="hub-down",
                )
            if time.monotonic() > end:
                raise TimedOutError(
                    f"The run of {study_id} is not finished after {timeout_s:g} s; it goes on.",
                    hint=f"Watch it: pixcell run watch {study_id} --dir {layout.root}",
                )
            time.sleep(POLL_S)


def require_success(layout: ServerLayout, state: RunState) -> RunState:
    """The state of a run that came to its end, or a `RefusedError` that says why it did not."""
    study_id = state.study_id
    if state.state == "failed":
        raise RefusedError(
            f"The run of {study_id} failed after {state.committed} committed rounds: {state.reason}",
            hint=f"See each site: pixcell run watch {study_id} --once --dir {layout.root}",
            code="run-failed",
        )
    if state.state == "stopped":
        raise RefusedError(
            f"The run of {study_id} was stopped after {state.committed} committed rounds.",
            hint=f"Go on: pixcell run resume {study_id} --dir {layout.root}",
            code="run-stopped",
        )
    return state


@contextmanager
def _display() -> Iterator[Callable[[RunShown], None]]:
    if not _is_terminal():
        yield _Lines()
        return
    from rich.console import Console
    from rich.live import Live

    # The result is printed when it is over: what was shown meanwhile leaves the screen.
    with Live(console=Console(stderr=True), refresh_per_second=4, transient=True) as live:
        yield lambda shown: live.update(shown.render())


def _is_terminal() -> bool:
    return sys.stderr.isatty()


class _Lines:
    """Says a line when something happened, and every few seconds that nothing did."""

    def __init__(self) -> None:
        self._began, self._said, self._last = time.monotonic(), 0.0, ""

    def __call__(self, shown: RunShown) -> None:
        now = time.monotonic()
        # Seconds tick: only what happened is compared, so that a log does not fill up.
        happened = str([shown.run[name] for name in ("state", "round", "committed", "replies", "reason")])
        happened += str([{**site, "last_reply_at": None} for site in shown.run["sites"]])
        if happened != self._last:
            emit_note(shown.line())
        elif now - self._said > SAY_EVERY_S:
            emit_note(f"{shown.run['state']}: no change, {now - self._began:.0f} s")
        else:
            return
        self._said, self._last = now, happened
