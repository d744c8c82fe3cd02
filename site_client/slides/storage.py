"""Writing that is whole or absent: atomic files, and one clear error when the disk refuses."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pixcell_core.errors import BadInputError, PixcellError, RefusedError

PARTIAL_SUFFIX = ".partial"

#: A file that cannot grow: the file system is full, the quota is spent, or a size limit was reached.
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_DENIED = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})
#: Libraries that hide the errno say it in words (SQLite, the safetensors writer, Arrow).
_FULL_WORDS = (
    "no space left on device",
    "disk is full",
    "disk quota exceeded",
    "file too large",
    "disk i/o error",
)


class StorageFullError(PixcellError):
    """The disk took no more bytes; nothing half-written was kept."""

    default_code = "disk-full"


@contextmanager
def storage_errors(what: str, folder: Path) -> Iterator[None]:
    """Turn a full or forbidden disk under `folder` into one clear error while `what` is being done.

    Raises:
        StorageFullError: no space, quota or file-size limit.
        BadInputError: the folder may not be written (`not-writable`) or is a file (`not-a-folder`).
    """
    try:
        yield
    except PixcellError:
        raise
    except Exception as error:
        number = error.errno if isinstance(error, OSError) else None
        words = f"{error} {error.__cause__ or ''}".lower()
        if number in _FULL or (number is None and any(phrase in words for phrase in _FULL_WORDS)):
            raise StorageFullError(
                f"The disk is full: {what} in {folder} could not be finished. Finished parts are "
                "kept, no part is half-written.",
                hint="Free space there (or choose another folder) and run the same command again: "
                "it continues.",
            ) from error
        if number in _DENIED or "readonly database" in words or "permission denied" in words:
            raise BadInputError(
                f"{folder} may not be written, so {what} could not be done.",
                hint="Give this user write permission on the folder, or choose another one.",
                code="not-writable",
            ) from error
        if isinstance(error, (FileExistsError, NotADirectoryError, IsADirectoryError)):
            raise BadInputError(
                f"{folder} is not a folder that {what} can use: a file stands where a folder should be, "
                "or the other way round.",
                hint="Name another folder, or move the file that stands there away.",
                code="not-a-folder",
            ) from error
        raise


@contextmanager
def exclusive(folder: Path, what: str) -> Iterator[None]:
    """Hold `folder` for one process; the kernel lets go when the process ends, however it ends.

    Raises:
        RefusedError: code `busy` when another process is doing this now.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RefusedError(
                f"Another process is {what} in {folder} right now.",
                hint="Wait for it to end (or stop it) and run the same command again: finished parts are kept.",
                code="busy",
            ) from error
        yield


@contextmanager
def atomic_path(final: Path) -> Iterator[Path]:
    """Yield a sibling path to write to; it becomes `final` only when the block ends well.

    The file is flushed to disk before the rename, so a power cut leaves either the old file or the new one.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    partial = final.with_name(f".{final.name}.{os.getpid()}{PARTIAL_SUFFIX}")
    try:
        yield partial
        with partial.open("rb+") as handle:
            os.fsync(handle.fileno())
        os.replace(partial, final)
    finally:
        partial.unlink(missing_ok=True)


def sweep_partials(folder: Path) -> int:
    """Delete what a killed process left half-written in `folder`; return how many files that were."""
    count = 0
    for leftover in folder.glob(f".*{PARTIAL_SUFFIX}"):
        leftover.unlink(missing_ok=True)
        count += 1
    return count
