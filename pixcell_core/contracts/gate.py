"""The gate's documents besides the verdict: who may sign, what the site asks for, a refusal, and what was taken back.

Each travels in a DSSE envelope of its own payload type, so that a signature given for one is never taken for another.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from pixcell_core.contracts.canonical import (
    Digest,
    Document,
    DocumentError,
    DocumentT,
    Moment,
    first_complaint,
)
from pixcell_core.contracts.release import MAX_TILES, Line, Prose
from pixcell_core.contracts.study import SiteName
from pixcell_core.contracts.verdict import Audience

REQUEST_PAYLOAD_TYPE = "application/vnd.pixcell.release-request.v1+json"
REFUSAL_PAYLOAD_TYPE = "application/vnd.pixcell.release-refusal.v1+json"
WITHDRAWALS_PAYLOAD_TYPE = "application/vnd.pixcell.release-withdrawals.v1+json"

MAX_SIGNERS, MAX_WITHDRAWN = 32, 10_000
LEAST_SIGNATURES = 2
"""A site and an auditor: nobody releases alone."""

SignerRole = Literal["site", "auditor", "data-protection"]
"""For whom a signer speaks: the releasing site, the auditor, the site's data-protection officer."""


class NamedSigner(Document):
    """One who may sign: for whom, by which key, and until when that key is good."""

    role: SignerRole
    name: Line
    key_id: Digest
    not_after: Moment | None = None


class Signers(Document):
    """Who may sign the verdicts of one site, and how many of them are needed: always a site and an auditor among them.

    `needed` counts distinct keys. Where `consortium` (the fingerprint of a CA certificate) is given, an auditor's key
    counts only with a certificate of that consortium.
    """

    schema_version: Literal["pixcell.release-signers/v1"] = "pixcell.release-signers/v1"
    site: SiteName
    needed: Annotated[int, Field(ge=LEAST_SIGNATURES, le=MAX_SIGNERS)]
    consortium: Digest | None = None
    signers: Annotated[tuple[NamedSigner, ...], Field(min_length=LEAST_SIGNATURES, max_length=MAX_SIGNERS)]

    @model_validator(mode="after")
    def _can_be_met(self) -> Self:
        if len({signer.key_id for signer in self.signers}) != len(self.signers):
            raise ValueError("one key stands twice among the signers: a key speaks for one role")
        if self.needed > len(self.signers):
            raise ValueError("more signatures are needed than there are signers")
        roles = {signer.role for signer in self.signers}
        if not {"site", "auditor"} <= roles:
            raise ValueError("a site and an auditor must be among the signers")
        return self

    def of(self, key_id: str) -> NamedSigner | None:
        """Whose key this is; None for a stranger's."""
        return next((signer for signer in self.signers if signer.key_id == key_id), None)


class ReleaseRequest(Document):
    """What a site asks the signers for: exactly these tiles, for this audience, judged by this policy.

    `signers_digest` is None where the standing rule holds: the site's release key and one auditor.
    """

    schema_version: Literal["pixcell.release-request/v1"] = "pixcell.release-request/v1"
    site: SiteName
    manifest_digest: Digest
    tiles_root: Digest
    tile_count: Annotated[int, Field(ge=1, le=MAX_TILES)]
    audience: Audience
    purpose: Prose
    policy_digest: Digest
    signers_digest: Digest | None
    requested_at: Moment


class Refusal(Document):
    """A signer's no, for good: these tiles do not leave."""

    schema_version: Literal["pixcell.release-refusal/v1"] = "pixcell.release-refusal/v1"
    site: SiteName
    manifest_digest: Digest
    tiles_root: Digest
    role: SignerRole
    reason: Prose
    audit_report_digest: Digest | None
    refused_at: Moment


class WithdrawnRelease(Document):
    """One release whose bundles must not be used any more."""

    manifest_digest: Digest
    reason: Prose
    withdrawn_at: Moment


class Withdrawals(Document):
    """All releases of a site that the holder of one key took back so far. `number` only grows: a lower one is older."""

    schema_version: Literal["pixcell.release-withdrawals/v1"] = "pixcell.release-withdrawals/v1"
    site: SiteName
    number: Annotated[int, Field(ge=1, le=2**40)]
    issued_at: Moment
    withdrawn: Annotated[tuple[WithdrawnRelease, ...], Field(min_length=1, max_length=MAX_WITHDRAWN)]

    @model_validator(mode="after")
    def _once_each(self) -> Self:
        if len({entry.manifest_digest for entry in self.withdrawn}) != len(self.withdrawn):
            raise ValueError("one release stands twice among the withdrawn")
        return self

    def of(self, manifest_digest: str) -> WithdrawnRelease | None:
        """Why a release was taken back; None if it was not."""
        return next((entry for entry in self.withdrawn if entry.manifest_digest == manifest_digest), None)


def written(kind: type[DocumentT], **values: Any) -> DocumentT:
    """A document from what a person typed; words that cannot stand in it are an input error that names the field."""
    try:
        return kind(**values)
    except ValidationError as error:
        where, why = first_complaint(error, "it")
        raise DocumentError(
            f"This cannot be signed as a {kind.__name__}: {where}: {why}.",
            hint="Use plain words: no control or invisible characters, not empty, at most 4000 characters.",
            code="cannot-be-signed",
        ) from error
