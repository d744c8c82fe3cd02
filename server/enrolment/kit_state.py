"""What the coordinator is told of a kit: as it stands, just signed, or revoked."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

from pydantic import BaseModel

from pixcell_core.contracts.enrolment import Role


class KitState(BaseModel):
    """One kit as `kit list` and `kit show` tell it."""

    party: str
    role: Role
    version: int
    serial: str
    fingerprint: str
    expires_at: datetime
    days_left: int
    revoked: bool
    kit: Path
    warning: str = ""

    def __str__(self) -> str:
        state = "REVOKED" if self.revoked else f"{self.days_left} days left"
        text = f"{self.party}  {self.role}  version {self.version}  {state}  {self.expires_at:%Y-%m-%d}"
        return text + (f"\n  {self.warning}" if self.warning else "")


class KitShown(KitState):
    """One kit with the file it lies in."""

    def __str__(self) -> str:
        return f"{super().__str__()}\n  {self.kit}"


class KitSigned(KitState):
    """A kit that was just signed."""

    def __str__(self) -> str:
        return (
            f"Kit of {self.party} ({self.role}, version {self.version}) signed, "
            f"valid until {self.expires_at:%Y-%m-%d}.\n"
            f"Send it to the party: {self.kit}\n"
            "It holds no secret. There: pixcell site install-kit KIT"
        )


class Revoked(BaseModel):
    """What `kit revoke` did."""

    party: str
    certificates: int
    number: int

    def __str__(self) -> str:
        return (
            f"{self.party}: {self.certificates} certificate(s) revoked; the list has number {self.number}.\n"
            "A running hub takes it up within seconds. Other parties are not touched."
        )
