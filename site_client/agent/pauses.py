"""The pauses of Flower's SuperNode, made to follow what happens: it asks soon after a message, seldom in quiet hours.

A round of secure aggregation is five messages, one after another, and each waits for the site's next look at the hub.
What the hub can learn from the time of a look it knows already: when it sent a message and when the reply came.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from pixcell_core.flower.pace import Bell, Pace

IDLE_S = 3.0
"""Flower 1.41 sleeps so long after a look that found nothing, and 0.5 s while it waits for a task's reply."""
SOON_S = 0.3
REPLY_S = 0.05


class SuperNodePauses:
    """Stands in for `time.sleep` in the SuperNode's loop."""

    def __init__(self, longest_s: float, bell: Bell, sleep: Callable[[float], None] = time.sleep) -> None:
        self._looks = Pace(min(SOON_S, longest_s), longest_s)
        self._replies = Pace(min(REPLY_S, longest_s), longest_s)
        self._bell, self._sleep, self._rung = bell, sleep, False

    def sleep(self, seconds: float) -> None:
        """Pause as Flower wants, or shorter; ring for the executor when a message has come."""
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
