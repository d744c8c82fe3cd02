"""Real processes for the registry's tests: forks that report one JSON value each, or die by SIGKILL where told."""

from __future__ import annotations

import json
import os
import signal
import traceback
from collections.abc import Callable
from typing import Any

from sqlalchemy import Engine, event

from pixcell_core.errors import PixcellError

KILLED = "killed"


def in_children(jobs: list[Callable[[], Any]]) -> list[Any]:
    """Run every job in a process of its own, all at once; what each returned, or the code of its `PixcellError`.

    They start together: each waits for a byte. A child that was killed reports `KILLED`.
    """
    ready, go = os.pipe()
    children = [_fork(job, ready, go) for job in jobs]
    os.close(ready)
    os.close(go)
    results = []
    for pid, reader in children:
        with os.fdopen(reader) as stream:
            said = stream.read()
        _, status = os.waitpid(pid, 0)
        if os.WIFSIGNALED(status):
            assert os.WTERMSIG(status) == signal.SIGKILL, status
            results.append(KILLED)
            continue
        value = json.loads(said)
        assert "trace" not in value, value["trace"]
        results.append(value["result"])
    return results


def _fork(job: Callable[[], Any], ready: int, go: int) -> tuple[int, int]:
    reader, writer = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writer)
        return pid, reader
    # The end of the parent's pipe is the start for all.
    try:
        os.close(go)
        os.close(reader)
        os.read(ready, 1)
        try:
            answer = {"result": job()}
        except PixcellError as error:
            answer = {"result": error.code}
        except BaseException:
            answer = {"trace": traceback.format_exc()}
        os.write(writer, json.dumps(answer).encode())
    finally:
        os._exit(0)


def killed_at(count: int, job: Callable[[], Any]) -> Any:
    """Run `job` in a process that is killed at its `count`-th statement or commit; `KILLED`, or what it returned."""

    def doomed() -> Any:
        left = count

        def step(*_: Any) -> None:
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

        for name in ("before_cursor_execute", "after_cursor_execute", "commit"):
            event.listen(Engine, name, step)
        return job()

    return in_children([doomed])[0]
