"""Checks of a bundle against its terms: who had to sign, what was asked for, who vouches, and what was taken back.

Pure, like all of verification: what the recipient knows from elsewhere comes in as values.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime

from cryptography import x509

from pixcell_core.contracts.canonical import parse_document
from pixcell_core.contracts.gate import (
    REQUEST_PAYLOAD_TYPE,
    WITHDRAWALS_PAYLOAD_TYPE,
    ReleaseRequest,
    Signers,
    Withdrawals,
)
from pixcell_core.contracts.release import ReleaseManifest
from pixcell_core.contracts.verdict import Verdict
from pixcell_core.errors import BadInputError, RefusedError
from pixcell_core.trust.bundle_files import REQUEST, SIGNERS
from pixcell_core.trust.certificates import fingerprint
from pixcell_core.trust.dsse import Envelope, valid_signers, verify_envelope
from pixcell_core.trust.keys import VerifyKey
from pixcell_core.trust.kits import CLOCK_SLACK
from pixcell_core.trust.quorum import NamedSignature
from pixcell_core.trust.signer_certificates import (
    SignerCertificate,
    open_signer_certificate,
    own_authority,
    revocations_of,
)
from pixcell_core.trust.vouched_keys import authority_of_vouched, open_vouched_key


class TermsError(RefusedError):
    """A bundle is not what its request, its signers' document or a withdrawal allow."""

    default_code = "terms-broken"


@dataclass(frozen=True)
class Known:
    """What the recipient knows from elsewhere than the bundle.

    `signers_digest` pins the document that says who must sign; `ca` is the authority whose certificates auditors must
    hold; `revocations` and `withdrawals` are signed lists in their envelopes; `auditing_code` are digests of auditing
    code whose judgement counts, any where there are none.
    """

    signers_digest: str | None = None
    ca: x509.Certificate | None = None
    revocations: Sequence[Envelope] = field(default_factory=tuple)
    withdrawals: Sequence[Envelope] = field(default_factory=tuple)
    auditing_code: Sequence[str] = field(default_factory=tuple)


def open_signers(
    data: bytes | None, verdict: Verdict, manifest: ReleaseManifest, known: Known
) -> Signers | None:
    """The document that says who must sign: the one the verdict names, of this site, and the one that is pinned."""
    wanted = verdict.predicate.signers_digest
    signers = None if data is None else parse_document(Signers, data, name=SIGNERS)
    found = None if signers is None else signers.digest
    if found != wanted or (signers is not None and signers.to_bytes() != data):
        raise TermsError(
            "The signed verdict names another signers' document than the one here.",
            hint="Do not use this bundle. Fetch it again from the site that released it.",
            code="wrong-signers",
        )
    if signers is not None and signers.site != manifest.site:
        raise TermsError(
            f"The signers' document is of {signers.site}, the release of {manifest.site}.",
            hint="Each site has a signers' document of its own.",
            code="wrong-signers",
        )
    if known.signers_digest is not None and found != known.signers_digest:
        raise TermsError(
            "This release was signed under another signers' document than the one you trust.",
            hint="Compare the document with the site's over another channel.",
            code="wrong-signers",
        )
    return signers


def check_request(
    data: bytes | None,
    verdict: Verdict,
    manifest: ReleaseManifest,
    site_key: VerifyKey,
) -> ReleaseRequest | None:
    """What the site asked for, if it asked in writing: signed by it, and nothing else than what was judged."""
    predicate = verdict.predicate
    if data is None:
        if predicate.request_digest is not None:
            raise _another_request("the request the verdict names is missing")
        return None
    payload = verify_envelope(
        Envelope.from_bytes(data, name=REQUEST), [site_key], payload_type=REQUEST_PAYLOAD_TYPE
    )
    request = parse_document(ReleaseRequest, payload, name=REQUEST)
    if request.digest != predicate.request_digest or request.to_bytes() != payload:
        raise _another_request("it is not the request the verdict answers")
    pairs = (
        ("tiles", (request.manifest_digest, request.tiles_root), (manifest.digest, manifest.tiles_root)),
        ("audience", request.audience, predicate.audience),
        ("policy", request.policy_digest, predicate.auditor.policy_digest),
        ("signers", request.signers_digest, predicate.signers_digest),
        ("site", request.site, manifest.site),
    )
    for what, asked, given in pairs:
        if asked != given:
            raise _another_request(f"it asked for other {what}")
    return request


def check_certificates(
    certificates: Mapping[str, Envelope],
    signatures: Sequence[NamedSignature],
    keys: Mapping[str, VerifyKey],
    signers: Signers | None,
    known: Known,
    moments: Sequence[datetime],
    site: tuple[str, str],
) -> tuple[SignerCertificate, ...]:
    """The certificates that stand behind the signatures of auditors and of the site, by key id of the signer.

    Each is of the right role and of that very key, good at every moment given, and unrevoked by the newest list the
    caller has. Every auditor and the site need one where the caller or the signers' document names a consortium.

    Args:
        moments: signing (for auditors) and export (for both), the last of them.
        site: the releasing site's name, and the id of the key it exports with.
    """
    auditors = [signature.key_id for signature in signatures if signature.role == "auditor"]
    name, exporter = site
    sites = sorted({exporter, *(signature.key_id for signature in signatures if signature.role == "site")})
    stray = sorted(set(certificates) - set(auditors) - set(sites))
    if stray:
        raise TermsError(
            f"A certificate lies here for {stray[0]}, who signed neither as an auditor nor for the site.",
            hint="Do not use this bundle. Fetch it again from the site that released it.",
            code="foreign-file",
        )
    named = signers.consortium if signers is not None else None
    opened: list[SignerCertificate] = []
    for key_id in (*auditors, *sites):
        envelope, is_auditor = certificates.get(key_id), key_id in auditors
        if envelope is None:
            if known.ca is not None or named is not None:
                raise _without_certificate(key_id, is_auditor)
            continue
        ca = known.ca or (own_authority(envelope) if is_auditor else authority_of_vouched(envelope))
        if named is not None and named != fingerprint(ca):
            raise TermsError(
                f"The {'auditor' if is_auditor else 'site'}'s certificate is of another consortium than the signers' "
                "document names.",
                hint="Have it signed by one who belongs to that consortium.",
                code="signer-certificate-refused",
            )
        revoked = revocations_of(known.revocations, ca)
        key = keys[key_id]
        opened.append(
            open_signer_certificate(envelope, key, ca=ca, moments=moments, revocations=revoked)
            if is_auditor
            # A site's signature has no time of its own before the export.
            else open_vouched_key(envelope, key, name, ca=ca, moments=moments[-1:], revocations=revoked)
        )
    if known.revocations and not any(key_id in certificates for key_id in auditors):
        raise BadInputError(
            "A revocation list was given, and no auditor's signature here rests on a certificate.",
            hint="Leave the list out, or ask the site for a bundle whose auditor signed with a certificate.",
            code="nothing-to-revoke",
        )
    return tuple(opened)


def _without_certificate(key_id: str, is_auditor: bool) -> TermsError:
    if is_auditor:
        return TermsError(
            f"The auditor {key_id} signed without a certificate of the consortium.",
            hint="The auditor signs with: pixcell release sign --certificate KIT.json",
            code="signer-certificate-missing",
        )
    return TermsError(
        f"No certificate of the consortium stands behind the site's key {key_id}.",
        hint="The site enrols and installs its kit, then exports again: the export puts the certificate in.",
        code="site-certificate-missing",
    )


def check_withdrawals(
    known: Known,
    manifest: ReleaseManifest,
    keys: Sequence[VerifyKey],
    signatures: Sequence[NamedSignature],
    now: datetime,
) -> tuple[Withdrawals, ...]:
    """The lists of withdrawals given, none of which names this release. Each is signed by a signer of this bundle.

    Args:
        keys: the site's and those of all signers. signatures: for whom each of them speaks.

    Raises:
        TermsError: `release-withdrawn`, with who took it back; `withdrawals-of-another`: a stranger's list or another
            site's; `withdrawals-rolled-back`: two lists of one signer of which the newer forgot something;
            `clock-wrong`: a list of a day to come.
    """
    lists: dict[str, list[Withdrawals]] = {}
    for envelope in known.withdrawals:
        signers = valid_signers(envelope, keys) if envelope.payloadType == WITHDRAWALS_PAYLOAD_TYPE else ()
        if envelope.payloadType == WITHDRAWALS_PAYLOAD_TYPE and not signers:
            raise TermsError(
                "The list of withdrawals is signed by nobody who signed this bundle.",
                hint="Ask the releasing site for its own list, or leave it out.",
                code="withdrawals-of-another",
            )
        payload = verify_envelope(envelope, keys, payload_type=WITHDRAWALS_PAYLOAD_TYPE)
        found = parse_document(Withdrawals, payload, name="the list of withdrawals")
        if found.site != manifest.site:
            raise TermsError(
                f"The list of withdrawals is of {found.site}, this bundle of {manifest.site}.",
                hint="Ask the releasing site for its own list.",
                code="withdrawals-of-another",
            )
        who = _speaker(signers[0].key_id, signatures)
        entry = found.of(manifest.digest)
        if entry is not None:
            raise TermsError(
                f"This release was withdrawn on {entry.withdrawn_at:%Y-%m-%d} by {who}: {entry.reason}",
                hint="Do not use its tiles any more, and delete your copies as your agreement says.",
                code="release-withdrawn",
            )
        if found.issued_at > now + CLOCK_SLACK:
            raise TermsError(
                f"The list of withdrawals of {who} is of {found.issued_at:%Y-%m-%d %H:%M} UTC, and here it is "
                f"{now:%Y-%m-%d %H:%M} UTC.",
                hint="Set this machine's clock, or ask the author of the list to look at theirs.",
                code="clock-wrong",
            )
        lists.setdefault(signers[0].key_id, []).append(found)
    for key_id, several in lists.items():
        _require_growth(several, _speaker(key_id, signatures))
    return tuple(found for several in lists.values() for found in several)


def _speaker(key_id: str, signatures: Sequence[NamedSignature]) -> str:
    """`the auditor Dr Auditor (sha256:0123456789ab)`: who holds a key, as the bundle names them."""
    named = next((one for one in signatures if one.key_id == key_id), None)
    words = "the site" if named is None else f"the {named.role} {named.name}".strip()
    return f"{words} ({key_id[:19]})"


def _require_growth(lists: Sequence[Withdrawals], who: str) -> None:
    """Of several lists of one signer each newer one holds all that the older one held."""
    ordered = sorted(lists, key=lambda found: found.number)
    for older, newer in itertools.pairwise(ordered):
        gone = [entry for entry in older.withdrawn if newer.of(entry.manifest_digest) != entry]
        if gone or (older.number == newer.number and older != newer):
            raise TermsError(
                f"Two lists of withdrawals of {who} do not go together: number {newer.number} lacks what number "
                f"{older.number} held.",
                hint="A withdrawal is never taken back. Rely on neither; ask the signer what happened.",
                code="withdrawals-rolled-back",
            )


def _another_request(why: str) -> TermsError:
    return TermsError(
        f"The verdict does not answer the site's request: {why}.",
        hint="Do not use this bundle. Fetch it again from the site that released it.",
        code="wrong-request",
    )
