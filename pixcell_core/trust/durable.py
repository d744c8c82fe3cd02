"""Writing a file whole or not at all: beside its place, flushed, then put in place in one step."""

from __future__ import annotations

import os
from pathlib import Path

from pixcell_core.errors import PixcellError


class WriteFailedError(PixcellError):
    """A file could not be written: full disk, missing folder, no permission. Nothing half-written stays."""

    default_code = "write-failed"


def write_whole(path: Path, data: bytes, *, mode: int = 0o644, replace: bool = True) -> None:
    """Write ``data`` to ``path`` atomically and durably.

    With ``replace=False`` an existing file stays and :class:`FileExistsError` is raised.
    Raises :class:`WriteFailedError` for everything the file system refuses.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{os.urandom(4).hex()}")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        if replace:
            temporary.replace(path)
        else:
            os.link(temporary, path)
        sync_folder(path.parent)
    except FileExistsError:
        raise
    except OSError as error:
        raise WriteFailedError(
            f"Cannot write {path}: {error.strerror or error}.",
            hint="Check that the folder exists, may be written to, and that its disk has room.",
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Flush a folder's own entries, so that a rename in it survives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
