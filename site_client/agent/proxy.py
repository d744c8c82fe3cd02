"""The way out of the hospital: straight to the hub, or through one HTTPS proxy. Chosen once, shown, never guessed.

In order: what the command line says, what the site's settings (site.json) say, what HTTPS_PROXY of the environment
says. The environment is read here, once, and passed on explicitly: no library of the agent reads it again.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from pixcell_core.contracts.canonical import read_bounded
from pixcell_core.errors import BadInputError
from site_client.approvals.site_folder import SiteIdentity

DIRECT = "direct"
MAX_CREDENTIAL_BYTES = 1024

Source = Literal["command line", "site.json", "environment", "none"]


@dataclass(frozen=True)
class Proxy:
    """One HTTP proxy that opens tunnels by CONNECT; credentials lie in a file and are read when it is used."""

    host: str
    port: int
    credentials_file: Path | None = None

    @property
    def url(self) -> str:
        """`http://host:port`, without credentials."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}"

    def credentials(self) -> tuple[str, str] | None:
        """User and password, from a file of mode 600 that holds `user:password` on its one line."""
        if self.credentials_file is None:
            return None
        text = read_bounded(self.credentials_file, MAX_CREDENTIAL_BYTES)
        if stat.S_IMODE(self.credentials_file.stat().st_mode) & 0o077:
            raise BadInputError(
                f"{self.credentials_file} can be read by other users.",
                hint=f"chmod 600 {self.credentials_file}",
                code="key-file-exposed",
            )
        try:
            user, separator, password = text.decode("utf-8").strip().partition(":")
        except UnicodeDecodeError:
            user, separator, password = "", "", ""
        if not separator or not user or any(c in user + password for c in "\r\n\0"):
            raise BadInputError(
                f"{self.credentials_file} does not hold user:password.",
                hint="Write both on one line, with a colon between them.",
                code="bad-proxy-credentials",
            )
        return user, password


@dataclass(frozen=True)
class WayOut:
    """Where the agent connects to, and who said so."""

    proxy: Proxy | None
    source: Source

    def __str__(self) -> str:
        return (
            "straight to the hub" if self.proxy is None else f"through {self.proxy.url} (from {self.source})"
        )


STRAIGHT = WayOut(None, "none")


def choose_way_out(
    identity: SiteIdentity,
    given: str | None = None,
    credentials_file: Path | None = None,
    environment: Mapping[str, str] = os.environ,
    hub: str | None = None,
) -> WayOut:
    """The proxy to use. `given` may be `direct`, which overrides settings and environment.

    Raises `BadInputError` for an address that is no HTTP proxy, or one that carries credentials.
    """
    if given is not None:
        chosen = None if given == DIRECT else parse_proxy(given, credentials_file)
        return WayOut(chosen, "command line")
    if identity.proxy is not None:
        file = credentials_file or (Path(identity.proxy_credentials) if identity.proxy_credentials else None)
        chosen = None if identity.proxy == DIRECT else parse_proxy(identity.proxy, file)
        return WayOut(chosen, "site.json")
    found = environment.get("https_proxy") or environment.get("HTTPS_PROXY") or ""
    if not found or _exempt(hub or identity.hub, environment):
        return STRAIGHT
    return WayOut(parse_proxy(found, credentials_file), "environment")


def parse_proxy(text: str, credentials_file: Path | None = None) -> Proxy:
    """A proxy from `http://host:port`."""
    try:
        parts = urlsplit(text if "://" in text else f"http://{text}")
        host, port = parts.hostname, parts.port or 80
    except ValueError:
        parts, host, port = urlsplit(""), None, 0
    if parts.username is not None or parts.password is not None:
        raise BadInputError(
            "The proxy's address carries credentials; process lists and logs would show them.",
            hint="Give http://host:port, and the credentials by --credentials-file / --proxy-credentials-file.",
            code="proxy-credentials-in-address",
        )
    if parts.scheme != "http" or not host or parts.path not in ("", "/") or parts.query:
        raise BadInputError(
            "This is not the address of an HTTP proxy.",
            hint="Give http://host:port (a proxy that opens tunnels by CONNECT), or 'direct'.",
            code="bad-proxy",
        )
    return Proxy(host, port, credentials_file)


def _exempt(hub: str, environment: Mapping[str, str]) -> bool:
    """Whether NO_PROXY names the hub's host or a domain above it."""
    host = hub.rpartition(":")[0].strip("[]").lower()
    for entry in (environment.get("no_proxy") or environment.get("NO_PROXY") or "").split(","):
        name = entry.strip().lower().lstrip(".")
        if name == "*" or (name and (host == name or host.endswith("." + name))):
            return True
    return False
