"""Cuts this process off from every network: no connection, no listening, no name is looked up.

The trainer sees patients; nothing it loads may call out. The guard is an interpreter-wide audit hook, which cannot
be removed once set. It stops Python code; the operating system's own isolation (a container without a network)
stands behind it.
"""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable

from pixcell_core.errors import RefusedError

LOOKUPS = frozenset(
    {
        "socket.getaddrinfo",
        "socket.gethostbyname",
        "socket.gethostbyaddr",
        "socket.getnameinfo",
    }
)
CONNECTIONS = frozenset({"socket.connect", "socket.bind", "socket.sendto", "socket.sendmsg"})


class NetworkRefusedError(RefusedError):
    """Something in the trainer tried to reach a network."""

    default_code = "network-refused"


def refuse_network(report: Callable[[str], None] = lambda event: None) -> None:
    """Refuse, from now on and in this whole process, everything but Unix sockets.

    `report` is told the name of an outbound call that was refused (libraries that bind a port to learn whether there
    is IPv6 are refused without a word). Cannot be undone.
    """

    def guard(event: str, arguments: tuple[object, ...]) -> None:
        if event in LOOKUPS:
            _refuse(event, report)
        if event in CONNECTIONS and arguments:
            family = getattr(arguments[0], "family", None)
            if family != getattr(socket, "AF_UNIX", None):
                _refuse(event, report)

    sys.addaudithook(guard)


def _refuse(event: str, report: Callable[[str], None]) -> None:
    if event != "socket.bind":
        report(event)
    raise NetworkRefusedError(
        f"The trainer has no network: {event} was refused.",
        hint="Whatever needs a network belongs to the agent, which sees no slides.",
    )
