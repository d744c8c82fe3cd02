"""What a site hands to the coordinator when it asks to join: public keys, and a fingerprint to read over the phone."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AwareDatetime, StringConstraints

from pixcell_core.contracts.canonical import Document
from pixcell_core.contracts.study import SiteName
from pixcell_core.trust.keys import VerifyKey

NodeKeyText = Annotated[str, StringConstraints(pattern=r"^ecdsa-sha2-nistp384 [A-Za-z0-9+/=]{100,300}$")]
"""A P-384 public key in OpenSSH form, without a comment: the identity of the site's network client."""

ApprovalKeyText = Annotated[str, StringConstraints(pattern=r"^-----BEGIN PUBLIC KEY-----\n", max_length=400)]
"""An Ed25519 public key in PEM: the key by which a site signs its approvals."""


class EnrolmentRequest(Document):
    """Public halves of a site's keys. The private halves never leave the site."""

    schema_version: Literal["enrolment-request/v1"] = "enrolment-request/v1"
    site: SiteName
    node_key: NodeKeyText
    approval_key: ApprovalKeyText
    created_at: AwareDatetime

    @property
    def fingerprint(self) -> str:
        """Eight groups of four hexadecimal digits: both sides read them aloud before the key is added."""
        text = self.digest.removeprefix("sha256:")[:32]
        return " ".join(text[i : i + 4] for i in range(0, 32, 4))

    def verify_key(self) -> VerifyKey:
        """The key that signs this site's approvals."""
        return VerifyKey.from_pem(self.approval_key.encode("ascii"), name=f"approval key of {self.site}")
