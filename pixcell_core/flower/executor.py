"""The warm executor: asks a Flower runtime for tasks and forks one child for each.

It stands where Flower's own executor stands with `--isolation process`, keeps Python and its imports loaded, and
holds the shared secret without which the runtime hands out no task. What a task runs is decided by the caller's
`run_task`, not by the bundle that came over the network.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pixcell_core.flower.pace import Bell, Pace
from pixcell_core.flower.processes import die_with_parent

TaskBody = Callable[[str, str], None]
"""`run_task(runtime_address, token)`: runs one task to its end."""


@dataclass(frozen=True)
class ExecutorSettings:
    """Where the runtime listens (plain HTTP on loopback), its secret, the kind of task, and when to ask for one.

    An answer costs the runtime milliseconds of a processor, so it is asked every `poll_s` only after `bell` rang or a
    task came, and then less and less, down to once in `idle_poll_s`.
    """

    runtime: str
    secret: bytes
    task_type: str
    bell: Path
    poll_s: float = 0.1
    idle_poll_s: float = 3.0


class _Stopped(Exception):
    """Raised by the signal handler to leave the polling loop."""


def serve_tasks(settings: ExecutorSettings, run_task: TaskBody) -> None:
    """Poll for tasks until SIGTERM; then terminate the running ones. Must run in the main thread."""
    import httpx
    from flwr.proto.runtime_pb2 import AcquireTaskRequest
    from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor, SuperExecAuthHttpInterceptor
    from flwr.supercore.retry import make_simple_http_retry_invoker
    from flwr.supercore.runtime import RuntimeHttpClient

    invoker = make_simple_http_retry_invoker()
    invoker.max_tries = 1
    client = RuntimeHttpClient.from_server_address(
        server_address=settings.runtime,
        insecure=True,
        root_certificates=None,
        interceptors=[
            RuntimeVersionHttpInterceptor(component_name="SuperExec"),
            SuperExecAuthHttpInterceptor(
                master_secret=settings.secret,
                protected_methods=frozenset({"/flwr.proto.Runtime/AcquireTask"}),
            ),
        ],
        retry_invoker=invoker,
    )
    running: set[int] = set()
    bell, pace = Bell(settings.bell), Pace(settings.poll_s, settings.idle_poll_s)
    signal.signal(signal.SIGTERM, _stop)
    signal.signal(signal.SIGINT, _stop)
    print(f"executor ready for {settings.task_type}", flush=True)
    try:
        while True:
            _reap(running)
            try:
                answer = client.AcquireTask(AcquireTaskRequest(supported_task_types=[settings.task_type]))
            except (httpx.HTTPError, OSError) as error:
                print(f"the runtime does not answer yet: {type(error).__name__}", flush=True)
                time.sleep(max(settings.poll_s, 0.5))
                continue
            if answer.HasField("task") and answer.token:
                running.add(_fork_task(settings.runtime, answer.token, run_task))
                pace.reset()
            elif bell.wait(pace.pause()):
                pace.reset()
    except _Stopped:
        _end(running)


def _stop(_number: int, _frame: object) -> None:
    raise _Stopped


def _fork_task(runtime: str, token: str, run_task: TaskBody) -> int:
    parent = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        # Not SIGTERM: Flower's handler of it ends the task without a reply, and its SuperNode then waits for that reply
        # for ever. A task that falls silent is given up after a minute, and the hub is told.
        die_with_parent(parent, signal.SIGKILL)
        run_task(runtime, token)
        code = 0
    except SystemExit as leave:
        code = leave.code if isinstance(leave.code, int) else 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _reap(running: set[int]) -> None:
    for pid in list(running):
        with contextlib.suppress(ChildProcessError):
            done, status = os.waitpid(pid, os.WNOHANG)
            if not done:
                continue
            if status:
                print(f"a task ended with code {os.waitstatus_to_exitcode(status)}", flush=True)
        running.discard(pid)


def _end(running: set[int], patience_s: float = 3.0) -> None:
    for pid in running:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
    end = time.monotonic() + patience_s
    while running and time.monotonic() < end:
        _reap(running)
        time.sleep(0.02)
    for pid in running:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
