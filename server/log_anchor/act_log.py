"""The coordinator's Merkle log, `DIR/log`: every act of the registry, copied once, with the digest of what it is about.

An act becomes true in the registry's transaction, together with what it tells. Here it is copied into a log whose
heads other parties hold: an act that later changes or goes from the database is missed, by `copy_acts` and by anyone
who was given a proof.
"""

from __future__ import annotations

import fcntl
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from sqlalchemy import Connection, select

from pixcell_core.errors import PixcellError
from pixcell_core.trust.dsse import Envelope
from pixcell_core.trust.keys import SigningKey, VerifyKey
from pixcell_core.trust.log import EventLog, LogEntry, LogReport, utc_text, verify_log
from server.layout import ServerLayout
from server.registry.events import Act, ActLog
from server.registry.tables import RoundRow, SiteRow, StudyRow

ACT = "act."
"""Beginning of the kinds of copied acts; the rest is the registry's own word."""

_WORD = re.compile(r"[a-z][a-z0-9-]{0,70}")
_PAGE = 10_000


class ActsCopied(BaseModel):
    """What a copying did: acts added now, acts in the log in all, and those the registry no longer holds."""

    added: int
    logged: int
    missing: list[dict[str, Any]]

    @property
    def exit_code(self) -> int:
        """1 where the registry lacks an act that was logged."""
        return 1 if self.missing else 0

    def __str__(self) -> str:
        text = f"{self.added} act(s) added to the log; it holds {self.logged}."
        if not self.missing:
            return text + "\nEvery logged act stands in the registry as it was logged."
        gone = "\n".join(f"  {m['at']} {m['kind']} {m['subject']}" for m in self.missing)
        return f"{text}\n{len(self.missing)} logged act(s) are not in the registry any more, or were changed:\n{gone}"


class CoordinatorLog:
    """The log of one coordinator. Any process of the coordinator may use it; writers take turns."""

    def __init__(self, layout: ServerLayout) -> None:
        self._layout = layout
        self._seen, self._trouble = -1, ""

    @property
    def folder(self) -> Path:
        """Where the log lies: `log.jsonl`, and `log.pub` to hand to the parties."""
        return self._layout.root / "log"

    @property
    def key(self) -> SigningKey:
        """The log's key, made at the first use."""
        return SigningKey.load_or_create(self._layout.secrets / "log")

    @property
    def verify_key(self) -> VerifyKey:
        """The public half of the log's key."""
        return self.key.verify_key

    def events(self) -> EventLog:
        """The log, open for appending."""
        return EventLog(self.folder, self.key)

    def verify(self, earlier_heads: Sequence[Envelope] = ()) -> LogReport:
        """Check the whole log, and heads of it that others were shown. Raises `LogBrokenError`."""
        self.events()
        return verify_log(self.folder, trusted_keys=[self.verify_key], earlier_heads=earlier_heads)

    def copy_acts(self, *, now: datetime | None = None) -> ActsCopied:
        """Add every act of the registry that is not in the log yet, oldest first."""
        with self.alone():
            log = self.events()
            logged = {_identity(entry.data): entry for entry in log.entries() if entry.kind.startswith(ACT)}
            registry = self._layout.registry()
            acts = _all_acts(ActLog(registry))
            added = 0
            with registry.read() as connection:
                for act in acts:
                    data = _facts(act)
                    if logged.pop(_identity(data), None) is None:
                        data |= _about(connection, act)
                        log.append(ACT + (act.kind if _WORD.fullmatch(act.kind) else "other"), data, now=now)
                        added += 1
            return ActsCopied(added=added, logged=len(acts) + len(logged), missing=_told(logged.values()))

    def tick(self, report: Callable[[str], None] = lambda _: None) -> None:
        """Copy acts where there are new ones; a glance at the registry where there are none. For the running hub.

        A log that cannot be written, or an act that is gone, must not stop the rounds: `report` gets its code, once.
        """
        try:
            newest = ActLog(self._layout.registry()).newest()
            if newest == self._seen:
                return
            code = "logged-acts-missing" if self.copy_acts().missing else ""
            self._seen = newest
        except PixcellError as error:
            code = error.code
        if code and code != self._trouble:
            report(code)
        self._trouble = code

    @contextmanager
    def alone(self) -> Iterator[None]:
        """What is read from the log stays true until it is appended to: one process at a time."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / ".turn").open("w") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            yield


def _all_acts(acts: ActLog) -> list[Act]:
    found: list[Act] = []
    while page := acts.since(found[-1].number if found else 0, _PAGE):
        found += page
    return found


def _facts(act: Act) -> dict[str, Any]:
    return {"act": act.number, "at": act.at.isoformat(), "kind": act.kind, "subject": act.subject}


def _identity(data: dict[str, Any]) -> tuple[Any, ...]:
    # All of an act, not its number alone: a number may come again after a power cut took an act that nobody relied on.
    return tuple(data.get(name) for name in ("act", "at", "kind", "subject"))


def _about(connection: Connection, act: Act) -> dict[str, str]:
    """The digest of the document an act is about, where that document is written once."""
    wanted = None
    if act.kind == "site-enrolled":
        wanted = select(SiteRow.digest).where(SiteRow.site == act.subject)
    elif act.kind == "study-created":
        wanted = select(StudyRow.digest).where(StudyRow.study_id == act.subject)
    elif act.kind == "round-committed":
        study, _, number = act.subject.rpartition("/")
        if number.isdecimal():
            wanted = select(RoundRow.digest).where(RoundRow.study_id == study, RoundRow.round == int(number))
    found = connection.execute(wanted).scalar() if wanted is not None else None
    return {"digest": str(found)} if found is not None else {}


def _told(entries: Any) -> list[dict[str, Any]]:
    lost: list[LogEntry] = sorted(entries, key=lambda entry: entry.index)
    return [
        {"event": entry.index, "logged": utc_text(datetime.fromisoformat(entry.time)), **entry.data}
        for entry in lost
    ]
