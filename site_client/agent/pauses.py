"""The pauses of Flower's SuperNode, made to follow what happens: it asks soon after a message, seldom in quiet hours.

A round of secure aggregation is five messages, one after another, and each waits for the site's next look at the hub.
What the hub can learn from the time of a look it knows already: when it sent a message and when the reply came.

One of Flower's pauses has no end: where a task died between announcing its reply and handing it over, the SuperNode
waits for the rest for ever. Such a wait is cut off here.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable

from pixcell_core.flower.pace import Bell, Pace

IDLE_S = 3.0
"""Flower 1.41 sleeps so long after a look that found nothing, and 0.5 s while it waits for a task's reply."""
SOON_S = 0.3
REPLY_S = 0.05
CONTENT_WAIT = "yield_object_contents"
"""The function of Flower's that waits for the content of a reply which its task has announced."""
CONTENT_PATIENCE_S = 60.0
"""A task hands its reply over loopback in seconds; one that is silent for so long is dead."""
GAVE_UP = 70


def end_process() -> None:
    """End the SuperNode at once: its supervisor starts another, and the hub gives the unfinished reply up."""
    print("a task died while it handed over its reply; starting anew", flush=True)
    os._exit(GAVE_UP)


class SuperNodePauses:
    """Stands in for `time.sleep` in the SuperNode's loop."""

    def __init__(
        self,
        longest_s: float,
        bell: Bell,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
        give_up: Callable[[], None] = end_process,
    ) -> None:
        self._looks = Pace(min(SOON_S, longest_s), longest_s)
        self._replies = Pace(min(REPLY_S, longest_s), longest_s)
        self._bell, self._sleep, self._clock, self._give_up = bell, sleep, clock, give_up
        self._rung = False
        self._silent_since: float | None = None
        self._last_wait = 0.0

    def sleep(self, seconds: float) -> None:
        """Pause as Flower wants, or shorter; ring for the executor when a message has come."""
        if sys._getframe(1).f_code.co_name == CONTENT_WAIT:
            self._wait_for_content(seconds)
            return
        self._silent_since = None
        if seconds >= IDLE_S:
            self._rung = False
            self._replies.reset()
            self._sleep(self._looks.pause())
            return
        self._looks.reset()
        if not self._rung:
            self._rung = True
            self._bell.ring()
        self._sleep(min(seconds, self._replies.pause()))

    def _wait_for_content(self, seconds: float) -> None:
        now = self._clock()
        # A wait that does not follow the last one at once is a new one: something was handed over between them.
        if self._silent_since is None or now - self._last_wait > 2 * seconds + 1.0:
            self._silent_since = now
        if now - self._silent_since > CONTENT_PATIENCE_S:
            self._give_up()
        self._last_wait = now
        self._sleep(min(seconds, REPLY_S))
