"""A private PostgreSQL server from the system's packages, on loopback, in a folder of its own; ended by its process id."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
import pytest

USER, PASSWORD = "pixcell", "correct horse battery"


def find_binaries() -> Path | None:
    """The folder of the newest `initdb` and `postgres` here, or None."""
    found = sorted(
        Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda p: int(p.parts[-3].split(".")[0])
    )
    if found and (found[-1].parent / "postgres").exists():
        return found[-1].parent
    plain = shutil.which("initdb")
    return Path(plain).parent if plain and shutil.which("postgres") else None


def require_binaries(found: Path | None, environment: Mapping[str, str]) -> Path:
    """The folder found; without one the gate (CI=true) fails, and a stranger's machine skips with the reason."""
    if found is not None:
        return found
    why = "PostgreSQL's server is not installed (Debian: apt-get install postgresql)"
    if environment.get("CI") == "true":
        pytest.fail(why)
    pytest.skip(why)


@dataclass
class Cluster:
    """A server in a folder of its own; `process` is None while it is halted."""

    binaries: Path
    folder: Path
    port: int
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Address of its database `registry`, without the password."""
        return f"postgresql://{USER}@127.0.0.1:{self.port}/registry"

    def password_file(self, folder: Path, password: str = PASSWORD) -> Path:
        """A private file with a password."""
        path = folder / "password"
        path.write_text(password + "\n")
        path.chmod(0o600)
        return path

    def ask(self, statement: str, database: str = "postgres") -> list[tuple[object, ...]]:
        """Run one statement as the owner."""
        with psycopg.connect(
            host="127.0.0.1", port=self.port, user=USER, password=PASSWORD, dbname=database, autocommit=True
        ) as connection:
            cursor = connection.execute(statement.encode())
            return cursor.fetchall() if cursor.description else []

    def empty(self) -> None:
        """A database `registry` with nothing in it."""
        self.ask("DROP DATABASE IF EXISTS registry WITH (FORCE)")
        self.ask("CREATE DATABASE registry")

    def make(self) -> None:
        """Make the data folder of a server that trusts nobody without a password."""
        (self.folder / "password").write_text(PASSWORD)
        owner = _owner()
        if owner is not None:
            for path in (self.folder, self.folder / "password"):
                os.chown(path, owner.pw_uid, owner.pw_gid)
        access = ["-U", USER, "--pwfile", self.folder / "password", "-A", "scram-sha-256"]
        place = ["-D", self.folder / "data", "-E", "UTF8", "--locale=C", "--no-sync"]
        made = subprocess.run(
            [self.binaries / "initdb", *place, *access], stderr=subprocess.PIPE, timeout=120, **self._quiet()
        )
        assert made.returncode == 0, made.stderr.decode()

    def start(self) -> None:
        """Start the server and wait until it answers."""
        settings = {
            "listen_addresses": "127.0.0.1",
            "port": str(self.port),
            "unix_socket_directories": "",
            "fsync": "off",
        }
        options = [text for name, value in settings.items() for text in ("-c", f"{name}={value}")]
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [self.binaries / "postgres", "-D", self.folder / "data", *options],
                stderr=log,
                **self._quiet(),
            )
        end = time.monotonic() + 60
        while True:
            try:
                self.ask("SELECT 1")
                return
            except psycopg.OperationalError:
                if self.process.poll() is not None or time.monotonic() > end:
                    said = (self.folder / "log").read_text(errors="replace")
                    raise AssertionError(f"PostgreSQL did not start:\n{said}") from None
                time.sleep(0.05)

    def halt(self) -> None:
        """End the server by its process; its data stay."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.send_signal(signal.SIGQUIT)
                self.process.wait(20)
        self.process = None

    def _quiet(self) -> dict[str, Any]:
        """The server refuses to run as root: there it runs as the user of its package."""
        owner = _owner()
        who = {"user": owner.pw_uid, "group": owner.pw_gid, "extra_groups": []} if owner is not None else {}
        return {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "cwd": self.folder, **who}


def start_cluster(binaries: Path) -> Cluster:
    """Make and start a server."""
    cluster = Cluster(binaries, Path(tempfile.mkdtemp(prefix="pixcell-pg-")), _free_port())
    try:
        cluster.make()
        cluster.start()
    except BaseException:
        remove_cluster(cluster)
        raise
    return cluster


def remove_cluster(cluster: Cluster) -> None:
    """End the server and remove its folder."""
    cluster.halt()
    shutil.rmtree(cluster.folder, ignore_errors=True)


def _owner() -> pwd.struct_passwd | None:
    return pwd.getpwnam("postgres") if os.geteuid() == 0 else None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
