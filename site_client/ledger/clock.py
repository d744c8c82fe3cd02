"""The time written into the ledger's records: it never runs back, unless the owner says that it had been wrong."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta

from pixcell_core.errors import RefusedError
from pixcell_core.private.ledger_record import BaseRecord, time_of

CLOCK_TOLERANCE = timedelta(seconds=60)
"""How far a clock may run back before it is a fault: less is how network time sets clocks right."""


class ClockBackwardsError(RefusedError):
    """The site's clock is behind the ledger's last record; nothing was charged."""

    default_code = "clock-backwards"


class LedgerClock:
    """Gives each record its time.

    Args:
        now: the site's clock; an aware time.
    """

    def __init__(self, now: Callable[[], datetime]) -> None:
        self._now = now

    def is_behind(self, last: BaseRecord | None) -> bool:
        """Whether the clock is further behind the last record than clocks are set right by."""
        return last is not None and self._now() < time_of(last) - CLOCK_TOLERANCE

    def time_after(self, last: BaseRecord | None) -> str:
        """Return the time of the record after `last`: the clock's, or the last one's where the clock is behind."""
        now = self._now()
        return last.time if last is not None and now < time_of(last) else text_of(now)

    def corrected_time(self) -> str:
        """Return the clock's own time, which may lie before the last record's."""
        return text_of(self._now())

    def require_after(self, last: BaseRecord | None) -> None:
        """Raise `ClockBackwardsError` where the clock is behind `last` by more than the tolerance."""
        if last is not None and self.is_behind(last):
            raise ClockBackwardsError(
                f"The clock says {self.corrected_time()}, but the privacy ledger's last record is of {last.time}: "
                "the clock was set back, or it was wrong then. Nothing was drawn and nothing was charged.",
                hint="Set the clock right. If it is right now and was wrong then, the site's owner runs "
                "`pixcell site budget correct-clock`, which is written into the ledger.",
            )


def text_of(moment: datetime) -> str:
    """Return a time as the records hold it: UTC, ISO 8601, to the second."""
    return moment.astimezone(UTC).isoformat(timespec="seconds")
