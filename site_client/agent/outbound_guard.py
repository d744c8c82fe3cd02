"""Lets the agent's network processes reach the hub (or the proxy) and their own loopback port, and nothing else.

An audit hook of the whole interpreter, which cannot be removed once set and which forked children keep. It stops
Python code; a firewall or a container's network policy stands behind it.
"""

from __future__ import annotations

import ipaddress
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass

from pixcell_core.errors import RefusedError

LOOKUPS = frozenset(
    {"socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr", "socket.getnameinfo"}
)
CONNECTIONS = frozenset({"socket.connect", "socket.sendto", "socket.sendmsg"})
PROGRAMS = frozenset({"subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn"})


class OutboundRefusedError(RefusedError):
    """Something in the agent tried to reach what it must not."""

    default_code = "outbound-refused"


@dataclass(frozen=True)
class Peer:
    """A host name or address, and a port."""

    host: str
    port: int

    @classmethod
    def parse(cls, address: str) -> Peer:
        """From `host:port` or `[IPv6]:port`."""
        host, _, port = address.rpartition(":")
        return cls(host.strip("[]").lower(), int(port))


def allow_only(peers: tuple[Peer, ...], report: Callable[[str], None] = lambda event: None) -> None:
    """Refuse, from now on and in this whole process and its forks, every peer but these, and every new program.

    A name among the peers may be looked up, and the addresses it has may be connected to on its port. Listening on
    loopback stays possible. `report` is told what was refused: the kind of call, never where to. Cannot be undone.
    """
    guard = _Guard(peers, report)
    sys.addaudithook(guard)


class _Guard:
    def __init__(self, peers: tuple[Peer, ...], report: Callable[[str], None]) -> None:
        self._peers, self._report = peers, report
        self._names = frozenset(peer.host for peer in peers)
        self._known = {(_plain(peer.host), peer.port) for peer in peers if _is_address(peer.host)}

    def __call__(self, event: str, arguments: tuple[object, ...]) -> None:
        if event in PROGRAMS:
            self._refuse(event)
        elif event in LOOKUPS:
            if not self._may_look_up(arguments):
                self._refuse(event)
        elif event in CONNECTIONS:
            family = getattr(arguments[0], "family", None) if arguments else None
            if family != socket.AF_UNIX and not self._may_reach(arguments[1] if len(arguments) > 1 else None):
                self._refuse(event)
        elif event == "socket.bind":
            family = getattr(arguments[0], "family", None)
            if family != socket.AF_UNIX and not _loopback(arguments[1]):
                self._refuse(event)

    def _may_look_up(self, arguments: tuple[object, ...]) -> bool:
        host = arguments[0] if arguments else None
        if isinstance(host, tuple):
            host = host[0]
        if isinstance(host, bytes):
            host = host.decode("ascii", "replace")
        # A literal address is not a question to anybody; what is connected to is asked for separately.
        return host is None or (isinstance(host, str) and (host.lower() in self._names or _is_address(host)))

    def _may_reach(self, address: object) -> bool:
        if not isinstance(address, tuple) or len(address) < 2 or not isinstance(address[0], str):
            return False
        place = (_plain(address[0]), int(address[1]))
        if place in self._known:
            return True
        # The name may have got another address since: ask again, for the names we are allowed to ask for.
        for peer in self._peers:
            if peer.port == place[1] and not _is_address(peer.host):
                try:
                    found = socket.getaddrinfo(peer.host, peer.port, type=socket.SOCK_STREAM)
                except OSError:
                    continue
                self._known |= {(_plain(str(entry[4][0])), peer.port) for entry in found}
        return place in self._known

    def _refuse(self, event: str) -> None:
        self._report(event)
        raise OutboundRefusedError(
            f"The agent reaches its hub and nothing else: {event} was refused.",
            hint="Nothing left this machine. Tell the authors what the log says.",
        )


def _plain(host: str) -> str:
    text = host.partition("%")[0].strip("[]").lower()
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return text
    mapped = getattr(address, "ipv4_mapped", None)
    return str(mapped or address)


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host.partition("%")[0].strip("[]"))
    except ValueError:
        return False
    return True


def _loopback(address: object) -> bool:
    host = address[0] if isinstance(address, tuple) and address else ""
    return host == "localhost" or (
        isinstance(host, str)
        and _is_address(host)
        and ipaddress.ip_address(host.partition("%")[0]).is_loopback
    )
