"""How far a release has come, and what blocks the next step. Read from files and log each time; nothing is remembered."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from pixcell_core.contracts.canonical import parse_document, parse_json, read_bounded
from pixcell_core.contracts.gate import Refusal
from pixcell_core.contracts.verdict import Verdict
from pixcell_core.errors import PixcellError
from pixcell_core.trust.bundle_files import MAX_FILE_BYTES, REPORT, VERDICT
from pixcell_core.trust.quorum import standing
from site_client.release.seal import Seal, require_seal
from site_client.release.withdrawal_list import WITHDRAWN
from site_client.release.workspace import ReleaseFolder, ReleaseState, ReleaseWorkspace


@dataclass(frozen=True)
class Progress:
    """The state of a release: `signed` as `1 of 2` once somebody signed, what blocks the next step, what that step is."""

    state: ReleaseState
    signed: str
    blocked_by: str
    next: str


def progress_of(workspace: ReleaseWorkspace, release: ReleaseFolder, now: datetime) -> Progress:
    """Look at everything under the seal, not only at which files are there."""
    state = workspace.state(release)
    if state == "withdrawn":
        taken = [entry.data for entry in workspace.events_of(release) if entry.kind == WITHDRAWN]
        roles = " and ".join(dict.fromkeys(str(data.get("role", "site")) for data in taken))
        by = f"by the {roles}" if roles else "on a list here, and the log does not say so"
        return Progress(state, "", f"it was taken back {by}", "")
    if state == "exported":
        return Progress(state, "", "", "withdraw, if it must be taken back")
    try:
        seal = require_seal(workspace, release)
        if state == "refused":
            return Progress(state, "", f"refused: {_refusal(release)}", "draft other tiles")
        if state == "signed":
            return _signed(release, seal, now)
    except PixcellError as error:
        return Progress("damaged", "", error.message, "draft again")
    if state == "audited":
        return _audited(release)
    if state == "draft":
        return Progress(
            state, "", "not requested: the standing terms would hold", "request, or audit its tiles"
        )
    return Progress(state, "", "no audit of these tiles is filed", "audit its tiles, then review or sign")


def _audited(release: ReleaseFolder) -> Progress:
    report = parse_json(read_bounded(release.report, MAX_FILE_BYTES), name=REPORT, max_bytes=MAX_FILE_BYTES)
    said = report.get("verdict") if isinstance(report, dict) else None
    if said == "PASS":
        return Progress("audited", "", "no auditor signed", "sign")
    if said == "REVIEW":
        blocked = "the audit says REVIEW: a named person must answer for it, or flagged tiles be withheld"
        return Progress("audited", "", blocked, "sign with --exception and --approver, or withhold")
    return Progress(
        "audited", "", f"the audit says {said}: these tiles never leave", "refuse, and draft other tiles"
    )


def _signed(release: ReleaseFolder, seal: Seal, now: datetime) -> Progress:
    envelope = release.verdict()
    assert envelope is not None
    verdict = parse_document(Verdict, envelope.unsafe_unverified_payload(), name=VERDICT)
    site = seal.manifest.site_key_id
    try:
        stands = standing(envelope.key_ids, seal.signers, site, at=now)
    except PixcellError as error:
        return Progress("signed", "", error.message, "name new signers in a new request")
    # Where nobody wrote down who signs for the site, the export is its signature.
    by_export = seal.signers is None and site not in envelope.key_ids
    signed = f"{len(stands.given)} of {stands.needed}"
    if now >= verdict.predicate.expires_at:
        return Progress(
            "signed",
            signed,
            f"the verdict ended on {verdict.predicate.expires_at:%Y-%m-%d}",
            "audit and sign anew",
        )
    if stands.complete or (by_export and len(stands.given) + 1 >= stands.needed):
        waits = "the site's own signature, which the export gives" if by_export else ""
        return Progress("signed", signed, waits, "export")
    return Progress("signed", signed, stands.words, "sign --role, by who is missing")


def _refusal(release: ReleaseFolder) -> str:
    envelope = release.refusal()
    if envelope is None:
        return "a signer refused these tiles, as the log says; the signed reason is not here"
    said = parse_document(Refusal, envelope.unsafe_unverified_payload(), name="the refusal")
    return f"by {said.role}, {said.reason}"
