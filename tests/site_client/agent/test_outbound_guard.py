"""The guard: one peer is reached, everything else is refused, and a forked child inherits that. In a process of its own."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest

PROGRAM = """
import os, socket, subprocess, sys
from site_client.agent.outbound_guard import OutboundRefusedError, Peer, allow_only
port = int(sys.argv[1]); said = []
allow_only((Peer(sys.argv[2], port),), said.append)
{body}
"""


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    """Somebody who listens on loopback."""
    with socket.create_server(("127.0.0.1", 0)) as made:
        yield made


def run(listener: socket.socket, body: str, host: str = "127.0.0.1") -> str:
    """Run a program under the guard, whose one peer is the listener."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(body=body), str(listener.getsockname()[1]), host],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


REFUSED = """
try:
    {call}
    print("passed")
except OutboundRefusedError as error:
    print(error.code, said)
"""


@pytest.mark.parametrize(
    ("call", "event"),
    [
        ("socket.create_connection(('127.0.0.1', port + 1), 1)", "socket.connect"),
        ("socket.create_connection(('127.0.0.2', port), 1)", "socket.connect"),
        ("socket.getaddrinfo('telemetry.example.org', 443)", "socket.getaddrinfo"),
        ("socket.gethostbyname('telemetry.example.org')", "socket.gethostbyname"),
        ("socket.socket(type=socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', 53))", "socket.sendto"),
        ("socket.socket().bind(('0.0.0.0', 0))", "socket.bind"),
        ("subprocess.Popen(['true'])", "subprocess.Popen"),
        ("os.system('true')", "os.system"),
        ("os.execv('/bin/true', ['true'])", "os.exec"),
        ("os.posix_spawn('/bin/true', ['true'], {{}})", "os.posix_spawn"),
    ],
)
def test_everything_but_the_peer_is_refused_and_said(listener: socket.socket, call: str, event: str) -> None:
    assert run(listener, REFUSED.format(call=call.format())) == f"outbound-refused ['{event}']"


def test_the_peer_is_reached_by_address_and_by_name(listener: socket.socket) -> None:
    call = "socket.create_connection((sys.argv[2], port), 5).close(); print('reached', said)"
    assert run(listener, call) == "reached []"
    assert run(listener, call, host="localhost") == "reached []"
    by_address = "socket.create_connection(('127.0.0.1', port), 5).close(); print('reached', said)"
    assert run(listener, by_address, host="localhost") == "reached []"


def test_listening_on_loopback_stays_possible(listener: socket.socket) -> None:
    assert (
        run(listener, "socket.create_server(('127.0.0.1', 0)).close(); print('listens', said)")
        == "listens []"
    )


def test_a_forked_child_is_no_way_around(listener: socket.socket) -> None:
    body = """
pid = os.fork()
if pid == 0:
    try:
        socket.create_connection(('127.0.0.1', port + 1), 1)
    except OutboundRefusedError:
        os._exit(7)
    os._exit(0)
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""
    assert run(listener, body) == "7"


def test_without_the_guard_the_same_calls_pass(listener: socket.socket) -> None:
    """The mutant: the calls above are refused by the guard and by nothing else."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        body = f"""
import socket
socket.create_connection(('127.0.0.1', {other.getsockname()[1]}), 1).close()
print('passed')
"""
        done = subprocess.run([sys.executable, "-c", body], capture_output=True, text=True, timeout=60)
        assert done.stdout.strip() == "passed"
        refused = REFUSED.format(call=f"socket.create_connection(('127.0.0.1', {other.getsockname()[1]}), 1)")
        assert run(listener, refused).startswith("outbound-refused")
