"""What verification of a bundle finds: its checks one by one, its signers, and what the release says of itself."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from pydantic import BaseModel, ConfigDict

from pixcell_core.contracts.release import PrivacyStatement, ReleaseManifest
from pixcell_core.contracts.verdict import Verdict
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
    """A bundle that verifies. ``trusted``: keys, signers or an authority from outside it prove whose it is."""

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

    @classmethod
    def of(
        cls,
        manifest: ReleaseManifest,
        verdict: Verdict,
        *,
        trusted: bool,
        checks: Sequence[Check],
        signers: tuple[Signer, ...],
        signed: str,
        exported_at: datetime,
    ) -> BundleReport:
        """From the documents of a bundle whose checks all passed."""
        predicate = verdict.predicate
        exception = predicate.exception
        return cls(
            trusted=trusted,
            checks=tuple(checks),
            signers=signers,
            site=manifest.site,
            study_digest=manifest.study_digest,
            manifest_digest=manifest.digest,
            tiles=manifest.tile_count,
            verdict=predicate.verdict,
            audience=predicate.audience,
            policy_digest=predicate.auditor.policy_digest,
            exception=exception.reason if exception else None,
            approver=exception.approver if exception else None,
            proven_kinds=predicate.proven_kinds,
            privacy=manifest.privacy,
            signed=signed,
            issued_at=predicate.issued_at,
            expires_at=predicate.expires_at,
            exported_at=exported_at,
        )
