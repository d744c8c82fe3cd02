"""What verification of a bundle finds: its checks one by one, its signers, and what the release says of itself."""

from __future__ import annotations

from datetime import datetime

from pydantic import BaseModel, ConfigDict

from pixcell_core.contracts.release import PrivacyStatement
from pixcell_core.errors import RefusedError


class BundleRefusedError(RefusedError):
    """A bundle does not verify. ``check`` names the check that failed."""

    default_code = "bundle-refused"

    def __init__(self, message: str, *, hint: str, code: str | None = None, check: str = "") -> None:
        super().__init__(message, hint=hint, code=code)
        self.check = check


class Check(BaseModel):
    """One check that was made, and what it found."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    passed: bool
    detail: str


class Signer(BaseModel):
    """One key whose signature was checked and is true."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    role: str
    key_id: str
    trusted: bool
    name: str = ""
    certificate: str | None = None


class BundleReport(BaseModel):
    """A bundle that verifies. ``trusted`` says whether keys given by the caller signed the verdict."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    trusted: bool
    checks: tuple[Check, ...]
    signers: tuple[Signer, ...]
    site: str
    study_digest: str | None
    manifest_digest: str
    tiles: int
    verdict: str
    audience: str
    policy_digest: str
    exception: str | None
    approver: str | None
    proven_kinds: tuple[str, ...]
    privacy: PrivacyStatement | None
    signed: str
    issued_at: datetime
    expires_at: datetime
    exported_at: datetime
