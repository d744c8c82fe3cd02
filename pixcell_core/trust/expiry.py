"""How long a certificate still lasts, and the warning that is due 30 days before its end. Pure: the clock comes in."""

from __future__ import annotations

import math
from datetime import datetime

from cryptography import x509
from pydantic import BaseModel, ConfigDict

WARN_DAYS = 30


class ExpiryWarning(BaseModel):
    """A certificate ends soon, or ended."""

    model_config = ConfigDict(frozen=True)

    what: str
    days_left: int
    expires_at: datetime
    hint: str

    @property
    def expired(self) -> bool:
        """Whether it has ended already."""
        return self.days_left < 0

    def __str__(self) -> str:
        when = f"{self.expires_at:%Y-%m-%d}"
        if self.expired:
            return f"{self.what} expired on {when}. {self.hint}"
        return f"{self.what} expires in {self.days_left} days, on {when}. {self.hint}"


def days_left(end: datetime | x509.Certificate, now: datetime) -> int:
    """Whole days until the end, rounded down: 0 on the last day, negative once it is over."""
    moment = end.not_valid_after_utc if isinstance(end, x509.Certificate) else end
    return math.floor((moment - now).total_seconds() / 86_400)


def expiry_warning(
    what: str,
    end: datetime | x509.Certificate,
    now: datetime,
    *,
    hint: str = "Ask the coordinator for a renewed kit: pixcell kit renew NAME.",
    warn_days: int = WARN_DAYS,
) -> ExpiryWarning | None:
    """The warning that is due at `now`, or None where the end is more than `warn_days` days away."""
    moment = end.not_valid_after_utc if isinstance(end, x509.Certificate) else end
    left = days_left(moment, now)
    if left >= warn_days:
        return None
    return ExpiryWarning(what=what, days_left=left, expires_at=moment, hint=hint)
