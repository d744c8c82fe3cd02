"""Whether enough of those who may sign a verdict did: k of n, a site and an auditor among them. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from pixcell_core.contracts.gate import LEAST_SIGNATURES, SignerRole, Signers
from pixcell_core.errors import RefusedError

ROLE_WORDS: dict[SignerRole, str] = {
    "site": "the site",
    "auditor": "an auditor",
    "data-protection": "the data-protection officer",
}


class QuorumError(RefusedError):
    """A signer may not sign, or too few did."""

    default_code = "signatures-missing"


@dataclass(frozen=True)
class NamedSignature:
    """One true signature: whose key, for which role, under which name (empty where the standing rule holds)."""

    key_id: str
    role: SignerRole
    name: str


@dataclass(frozen=True)
class Standing:
    """How far the signatures on a verdict have come."""

    given: tuple[NamedSignature, ...]
    needed: int
    lacking: tuple[SignerRole, ...]

    @property
    def complete(self) -> bool:
        """Whether the verdict may be acted on."""
        return len(self.given) >= self.needed and not self.lacking

    @property
    def words(self) -> str:
        """`signed 1 of 2: the site has not signed`."""
        text = f"signed {len(self.given)} of {self.needed}"
        who = " and ".join(ROLE_WORDS[role] for role in self.lacking)
        return text + (f": {who} has not signed" if who else "")

    def require(self) -> Standing:
        """This standing, if it is complete; else `signatures-missing`."""
        if not self.complete:
            raise QuorumError(
                f"The verdict does not carry the signatures it needs: {self.words}.",
                hint="Everyone who must sign does so with: pixcell release sign --role ROLE --key FILE",
            )
        return self


def role_of(key_id: str, signers: Signers | None, site_key_id: str, *, at: datetime) -> NamedSignature:
    """For whom a key may sign at a moment. Without a document: the site's release key, and any other as auditor.

    Raises `unknown-signer` for a key the document does not name, `signer-key-expired` for one that is over.
    """
    if signers is None:
        return NamedSignature(key_id, "site" if key_id == site_key_id else "auditor", "")
    named = signers.of(key_id)
    if named is None:
        raise QuorumError(
            f"{key_id} is not among those who may sign for {signers.site}.",
            hint="The signers' document of the request says who may sign.",
            code="unknown-signer",
        )
    if named.not_after is not None and at >= named.not_after:
        raise QuorumError(
            f"The key of {named.name} was good until {named.not_after:%Y-%m-%d %H:%M} UTC.",
            hint="Ask them for a new key, name it in a new signers' document, and request the release again.",
            code="signer-key-expired",
        )
    return NamedSignature(key_id, named.role, named.name)


def standing(key_ids: Sequence[str], signers: Signers | None, site_key_id: str, *, at: datetime) -> Standing:
    """How far distinct, true signatures have come; a key that may not sign is refused, not left out."""
    given = tuple(role_of(key_id, signers, site_key_id, at=at) for key_id in sorted(set(key_ids)))
    roles = {signature.role for signature in given}
    must: tuple[SignerRole, ...] = ("site", "auditor")
    return Standing(
        given=given,
        needed=LEAST_SIGNATURES if signers is None else signers.needed,
        lacking=tuple(role for role in must if role not in roles),
    )
