"""An append-only log of events whose every state is signed: entries, a Merkle tree over them, signed
tree heads.

One file, ``log.jsonl``. Each line is the canonical JSON of a :class:`LogLine`: the event, and a DSSE
envelope with the head of the tree (size and RFC 6962 root) after that event. One line is one write and
one fsync, so a crash leaves either the whole event or an unfinished last line that was never
acknowledged; the next append removes it.

A log alone cannot show that its newest entries were cut off. Hand its head to others (:func:`TreeHead`),
and give heads seen earlier to :func:`verify_log`: a past that was rewritten or shortened then fails.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from pixcell_core.contracts.canonical import Digest, Document, canonical_bytes, parse_document
from pixcell_core.errors import BadInputError, PixcellError, RefusedError
from pixcell_core.trust.dsse import Envelope, sign_envelope, verify_envelope
from pixcell_core.trust.keys import SigningKey, VerifyKey
from pixcell_core.trust.merkle import RunningRoot, consistency_proof, inclusion_proof

LOG_FILE = "log.jsonl"
KEY_FILE = "log.pub"
HEAD_PAYLOAD_TYPE = "application/vnd.pixcell.log-head.v1+json"
MAX_LINE_BYTES = 256 * 1024
MAX_DATA_BYTES = 64 * 1024

EventKind = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9-]*(\.[a-z][a-z0-9-]*)*$", max_length=80)]
Timestamp = Annotated[str, StringConstraints(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ$")]


class LogBrokenError(RefusedError):
    """A log does not verify. The message names the first line that is wrong."""

    default_code = "log-broken"


class LogEntry(Document):
    """One event: its place, time (UTC), kind, and facts about it that hold no patient and no image."""

    schema_version: Literal["pixcell.log-entry/v1"] = "pixcell.log-entry/v1"
    index: Annotated[int, Field(ge=0)]
    time: Timestamp
    kind: EventKind
    data: dict[str, Any]


class TreeHead(Document):
    """Size and root of a log's tree at one moment, as its owner signed it."""

    schema_version: Literal["pixcell.log-head/v1"] = "pixcell.log-head/v1"
    tree_size: Annotated[int, Field(ge=1)]
    root: Digest
    time: Timestamp


class LogLine(BaseModel):
    """What one line of the file holds."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    entry: LogEntry
    head: Envelope


class LogReport(BaseModel):
    """What :func:`verify_log` found in a log that verifies."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    entries: int
    root: str | None
    key_id: str
    key_trusted: bool
    earlier_heads_checked: int
    unfinished_tail_bytes: int


def utc_text(moment: datetime) -> str:
    """``2026-01-31T23:59:59Z``: whole seconds, UTC."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


class EventLog:
    """A log opened by its owner for appending and reading. Safe between processes through a file lock."""

    def __init__(self, folder: Path, key: SigningKey) -> None:
        """Open the log, creating it on first use; a log of another key raises :class:`LogBrokenError`."""
        self.folder = folder
        self._key = key
        self._path = folder / LOG_FILE
        self._tree = RunningRoot()
        self._read_bytes = 0
        folder.mkdir(parents=True, exist_ok=True)
        public = folder / KEY_FILE
        with self._locked():
            if not public.exists():
                key.verify_key.save(public)
        if VerifyKey.load(public) != key.verify_key:
            raise LogBrokenError(
                f"The log in {folder} belongs to another key.",
                hint="Open it with the key it was started with; a new key needs a new log.",
                code="log-of-another-key",
            )

    def append(self, kind: str, data: dict[str, Any], *, now: datetime | None = None) -> LogEntry:
        """Add one event and sign the new head; on return both are on the disk."""
        if len(canonical_bytes(data)) > MAX_DATA_BYTES:
            raise BadInputError(
                f"An event holds at most {MAX_DATA_BYTES} bytes of facts.", hint="Log digests, not contents."
            )
        time = utc_text(now or datetime.now(UTC))
        with self._locked():
            self._catch_up()
            entry = LogEntry(index=self._tree.size, time=time, kind=kind, data=data)
            grown = self._tree.copy()
            grown.append(entry.to_bytes())
            head = TreeHead(tree_size=grown.size, root=_digest_text(grown.root()), time=time)
            line = LogLine(entry=entry, head=sign_envelope(HEAD_PAYLOAD_TYPE, head.to_bytes(), [self._key]))
            written = canonical_bytes(line) + b"\n"
            self._write(written)
            self._tree, self._read_bytes = grown, self._read_bytes + len(written)
        return entry

    def entries(self) -> list[LogEntry]:
        """Every complete event, oldest first."""
        return [line.entry for line, _ in _lines(self._path)]

    def head(self) -> Envelope | None:
        """The newest signed head, to hand to others; None while the log is empty."""
        return newest_head(self.folder)

    def inclusion_proof(self, index: int) -> list[bytes]:
        """RFC 6962 audit path of event ``index`` under the newest head."""
        return inclusion_proof([entry.to_bytes() for entry in self.entries()], index)

    def consistency_proof(self, old_size: int) -> list[bytes]:
        """RFC 6962 proof that the newest head only appended to the head of ``old_size`` events."""
        return consistency_proof([entry.to_bytes() for entry in self.entries()], old_size)

    def _catch_up(self) -> None:
        """Read what other processes appended since, and remove an unfinished last line."""
        if not self._path.exists():
            return
        end = self._read_bytes
        for line, size in _lines(self._path, self._read_bytes):
            if line.entry.index != self._tree.size:
                raise LogBrokenError(
                    f"Event {line.entry.index} stands where event {self._tree.size} belongs in {self._path}.",
                    hint="The log was changed by hand. Run `pixcell log verify` on it and keep a copy.",
                )
            self._tree.append(line.entry.to_bytes())
            end += size
        self._read_bytes = end
        if self._path.stat().st_size > end:
            os.truncate(self._path, end)

    def _write(self, data: bytes) -> None:
        fresh = not self._path.exists()
        descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            if os.write(descriptor, data) != len(data):
                os.ftruncate(descriptor, self._read_bytes)
                raise OSError("the line was written in part")
            os.fsync(descriptor)
        except OSError as error:
            raise PixcellError(
                f"Cannot write to the log {self._path}: {error.strerror or error}.",
                hint="Free space on this disk; nothing was recorded, so the act it records did not happen.",
                code="log-unwritable",
            ) from error
        finally:
            os.close(descriptor)
        if fresh:
            folder = os.open(self.folder, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with (self.folder / ".lock").open("w") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            yield


def verify_log(
    folder: Path, *, trusted_keys: Iterable[VerifyKey] | None = None, earlier_heads: Sequence[Envelope] = ()
) -> LogReport:
    """Check every line of a log: form, order, tree, signatures, and heads seen earlier.

    Without ``trusted_keys`` the log is checked against the key that lies in its own folder: that proves
    it whole, not whose it is. Raises :class:`LogBrokenError` naming the first wrong line.
    """
    if not (folder / KEY_FILE).is_file():
        raise BadInputError(
            f"{folder} holds no log.", hint="Give the folder with log.jsonl and log.pub.", code="no-log"
        )
    owner = VerifyKey.load(folder / KEY_FILE)
    keys = None if trusted_keys is None else list(trusted_keys)
    if keys is not None and owner not in keys:
        raise LogBrokenError(
            f"This log is signed by {owner.key_id}, which is not a key you trust.",
            hint="Compare the key with its owner over another channel.",
            code="log-of-another-key",
        )
    earlier = _open_heads(earlier_heads, owner)
    tree, complete = RunningRoot(), 0
    path = folder / LOG_FILE
    for line, size in _lines(path):
        number = tree.size + 1
        if line.entry.index != tree.size:
            raise _broken(number, f"it says it is event {line.entry.index}, not {tree.size}")
        tree.append(line.entry.to_bytes())
        complete += size
        root = _digest_text(tree.root())
        try:
            signed = verify_envelope(line.head, [owner], payload_type=HEAD_PAYLOAD_TYPE)
            head = parse_document(TreeHead, signed, name="the signed head")
        except PixcellError as error:
            raise _broken(number, error.message) from error
        if (head.tree_size, head.root) != (tree.size, root):
            raise _broken(number, "the signed head is of another tree: an earlier event was changed")
        for seen in earlier.pop(tree.size, ()):
            if seen.root != root:
                raise _broken(number, "a head seen earlier has another root: the past was rewritten")
    if earlier:
        raise LogBrokenError(
            f"A head of {max(earlier)} events was seen; now there are {tree.size}: the end was cut off.",
            hint="Ask the owner of the log for the missing events.",
        )
    tail = (path.stat().st_size if path.exists() else 0) - complete
    return LogReport(
        entries=tree.size,
        root=_digest_text(tree.root()) if tree.size else None,
        key_id=owner.key_id,
        key_trusted=keys is not None,
        earlier_heads_checked=len(earlier_heads),
        unfinished_tail_bytes=tail,
    )


def read_entries(folder: Path) -> list[LogEntry]:
    """The events of a log, signatures unchecked: call :func:`verify_log` before relying on them."""
    return [line.entry for line, _ in _lines(folder / LOG_FILE)]


def newest_head(folder: Path) -> Envelope | None:
    """The newest signed head of a log; None while it is empty."""
    newest = None
    for line, _ in _lines(folder / LOG_FILE):
        newest = line.head
    return newest


def head_at(folder: Path, size: int) -> Envelope:
    """The signed head after the first ``size`` events, as its line holds it; ``size`` must be in the log."""
    for number, (line, _) in enumerate(_lines(folder / LOG_FILE), start=1):
        if number == size:
            return line.head
    raise BadInputError(
        f"The log holds no head of {size} events.", hint="Give a size the log once had.", code="no-such-event"
    )


def _open_heads(heads: Sequence[Envelope], owner: VerifyKey) -> dict[int, list[TreeHead]]:
    opened: dict[int, list[TreeHead]] = {}
    for envelope in heads:
        payload = verify_envelope(envelope, [owner], payload_type=HEAD_PAYLOAD_TYPE)
        head = parse_document(TreeHead, payload, name="the earlier head")
        opened.setdefault(head.tree_size, []).append(head)
    return opened


def _lines(path: Path, offset: int = 0) -> Iterator[tuple[LogLine, int]]:
    """Complete lines from ``offset`` on, each with its size in bytes; an unfinished last line is left out."""
    if not path.exists():
        return
    with path.open("rb") as stream:
        stream.seek(offset)
        number = 0
        while raw := stream.readline(MAX_LINE_BYTES + 1):
            number += 1
            if not raw.endswith(b"\n"):
                if len(raw) > MAX_LINE_BYTES or stream.read(1):
                    raise _broken(number, f"it is longer than {MAX_LINE_BYTES} bytes")
                return
            try:
                line = parse_document(LogLine, raw[:-1], name="it")
            except PixcellError as error:
                raise _broken(number, error.message) from error
            if canonical_bytes(line) + b"\n" != raw:
                raise _broken(number, "it is not in canonical form")
            yield line, len(raw)


def _digest_text(root: bytes) -> str:
    return "sha256:" + root.hex()


def _broken(line: int, why: str) -> LogBrokenError:
    return LogBrokenError(
        f"Line {line} of the log is wrong: {why}.",
        hint="Rely on nothing from there on. Keep the log as it is; compare it with heads others hold.",
    )
