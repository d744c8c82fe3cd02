"""The signed verdict that lies with a release: believed only where every signature on it is true and known here."""

from __future__ import annotations

from collections.abc import Sequence

from pixcell_core.contracts.canonical import parse_document
from pixcell_core.contracts.verdict import Verdict
from pixcell_core.errors import RefusedError
from pixcell_core.trust.bundle_files import VERDICT
from pixcell_core.trust.dsse import IN_TOTO_PAYLOAD_TYPE, Envelope, verify_envelope
from pixcell_core.trust.keys import VerifyKey
from site_client.release.signers import known_keys
from site_client.release.workspace import ReleaseFolder, ReleaseWorkspace


class GateRefusedError(RefusedError):
    """The gate stays shut."""

    default_code = "gate-refused"


def open_verdict(
    workspace: ReleaseWorkspace, release: ReleaseFolder, auditors: Sequence[VerifyKey] = ()
) -> tuple[Envelope, Verdict, list[VerifyKey]]:
    """The verdict, if every signature on it is true, by a known key, and an auditor this site accepts is among them.

    Args:
        auditors: keys known besides those of the site and of who signed here.

    Raises:
        RefusedError: `no-verdict`, `unknown-auditor`, `auditor-is-site`, `signature-refused`.
    """
    envelope = release.verdict()
    if envelope is None:
        raise GateRefusedError(
            f"Release {release.release_id} has no signed verdict.",
            hint="Audit its tiles, then: pixcell release sign --site-dir DIR --audit OUT --key KEY",
            code="no-verdict",
        )
    keys, own = known_keys(workspace, release, auditors), workspace.site_key().key_id
    accepted, rule = workspace.accepted_auditors(), release.signers()
    for key_id in envelope.key_ids:
        named = None if rule is None else rule.of(key_id)
        speaks_as_auditor = key_id != own if named is None else named.role == "auditor"
        refused = accepted is not None and speaks_as_auditor and key_id not in accepted
        if key_id not in keys or refused:
            raise GateRefusedError(
                f"The verdict is signed by {key_id}, which this site does not accept.",
                hint="Sign with `pixcell release sign` at this site, by an auditor it accepts.",
                code="unknown-auditor",
            )
    if set(envelope.key_ids) == {own}:
        raise GateRefusedError(
            "The verdict is signed by the site itself.", hint="An auditor signs.", code="auditor-is-site"
        )
    signers = [keys[key_id] for key_id in envelope.key_ids]
    payload = verify_envelope(envelope, signers, len(signers), payload_type=IN_TOTO_PAYLOAD_TYPE)
    return envelope, parse_document(Verdict, payload, name=VERDICT), signers
