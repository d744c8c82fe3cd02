"""What the log commands return: typed results with a text form for people."""

from __future__ import annotations

from pydantic import BaseModel
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from pixcell_core.contracts.canonical import canonical_bytes
from pixcell_core.trust.dsse import Envelope
from pixcell_core.trust.log import LogEntry, LogReport


class LogVerified(LogReport):
    """A log that verifies."""

    def __str__(self) -> str:
        lines = [
            f"✓ {self.entries} events, each in its place, every head signed",
            f"✓ root {self.root or '(empty log)'}",
            f"{'✓ signed by a key you trust:' if self.key_trusted else '  signed by'} {self.key_id}",
        ]
        if self.earlier_heads_checked:
            lines.append(f"✓ {self.earlier_heads_checked} earlier head(s) lie in its past")
        else:
            lines.append(
                "  no earlier head was given: events cut off at the end would not show (--head FILE)"
            )
        if not self.key_trusted:
            lines.append("  no key was given: the log is whole, whose it is was not checked (--key FILE)")
        if self.unfinished_tail_bytes:
            lines.append(
                f"  {self.unfinished_tail_bytes} bytes of an interrupted write at the end: "
                "never acknowledged, the next event removes them"
            )
        return "\n".join(lines)


class LogShown(BaseModel):
    """The newest events of a log."""

    total: int
    events: list[LogEntry]

    def render(self) -> RenderableType:
        """A table: number, time, kind, facts."""
        table = Table(title=f"{len(self.events)} of {self.total} events")
        for name in ("#", "time", "event"):
            table.add_column(name, no_wrap=True)
        table.add_column("facts", overflow="fold")
        for entry in self.events:
            facts = Text(canonical_bytes(entry.data).decode("utf-8"))
            table.add_row(str(entry.index), entry.time, entry.kind, facts)
        return table


class LogHead(BaseModel):
    """The newest head of a log with its signature."""

    tree_size: int
    root: str
    key_id: str
    head: Envelope

    def __str__(self) -> str:
        return f"{self.tree_size} events\nroot {self.root}\nsigned by {self.key_id}"
