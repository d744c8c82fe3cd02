"""The site's signed decisions: one envelope per study digest; the last decision counts."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from pydantic import BaseModel

from pixcell_core.contracts.atomic import write_atomically
from pixcell_core.contracts.canonical import load_document
from pixcell_core.contracts.study import Approval, ApprovalError, Study, check_approval
from pixcell_core.errors import RefusedError
from pixcell_core.trust.dsse import Envelope
from pixcell_core.trust.keys import SigningKey
from site_client.approvals.site_folder import SiteFolder

Decision = Literal["approve", "deny", "revoke"]


class Decided(BaseModel):
    """A decision as it was signed."""

    study: str
    digest: str
    decision: str
    file: Path

    def __str__(self) -> str:
        return f"{self.decision}: study {self.study}\ndigest: {self.digest}\nsigned in: {self.file}"


class ApprovalBook:
    """Decisions of one site."""

    def __init__(self, folder: SiteFolder) -> None:
        self._folder = folder

    def decide(self, study: Study, decision: Decision, now: datetime | None = None) -> Decided:
        """Sign a decision about exactly this study. A study that does not name this site is refused."""
        site = self._folder.identity().site
        if site not in study.sites:
            raise RefusedError(
                f"Study {study.id} does not name {site} among its sites.",
                hint="Ask the coordinator for the study that does.",
                code="not-in-study",
            )
        moment = (now or datetime.now(UTC)).replace(microsecond=0)
        approval = Approval(
            study_id=study.id,
            study_digest=study.digest,
            site=site,
            decision=decision,
            epsilon_cap=study.epsilon_cap,
            decided_at=moment,
            expires_at=study.expires_at,
        )
        envelope = approval.sign(SigningKey.load(self._folder.approval_key))
        path = self._path(study.digest)
        write_atomically(path, envelope.to_bytes())
        return Decided(study=study.id, digest=study.digest, decision=decision, file=path)

    def require(self, study: Study, now: datetime | None = None) -> Envelope:
        """The valid approval of exactly this study.

        Raises `ApprovalError` where there is none, `SignatureRefusedError` where it was not signed here.
        """
        path = self._path(study.digest)
        if not path.is_file():
            raise ApprovalError(
                f"This site has not approved study {study.id} ({study.digest[:19]}…).",
                hint="Read the study, then: pixcell site approve STUDY.json",
                code="not-approved",
            )
        envelope = Envelope.load(path)
        key = SigningKey.load(self._folder.approval_key).verify_key
        check_approval(envelope, key, study=study, site=self._folder.identity().site, now=now)
        return envelope

    def _path(self, digest: str) -> Path:
        return self._folder.approvals / f"{digest.removeprefix('sha256:')}.json"


def read_study(path: Path) -> Study:
    """The study in a file, strictly read."""
    return load_document(Study, path, max_bytes=1 << 20)
