"""`pixcell audit policy show | diff | sign | verify`: thresholds with their sources, and whose key stands under them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import BaseModel

from pixcell_core.cli.contract import FormatOption, OutputFormat, command
from pixcell_core.cli.main import group

PolicyOption = Annotated[
    str | None, typer.Option("--policy", help="Policy file, or a shipped name: core (default), rehearsal.")
]
PolicyArgument = Annotated[str, typer.Argument(help="Policy file, or a shipped name.")]


class PolicyView(BaseModel):
    """What `audit policy show` prints."""

    name: str
    digest: str
    source: str
    settings: dict[str, Any]
    text: str

    def __str__(self) -> str:
        return f"# effective digest {self.digest}\n# from {self.source}\n{self.text}"


class PolicyDifference(BaseModel):
    """One setting in which two policies differ."""

    key: str
    left: str
    right: str


class PolicyComparison(BaseModel):
    """What `audit policy diff` prints."""

    left: str
    right: str
    same: bool
    differences: list[PolicyDifference]

    @property
    def exit_code(self) -> int:
        """1 where they differ, as `diff` has it."""
        return 0 if self.same else 1

    def __str__(self) -> str:
        if self.same:
            return f"the same numbers: {self.left}"
        return "\n".join(f"{one.key}: {one.left} -> {one.right}" for one in self.differences)


class PolicySigned(BaseModel):
    """What `audit policy sign` and `verify` print."""

    name: str
    digest: str
    signers: list[str]
    envelope: Path

    def __str__(self) -> str:
        return f"{self.name} {self.digest}\nsigned by {', '.join(self.signers)}\n{self.envelope}"


def register(root: typer.Typer) -> None:
    """Add the commands about policies."""
    policy = group(root, "audit", "policy")
    policy.command("show")(show)
    policy.command("diff")(diff)
    policy.command("sign")(sign)
    policy.command("verify")(verify)


@command
def show(policy: PolicyOption = None, format: FormatOption = OutputFormat.TEXT) -> PolicyView:
    """Show a policy with the source of every number."""
    from privacy_audit.policy import load_policy, policy_path

    loaded, path = load_policy(policy), policy_path(policy)
    return PolicyView(
        name=loaded.name,
        digest=loaded.digest,
        source=path.name,
        settings=loaded.model_dump(mode="json"),
        text=path.read_text(encoding="utf-8"),
    )


@command
def diff(
    left: PolicyArgument, right: PolicyArgument, format: FormatOption = OutputFormat.TEXT
) -> PolicyComparison:
    """Show every setting in which two policies differ; exit 1 where they do."""
    from privacy_audit.policy import load_policy
    from privacy_audit.policy_signature import differences

    one, other = load_policy(left), load_policy(right)
    found = [PolicyDifference(key=key, left=a, right=b) for key, a, b in differences(one, other)]
    return PolicyComparison(left=one.digest, right=other.digest, same=not found, differences=found)


@command
def sign(
    policy: PolicyArgument,
    key: Annotated[Path, typer.Option("--key", help="Private key of whoever answers for these numbers.")],
    out: Annotated[Path | None, typer.Option("--out", help="Envelope; POLICY.dsse when absent.")] = None,
    log: Annotated[
        Path | None,
        typer.Option(
            "--log", help="Your own log; without it the one of your folder, else KEY.log beside the key."
        ),
    ] = None,
    format: FormatOption = OutputFormat.TEXT,
) -> PolicySigned:
    """Sign a policy, or add a signature to those that are there; an event of your own log."""
    from pixcell_core.contracts import digest
    from pixcell_core.errors import BadInputError
    from pixcell_core.trust.dsse import Envelope
    from pixcell_core.trust.durable import write_whole
    from pixcell_core.trust.keys import SigningKey
    from pixcell_core.trust.party_log import own_log
    from privacy_audit.policy import load_policy, shipped_policies
    from privacy_audit.policy_signature import sign_policy, signature_path

    if out is None and policy in shipped_policies():
        raise BadInputError(
            "A shipped policy is signed into a file of your own.", hint="Give --out FILE.", code="no-out"
        )
    loaded, path = load_policy(policy), out or signature_path(policy)
    signer = SigningKey.load(key)
    envelope = sign_policy(loaded, signer, Envelope.load(path) if path.is_file() else None)
    facts = {"policy": loaded.digest, "key": signer.key_id, "envelope": digest(envelope.to_bytes())}
    # The event first: a signature that stands nowhere in the signer's log must not exist.
    own_log(key, log).append("policy.signed", facts)
    write_whole(path, envelope.to_bytes())
    return PolicySigned(name=loaded.name, digest=loaded.digest, signers=list(envelope.key_ids), envelope=path)


@command
def verify(
    policy: PolicyArgument,
    trust: Annotated[
        list[Path], typer.Option("--trust", help="Public key that must have signed (repeatable).")
    ],
    threshold: Annotated[
        int | None, typer.Option("--threshold", help="How many of them must have; all when absent.")
    ] = None,
    signature: Annotated[
        Path | None, typer.Option("--signature", help="Envelope; POLICY.dsse when absent.")
    ] = None,
    format: FormatOption = OutputFormat.TEXT,
) -> PolicySigned:
    """Refuse (exit 1) a policy that the keys, or --threshold of them, did not sign as it is now."""
    from pixcell_core.trust.keys import VerifyKey
    from privacy_audit.policy import load_policy
    from privacy_audit.policy_signature import require_signed, signature_path

    loaded, keys = load_policy(policy), [VerifyKey.load(path) for path in trust]
    signers = require_signed(loaded, policy, *keys, needed=threshold, signature=signature)
    return PolicySigned(
        name=loaded.name,
        digest=loaded.digest,
        signers=[key.key_id for key in signers],
        envelope=signature or signature_path(policy),
    )
