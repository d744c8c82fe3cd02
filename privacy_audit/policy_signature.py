"""Signed policies: the hospital puts its key under the thresholds, and an audit may demand that it did.

The signature is over the canonical JSON of the effective policy, so that comments may be mended and no number can.
"""

from __future__ import annotations

from pathlib import Path

from pixcell_core.contracts import canonical_bytes, parse_json, read_bounded
from pixcell_core.errors import RefusedError
from pixcell_core.trust.dsse import Envelope, add_signature, sign_envelope, verify_envelope
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


def signed_policy(envelope: Envelope, key: VerifyKey) -> Policy:
    """The policy inside an envelope that the key signed.

    Raises:
        SignatureRefusedError: the key did not sign it. PolicyError: what was signed is no policy.
    """
    data = verify_envelope(envelope, [key], payload_type=POLICY_TYPE)
    value = parse_json(data, name="signed policy", max_bytes=_MAX_BYTES)
    if not isinstance(value, dict):
        raise PolicyError(
            "What was signed is no policy.", hint="Sign a policy with `pixcell audit policy sign`."
        )
    return parse_policy(value, "signed policy")


def require_signed(
    policy: Policy, source: str | Path | None, key: VerifyKey, signature: Path | None = None
) -> None:
    """Refuse a policy that the key did not sign.

    Args:
        policy: the policy that will judge. source: its file or shipped name.
        signature: the envelope; beside the policy's file with `.dsse` after its name when absent.

    Raises:
        PolicySignatureError: no envelope, or one that holds other numbers.
        SignatureRefusedError: the envelope is not signed by the key.
    """
    path = signature or signature_path(source)
    if not path.is_file():
        raise PolicySignatureError(
            f"The policy {policy.name} has no signature: {path.name} is not there.",
            hint="pixcell audit policy sign POLICY --key KEY; then give it with --policy-signature.",
        )
    if (
        signed_policy(Envelope.from_bytes(read_bounded(path, _MAX_BYTES), name=path.name), key).digest
        != policy.digest
    ):
        raise PolicySignatureError(
            f"{path.name} was signed over other numbers than the policy {policy.name} now has.",
            hint="See what changed with `pixcell audit policy diff`, and have it signed again.",
            code="policy-differs",
        )


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
