"""Asking for a release: the site signs which tiles it puts before which signers, for whom, judged by which policy."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from pixcell_core.contracts.canonical import load_document, read_bounded
from pixcell_core.contracts.gate import REQUEST_PAYLOAD_TYPE, ReleaseRequest, Signers, written
from pixcell_core.contracts.verdict import Audience
from pixcell_core.errors import BadInputError, RefusedError
from pixcell_core.trust.bundle_files import REQUEST, SIGNERS
from pixcell_core.trust.dsse import sign_envelope
from pixcell_core.trust.durable import write_whole
from site_client.release.seal import require_open, require_seal
from site_client.release.workspace import POLICY, ReleaseFolder, ReleaseWorkspace

DEFAULT_PURPOSE = "Research and education on methods, under the terms of the manifest."
_MAX_POLICY_BYTES = 1 << 20


class RequestRefusedError(RefusedError):
    """A release may not be asked for like this."""

    default_code = "request-refused"


@dataclass(frozen=True)
class RequestedRelease:
    """A sealed release, and what was asked for it."""

    release: ReleaseFolder
    request: ReleaseRequest
    signers: Signers | None


def request_release(
    workspace: ReleaseWorkspace,
    *,
    now: datetime,
    release_id: str | None = None,
    audience: Audience = "agreement",
    purpose: str = DEFAULT_PURPOSE,
    policy: str | None = None,
    signers_file: Path | None = None,
) -> RequestedRelease:
    """Sign the request for a draft and keep policy and signers' document under its seal.

    `policy` is the name of a shipped policy or a file; without it the shipped default. Raises `already-requested`
    where the release was requested, audited or signed before: terms are fixed before anybody looks.
    """
    from privacy_audit.policy import DEFAULT_POLICY, load_policy, policy_path

    release = workspace.require().find(release_id)
    with workspace.recording_refusals("request", {"release": release.release_id}, now=now):
        require_open(workspace, release)
        seal = require_seal(workspace, release)
        if workspace.state(release) != "draft":
            raise RequestRefusedError(
                f"Release {release.release_id} is {workspace.state(release)} already: its terms are fixed.",
                hint="Other terms are another release: draft the tiles again, then request that.",
                code="already-requested",
            )
        signers = None if signers_file is None else load_document(Signers, signers_file)
        _require_fit(workspace, seal.manifest.site, signers)
        named = policy or DEFAULT_POLICY
        judged_by = load_policy(named)
        request = written(
            ReleaseRequest,
            site=seal.manifest.site,
            manifest_digest=seal.manifest.digest,
            tiles_root=seal.manifest.tiles_root,
            tile_count=seal.manifest.tile_count,
            audience=audience,
            purpose=purpose,
            policy_digest=judged_by.digest,
            signers_digest=None if signers is None else signers.digest,
            requested_at=now.astimezone(UTC).replace(microsecond=0),
        )
        envelope = sign_envelope(REQUEST_PAYLOAD_TYPE, request.to_bytes(), [workspace.site_key()])
        workspace.log().append(
            "release.requested",
            {
                "release": release.release_id,
                "request": request.digest,
                "policy": request.policy_digest,
                "signers": request.signers_digest,
                "audience": audience,
            },
            now=now,
        )
        write_whole(release.path / POLICY, read_bounded(policy_path(named), _MAX_POLICY_BYTES))
        if signers is not None:
            write_whole(release.path / SIGNERS, signers.to_bytes())
        else:
            (release.path / SIGNERS).unlink(missing_ok=True)
        write_whole(release.path / REQUEST, envelope.to_bytes())
    return RequestedRelease(release, request, signers)


def _require_fit(workspace: ReleaseWorkspace, site: str, signers: Signers | None) -> None:
    if signers is None:
        return
    if signers.site != site:
        raise BadInputError(
            f"The signers' document is of {signers.site}, this release of {site}.",
            hint="Write one for this site; --signers names it.",
            code="signers-of-another-site",
        )
    own = signers.of(workspace.site_key().key_id)
    if own is not None and own.role != "site":
        raise RequestRefusedError(
            f"The signers' document lets the site's own release key sign as {own.role}.",
            hint="The auditor signs with a key of their own: pixcell key new FILE.",
            code="auditor-is-site",
        )
