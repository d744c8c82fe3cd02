"""A signer's no: signed with its reason, and final for these tiles."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime

from pixcell_core.contracts.canonical import digest, read_bounded
from pixcell_core.contracts.gate import REFUSAL_PAYLOAD_TYPE, Refusal, SignerRole, written
from pixcell_core.trust.bundle_files import MAX_FILE_BYTES
from pixcell_core.trust.dsse import Envelope, sign_envelope
from pixcell_core.trust.durable import write_whole
from pixcell_core.trust.keys import SigningKey
from pixcell_core.trust.log import EventLog
from site_client.release.seal import ClosedError, require_open, require_seal
from site_client.release.signers import require_signer
from site_client.release.workspace import DECLINED, REFUSAL, ReleaseFolder, ReleaseWorkspace


@dataclass(frozen=True)
class RefusedRelease:
    """A release that stays: who said no, and why."""

    release: ReleaseFolder
    refusal: Refusal
    envelope: Envelope


def refuse_release(
    workspace: ReleaseWorkspace,
    key: SigningKey,
    reason: str,
    *,
    now: datetime,
    role: SignerRole = "auditor",
    release_id: str | None = None,
    own_log: EventLog | None = None,
) -> RefusedRelease:
    """Sign a refusal of a release that was not exported yet. Only who may sign may refuse.
    It is an event of the site's log, and of `own_log`, the signer's.

    One no is enough, whatever the others signed. Raises `already-exported` (then: withdraw), or the refusals of the
    seal and of `require_signer`.
    """
    release = workspace.require().find(release_id)
    facts = {"release": release.release_id, "key": key.key_id}
    with workspace.recording_refusals("refuse", facts, now=now, own=own_log):
        require_open(workspace, release)
        if workspace.state(release) == "exported":
            raise ClosedError(
                f"Release {release.release_id} has left already: a refusal comes too late.",
                hint="Take it back: pixcell release withdraw",
                code="already-exported",
            )
        seal = require_seal(workspace, release)
        require_signer(workspace, seal, key.verify_key, role, now)
        filed = release.report.exists()
        refusal = written(
            Refusal,
            site=seal.manifest.site,
            manifest_digest=seal.manifest.digest,
            tiles_root=seal.manifest.tiles_root,
            role=role,
            reason=reason,
            audit_report_digest=digest(read_bounded(release.report, MAX_FILE_BYTES)) if filed else None,
            refused_at=now.astimezone(UTC).replace(microsecond=0),
        )
        envelope = sign_envelope(REFUSAL_PAYLOAD_TYPE, refusal.to_bytes(), [key])
        workspace.note(
            DECLINED,
            {
                **facts,
                "site": seal.manifest.site,
                "role": role,
                "manifest": seal.manifest.digest,
                "tiles_root": seal.manifest.tiles_root,
                "refusal": digest(envelope.to_bytes()),
            },
            now=now,
            own=own_log,
        )
        workspace.record_signer(release, key.verify_key)
        write_whole(release.path / REFUSAL, envelope.to_bytes())
    return RefusedRelease(release, refusal, envelope)
