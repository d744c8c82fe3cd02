"""Taking back what left: the site, or anyone who signed, says so on a signed list for everyone who holds a bundle."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from pixcell_core.contracts.canonical import parse_document
from pixcell_core.contracts.gate import WITHDRAWALS_PAYLOAD_TYPE, SignerRole, Withdrawals
from pixcell_core.contracts.release import BundleListing
from pixcell_core.contracts.verdict import Verdict
from pixcell_core.errors import BadInputError
from pixcell_core.trust.bundle import verify_bundle
from pixcell_core.trust.bundle_files import LISTING, VERDICT, open_bundle
from pixcell_core.trust.bundle_terms import TermsError
from pixcell_core.trust.dsse import Envelope, valid_signers, verify_envelope
from pixcell_core.trust.durable import write_whole
from pixcell_core.trust.keys import SigningKey
from pixcell_core.trust.log import EventLog
from pixcell_core.trust.party_log import newest_of
from pixcell_core.trust.quorum import ROLE_WORDS, role_of
from site_client.release.seal import ClosedError
from site_client.release.signers import SignerRefusedError
from site_client.release.withdrawal_list import WITHDRAWN, WithdrawalList
from site_client.release.workspace import ReleaseFolder, ReleaseWorkspace


@dataclass(frozen=True)
class WithdrawnBundle:
    """What was taken back, by whom, and the list that says so."""

    release_id: str
    manifest_digest: str
    role: SignerRole
    withdrawals: Withdrawals
    envelope: Envelope
    list_file: Path


def withdraw_release(
    workspace: ReleaseWorkspace,
    reason: str,
    *,
    now: datetime,
    release_id: str | None = None,
    out: Path | None = None,
    key: SigningKey | None = None,
    own_log: EventLog | None = None,
) -> WithdrawnBundle:
    """Put an exported release on the list of withdrawals of the site, or of the signer who holds `key`.

    Bundles cannot be called back from those who have them: the list must reach them; `out` gets a copy. It is an event
    of the site's log and of the signer's. Raises `not-exported`, `release-withdrawn` (this key took it back before),
    `not-a-signer`, `withdrawals-rolled-back`, `out-exists`.
    """
    release = workspace.require().find(release_id)
    _require_free(out)
    site_key = workspace.site_key()
    signer, own = key or site_key, own_log or workspace.log()
    facts = {"release": release.release_id, "key": signer.key_id}
    with workspace.recording_refusals("withdraw", facts, now=now, own=own):
        state = workspace.state(release)
        if state not in ("exported", "withdrawn"):
            raise ClosedError(
                f"Release {release.release_id} is {state}: nothing of it left.",
                hint="To stop it from leaving: pixcell release refuse",
                code="not-exported",
            )
        manifest = release.manifest()
        role = _role_at_site(release, signer, site_key)
        mine = signer.key_id == site_key.key_id
        path = workspace.withdrawals_file if mine else _list_file(own, manifest.site, signer)
        taken = WithdrawalList(path, manifest.site, signer, workspace.log() if mine else own)
        _require_first(taken, release.release_id)
        withdrawals, envelope = taken.take_back(manifest.digest, reason, now)
        # The lists first: a withdrawal that is on record and on no list would reach nobody.
        public = workspace.withdrawals_file if mine else _public_copy(workspace, signer.key_id)
        write_whole(public, envelope.to_bytes())
        data = {"site": manifest.site, "manifest": manifest.digest, "number": withdrawals.number}
        workspace.note(WITHDRAWN, {**facts, "role": role, **data}, now=now, own=own)
    if out is not None:
        write_whole(out, envelope.to_bytes())
    return WithdrawnBundle(release.release_id, manifest.digest, role, withdrawals, envelope, public)


def withdraw_bundle(
    bundle: Path, key: SigningKey, reason: str, *, now: datetime, own_log: EventLog, out: Path | None = None
) -> WithdrawnBundle:
    """Take a bundle back that one signed, far from the site that released it: on one's own list, in one's own log.

    The bundle is verified as of its export: an expired one can be taken back too. Raises `not-a-signer`,
    `release-withdrawn`, `withdrawals-rolled-back`, `out-exists`, or what is wrong with the bundle.
    """
    _require_free(out)
    with open_bundle(bundle) as files:
        claimed = Envelope.from_bytes(files.read(LISTING), name=LISTING).unsafe_unverified_payload()
        exported_at = parse_document(BundleListing, claimed, name=LISTING).exported_at
        report = verify_bundle(files, trusted_keys=None, now=exported_at)
        said = Envelope.from_bytes(files.read(VERDICT), name=VERDICT)
    predicate = parse_document(Verdict, said.unsafe_unverified_payload(), name=VERDICT).predicate
    given = {one.role for one in report.signers if one.key_id == key.key_id}
    role: SignerRole | None = next((role for role in ROLE_WORDS if role in given), None)
    if role is None:
        raise _not_a_signer(key)
    if role == "site":
        raise BadInputError(
            "The site takes back in its own folder, where its list lies.",
            hint="Give --site-dir instead of --bundle.",
            code="withdrawal-incomplete",
        )
    digest = predicate.manifest_digest
    release_id = digest.removeprefix("sha256:")[:16]
    path = _list_file(own_log, predicate.site, key)
    taken = WithdrawalList(path, predicate.site, key, own_log)
    _require_first(taken, release_id)
    withdrawals, envelope = taken.take_back(digest, reason, now)
    data = {"site": predicate.site, "manifest": digest, "number": withdrawals.number}
    own_log.append(WITHDRAWN, {"release": release_id, "key": key.key_id, "role": role, **data}, now=now)
    if out is not None:
        write_whole(out, envelope.to_bytes())
    return WithdrawnBundle(release_id, digest, role, withdrawals, envelope, path)


def take_up_withdrawals(workspace: ReleaseWorkspace, envelope: Envelope, *, now: datetime) -> tuple[str, ...]:
    """Put on record here what a signer took back elsewhere; returns the ids of this site's releases on that list.

    Raises `withdrawals-of-another`: no release of this site that its signer signed stands on it; the refusals of a
    false envelope; `withdrawals-rolled-back`: an older list than the one taken up before.
    """
    found: list[str] = []
    with workspace.require().recording_refusals("withdraw", {}, now=now):
        for release in workspace.all_releases():
            manifest = release.manifest()
            keys = workspace.recorded_signers(release)
            if not valid_signers(envelope, keys):
                continue
            payload = verify_envelope(envelope, keys, payload_type=WITHDRAWALS_PAYLOAD_TYPE)
            listed = parse_document(Withdrawals, payload, name="the list of withdrawals")
            if listed.site != manifest.site or listed.of(manifest.digest) is None:
                continue
            key_id = valid_signers(envelope, keys)[0].key_id
            _require_newer(workspace, key_id, listed)
            data = {"site": manifest.site, "manifest": manifest.digest, "number": listed.number}
            facts = {"release": release.release_id, "key": key_id}
            if newest_of(workspace.log().folder, WITHDRAWN, **facts) is None:
                role = role_of(key_id, release.signers(), manifest.site_key_id, at=manifest.created_at).role
                write_whole(_public_copy(workspace, key_id), envelope.to_bytes())
                workspace.note(WITHDRAWN, {**facts, "role": role, **data}, now=now)
            found.append(release.release_id)
        if not found:
            raise TermsError(
                "This list takes back no release of this site that its signer signed here.",
                hint="Ask its author which site it is for.",
                code="withdrawals-of-another",
            )
    return tuple(found)


def _role_at_site(release: ReleaseFolder, signer: SigningKey, site_key: SigningKey) -> SignerRole:
    """For whom the key speaks: the site always, others where the verdict carries their true signature."""
    if signer.key_id == site_key.key_id:
        return "site"
    envelope = release.verdict()
    if envelope is None or not valid_signers(envelope, [signer.verify_key]):
        raise _not_a_signer(signer)
    # A key that is over by now still speaks for what it signed: taking back is never the dangerous side.
    manifest = release.manifest()
    return role_of(signer.key_id, release.signers(), manifest.site_key_id, at=manifest.created_at).role


def _require_first(taken: WithdrawalList, release_id: str) -> None:
    if any(entry.data.get("release") == release_id for entry in taken.events()):
        raise ClosedError(
            f"Release {release_id} was withdrawn before with this key.",
            hint=f"Give recipients the list: {taken.path}",
            code="release-withdrawn",
        )


def _require_newer(workspace: ReleaseWorkspace, key_id: str, listed: Withdrawals) -> None:
    known = newest_of(workspace.log().folder, WITHDRAWN, key=key_id)
    if known is not None and int(known.data["number"]) > listed.number:
        raise TermsError(
            f"This list has number {listed.number}; number {known.data['number']} of the same signer is on record.",
            hint="Ask its author for the newest one.",
            code="withdrawals-rolled-back",
        )


def _require_free(out: Path | None) -> None:
    if out is not None and (out.exists() or not out.parent.is_dir()):
        raise BadInputError(
            f"{out} exists already, or has no folder to lie in.",
            hint="Give a path where nothing is yet.",
            code="out-exists",
        )


def _list_file(own: EventLog, site: str, key: SigningKey) -> Path:
    return own.folder / f"withdrawals-{site}-{key.key_id.removeprefix('sha256:')[:16]}.dsse.json"


def _public_copy(workspace: ReleaseWorkspace, key_id: str) -> Path:
    return workspace.releases / f"withdrawals-{key_id.removeprefix('sha256:')[:16]}.dsse.json"


def _not_a_signer(key: SigningKey) -> SignerRefusedError:
    return SignerRefusedError(
        f"{key.key_id} signed nothing of this release.",
        hint="Only the site and those who signed the verdict can take it back. Tell one of them what you found.",
        code="not-a-signer",
    )
