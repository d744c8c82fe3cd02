"""Where the registry lives: a file in the coordinator's folder, or a PostgreSQL database named in `registry.yaml`.

A password is read from a file that nobody else can read; a URL that holds one is refused. A database on another
machine is asked over TLS, and its certificate is checked, unless the URL says otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError

from pixcell_core.contracts.canonical import read_bounded
from pixcell_core.errors import BadInputError

FILE_NAME = "registry.yaml"
DATABASE_NAME = "registry.db"
MAX_SETTINGS_BYTES = 65_536
QUERY = frozenset({"host", "sslmode", "sslrootcert", "sslcert", "sslkey", "sslcrl", "connect_timeout"})
"""What may follow the question mark of a PostgreSQL URL. No `password`, and no `options` that undo a safeguard."""
LOCAL = frozenset({"", "localhost", "127.0.0.1", "::1"})


class AddressFile(BaseModel):
    """Form of `registry.yaml`."""

    model_config = ConfigDict(extra="forbid")

    url: str
    password_file: Path | None = None


@dataclass(frozen=True)
class RegistryAddress:
    """A checked address. `url` never holds the password."""

    url: URL
    password_file: Path | None = None

    @classmethod
    def of_folder(cls, folder: Path) -> RegistryAddress:
        """What `registry.yaml` in a coordinator's folder says; without one, the file `registry.db` beside it.

        Raises `BadInputError` where the file is none, or says what cannot be.
        """
        path = folder / FILE_NAME
        if not path.exists():
            return cls(URL.create("sqlite", database=str(folder / DATABASE_NAME)))
        try:
            settings = AddressFile.model_validate(yaml.safe_load(read_bounded(path, MAX_SETTINGS_BYTES)))
        except (yaml.YAMLError, UnicodeDecodeError, ValidationError) as error:
            raise _bad(
                f"{path} cannot be read", "Write two lines: `url: ...` and `password_file: ...`."
            ) from error
        return cls.parse(settings.url, settings.password_file, folder)

    @classmethod
    def parse(cls, text: str, password_file: Path | None, folder: Path) -> RegistryAddress:
        """An address from a URL; relative paths are taken from `folder`. The URL itself is never repeated in errors."""
        try:
            url = make_url(text)
        except (ArgumentError, ValueError) as error:
            raise _bad("the registry's URL is none", _EXAMPLE) from error
        backend = url.drivername.split("+")[0]
        if url.password is not None or "password" in url.query:
            raise _bad(
                "the registry's URL holds a password",
                "Take it out, write it to a file of mode 0600 and name that as `password_file`. Change the password.",
            )
        if backend == "sqlite":
            if password_file is not None or url.host or url.query or not url.database or ":" in url.database:
                raise _bad("the registry's URL names no plain SQLite file", _EXAMPLE)
            return cls(URL.create("sqlite", database=str((folder / url.database).absolute())))
        if backend not in ("postgresql", "postgres"):
            raise _bad(f"the registry cannot live in '{backend[:40]}'", _EXAMPLE)
        if strange := sorted(set(url.query) - QUERY):
            raise _bad(
                f"the registry's URL has a setting '{strange[0][:40]}'",
                f"Allowed: {', '.join(sorted(QUERY))}.",
            )
        if not url.database or not url.username:
            raise _bad("the registry's URL names no database or no user", _EXAMPLE)
        if password_file is not None:
            password_file = (folder / password_file).absolute()
        return cls(_over_tls(url.set(drivername="postgresql+psycopg")), password_file)

    @property
    def shown(self) -> str:
        """The URL for people: it holds no password."""
        return self.url.set(drivername=self.backend).render_as_string(hide_password=True)

    @property
    def backend(self) -> str:
        """`sqlite` or `postgresql`."""
        return self.url.get_backend_name()

    @property
    def file(self) -> Path | None:
        """The database file, where the registry is one."""
        return Path(str(self.url.database)) if self.backend == "sqlite" else None

    def with_password(self) -> URL:
        """The URL to connect with. Raises `BadInputError` where the password's file is missing or open to others."""
        if self.password_file is None:
            return self.url
        data = read_bounded(self.password_file, 4096)
        if self.password_file.stat().st_mode & 0o077:
            raise _bad(
                f"the registry's password in {self.password_file} can be read by others",
                f"Close it: chmod 600 {self.password_file}",
            )
        try:
            return self.url.set(password=data.decode("utf-8").rstrip("\r\n"))
        except UnicodeDecodeError as error:
            raise _bad(f"{self.password_file} holds no text", "Write the password alone into it.") from error


_EXAMPLE = (
    "Give sqlite:///FILE or postgresql://USER@HOST:5432/DATABASE, and the password in a `password_file`."
)


def _over_tls(url: URL) -> URL:
    hosts = [url.host or "", *_listed(url.query.get("host"))]
    local = all(host in LOCAL or host.startswith("/") for host in hosts)
    return url if local or "sslmode" in url.query else url.update_query_dict({"sslmode": "verify-full"})


def _listed(value: Any) -> list[str]:
    texts = [value] if isinstance(value, str) else list(value or ())
    return [part for text in texts for part in text.split(",")]


def _bad(what: str, hint: str) -> BadInputError:
    return BadInputError(f"{what[0].upper()}{what[1:]}.", hint=hint, code="bad-registry-address")
