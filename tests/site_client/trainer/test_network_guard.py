"""The trainer's process reaches no network, whatever asks for one."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import socket, sys
server = socket.create_server(("127.0.0.1", 0))
address = server.getsockname()
from site_client.trainer.network_guard import NetworkRefusedError, refuse_network
seen = []
refuse_network(seen.append)
attempts = {
    "connect": lambda: socket.create_connection(address, 2),
    "raw": lambda: socket.socket(socket.AF_INET, socket.SOCK_STREAM).connect(address),
    "six": lambda: socket.socket(socket.AF_INET6, socket.SOCK_STREAM).connect(("::1", address[1])),
    "datagram": lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x", address),
    "name": lambda: socket.getaddrinfo("example.org", 443),
    "bind": lambda: socket.socket(socket.AF_INET, socket.SOCK_STREAM).bind(("127.0.0.1", 0)),
    "http": lambda: __import__("urllib.request").request.urlopen("http://127.0.0.1:%d/" % address[1], timeout=2),
}
for name, attempt in attempts.items():
    try:
        attempt()
    except NetworkRefusedError:
        print(name, "refused")
    except Exception as error:
        reason = getattr(error, "reason", error)
        print(name, "refused" if isinstance(reason, NetworkRefusedError) else repr(error))
    else:
        print(name, "WENT THROUGH")
here, there = socket.socketpair(socket.AF_UNIX)
here.sendall(b"x")
print("unix", there.recv(1))
"""


def test_every_way_out_is_refused_and_unix_sockets_work() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=60)
    lines = dict(line.split(" ", 1) for line in done.stdout.splitlines())
    assert lines.pop("unix") == "b'x'", done.stderr
    assert lines.keys() == {"connect", "raw", "six", "datagram", "name", "bind", "http"}
    assert set(lines.values()) == {"refused"}, lines
