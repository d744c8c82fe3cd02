"""What an audit is asked to do, and the requests that are refused before anything is computed."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from pixcell_core.contracts import parse_document, read_bounded
from pixcell_core.errors import BadInputError
from privacy_audit.battery import Extras
from privacy_audit.policy import Policy
from privacy_audit.report import MAX_REPORT_BYTES, REPORT, AuditReport
from privacy_audit.tiles import TileError, TileSource

_IDENTIFYING_LENGTH = 4


@dataclass(frozen=True)
class AuditRequest:
    """What to audit, by which policy, and where to write."""

    train: Path
    holdout: Path
    synthetic: Path
    out: Path
    policy: Policy
    seed: int | None = None  # follows from tiles and policy when absent; a gate takes no other
    filtered_from: Path | None = None
    extras: Extras = field(default_factory=Extras)
    patients: Path | None = None
    now: datetime | None = None  # the clock; the computer's own when absent
    device: str = "cpu"  # auto, cpu, cuda or cuda:N: where tiles are looked at and compared


def seed_of(tiles_root: str, policy_digest: str) -> int:
    """The seed of an audit of these tiles by this policy: nobody can try seeds until one passes."""
    return int(hashlib.sha256(f"{tiles_root}|{policy_digest}".encode()).hexdigest()[:8], 16) % 2**31


def first_audit(request: AuditRequest) -> tuple[AuditReport, bytes] | None:
    """The report of the audit after which tiles were withheld, read before anything is written."""
    if request.filtered_from is None:
        return None
    if request.filtered_from.resolve() == request.out.resolve():
        raise BadInputError(
            "--filtered-from and --out are the same folder.",
            hint="Keep the first audit; write the second elsewhere.",
            code="same-folder",
        )
    data = read_bounded(request.filtered_from / REPORT, MAX_REPORT_BYTES)
    return parse_document(AuditReport, data, name=REPORT), data


def refuse_same_folder(request: AuditRequest) -> None:
    twins = request.extras.base_twins
    folders = [
        path.resolve()
        for path in (request.train, request.holdout, request.synthetic, twins)
        if path is not None
    ]
    if len(set(folders)) < len(folders):
        raise BadInputError(
            f"Two of the folders --train, --holdout{',' if twins else ' and'} --synthetic"
            f"{' and --base-twins' if twins else ''} are the same.",
            hint="Give a folder of its own to each.",
            code="same-folder",
        )
    if any(request.out.resolve() == folder or folder in request.out.resolve().parents for folder in folders):
        raise BadInputError(
            "The output folder lies inside a folder of tiles.",
            hint="Choose another --out: the report must not mix with what it judges.",
            code="out-inside-tiles",
        )


def refuse_identifying_names(train: TileSource, holdout: TileSource, synthetic: TileSource) -> None:
    """Names of released tiles go into the report and into the bundle: none may carry a patient identifier."""
    patients = {
        name.lower()
        for name in {*train.patients, *holdout.patients}
        if len(name) >= _IDENTIFYING_LENGTH and not name.isdigit()
    }
    for tile in synthetic.ids:
        text = tile.lower()
        tokens = (
            set(re.split(r"[/._ ]+", text))
            | set(re.split(r"[/. ]+", text))
            | set(re.split(r"[^a-z0-9]+", text))
        )
        if tokens & patients:
            raise TileError(
                "The name of a synthetic tile carries a patient identifier of this site.",
                hint="Rename the synthetic tiles, for example by number, and look for how the name got there.",
                code="names-identify",
            )
