"""The signed approvals that sites showed in a run: kept as they came, and checked again by whoever reads them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from pixcell_core.contracts.atomic import write_atomically
from pixcell_core.contracts.enrolment import EnrolmentRequest
from pixcell_core.contracts.study import Approval, Study, check_approval
from pixcell_core.errors import PixcellError
from pixcell_core.trust.dsse import Envelope

FOLDER = "approvals"


@dataclass(frozen=True)
class SeenApproval:
    """One site's approval: the document where it covers the study now, else the reason why not."""

    site: str
    approval: Approval | None
    code: str
    reason: str


class ApprovalsSeen:
    """One envelope per site, in the folder of a run."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / FOLDER

    def keep(self, site: str, envelope: bytes) -> None:
        """Keep an approval that was verified. The one before it is replaced where it differs."""
        path = self._folder / f"{site}.json"
        if path.is_file() and path.read_bytes() == envelope:
            return
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_atomically(path, envelope)

    def read(
        self, study: Study, sites: Mapping[str, EnrolmentRequest], now: datetime | None = None
    ) -> list[SeenApproval]:
        """Every site of the study, each with its approval as it stands at `now`."""
        return [self._read(study, site, sites[site], now) for site in study.sites]

    def _read(
        self, study: Study, site: str, enrolled: EnrolmentRequest, now: datetime | None
    ) -> SeenApproval:
        path = self._folder / f"{site}.json"
        if not path.is_file():
            return SeenApproval(site, None, "not-seen", "no approval was seen yet")
        try:
            envelope = Envelope.load(path)
            found = check_approval(envelope, enrolled.verify_key(), study=study, site=site, now=now)
        except PixcellError as error:
            return SeenApproval(site, None, error.code, error.message)
        return SeenApproval(site, found, "ok", "")
