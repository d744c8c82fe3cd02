"""The open registry: transactions that are whole or absent, on SQLite or PostgreSQL.

An engine belongs to the process that made it. The hub forks, so a registry that finds itself in another process makes
an engine of its own and never touches, nor closes, the connections it inherited.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

from sqlalchemy import Connection, Engine, create_engine, event, text

from pixcell_core.errors import BadInputError
from server.registry.address import RegistryAddress
from server.registry.faults import registry_errors

BUSY_S = 20.0
"""How long a transaction waits for others before it gives up."""
CONNECT_S = 10
MODE = "pixcell_transaction"

Mode = Literal["read", "write", "write-fast"]

_INHERITED: list[Engine] = []
"""Engines of a parent process, kept so that nothing ever closes their connections from here."""


class Registry:
    """One database. `read` and `write` give a connection inside a transaction of its own."""

    def __init__(self, address: RegistryAddress, *, busy_s: float = BUSY_S) -> None:
        self.address, self._busy_s = address, busy_s
        self._engine: Engine | None = None
        self._process = os.getpid()

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """Look at one moment of the registry; what others write meanwhile is not seen."""
        with self._transaction("read") as connection:
            yield connection

    @contextmanager
    def write(self, *, lock: str | None = None, durable: bool = True) -> Iterator[Connection]:
        """Change the registry: all of it at the end of the block, or nothing where the block raises.

        A durable transaction has reached the disk when the block is left; another one survives a kill but may be lost
        in a power cut. Blocks with the same `lock` never overlap (on SQLite no two writing blocks do).
        """
        with self._transaction("write" if durable else "write-fast") as connection:
            if lock is not None and connection.dialect.name == "postgresql":
                connection.execute(
                    text("SELECT pg_advisory_xact_lock(hashtextextended(:lock, 0))"), {"lock": lock}
                )
            yield connection

    def ping(self) -> None:
        """Raises the error of `registry_errors` where the database does not answer."""
        with self.read() as connection:
            connection.execute(text("SELECT 1"))

    def close(self) -> None:
        """Close the connections of this process. The next transaction opens new ones."""
        if self._engine is not None and self._process == os.getpid():
            self._engine.dispose()
            self._engine = None

    @contextmanager
    def _transaction(self, mode: Mode) -> Iterator[Connection]:
        with registry_errors(self.address), self._here().connect() as plain:
            connection = plain.execution_options(**{MODE: mode})
            with connection.begin():
                yield connection

    def _here(self) -> Engine:
        if self._process != os.getpid():
            if self._engine is not None:
                _INHERITED.append(self._engine)
            self._engine, self._process = None, os.getpid()
        if self._engine is None:
            make = _sqlite_engine if self.address.backend == "sqlite" else _postgresql_engine
            self._engine = make(self.address, self._busy_s)
        return self._engine


def _sqlite_engine(address: RegistryAddress, busy_s: float) -> Engine:
    _touch_private(address)
    engine = create_engine(
        address.url, connect_args={"timeout": busy_s}, pool_size=2, max_overflow=8, pool_timeout=busy_s
    )

    @event.listens_for(engine, "connect")
    def _prepare(raw: Any, _record: Any) -> None:
        # The driver's own idea of when to begin is switched off: it would leave DDL outside of transactions.
        raw.isolation_level = None
        _into_wal(raw, busy_s)
        raw.execute("PRAGMA foreign_keys=ON")
        raw.execute("PRAGMA trusted_schema=OFF")

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        mode = connection.get_execution_options().get(MODE, "read")
        if mode == "read":
            connection.exec_driver_sql("BEGIN")
            return
        connection.exec_driver_sql(f"PRAGMA synchronous={'FULL' if mode == 'write' else 'NORMAL'}")
        # A writer waits here, before it has read anything: it can never be told later that it read too early.
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    return engine


def _touch_private(address: RegistryAddress) -> None:
    file = address.file
    assert file is not None
    try:
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        os.close(os.open(file, os.O_RDWR | os.O_CREAT, 0o600))
    except OSError as error:
        raise BadInputError(
            f"The registry {file} cannot be opened: {error.strerror or error}.",
            hint="Run as the user who owns the coordinator's folder, and check its permissions.",
            code="registry-unreadable",
        ) from error


def _into_wal(raw: Any, busy_s: float) -> None:
    """Readers beside a writer. SQLite does not wait by itself for the moment of the first change to this mode."""
    import sqlite3

    end = time.monotonic() + busy_s
    while True:
        try:
            raw.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError as error:
            if (
                not str(getattr(error, "sqlite_errorname", "")).startswith("SQLITE_BUSY")
                or time.monotonic() > end
            ):
                raise
            time.sleep(0.02)


def _postgresql_engine(address: RegistryAddress, busy_s: float) -> Engine:
    url = address.with_password()
    waits = {} if "connect_timeout" in url.query else {"connect_timeout": CONNECT_S}
    try:
        engine = create_engine(
            url,
            # A server that was started again must not cost the first transaction after it.
            pool_pre_ping=True,
            pool_size=2,
            max_overflow=8,
            pool_timeout=busy_s,
            connect_args={
                **waits,
                "application_name": "pixcell",
                "options": f"-c lock_timeout={int(busy_s * 1000)} -c search_path=public -c timezone=UTC",
            },
        )
    except ModuleNotFoundError as error:
        raise BadInputError(
            "This installation cannot speak to PostgreSQL: psycopg is missing.",
            hint="Install the extra: pip install 'pixcell-federation[postgres]'",
            code="no-postgresql-driver",
        ) from error

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        mode = connection.get_execution_options().get(MODE, "read")
        if mode == "read":
            connection.exec_driver_sql("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")
        elif mode == "write":
            connection.exec_driver_sql("SET LOCAL synchronous_commit TO on")
        else:
            connection.exec_driver_sql("SET LOCAL synchronous_commit TO off")

    return engine
