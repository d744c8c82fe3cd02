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
from dataclasses import dataclass
from pathlib import Path

import psycopg

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


@dataclass
class Cluster:
    """A running server."""

    folder: Path
    port: int
    process: subprocess.Popen[bytes]

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

    def stop(self) -> None:
        """End the server and remove its folder."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.send_signal(signal.SIGQUIT)
                self.process.wait(20)
        shutil.rmtree(self.folder, ignore_errors=True)


def start_cluster(binaries: Path) -> Cluster:
    """Make and start a server that trusts nobody without a password."""
    folder = Path(tempfile.mkdtemp(prefix="pixcell-pg-"))
    owner = pwd.getpwnam("postgres") if os.geteuid() == 0 else None
    (folder / "password").write_text(PASSWORD)
    if owner is not None:
        for path in (folder, folder / "password"):
            os.chown(path, owner.pw_uid, owner.pw_gid)
    who = {"user": owner.pw_uid, "group": owner.pw_gid, "extra_groups": []} if owner is not None else {}
    quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "cwd": folder, **who}
    access = ["-U", USER, "--pwfile", folder / "password", "-A", "scram-sha-256"]
    made = subprocess.run(
        [binaries / "initdb", "-D", folder / "data", *access, "-E", "UTF8", "--locale=C", "--no-sync"],
        stderr=subprocess.PIPE,
        timeout=120,
        **quiet,  # type: ignore[call-overload]
    )
    assert made.returncode == 0, made.stderr.decode()
    port = _free_port()
    settings = {
        "listen_addresses": "127.0.0.1",
        "port": str(port),
        "unix_socket_directories": "",
        "fsync": "off",
    }
    options = [text for name, value in settings.items() for text in ("-c", f"{name}={value}")]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [binaries / "postgres", "-D", folder / "data", *options],
            stderr=log,
            **quiet,  # type: ignore[call-overload]
        )
    cluster = Cluster(folder, port, process)
    end = time.monotonic() + 60
    while True:
        try:
            cluster.ask("SELECT 1")
            return cluster
        except psycopg.OperationalError:
            if process.poll() is not None or time.monotonic() > end:
                log_text = (folder / "log").read_text(errors="replace")
                cluster.stop()
                raise AssertionError(f"PostgreSQL did not start:\n{log_text}") from None
            time.sleep(0.05)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
