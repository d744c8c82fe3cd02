"""Signed policies: hospital and auditor put their keys under the thresholds, and an audit may demand k of n of them.

The signature is over the canonical JSON of the effective policy, so that comments may be mended and no number can.
"""

from __future__ import annotations

from pathlib import Path

from pixcell_core.contracts import canonical_bytes, parse_json, read_bounded
from pixcell_core.errors import BadInputError, RefusedError
from pixcell_core.trust.dsse import Envelope, add_signature, sign_envelope, valid_signers, verify_envelope
from pixcell_core.trust.keys import SigningKey, VerifyKey
from privacy_audit.policy import Policy, PolicyError, parse_policy, policy_path

POLICY_TYPE = "application/vnd.pixcell.audit-policy+json"
SUFFIX = ".dsse"
_MAX_BYTES = 1024 * 1024


class PolicySignatureError(RefusedError):
    """A policy is not signed as demanded: no signature, another key, or other numbers than were signed."""

    default_code = "policy-unsigned"


def sign_policy(policy: Policy, key: SigningKey, earlier: Envelope | None = None) -> Envelope:
    """Sign a policy, or add a signature to an envelope that holds the same one.

    Raises:
        PolicySignatureError: the earlier envelope holds another policy.
    """
    if earlier is None:
        return sign_envelope(POLICY_TYPE, _payload(policy), [key])
    if earlier.payloadType != POLICY_TYPE or earlier.unsafe_unverified_payload() != _payload(policy):
        raise PolicySignatureError(
            "The envelope that is there holds another policy.",
            hint="Move it away, and sign this policy anew.",
            code="policy-differs",
        )
    return add_signature(earlier, key)


def signed_policy(envelope: Envelope, *keys: VerifyKey, needed: int = 1) -> Policy:
    """The policy inside an envelope that at least `needed` distinct ones of `keys` signed.

    Raises:
        SignatureRefusedError: too few of them did. PolicyError: what was signed is no policy.
    """
    data = verify_envelope(envelope, keys, needed, payload_type=POLICY_TYPE)
    value = parse_json(data, name="signed policy", max_bytes=_MAX_BYTES)
    if not isinstance(value, dict):
        raise PolicyError(
            "What was signed is no policy.", hint="Sign a policy with `pixcell audit policy sign`."
        )
    return parse_policy(value, "signed policy")


def require_signed(
    policy: Policy,
    source: str | Path | None,
    *keys: VerifyKey,
    needed: int | None = None,
    signature: Path | None = None,
) -> tuple[VerifyKey, ...]:
    """Refuse a policy that too few of the keys signed; return those that did.

    Args:
        policy: the policy that will judge. source: its file or shipped name.
        keys: whose signatures count, each once. needed: how many of them; all when absent.
        signature: the envelope; beside the policy's file with `.dsse` after its name when absent.

    Raises:
        PolicySignatureError: no envelope (`policy-unsigned`), too few of the keys (`policy-signers-missing`), or other
            numbers than were signed (`policy-differs`).
        BadInputError: `policy-threshold`: more signatures are needed than distinct keys were named.
    """
    known = {key.key_id: key for key in keys}
    least = len(known) if needed is None else needed
    if not 1 <= least <= len(known):
        raise BadInputError(
            f"{least} signatures are asked for, and {len(known)} different keys are named.",
            hint="Name one key for each signature at least; a key given twice counts once.",
            code="policy-threshold",
        )
    path = signature or signature_path(source)
    if not path.is_file():
        raise PolicySignatureError(
            f"The policy {policy.name} has no signature: {path.name} is not there.",
            hint="pixcell audit policy sign POLICY --key KEY; then give it with --policy-signature.",
        )
    envelope = Envelope.from_bytes(read_bounded(path, _MAX_BYTES), name=path.name)
    signers = valid_signers(envelope, known.values()) if envelope.payloadType == POLICY_TYPE else ()
    if envelope.payloadType == POLICY_TYPE and len(signers) < least:
        lacking = sorted(known.keys() - {key.key_id for key in signers})
        claimed = set(envelope.key_ids)
        why = ", ".join(f"{one} ({'a false one' if one in claimed else 'none'})" for one in lacking)
        raise PolicySignatureError(
            f"{path.name} carries {len(signers)} of the {least} signatures that are needed of {len(known)} keys; "
            f"no true one of {why}.",
            hint="Have them sign it: pixcell audit policy sign POLICY --key KEY adds a signature to those that are there.",
            code="policy-signers-missing",
        )
    if signed_policy(envelope, *known.values(), needed=least).digest != policy.digest:
        raise PolicySignatureError(
            f"{path.name} was signed over other numbers than the policy {policy.name} now has.",
            hint="See what changed with `pixcell audit policy diff`, and have it signed again.",
            code="policy-differs",
        )
    return signers


def signature_path(source: str | Path | None) -> Path:
    """Where the signature of a policy lies by default: beside its file."""
    path = policy_path(source)
    return path.with_name(path.name + SUFFIX)


def differences(left: Policy, right: Policy) -> list[tuple[str, str, str]]:
    """Every setting that differs: dotted key, left value, right value; a dash where one side has none."""
    one, other = _flat(left.model_dump(mode="json")), _flat(right.model_dump(mode="json"))
    return [
        (key, one.get(key, "–"), other.get(key, "–"))
        for key in sorted({*one, *other})
        if one.get(key) != other.get(key)
    ]


def _flat(value: object, prefix: str = "") -> dict[str, str]:
    if isinstance(value, dict):
        found: dict[str, str] = {}
        for key, inner in value.items():
            found |= _flat(inner, f"{prefix}.{key}" if prefix else str(key))
        return found
    return {prefix: str(value)}


def _payload(policy: Policy) -> bytes:
    return canonical_bytes(policy.model_dump(mode="json"))
