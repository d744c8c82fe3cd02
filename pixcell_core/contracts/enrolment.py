"""What joins a party to a consortium: its request, the kit signed in return, and the list of kits taken back."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, StringConstraints, model_validator

from pixcell_core.contracts.canonical import Digest, Document, Moment
from pixcell_core.contracts.study import SiteName
from pixcell_core.trust.keys import VerifyKey

KIT_PAYLOAD_TYPE = "application/vnd.pixcell.kit+json"
REVOCATIONS_PAYLOAD_TYPE = "application/vnd.pixcell.revocations+json"
MAX_REVOKED = 100_000

Role = Literal["site", "auditor", "coordinator"]
"""What a party's certificate lets it do: a site takes part in rounds, the others do not."""

HubAddress = Annotated[
    str, StringConstraints(pattern=r"^(\[[0-9a-fA-F:]+\]|[A-Za-z0-9.\-]{1,253}):[0-9]{1,5}$")
]
"""`host:port`, or `[IPv6]:port`."""

NodeKeyText = Annotated[str, StringConstraints(pattern=r"^ecdsa-sha2-nistp384 [A-Za-z0-9+/=]{100,300}$")]
"""A P-384 public key in OpenSSH form, without a comment: the identity of the site's network client."""

ApprovalKeyText = Annotated[
    str, StringConstraints(pattern=r"^-----BEGIN PUBLIC KEY-----\n[\n\r -~]*$", max_length=400)
]
"""An Ed25519 public key in PEM: the key by which a site signs its approvals."""

TlsRequestText = Annotated[
    str, StringConstraints(pattern=r"^-----BEGIN CERTIFICATE REQUEST-----\n[\n\r -~]*$", max_length=4096)
]
"""A PKCS#10 request in PEM, signed by the TLS key it names: the requester holds the private half."""

CertificateText = Annotated[
    str, StringConstraints(pattern=r"^-----BEGIN CERTIFICATE-----\n[\n\r -~]*$", max_length=8192)
]
"""One X.509 certificate in PEM."""

Serial = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{1,40}$")]
"""Serial number of a certificate, lower-case hexadecimal without leading zeros."""


class EnrolmentRequest(Document):
    """Public halves of a party's keys. The private halves never leave it.

    A request of version 1 carries no TLS request: it names a site, but no kit can be made from it.
    """

    schema_version: Literal["enrolment-request/v1", "enrolment-request/v2"] = "enrolment-request/v2"
    site: SiteName
    node_key: NodeKeyText
    approval_key: ApprovalKeyText
    tls_request: TlsRequestText | None = None
    created_at: Moment

    @property
    def fingerprint(self) -> str:
        """Eight groups of four hexadecimal digits: both sides read them aloud before the kit is signed."""
        text = self.digest.removeprefix("sha256:")[:32]
        return " ".join(text[i : i + 4] for i in range(0, 32, 4))

    def verify_key(self) -> VerifyKey:
        """The key that signs this site's approvals."""
        return VerifyKey.from_pem(self.approval_key.encode("ascii"), name=f"approval key of {self.site}")


class Kit(Document):
    """What the coordinator signs for one party: its certificate, and all the party needs to check it.

    `consortium` is the fingerprint of the CA certificate; `version` grows by one with every kit of the party, so that
    an older kit never comes back over a newer one; `hub` is where the hub listens, if the coordinator says so.
    """

    schema_version: Literal["kit/v1"] = "kit/v1"
    consortium: Digest
    party: SiteName
    role: Role
    version: Annotated[int, Field(ge=1, le=1_000_000)]
    certificate: CertificateText
    ca: CertificateText
    hub: HubAddress | None = None
    request_digest: Digest
    node_key: NodeKeyText
    approval_key: ApprovalKeyText
    issued_at: Moment
    expires_at: Moment

    @model_validator(mode="after")
    def _lasts(self) -> Self:
        if self.expires_at <= self.issued_at:
            raise ValueError("the kit expires before it is issued")
        return self


class RevokedCertificate(Document):
    """One certificate that is not accepted any more."""

    serial: Serial
    party: SiteName
    version: Annotated[int, Field(ge=1, le=1_000_000)]
    revoked_at: Moment
    reason: Annotated[str, StringConstraints(max_length=200)] = ""


class RevocationList(Document):
    """All certificates taken back so far. `number` only grows: a list with a lower number is an old one."""

    schema_version: Literal["revocations/v1"] = "revocations/v1"
    consortium: Digest
    number: Annotated[int, Field(ge=0, le=2**40)]
    issued_at: Moment
    revoked: Annotated[tuple[RevokedCertificate, ...], Field(max_length=MAX_REVOKED)] = ()

    @property
    def serials(self) -> frozenset[str]:
        """Serial numbers of the revoked certificates."""
        return frozenset(entry.serial for entry in self.revoked)
