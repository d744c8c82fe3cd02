"""A run as people and programs see it: sites, bytes, time left, and who does not count, why, and what to do."""

from __future__ import annotations

import statistics
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from pixcell_core.contracts.remedies import remedy_of
from pixcell_core.contracts.round import RunState, SiteState

STEPS = ("registered", "approved", "configured", "training")
RECENT = 10
"""Committed rounds whose time tells how long the rest will take."""


class NotCounted(BaseModel):
    """A site that does not count now, or did not in the round it is said of."""

    site: str
    round: int | None
    code: str
    reason: str
    remedy: str


class RunShown(BaseModel):
    """A run as it stands, with the folder of its committed rounds. Times are in seconds; None where unknown."""

    folder: Path
    adapter: Path | None
    run: dict[str, Any]
    bytes_out: int
    bytes_in: int
    deadline_in_s: float | None
    left_s: float | None
    not_counted: list[NotCounted]

    def render(self) -> Any:
        """A table with one row per site, the progress of rounds and replies, and what to do about who is missing."""
        from rich.box import SIMPLE_HEAD
        from rich.console import Group
        from rich.padding import Padding
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        state = RunState.model_validate(self.run)
        parts: list[Any] = [
            Text(f"{state.study_id}: {state.state}, {state.committed} of {state.rounds} rounds committed"),
            # Padded, since a bar narrower than the terminal does not end its line.
            Padding(ProgressBar(total=state.rounds * len(state.sites), completed=_done(state), width=48), 0),
            Text(", ".join(self._times(state))),
        ]
        table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        table.add_column("site", no_wrap=True)
        for column in (*STEPS, "rounds", "last reply", "sent", "received"):
            table.add_column(column, overflow="fold")
        for site in state.sites:
            marks = ["yes" if getattr(site, column) else "no" for column in STEPS]
            numbers = [str(site.rounds_counted), age(site), size(site.bytes_out), size(site.bytes_in)]
            table.add_row(site.site, *marks, *numbers)
        parts.append(table)
        if state.reason:
            parts.append(Text(state.reason))
        # What follows holds what a peer wrote: never markup.
        for missing in self.not_counted:
            when = f" in round {missing.round}" if missing.round else ""
            parts.append(Text(f"{missing.site} does not count{when}: {missing.reason}\n  → {missing.remedy}"))
        return Group(*parts)

    def _times(self, state: RunState) -> list[str]:
        parts = [f"sent {size(self.bytes_out)}, received {size(self.bytes_in)}"]
        if state.state == "running":
            parts.insert(0, f"round {state.round}: {state.replies} of {len(state.sites)} replies count")
        if self.deadline_in_s is not None:
            parts.append(f"deadline in {duration(self.deadline_in_s)}")
        if self.left_s is not None:
            parts.append(f"about {duration(self.left_s)} to the end")
        return parts

    def line(self) -> str:
        """The same in one line, for a log."""
        state = RunState.model_validate(self.run)
        marks = []
        for site in state.sites:
            step = next((c for c in reversed(STEPS) if getattr(site, c)), "unknown")
            marks.append(f"{site.site} {step}" + (f" ({site.note})" if site.note else ""))
        text = f"{state.state}: round {state.round}/{state.rounds}, {state.committed} committed"
        return f"{text}, {', '.join(self._times(state))}; {', '.join(marks)}"


def show_run(folder: Path, state: RunState, now: datetime | None = None) -> RunShown:
    """What is to be shown of a run at `now`."""
    moment = now or datetime.now(UTC)
    active = state.state in ("submitted", "waiting", "running")
    deadline = state.deadline_at if active else None
    place = folder / "rounds" / f"{state.committed:05d}" / "adapter.safetensors"
    return RunShown(
        folder=folder,
        adapter=place if place.is_file() else None,
        run=state.model_dump(mode="json"),
        bytes_out=sum(site.bytes_out for site in state.sites),
        bytes_in=sum(site.bytes_in for site in state.sites),
        deadline_in_s=max(0.0, (deadline - moment).total_seconds()) if deadline is not None else None,
        left_s=time_left(state, moment),
        not_counted=not_counted(state),
    )


def time_left(state: RunState, now: datetime) -> float | None:
    """Seconds to the end of the study: the median of its last rounds for each round left; None before the first."""
    if state.state != "running":
        return None
    took = [record.seconds for record in state.history if record.round > 0][-RECENT:]
    if not took:
        return None
    each = statistics.median(took)
    last = max(record.committed_at for record in state.history)
    spent = min(each, max(0.0, (now - last).total_seconds()))
    return each * (state.rounds - state.committed) - spent


def not_counted(state: RunState) -> list[NotCounted]:
    """Sites that lack something now; and of the last committed round those that did not count and are back."""
    found = {
        site.site: NotCounted(
            site=site.site, round=None, code=site.code, reason=site.note, remedy=remedy_of(site.code)
        )
        for site in state.sites
        if site.code != "ok"
    }
    for record in state.history[-1:]:
        for gone in record.excluded:
            found.setdefault(
                gone.site,
                NotCounted(
                    site=gone.site,
                    round=record.round,
                    code=gone.code,
                    reason=gone.reason,
                    remedy=gone.remedy,
                ),
            )
    return [found[site] for site in sorted(found)]


def _done(state: RunState) -> int:
    """Replies that count, of all rounds: a committed round is done, whoever was missing."""
    within = state.replies if state.state == "running" and state.round > state.committed else 0
    return state.committed * len(state.sites) + within


def age(site: SiteState, now: datetime | None = None) -> str:
    """How long ago a site was heard of."""
    if site.last_reply_at is None:
        return "never"
    return f"{duration(max(0.0, ((now or datetime.now(UTC)) - site.last_reply_at).total_seconds()))} ago"


def duration(seconds: float) -> str:
    """Seconds for people."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def size(count: int) -> str:
    """Bytes for people."""
    value = float(count)
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.2f} GB"
