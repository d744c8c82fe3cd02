"""Put on PYTHONPATH by a test: records every outbound call and new program of this process, and blocks the rest.

AUDIT_FILE takes one JSON line per call; AUDIT_ALLOW holds `host:port` pairs that are let through.
"""

import json
import os
import sys

_FILE = os.environ.get("AUDIT_FILE", "")
_ALLOW = {tuple(p.rsplit(":", 1)) for p in os.environ.get("AUDIT_ALLOW", "").split(",") if p}
_HOSTS = {host for host, _ in _ALLOW}
_CALLS = {
    "socket.connect",
    "socket.sendto",
    "socket.sendmsg",
    "socket.getaddrinfo",
    "socket.gethostbyname",
    "socket.gethostbyaddr",
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "os.posix_spawn",
}


def _hook(event: str, arguments: tuple) -> None:
    if event not in _CALLS:
        return
    where = ""
    if event in ("socket.connect", "socket.sendto", "socket.sendmsg"):
        address = arguments[1] if len(arguments) > 1 else None
        if not isinstance(address, tuple):
            return  # AF_UNIX: never leaves the machine
        where = f"{address[0]}:{address[1]}"
        allowed = (str(address[0]), str(address[1])) in _ALLOW
    elif event.startswith("socket."):
        where = str(arguments[0])
        allowed = arguments[0] in _HOSTS or arguments[0] is None
    else:
        where = str(arguments[1] if event == "subprocess.Popen" else arguments[0])
        allowed = False
    line = json.dumps({"pid": os.getpid(), "event": event, "where": where, "allowed": allowed}) + "\n"
    descriptor = os.open(_FILE, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.write(descriptor, line.encode())
    os.close(descriptor)
    if not allowed:
        raise PermissionError(f"audit: {event} {where}")


if _FILE:
    sys.addaudithook(_hook)
