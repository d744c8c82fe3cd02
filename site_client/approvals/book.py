"""The site's signed decisions: one envelope per study digest, the study beside it; the last decision counts.

Every decision carries a number that only grows, and the numbers given are also remembered outside the folder of the
decisions: an older approval that is put back after a withdrawal is met by a number that is too small.
"""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, Field

from pixcell_core.contracts.atomic import write_atomically
from pixcell_core.contracts.canonical import Digest, Document, digest, load_document
from pixcell_core.contracts.study import Approval, ApprovalError, Study, check_approval
from pixcell_core.errors import BadInputError, PixcellError, RefusedError
from pixcell_core.trust.dsse import Envelope
from pixcell_core.trust.keys import SigningKey
from site_client.approvals.act_log import DECIDED, note_act
from site_client.approvals.site_folder import SiteFolder

Decision = Literal["approve", "deny", "revoke"]
STUDY_ENDING = ".study.json"
MAX_STUDY_BYTES = 1 << 20


class Decided(BaseModel):
    """A decision as it was signed."""

    study: str
    digest: str
    decision: str
    file: Path
    epsilon_cap: float | None = None
    expires_at: datetime | None = None

    def __str__(self) -> str:
        return f"{self.decision}: study {self.study}\ndigest: {self.digest}\nsigned in: {self.file}"


class Standing(BaseModel):
    """What this site decided about one study and whether that holds now: `ok`, or the code of why not."""

    study: Study
    approval: Approval | None
    code: str

    @property
    def valid(self) -> bool:
        """Whether rounds of this study may run here now."""
        return self.code == "ok"


class _Numbers(Document):
    """The decisions' numbers as remembered outside their folder."""

    schema_version: Literal["approval-numbers/v1"] = "approval-numbers/v1"
    last: Annotated[int, Field(ge=0, lt=2**53)] = 0
    studies: Annotated[dict[Digest, int], Field(max_length=10_000)] = Field(default_factory=dict)


class ApprovalBook:
    """Decisions of one site."""

    def __init__(self, folder: SiteFolder) -> None:
        self._folder = folder
        self._numbers_file = folder.root / "private" / "approval-numbers.json"

    def decide(
        self,
        study: Study,
        decision: Decision,
        now: datetime | None = None,
        *,
        epsilon_cap: float | None = None,
        expires_at: datetime | None = None,
    ) -> Decided:
        """Sign a decision about exactly this study. `epsilon_cap` and `expires_at` may narrow it, never widen it.

        Raises `RefusedError` for a study that does not name this site, `BadInputError` (`approval-too-wide`).
        """
        site = self._folder.identity().site
        if site not in study.sites:
            raise RefusedError(
                f"Study {study.id} does not name {site} among its sites.",
                hint="Ask the coordinator for the study that does.",
                code="not-in-study",
            )
        moment = (now or datetime.now(UTC)).replace(microsecond=0)
        cap = study.epsilon_cap if epsilon_cap is None else epsilon_cap
        end = study.expires_at if expires_at is None else expires_at
        if not 0 < cap <= study.epsilon_cap or end > study.expires_at or end <= moment < study.expires_at:
            raise BadInputError(
                f"An approval may allow less than the study asks for, not more: epsilon up to {study.epsilon_cap:g} per "
                f"{study.unit} at delta {study.delta:g}, until {study.expires_at:%Y-%m-%d %H:%M} UTC, and not the past.",
                hint="Give a smaller --epsilon-cap, or an earlier end.",
                code="approval-too-wide",
            )
        with self._alone():
            numbers = self._numbers()
            approval = Approval(
                study_id=study.id,
                study_digest=study.digest,
                site=site,
                decision=decision,
                epsilon_cap=cap,
                sequence=numbers.last + 1,
                decided_at=moment,
                expires_at=end,
            )
            envelope = approval.sign(SigningKey.load(self._folder.approval_key))
            path = self._path(study.digest)
            # The number first: a crash between the writes leaves the older decision refused, not the newer lost.
            write_atomically(
                self._numbers_file,
                _Numbers(
                    last=approval.sequence, studies=numbers.studies | {study.digest: approval.sequence}
                ).to_bytes(),
            )
            # The event before the decision: one that stands nowhere in the site's log must not count.
            facts = {"study": study.digest, "decision": decision, "sequence": approval.sequence}
            note_act(self._folder, DECIDED, {**facts, "envelope": digest(envelope.to_bytes())}, now=now)
            write_atomically(self._study_path(study.digest), study.to_bytes())
            write_atomically(path, envelope.to_bytes())
        return Decided(
            study=study.id,
            digest=study.digest,
            decision=decision,
            file=path,
            epsilon_cap=cap if decision == "approve" else None,
            expires_at=end if decision == "approve" else None,
        )

    def require(self, study: Study, now: datetime | None = None) -> Envelope:
        """The valid approval of exactly this study, as it travels.

        Raises `ApprovalError` where there is none or an older one lies in its place, `SignatureRefusedError` where it
        was not signed here.
        """
        return self._checked(study, now)[0]

    def approval(self, study: Study, now: datetime | None = None) -> Approval:
        """The valid approval of exactly this study, read. Raises as `require` does."""
        return self._checked(study, now)[1]

    def studies(self, now: datetime | None = None) -> tuple[Standing, ...]:
        """Every study this site decided about, in the order of their ids, with what holds now."""
        found = []
        for path in sorted(self._folder.approvals.glob(f"*{STUDY_ENDING}")):
            try:
                study = read_study(path)
            except PixcellError:
                continue
            if self._study_path(study.digest).name == path.name:
                found.append(self.standing(study, now))
        return tuple(sorted(found, key=lambda s: (s.study.id, s.study.digest)))

    def standing(self, study: Study, now: datetime | None = None) -> Standing:
        """What holds now for one study."""
        try:
            return Standing(study=study, approval=self.approval(study, now), code="ok")
        except PixcellError as error:
            return Standing(study=study, approval=None, code=error.code)

    def find(self, name: str) -> Study:
        """The study decided about here whose id or digest (or a beginning of it) is `name`."""
        matches = [
            s.study
            for s in self.studies()
            if name == s.study.id
            or (len(name) >= 8 and s.study.digest.removeprefix("sha256:").startswith(name))
        ]
        if len(matches) != 1:
            raise BadInputError(
                f"{'No' if not matches else 'More than one'} study decided about here is called {name}.",
                hint="`pixcell site studies` lists them; a digest's first 8 digits name one exactly.",
                code="unknown-study" if not matches else "ambiguous-study",
            )
        return matches[0]

    def apps(self, now: datetime | None = None) -> frozenset[str]:
        """Digests of the Flower bundles that a valid approval names: the only ones whose tasks may run here."""
        return frozenset(s.study.app_digest for s in self.studies(now) if s.valid and s.study.app_digest)

    def _checked(self, study: Study, now: datetime | None) -> tuple[Envelope, Approval]:
        path = self._path(study.digest)
        if not path.is_file():
            raise ApprovalError(
                f"This site has not approved study {study.id} ({study.digest[:19]}…).",
                hint="Read the study, then: pixcell site approve STUDY.json",
                code="not-approved",
            )
        envelope = Envelope.load(path)
        key = SigningKey.load(self._folder.approval_key).verify_key
        approval = check_approval(envelope, key, study=study, site=self._folder.identity().site, now=now)
        if approval.sequence < self._numbers().studies.get(study.digest, 0):
            raise ApprovalError(
                f"An older approval of study {study.id} lies where a newer decision was.",
                hint="Someone put it back. Decide again: pixcell site approve or revoke STUDY.json",
                code="approval-superseded",
            )
        return envelope, approval

    def _numbers(self) -> _Numbers:
        return load_document(_Numbers, self._numbers_file) if self._numbers_file.is_file() else _Numbers()

    @contextmanager
    def _alone(self) -> Iterator[None]:
        for place in (self._folder.approvals, self._numbers_file.parent):
            place.mkdir(parents=True, exist_ok=True, mode=0o700)
        with (self._folder.approvals / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _path(self, digest: str) -> Path:
        return self._folder.approvals / f"{digest.removeprefix('sha256:')}.json"

    def _study_path(self, digest: str) -> Path:
        return self._folder.approvals / f"{digest.removeprefix('sha256:')}{STUDY_ENDING}"


def read_study(path: Path) -> Study:
    """The study in a file, strictly read."""
    return load_document(Study, path, max_bytes=MAX_STUDY_BYTES)
