"""The hub's processes: one embedded SuperLink with two listeners, and the executor that runs the round loop.

The parent imports Flower once, forks the executor while it still has a single thread, then serves:
  public door   mutual TLS, fleet routes alone     <- the sites' SuperNodes
  inner door    loopback, runtime routes alone     <- the executor, with the shared secret
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import ssl
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from typing import Any

from cryptography import x509

from pixcell_core.cli.contract import emit_note
from pixcell_core.contracts.atomic import write_atomically
from pixcell_core.contracts.canonical import read_bounded
from pixcell_core.errors import ConnectionFailedError, RefusedError
from pixcell_core.flower.executor import ExecutorSettings, serve_tasks
from pixcell_core.flower.processes import Child, quiet_flower, stop_children
from pixcell_core.trust.certificates import read_authority, read_certificate
from server.enrolment.revocations import RevocationWatch
from server.hub.gate import FLEET_ROUTES, RUNTIME_ROUTES, Door
from server.hub.superlink import LOOPBACK, make_superlink
from server.layout import ServerLayout

TICK_S = 0.5


@dataclass(frozen=True)
class HubSettings:
    """How the hub is started. Port 0 takes a free one; the ready file says which."""

    layout: ServerLayout
    host: str = LOOPBACK
    port: int = 0
    ready_file: Path | None = None


def serve_hub(settings: HubSettings) -> None:
    """Serve until SIGTERM or SIGINT; then stop every process started here."""
    layout = settings.layout
    check_start(layout)
    # A registry that cannot be used is said at once; no connection to it may live on into the fork.
    layout.registry().close()
    quiet_flower(layout.hub / "flower")
    public, inner = _listen(settings.host, settings.port), _listen(LOOPBACK, 0)
    _import_flower()
    executor = Child(
        "executor",
        lambda: _run_executor(layout, f"{LOOPBACK}:{inner.getsockname()[1]}"),
        layout.hub / "executor.log",
    )
    executor.start()
    try:
        asyncio.run(_serve(settings, public, inner, executor))
    finally:
        stop_children([executor])
        for path in (layout.ready, settings.ready_file):
            if path is not None:
                path.unlink(missing_ok=True)


def check_start(layout: ServerLayout) -> None:
    """Refuse to start where whom to let in is not known: a bad or expired certificate, CA or revocation list.

    Says what ends within 30 days.
    """
    from server.enrolment.kits import expiry_warnings
    from server.hub.listener import server_context

    server_context(layout.pki)
    certificate = read_certificate(read_bounded(layout.pki / "server.crt", 65_536), "server.crt")
    if certificate.not_valid_after_utc <= datetime.now(UTC):
        raise RefusedError(
            f"The hub's certificate expired on {certificate.not_valid_after_utc:%Y-%m-%d}: no site would connect.",
            hint="Make a new one: pixcell kit renew-hub. Kits of the sites stay as they are.",
            code="server-certificate-expired",
        )
    for warning in expiry_warnings(layout):
        emit_note(str(warning))


def _authority(layout: ServerLayout) -> x509.Certificate:
    return read_authority(read_bounded(layout.pki / "ca.crt", 65_536))


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except OSError as error:
        raise ConnectionFailedError(
            f"The hub cannot listen on {host}:{port}: {error.strerror or error}.",
            hint="Another hub may be running. Choose another --port, or 0 for a free one.",
            code="cannot-listen",
        ) from error
    listener.set_inheritable(False)
    return listener


PRELOADED = (
    "flwr.superlink.main",
    "flwr.superlink.cli.flower_superlink",
    "flwr.superlink.runtime.run_serverapp",
    "uvicorn.protocols.http.auto",
    "server.hub.listener",
    "uvicorn.lifespan.on",
    "uvicorn.loops.auto",
    "server.hub.runs",
    "server.hub.event_log",
    "server.registry.opening",
    "server.rounds.server_app",
    "safetensors.numpy",
)
"""What both processes need, and each run's process after them: imported once, before the fork."""


def _import_flower() -> None:
    for name in PRELOADED:
        import_module(name)


def _run_executor(layout: ServerLayout, runtime: str) -> None:
    from flwr.supercore.constant import TaskType

    os.environ["FLWR_HOME"] = str(layout.hub / "flower")
    secret = (layout.secrets / "executor.secret").read_bytes()
    serve_tasks(ExecutorSettings(runtime, secret, TaskType.SERVER_APP, layout.bell), _run_server_app)


def _run_server_app(runtime: str, token: str) -> None:
    from queue import Queue

    from flwr.superlink.runtime.run_serverapp import run_serverapp

    run_serverapp(runtime_api_address=runtime, log_queue=Queue(), token=token, insecure=True)


async def _serve(settings: HubSettings, public: socket.socket, inner: socket.socket, executor: Child) -> None:
    import uvicorn

    from server.hub.admission import Admission
    from server.hub.event_log import EventLog
    from server.hub.jobs import JobDesk
    from server.hub.listener import PublicServer, server_context
    from server.hub.runs import RunDesk
    from server.log_anchor.act_log import CoordinatorLog

    layout = settings.layout
    events = EventLog(layout.events)
    app = make_superlink(layout, events)
    watch = RevocationWatch(
        layout, _authority(layout), lambda problem: events.say("revocations-ignored", code=problem)
    )
    admission = Admission(watch)
    context = server_context(layout.pki)
    fleet = PublicServer(
        uvicorn.Config(
            Door(app, FLEET_ROUTES, admission=admission, report=events.refuse),  # type: ignore[arg-type]
            lifespan="off",
            # What is refused stands in the event log, bounded; uvicorn's own lines are not.
            log_level="error",
            ws="none",
            proxy_headers=False,
            timeout_keep_alive=int(admission.limits.idle_s),
            timeout_graceful_shutdown=2,
            server_header=False,
        ),
        context,
        admission,
        events.refuse,
    )
    runtime = _quiet_server(
        uvicorn.Config(
            Door(app, RUNTIME_ROUTES),  # type: ignore[arg-type]
            lifespan="on",
            log_level="error",
            timeout_graceful_shutdown=2,
            server_header=False,
        )
    )
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    desk = RunDesk(layout, app.state.linkstate_factory.state(), events)
    jobs, acts = JobDesk(layout, events), CoordinatorLog(layout)
    desk.begin()
    desk.tick()
    serving = [
        asyncio.create_task(runtime.serve(sockets=[inner])),
        asyncio.create_task(fleet.serve(sockets=[public])),
    ]
    while not (fleet.started and runtime.started):
        await asyncio.sleep(0.02)
    _announce(settings, public)
    events.say("hub-started", port=public.getsockname()[1])
    broken, pair = False, _pair_mark(layout)
    while not stop.is_set() and not any(task.done() for task in serving):
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), TICK_S)
        if not executor.poll() and not stop.is_set():
            events.say("executor-died", code=executor.exit_code or 0)
            broken = True
            break
        try:
            await asyncio.to_thread(desk.tick)
            await asyncio.to_thread(jobs.tick)
            await asyncio.to_thread(acts.tick, lambda problem: events.say("acts-not-logged", code=problem))
        except Exception:
            # The hub must outlive a bad tick: its sites are connected. The trace is for the coordinator's log.
            traceback.print_exc()
            events.say("tick-failed")
        events.tick()
        pair = _take_up_renewed(layout, context, pair, events)
    events.tick(final=True)
    await asyncio.to_thread(jobs.close)
    events.say("hub-stopped")
    fleet.should_exit = runtime.should_exit = True
    await asyncio.gather(*serving)
    if broken:
        raise RefusedError(
            "The hub's executor ended, so the hub stopped too.",
            hint=f"See {layout.hub / 'executor.log'}, then start the hub again: runs go on from their last commit.",
            code="executor-ended",
        )


def _pair_mark(layout: ServerLayout) -> tuple[int, ...]:
    found = [(layout.pki / name).stat() for name in ("server.crt", "server.key")]
    return tuple(number for one in found for number in (one.st_ino, one.st_mtime_ns))


def _take_up_renewed(
    layout: ServerLayout, context: ssl.SSLContext, before: tuple[int, ...], events: Any
) -> tuple[int, ...]:
    """Use a renewed server certificate for new connections; a pair that does not fit is left for the next look."""
    from server.hub.listener import server_context

    try:
        mark = _pair_mark(layout)
        if mark != before:
            # A pair that does not fit together would leave the serving context without a key: try it elsewhere first.
            server_context(layout.pki)
            context.load_cert_chain(str(layout.pki / "server.crt"), str(layout.pki / "server.key"))
            events.say("server-certificate-renewed")
    except (OSError, RefusedError):
        return before
    return mark


def _announce(settings: HubSettings, public: socket.socket) -> None:
    host, port = public.getsockname()[:2]
    body = json.dumps({"address": f"{host}:{port}", "process": os.getpid()}).encode()
    for path in (settings.layout.ready, settings.ready_file):
        if path is not None:
            write_atomically(path, body, durable=False)


def _quiet_server(config: Any) -> Any:
    """A uvicorn server that leaves signals to the hub, which stops both listeners together."""
    import uvicorn

    class QuietServer(uvicorn.Server):
        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            yield

    return QuietServer(config)
