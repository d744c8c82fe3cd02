"""Audits that failed before: what one said of these tiles by this policy stays said, however often it is asked again.

An audit draws at random, so one who may repeat it until it passes has no gate. INVALID is no such word: the audit could
not see, and more data may help it.
"""

from __future__ import annotations

from pixcell_core.contracts.release import ReleaseManifest
from pixcell_core.errors import RefusedError
from pixcell_core.trust.log import EventLog, LogEntry, read_entries
from privacy_audit.log_event import DECIDED, RAN
from site_client.release.workspace import ReleaseWorkspace, release_id_of

AUDITED = "release.audited"
"""Kind of the event by which an audit was filed with a release."""


class FailedBeforeError(RefusedError):
    """An earlier audit of the same tiles by the same policy said FAIL."""

    default_code = "failed-before"


def require_unfailed(
    workspace: ReleaseWorkspace, manifest: ReleaseManifest, policy: str, own: EventLog | None = None
) -> None:
    """Refuse where the site's log, or `own`, the signer's, holds an audit of these tiles by `policy` that said FAIL.

    The site's log was verified before (`require_open`). Other tiles, or another policy that the signers accept, are
    another question.
    """
    folders = [workspace.log().folder, *([] if own is None else [own.folder])]
    for entry in (entry for folder in folders for entry in read_entries(folder)):
        if _failed(entry, manifest, policy):
            raise FailedBeforeError(
                f"An audit of these very tiles by this policy said FAIL on {entry.time[:10]} ({entry.data['report']}).",
                hint="A FAIL is not asked away by other seeds. Read that report, make other tiles and draft those.",
            )


def _failed(entry: LogEntry, manifest: ReleaseManifest, policy: str) -> bool:
    data = entry.data
    if entry.kind not in (RAN, DECIDED, AUDITED) or data.get("verdict") != "FAIL":
        return False
    # What was filed by earlier versions names the release alone.
    named = data.get("tiles_root") == manifest.tiles_root or data.get("release") == release_id_of(manifest)
    return named and data.get("policy") == policy
