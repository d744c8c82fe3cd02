"""The verdict on a release: an in-toto statement that names every tile and says whether it may leave.

The form is in-toto Statement v1 (github.com/in-toto/attestation, ``spec/v1/statement.md``) with a
predicate of our own. It travels in a DSSE envelope and means nothing outside it.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Annotated, Literal, Self

from pydantic import Field, StringConstraints, model_validator

from pixcell_core.contracts.canonical import Digest, Document, Moment
from pixcell_core.contracts.release import (
    MAX_TILES,
    Conditioning,
    Line,
    PrivacyStatement,
    Prose,
    ReleaseManifest,
    TileName,
    tiles_root,
)
from pixcell_core.contracts.study import SiteName

StatementType = Literal["https://in-toto.io/Statement/v1"]
PredicateType = Literal["urn:pixcell:predicate:release-verdict:v1"]

STATEMENT_TYPE: StatementType = "https://in-toto.io/Statement/v1"
VERDICT_PREDICATE_TYPE: PredicateType = "urn:pixcell:predicate:release-verdict:v1"

Audience = Literal["agreement", "registered", "public"]
"""Who may receive the tiles: parties to a written agreement, registered users, anyone."""

MAX_VERDICT_DAYS = 1095
"""No verdict holds longer, whoever signs it: attacks improve, and tiles are audited anew."""

VerdictStatus = Literal["PASS", "REVIEW", "FAIL", "INVALID"]


class SubjectDigest(Document):
    """The digest set of an in-toto subject, SHA-256 alone: 64 lower-case hexadecimal digits."""

    sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


class Subject(Document):
    """One tile by file name and digest of its bytes."""

    name: TileName
    digest_set: Annotated[SubjectDigest, Field(alias="digest")]

    @classmethod
    def of(cls, name: str, file_digest: str) -> Subject:
        """From a ``sha256:<hex>`` digest."""
        return cls(name=name, digest_set=SubjectDigest(sha256=file_digest.removeprefix("sha256:")))

    @property
    def file_digest(self) -> str:
        """``sha256:<hex>`` of the tile's bytes."""
        return f"sha256:{self.digest_set.sha256}"


class VerdictException(Document):
    """Why a REVIEW may be released all the same, and who answers for it."""

    reason: Prose
    approver: Line


class Auditor(Document):
    """The program that judged, by name and by the digest of its code, and the policy it judged by."""

    name: Line
    version: Line
    code_digest: Digest | None = None
    policy_digest: Digest


class VerdictPredicate(Document):
    """What was judged, on what evidence, with what outcome, and until when.

    `signers_digest` names the document that says who must sign; None where the standing rule holds (the site's
    release key and one auditor). `request_digest` names what the site asked for, where it asked in writing.
    """

    verdict: VerdictStatus
    exception: VerdictException | None = None
    audience: Audience
    site: SiteName
    manifest_digest: Digest
    tile_count: Annotated[int, Field(ge=1, le=MAX_TILES)]
    tiles_root: Digest
    study_digest: Digest | None
    base_digest: Digest
    adapter_digest: Digest | None
    conditioning: Conditioning
    privacy: PrivacyStatement | None
    ledger_head: Digest | None
    auditor: Auditor
    audit_report_digest: Digest
    audit_page_digest: Digest
    proven_kinds: tuple[Line, ...]
    signers_digest: Digest | None = None
    request_digest: Digest | None = None
    issued_at: Moment
    expires_at: Moment

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.expires_at <= self.issued_at:
            raise ValueError("a verdict expires after it is issued")
        if self.expires_at - self.issued_at > timedelta(days=MAX_VERDICT_DAYS):
            raise ValueError(f"a verdict holds at most {MAX_VERDICT_DAYS} days")
        if self.verdict != "REVIEW" and self.exception is not None:
            raise ValueError(
                "only REVIEW can carry an exception: FAIL and INVALID need a new audit, PASS needs none"
            )
        return self

    @property
    def permits_release(self) -> bool:
        """PASS, or REVIEW with a named approver's reason."""
        return self.verdict == "PASS" or (self.verdict == "REVIEW" and self.exception is not None)


class Verdict(Document):
    """An in-toto Statement v1 whose subjects are the tiles of one release."""

    type: Annotated[StatementType, Field(alias="_type")] = STATEMENT_TYPE
    subject: Annotated[tuple[Subject, ...], Field(min_length=1, max_length=MAX_TILES)]
    predicate_type: Annotated[PredicateType, Field(alias="predicateType")] = VERDICT_PREDICATE_TYPE
    predicate: VerdictPredicate

    @model_validator(mode="after")
    def _counts_its_subjects(self) -> Self:
        if len({subject.name for subject in self.subject}) != len(self.subject):
            raise ValueError("one tile name stands twice among the subjects")
        if self.predicate.tile_count != len(self.subject):
            raise ValueError("tile_count is not the number of subjects")
        if tiles_root(subject.file_digest for subject in self.subject) != self.predicate.tiles_root:
            raise ValueError("tiles_root is not the root over the subjects")
        return self

    def difference_from(self, manifest: ReleaseManifest) -> str | None:
        """The first way in which this verdict is not about ``manifest``; None if it is."""
        predicate = self.predicate
        pairs = (
            ("another site", predicate.site, manifest.site),
            ("another study", predicate.study_digest, manifest.study_digest),
            ("another base model", predicate.base_digest, manifest.generator.base_digest),
            ("another adapter", predicate.adapter_digest, manifest.generator.adapter_digest),
            ("another conditioning policy", predicate.conditioning, manifest.generator.conditioning),
            ("another privacy statement", predicate.privacy, manifest.privacy),
            ("another state of the ledger", predicate.ledger_head, manifest.ledger_head),
        )
        for what, ours, theirs in pairs:
            if ours != theirs:
                return f"it is about {what}"
        judged = {subject.name: subject.file_digest for subject in self.subject}
        for tile in manifest.tiles:
            if judged.pop(tile.name, None) != tile.file_digest:
                return f"tile {tile.name} of the manifest is not among the tiles it judged"
        if judged:
            return f"it judged tile {min(judged)}, which the manifest does not hold"
        if predicate.manifest_digest != manifest.digest:
            return "it names another manifest"
        return None
