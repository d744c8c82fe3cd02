"""The version of a registry's tables: made when new, refused when newer, brought up on request when older."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from sqlalchemy import Connection, inspect, text
from sqlalchemy.exc import DBAPIError

from pixcell_core.errors import BadInputError, PixcellError, RefusedError
from server.registry.address import RegistryAddress
from server.registry.faults import file_errors, registry_errors
from server.registry.registry import Registry

if TYPE_CHECKING:
    from alembic.config import Config

REVISIONS = ("0001", "0002")
"""Every version of the tables this program knows, oldest first. A test holds them to the migrations."""
HEAD = REVISIONS[-1]
MIGRATIONS = Path(__file__).parent / "migrations"
LOCK = "schema"


def revision_of(connection: Connection) -> str | None:
    """The version of the tables; None for an empty database.

    Raises `BadInputError` where the database holds something else (`registry-foreign`).
    """
    tables = set(inspect(connection).get_table_names())
    if not tables:
        return None
    if "alembic_version" not in tables:
        raise _foreign(connection)
    found = connection.execute(text("SELECT version_num FROM alembic_version")).scalars().all()
    if len(found) > 1:
        raise _foreign(connection)
    return str(found[0]) if found else None


def require_current(registry: Registry) -> None:
    """Make the tables of a new database; pass those of this version.

    Raises `RefusedError` for older ones (`registry-older`), `BadInputError` for newer or foreign ones.
    """
    with registry.read() as connection:
        found = revision_of(connection)
    if found is None:
        migrate(registry)
    elif found != HEAD:
        raise _other_version(found)


def migrate(registry: Registry, target: str = HEAD) -> tuple[str | None, str]:
    """Bring the tables to `target`, all steps in one transaction; returns the versions before and after.

    Raises `BadInputError` for a newer or foreign database.
    """
    from alembic import command

    with registry.write(lock=LOCK) as connection:
        before = revision_of(connection)
        if before is not None and before not in REVISIONS:
            raise _other_version(before)
        command.upgrade(_config(connection), target)
        after = revision_of(connection)
        assert after is not None
    return before, after


def backup(registry: Registry, place: Path) -> None:
    """Write a whole copy of an SQLite registry to `place`, which must not exist; others may write meanwhile.

    Raises `BadInputError` where the place cannot be written, `StorageFullError` where its disk is full.
    """
    file = registry.address.file
    assert file is not None
    partial = place.with_name(f".{place.name}.{os.getpid()}")
    try:
        with file_errors(f"the copy {place.name}", place.parent):
            os.close(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
        with registry_errors(RegistryAddress.parse(f"sqlite:///{partial}", None, place.parent)):
            _copy(file, partial)
        os.replace(partial, place)
    except OSError as error:
        raise BadInputError(
            f"The copy {place} cannot be written: {error.strerror or error}.",
            hint="Name a file in a folder that this user may write.",
            code="not-writable",
        ) from error
    finally:
        partial.unlink(missing_ok=True)


def _copy(file: Path, partial: Path) -> None:
    import sqlite3

    source, copy = sqlite3.connect(file), sqlite3.connect(partial)
    try:
        source.backup(copy)
    except sqlite3.Error as error:
        raise DBAPIError("backup", None, error) from error
    finally:
        source.close()
        copy.close()


def _config(connection: Connection) -> Config:
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    config.attributes["connection"] = connection
    return config


def _other_version(found: str) -> PixcellError:
    if found in REVISIONS:
        return RefusedError(
            f"The registry has version {found} of its tables; this program needs {HEAD}.",
            hint="Stop the hub, copy the database, then bring it up: pixcell registry upgrade --dir FOLDER",
            code="registry-older",
        )
    return BadInputError(
        f"The registry was written by another version of this program: its tables have version {found[:40]}, "
        f"this program knows up to {HEAD}.",
        hint="Install the newer version of pixcell again, or restore the copy made before the upgrade.",
        code="registry-newer",
    )


def _foreign(connection: Connection) -> BadInputError:
    return BadInputError(
        f"The {connection.dialect.name} database holds tables of something else.",
        hint="Give the registry a database of its own: name an empty one in registry.yaml.",
        code="registry-foreign",
    )
