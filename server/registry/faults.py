"""What a database says when it cannot, in words that name the remedy. A constraint's refusal is left to the caller."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from pixcell_core.errors import BadInputError, ConnectionFailedError, PixcellError, TimedOutError
from server.registry.address import RegistryAddress

MAX_WORDS = 200
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


class StorageFullError(PixcellError):
    """The disk took no more bytes; nothing half-done was kept."""

    default_code = "disk-full"


@contextmanager
def registry_errors(address: RegistryAddress) -> Iterator[None]:
    """Turn a database's failures into one clear error each.

    Raises `StorageFullError`; `ConnectionFailedError` (`registry-down`, `registry-refused`, `registry-forbidden`);
    `TimedOutError` (`registry-busy`); `BadInputError` (`registry-unreadable`, `registry-broken`). An `IntegrityError`
    passes: the caller knows which rule said no.
    """
    try:
        yield
    except IntegrityError:
        raise
    except PoolTimeoutError as error:
        raise _busy(address) from error
    except DBAPIError as error:
        known = _of_sqlite(address, error) if address.backend == "sqlite" else _of_postgresql(address, error)
        if known is None:
            raise
        raise known from error


@contextmanager
def file_errors(what: str, folder: Path) -> Iterator[None]:
    """Turn a full disk under `folder` into `StorageFullError` while `what` is written."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise _full(f"{what} in {folder}") from error


def _full(what: str) -> StorageFullError:
    return StorageFullError(
        f"The disk is full: {what} could not be written, and nothing half-done was kept.",
        hint="Free space there, then do the same again.",
    )


def _busy(address: RegistryAddress) -> TimedOutError:
    return TimedOutError(
        f"The registry {address.shown} was busy for too long.",
        hint="Do the same again. If it stays so, look for a process that hangs while it writes.",
        code="registry-busy",
    )


def _of_sqlite(address: RegistryAddress, error: DBAPIError) -> PixcellError | None:
    name = str(getattr(error.orig, "sqlite_errorname", ""))
    file = address.file
    if name == "SQLITE_FULL" or name in ("SQLITE_IOERR_WRITE", "SQLITE_IOERR_FSYNC", "SQLITE_IOERR_TRUNCATE"):
        return _full(f"the registry {file}")
    if name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
        return _busy(address)
    if name.startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB")):
        return BadInputError(
            f"The registry {file} is damaged, or is no database.",
            hint="Stop the hub and restore the file from a copy; rounds that were committed lie under runs/.",
            code="registry-broken",
        )
    if name.startswith(("SQLITE_CANTOPEN", "SQLITE_READONLY", "SQLITE_PERM", "SQLITE_AUTH", "SQLITE_IOERR")):
        return BadInputError(
            f"The registry {file} cannot be opened for writing.",
            hint="Run as the user who owns the coordinator's folder, and check its permissions.",
            code="registry-unreadable",
        )
    return None


_REFUSED_STATES = ("28000", "28P01")
_REFUSED_WORDS = (
    "password authentication failed",
    "no password supplied",
    "no pg_hba.conf entry",
    "authentication",
)
_BUSY_STATES = ("55P03", "57014", "40001", "40P01")


def _of_postgresql(address: RegistryAddress, error: DBAPIError) -> PixcellError | None:
    state = str(getattr(error.orig, "sqlstate", None) or "")
    words = _plain(str(error.orig))
    lower = words.lower()
    if state == "53100" or "no space left on device" in lower:
        return _full(f"the registry {address.shown}")
    if state in _BUSY_STATES:
        return _busy(address)
    if state in _REFUSED_STATES or (not state and any(part in lower for part in _REFUSED_WORDS)):
        return ConnectionFailedError(
            f"The registry {address.shown} does not accept this user and password.",
            hint="Correct the user in registry.yaml and the password in its password_file.",
            code="registry-refused",
        )
    if state == "3D000" or (not state and "does not exist" in lower and "database" in lower):
        return ConnectionFailedError(
            f"There is no database {address.url.database} at {address.shown}.",
            hint="Have it made (createdb), owned by the user of registry.yaml.",
            code="registry-down",
        )
    if state == "42501":
        return ConnectionFailedError(
            f"The user of registry.yaml may not do this in {address.shown}.",
            hint="Let that user own the database.",
            code="registry-forbidden",
        )
    if error.connection_invalidated or not state or state[:2] in ("08", "57", "53"):
        return ConnectionFailedError(
            f"The registry {address.shown} cannot be reached: {words}",
            hint="Check that the database server runs, and the host, port and TLS settings in registry.yaml.",
            code="registry-down",
        )
    return None


def _plain(text: str) -> str:
    """The first line of what a driver said, printable and bounded."""
    line = text.strip().splitlines()[0] if text.strip() else "no reason given"
    return "".join(c if c.isprintable() else " " for c in line)[:MAX_WORDS]
