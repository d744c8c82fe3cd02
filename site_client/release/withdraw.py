"""Taking back what left: the site's signed list of withdrawn releases, for everyone who holds a bundle."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from pixcell_core.contracts.canonical import parse_document
from pixcell_core.contracts.gate import WITHDRAWALS_PAYLOAD_TYPE, Withdrawals, WithdrawnRelease, written
from pixcell_core.errors import BadInputError
from pixcell_core.trust.dsse import Envelope, sign_envelope, verify_envelope
from pixcell_core.trust.durable import write_whole
from site_client.release.seal import ClosedError
from site_client.release.workspace import ReleaseFolder, ReleaseWorkspace


@dataclass(frozen=True)
class WithdrawnBundle:
    """What was taken back, and the list that says so."""

    release: ReleaseFolder
    withdrawals: Withdrawals
    envelope: Envelope


def withdraw_release(
    workspace: ReleaseWorkspace,
    reason: str,
    *,
    now: datetime,
    release_id: str | None = None,
    out: Path | None = None,
) -> WithdrawnBundle:
    """Put an exported release on the site's list of withdrawals, signed by its release key; `out` gets a copy.

    Bundles cannot be called back from those who have them: the list must reach them. Raises `not-exported`,
    `release-withdrawn` (it was taken back before), `out-exists`.
    """
    release = workspace.require().find(release_id)
    if out is not None and (out.exists() or not out.parent.is_dir()):
        raise BadInputError(
            f"{out} exists already, or has no folder to lie in.",
            hint="Give a path where nothing is yet.",
            code="out-exists",
        )
    with workspace.recording_refusals("withdraw", {"release": release.release_id}, now=now):
        state = workspace.state(release)
        if state == "withdrawn":
            raise ClosedError(
                f"Release {release.release_id} was withdrawn before.",
                hint=f"Give recipients the list: {workspace.withdrawals_file}",
                code="release-withdrawn",
            )
        if state != "exported":
            raise ClosedError(
                f"Release {release.release_id} is {state}: nothing of it left.",
                hint="To stop it from leaving: pixcell release refuse",
                code="not-exported",
            )
        manifest = release.manifest()
        before = published_withdrawals(workspace)
        moment = now.astimezone(UTC).replace(microsecond=0)
        entry = written(WithdrawnRelease, manifest_digest=manifest.digest, reason=reason, withdrawn_at=moment)
        if before is not None and before.of(manifest.digest) is not None:
            # A withdrawal that was interrupted: the list has it, the log has not.
            withdrawals, envelope = before, Envelope.load(workspace.withdrawals_file)
        else:
            withdrawals = Withdrawals(
                site=manifest.site,
                number=1 if before is None else before.number + 1,
                issued_at=moment,
                withdrawn=(*(() if before is None else before.withdrawn), entry),
            )
            envelope = sign_envelope(WITHDRAWALS_PAYLOAD_TYPE, withdrawals.to_bytes(), [workspace.site_key()])
        # The list first: a withdrawal that is on record and not on the list would reach nobody.
        write_whole(workspace.withdrawals_file, envelope.to_bytes())
        workspace.log().append(
            "release.withdrawn",
            {"release": release.release_id, "manifest": manifest.digest, "number": withdrawals.number},
            now=now,
        )
    if out is not None:
        write_whole(out, envelope.to_bytes())
    return WithdrawnBundle(release, withdrawals, envelope)


def published_withdrawals(workspace: ReleaseWorkspace) -> Withdrawals | None:
    """The site's list so far, if its signature is true; None before the first withdrawal."""
    path = workspace.withdrawals_file
    if not path.exists():
        return None
    payload = verify_envelope(
        Envelope.load(path), [workspace.site_key().verify_key], payload_type=WITHDRAWALS_PAYLOAD_TYPE
    )
    return parse_document(Withdrawals, payload, name=path.name)
