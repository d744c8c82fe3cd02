"""Whose a bundle is: what the recipient trusts from elsewhere, held against who signed in which role. Pure.

A bundle's own keys prove it whole. That an auditor whom the recipient knows judged it, only the recipient's own
knowledge proves: a key, a signers' document, or the authority of a consortium.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pixcell_core.errors import BadInputError
from pixcell_core.trust.bundle_report import Signer
from pixcell_core.trust.bundle_rules import refused
from pixcell_core.trust.bundle_terms import Known
from pixcell_core.trust.keys import VerifyKey
from pixcell_core.trust.quorum import Standing


def require_enough_keys(trusted: Sequence[VerifyKey] | None, threshold: int) -> None:
    """Refuse a threshold that the keys given could never meet."""
    if threshold < 1 or (trusted is not None and len(trusted) < threshold):
        raise BadInputError(
            f"{threshold} trusted signatures were asked for with fewer trusted keys given.",
            hint="Give one --trust file for each signature you require.",
        )


def prove_origin(
    trusted: Sequence[VerifyKey] | None, threshold: int, stands: Standing, known: Known
) -> tuple[bool, str]:
    """Whether the recipient knows who judged these tiles, and on which grounds, in words.

    `threshold` counts the trusted keys that signed the verdict, whatever their role. One whom the recipient knows must
    have signed as an auditor: by its own key, or because a pinned signers' document or the authority stands for all.

    Raises:
        BundleRefusedError: `untrusted-signer` for too few trusted keys, `auditor-not-trusted` where none of them is an
            auditor's.
    """
    proofs = []
    if trusted is not None:
        ids = {key.key_id for key in trusted}
        found = [signature for signature in stands.given if signature.key_id in ids]
        if len(found) < threshold:
            raise refused(
                f"{len(found)} of the keys you trust signed the verdict; {threshold} needed.",
                "untrusted-signer",
                hint="Compare the signers' key ids with their owners over another channel.",
            )
        vouched = known.ca is not None or known.signers_digest is not None
        if not vouched and all(signature.role != "auditor" for signature in found):
            raise refused(
                "None of the keys you trust signed as an auditor: whoever judged these tiles is a stranger to you.",
                "auditor-not-trusted",
                hint="Give the key of an auditor you know with --trust. A site's own signature says nothing about an audit.",
            )
        proofs.append(f"signed by {len(found)} of the keys you trust")
    if known.signers_digest is not None:
        proofs.append(f"{stands.words}, of those the document you trust names")
    if known.ca is not None:
        proofs.append("every auditor and the site certified by the authority you trust")
    if not proofs:
        return False, "NOT PROVEN: no key was given; the bundle's own keys prove it whole, not whose it is"
    return True, "; ".join(proofs)


def told_signers(
    trusted: Sequence[VerifyKey] | None,
    stands: Standing,
    site_key: VerifyKey,
    vouched: Mapping[str, str],
    known: Known,
) -> tuple[Signer, ...]:
    """Every signer, and whether the caller has grounds outside the bundle to trust that key.

    Args:
        vouched: certificates that were checked, in words, by the key id of the signer.
    """
    grounds = {key.key_id for key in trusted or ()}
    given: list[tuple[str, str, str]] = [(one.role, one.key_id, one.name) for one in stands.given]
    if known.signers_digest is not None:
        grounds |= {key_id for _, key_id, _ in given}
    if known.ca is not None:
        grounds |= set(vouched)
    if site_key.key_id not in {key_id for _, key_id, _ in given}:
        given.append(("exporter", site_key.key_id, ""))
    return tuple(
        Signer(
            role=role, key_id=key_id, trusted=key_id in grounds, name=name, certificate=vouched.get(key_id)
        )
        for role, key_id, name in given
    )
