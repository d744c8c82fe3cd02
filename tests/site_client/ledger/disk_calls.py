"""Every call that changes the disk, made visible: tests stop, fail or count at each, without help from the code.

A write is seen three times: before it, when half of its bytes are on their way, and after it. The other calls are
seen before and after. Code under test finds these functions in `os`, where it always looks for them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

Observer = Callable[[str], None]

_CHANGES = os.O_CREAT | os.O_WRONLY | os.O_RDWR | os.O_TRUNC
REAL: dict[str, Callable[..., Any]] = {
    name: getattr(os, name)
    for name in (
        *("open", "write", "pwrite", "fsync", "fdatasync"),
        *("ftruncate", "replace", "link", "mkdir", "unlink"),
    )
}


@contextmanager
def watched_disk(observer: Observer) -> Iterator[None]:
    """Tell `observer` of every change of the disk by this process, until the block ends."""

    def around(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if name == "open" and not args[1] & _CHANGES:
                return REAL[name](*args, **kwargs)
            observer(f"before {name}")
            result = REAL[name](*args, **kwargs)
            observer(f"after {name}")
            return result

        return call

    def write(descriptor: int, data: Any) -> int:
        held = bytes(data)
        observer("before write")
        done: int = REAL["write"](descriptor, held[: len(held) // 2])
        observer("half a write")
        done += REAL["write"](descriptor, held[done:])
        observer("after write")
        return done

    def pwrite(descriptor: int, data: Any, offset: int) -> int:
        held = bytes(data)
        observer("before pwrite")
        done: int = REAL["pwrite"](descriptor, held[: len(held.rstrip()) // 2], offset)
        observer("half a pwrite")
        done += REAL["pwrite"](descriptor, held[done:], offset + done)
        observer("after pwrite")
        return done

    halved = {"write": write, "pwrite": pwrite}
    try:
        for name in REAL:
            setattr(os, name, halved.get(name) or around(name))
        yield
    finally:
        for name, function in REAL.items():
            setattr(os, name, function)


class RefusingCall:
    """An observer with which the `number`-th call, from 0, does nothing and fails with `code` (an errno).

    A write may also fail when half of it was done: it counts as two. `unlink` never fails: it only tidies up.
    `refused` says whether there was such a call.
    """

    def __init__(self, number: int, code: int) -> None:
        self.refused = False
        self._left, self._code = number, code

    def __call__(self, name: str) -> None:
        if name.startswith("after") or name == "before unlink":
            return
        self._left -= 1
        if self._left == -1:
            self.refused = True
            raise OSError(self._code, os.strerror(self._code))
