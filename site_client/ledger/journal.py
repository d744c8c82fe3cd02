"""The ledger's file: append-only lines, on disk before `append` returns, under a single writer's lock.

Files of a ledger folder::

    ledger.jsonl   one signed record per line, only ever appended to
    head.json      sequence number and hash of the last two records that were safely on disk, one slot each
    lock           held (flock) by the one process that may append; the system frees it when that process dies

`append` writes the line and waits for the disk (fsync), then writes the head over the older of the two slots and
waits again. The slots lie in blocks of their own and carry a checksum: a slot that a crash left half-written does not
count, and the other one is one record behind. Writing in place spares the disk a renaming for every charge. A crash
therefore leaves one of three states, told apart by `head.json`: nothing happened; a torn last line that the
head does not know (its `append` never returned, so nothing was drawn on it, and it may be dropped); a whole
last line that the head does not know yet (kept: it charges). Anything else is damage, and the ledger
refuses to go on. Mending what a crash left is itself a sequence of such steps, each of which may be cut short:
the tail is cut or completed before the head is written, and a second attempt finds one of the same three states.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import time
import weakref
from collections.abc import Iterator
from pathlib import Path

from pixcell_core.contracts.canonical import DocumentError, canonical_bytes, digest, parse_json
from pixcell_core.errors import BadInputError, PixcellError, RefusedError
from pixcell_core.private.ledger_record import LedgerHead

LEDGER_FILE = "ledger.jsonl"
HEAD_FILE = "head.json"
LOCK_FILE = "lock"
HEAD_SLOT_BYTES = 512
MAX_LEDGER_BYTES = 256 * 1024 * 1024
_POLL_SECONDS = 0.05


class LedgerBusyError(RefusedError):
    """Another process of this site holds the ledger."""

    default_code = "ledger-busy"


class LedgerWriteError(PixcellError):
    """The disk did not take the record, or another process wrote in between; nothing may be drawn on it."""

    default_code = "ledger-write"


class Journal:
    """Exclusive append access to a ledger folder, from `Journal.lock` to `close` or the process's end."""

    def __init__(self, folder: Path, lock_descriptor: int) -> None:
        self.folder = folder
        self._lock = lock_descriptor
        self._owner = os.getpid()
        self._failed = False
        self._size = _size_of(folder / LEDGER_FILE)
        _HELD.add(self)

    @classmethod
    def lock(cls, folder: Path, *, wait_seconds: float = 0.0) -> Journal:
        """Take the writer's lock, waiting at most `wait_seconds`.

        Args:
            folder: made when missing, for the owner alone.
            wait_seconds: how long another process may still hold it.

        Raises:
            LedgerBusyError: another living process has it. A lock file left by a dead one is no obstacle, and a
                forked child never keeps its parent's lock.
            BadInputError: the folder cannot be made, read or written.
        """
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            descriptor = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise _cannot("open", folder, error) from error
        deadline = time.monotonic() + wait_seconds
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if error.errno not in (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES):
                    os.close(descriptor)
                    raise _cannot("lock", folder, error) from error
                if time.monotonic() >= deadline:
                    holder = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip() or "unknown"
                    os.close(descriptor)
                    raise LedgerBusyError(
                        f"The privacy ledger is in use by process {holder}.",
                        hint="Two trainings must not charge it at once. Wait for the other one, or stop it.",
                    ) from None
                time.sleep(_POLL_SECONDS)
        try:
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, str(os.getpid()).encode(), 0)
            return cls(folder, descriptor)
        except BaseException as error:
            os.close(descriptor)
            if isinstance(error, OSError):
                raise _cannot("lock", folder, error) from error
            raise

    def close(self) -> None:
        """Free the lock. Harmless when done twice."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    @property
    def usable(self) -> bool:
        """Whether `append` may be asked: the lock is held by this process, and no earlier write failed."""
        return self._lock >= 0 and not self._failed and os.getpid() == self._owner

    def append(self, line: bytes, head: LedgerHead) -> None:
        """Append one line (newline included). Returns when it and its head are on disk.

        Raises:
            LedgerWriteError: the disk refused. The journal then accepts nothing more; open the ledger anew.
        """
        if not self.usable:
            raise LedgerWriteError(
                "This ledger is closed, belongs to another process, or failed to write before.",
                hint="Open the ledger again; it will check itself first.",
            )
        self._failed = True  # until everything below is done
        with _write_errors():
            self._append_line(line)
            self._write_head(head)
        self._failed = False

    def drop_torn_tail(self, whole_bytes: int) -> None:
        """Cut a torn last line off; only for one that no head ever named."""
        with _write_errors():
            descriptor = os.open(self.folder / LEDGER_FILE, os.O_WRONLY | os.O_CLOEXEC)
            try:
                os.ftruncate(descriptor, whole_bytes)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            self._size = whole_bytes

    def complete_tail(self) -> None:
        """Give a whole last line the newline it lacks."""
        with _write_errors():
            self._append_line(b"\n")

    def restore_head(self, head: LedgerHead) -> None:
        """Write the head that a crash left one record behind."""
        with _write_errors():
            self._write_head(head)

    def _append_line(self, line: bytes) -> None:
        path = self.folder / LEDGER_FILE
        is_new = not path.exists()
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            before = os.fstat(descriptor).st_size
            if before != self._size:
                raise LedgerWriteError(
                    "Another process wrote to the privacy ledger although this one holds its lock.",
                    hint="Nothing was drawn. Was the lock file deleted? Stop the other trainer, then run "
                    "`pixcell site budget verify`.",
                    code="ledger-changed",
                )
            try:
                _write_all(descriptor, line)
            except OSError:
                with contextlib.suppress(OSError):
                    os.ftruncate(descriptor, before)
                    os.fsync(descriptor)
                raise
            os.fsync(descriptor)
            self._size = before + len(line)
        finally:
            os.close(descriptor)
        if is_new:
            _sync_folder(self.folder)
            _sync_folder(self.folder.parent)

    def _write_head(self, head: LedgerHead) -> None:
        path = self.folder / HEAD_FILE
        if _size_of(path) != 2 * HEAD_SLOT_BYTES:
            self._make_head(_slot(head) * 2)
            return
        descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            _write_all(descriptor, _slot(head), at=HEAD_SLOT_BYTES * (head.sequence % 2))
            os.fdatasync(descriptor)
        finally:
            os.close(descriptor)

    def _make_head(self, content: bytes) -> None:
        partial = self.folder / (HEAD_FILE + ".partial")
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            _write_all(descriptor, content)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(partial, self.folder / HEAD_FILE)
        _sync_folder(self.folder)


def read_lines(folder: Path) -> tuple[list[bytes], bytes]:
    """Return the whole lines of the ledger, without newlines, and the bytes of a torn last line, if any."""
    path = folder / LEDGER_FILE
    try:
        if path.stat().st_size > MAX_LEDGER_BYTES:
            raise BadInputError(
                f"{path} is larger than {MAX_LEDGER_BYTES} bytes.",
                hint="This is not a ledger.",
                code="ledger-broken",
            )
        data = path.read_bytes()
    except FileNotFoundError:
        return [], b""
    except OSError as error:
        raise _cannot("read", path, error) from error
    *lines, tail = data.split(b"\n")
    return lines, tail


def read_head(folder: Path) -> LedgerHead | None:
    """Return the last head that was safely on disk; None when there is none or none that can be read."""
    try:
        data = (folder / HEAD_FILE).read_bytes()
    except OSError:
        return None
    slots = [data[at : at + HEAD_SLOT_BYTES] for at in range(0, 2 * HEAD_SLOT_BYTES, HEAD_SLOT_BYTES)]
    heads = [head for head in map(_read_slot, slots) if head is not None]
    return max(heads, key=lambda head: head.sequence, default=None)


def _slot(head: LedgerHead) -> bytes:
    """A head as a line of JSON filled up with blanks; the checksum tells a whole slot from a mixture of two."""
    told = {"hash": head.hash, "sequence": head.sequence}
    return canonical_bytes({**told, "check": digest(told)}).ljust(HEAD_SLOT_BYTES - 1) + b"\n"


def _read_slot(data: bytes) -> LedgerHead | None:
    try:
        value = parse_json(data, name=HEAD_FILE, max_bytes=HEAD_SLOT_BYTES)
    except DocumentError:
        return None
    if not isinstance(value, dict) or not isinstance(value.get("sequence"), int):
        return None
    head = LedgerHead(value["sequence"], str(value.get("hash")))
    # Heads were once written without a checksum, alone in the file and replaced as a whole.
    return (
        head if value.get("check") in (None, digest({"hash": head.hash, "sequence": head.sequence})) else None
    )


_HELD: weakref.WeakSet[Journal] = weakref.WeakSet()


def _let_go_in_child() -> None:
    """Close inherited locks: a worker that outlives its trainer would otherwise hold the ledger for ever."""
    for journal in list(_HELD):
        journal.close()


os.register_at_fork(after_in_child=_let_go_in_child)


@contextlib.contextmanager
def _write_errors() -> Iterator[None]:
    """Turn what the disk answers into the ledger's own error."""
    try:
        yield
    except OSError as error:
        raise LedgerWriteError(
            f"The privacy ledger could not be written: {error.strerror or error}.",
            hint="Nothing was drawn on a charge that is not on disk. Free some space or mend the folder's "
            "permissions, then run again.",
        ) from error


def _size_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
    except OSError as error:
        raise _cannot("read", path, error) from error


def _write_all(descriptor: int, data: bytes, *, at: int | None = None) -> None:
    view = memoryview(data)
    while view:
        done = os.write(descriptor, view) if at is None else os.pwrite(descriptor, view, at)
        view, at = view[done:], None if at is None else at + done


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _cannot(verb: str, path: Path, error: OSError) -> BadInputError:
    return BadInputError(
        f"Cannot {verb} the privacy ledger at {path}: {error.strerror or error}.",
        hint="Check the folder, its owner and its permissions.",
        code="ledger-unreadable",
    )
