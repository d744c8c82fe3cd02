"""Runs independent work on a few threads, results in order, and stops at once when interrupted."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def default_workers() -> int:
    """As many workers as this process may use cores, at most eight."""
    return max(1, min(8, len(os.sched_getaffinity(0))))


def ordered_map(
    function: Callable[[T], R], items: Iterable[T], workers: int, ahead: int | None = None
) -> Iterator[R]:
    """Yield `function(item)` for each item in order, computing at most `ahead` (2 per worker) in advance.

    Threads suffice: slide decoding and array arithmetic release the interpreter lock. On any exit, work that
    has not begun is dropped, so Ctrl-C waits for no more than the tasks in flight.
    """
    limit = ahead or 2 * workers
    pool = ThreadPoolExecutor(max_workers=workers)
    pending: deque[Future[R]] = deque()
    try:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) >= limit:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
