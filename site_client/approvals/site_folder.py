"""Where a site keeps its files, and the small document that says who it is and which hub it trusts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import StringConstraints

from pixcell_core.contracts.canonical import Document, load_document
from pixcell_core.contracts.enrolment import HubAddress
from pixcell_core.contracts.study import SiteName
from pixcell_core.errors import BadInputError

ProxyAddress = Annotated[str, StringConstraints(pattern=r"^(direct|http://[A-Za-z0-9.\-\[\]:]{1,260})$")]
"""`http://host:port` of a proxy, or `direct` for none whatever the environment says."""


class SiteIdentity(Document):
    """Who this site is, where its hub listens, and the proxy on the way there (credentials by file only)."""

    schema_version: Literal["site/v1"] = "site/v1"
    site: SiteName
    hub: HubAddress
    proxy: ProxyAddress | None = None
    proxy_credentials: Annotated[str, StringConstraints(max_length=4096)] | None = None


@dataclass(frozen=True)
class SiteFolder:
    """One site's folder."""

    root: Path

    @property
    def identity_file(self) -> Path:
        """Who this site is."""
        return self.root / "site.json"

    @property
    def keys(self) -> Path:
        """Private keys, mode 0700; each file 0600."""
        return self.root / "keys"

    @property
    def node_key(self) -> Path:
        """Key of the network client, OpenSSH form."""
        return self.keys / "node"

    @property
    def approval_key(self) -> Path:
        """Key that signs approvals."""
        return self.keys / "approval"

    @property
    def tls_key(self) -> Path:
        """Key of the site's TLS client certificate, PEM."""
        return self.keys / "tls.key"

    @property
    def next_tls_key(self) -> Path:
        """A new TLS key that waits for its kit; the one in use stays until then."""
        return self.keys / "tls.next.key"

    @property
    def tls_certificate(self) -> Path:
        """The TLS client certificate that the consortium issued with the site's kit, PEM."""
        return self.keys / "tls.crt"

    @property
    def kit(self) -> Path:
        """The signed kit the coordinator returned for the request."""
        return self.root / "kit.json"

    @property
    def masking(self) -> Path:
        """What the agent remembers of masked rounds; keys of a round leave it when the round does."""
        return self.agent / "masking"

    @property
    def hub_ca(self) -> Path:
        """The certificate authority of the one hub this site talks to."""
        return self.keys / "hub-ca.crt"

    @property
    def request(self) -> Path:
        """The enrolment request to hand to the coordinator; public."""
        return self.root / "request.json"

    @property
    def approvals(self) -> Path:
        """Signed decisions about studies."""
        return self.root / "approvals"

    @property
    def spool(self) -> Path:
        """The folder between agent and trainer."""
        return self.root / "spool"

    @property
    def train_features(self) -> Path:
        """Feature store of the training patients."""
        return self.root / "features" / "train"

    @property
    def ledger(self) -> Path:
        """The site's privacy ledger."""
        return self.root / "ledger"

    @property
    def logs(self) -> Path:
        """What the site's processes say; for this site's eyes."""
        return self.root / "logs"

    @property
    def bell(self) -> Path:
        """Touched when the agent's executor has something to do."""
        return self.agent / "bell"

    @property
    def agent(self) -> Path:
        """Private files of the agent."""
        return self.root / "agent"

    def identity(self) -> SiteIdentity:
        """Who this site is; an input error that says how to enrol if it is not yet."""
        if not self.identity_file.is_file():
            raise BadInputError(
                f"{self.root} is not an enrolled site.",
                hint=f"Run: pixcell site enroll --site-dir {self.root} --name NAME --hub HOST:PORT --ca CA.crt",
                code="not-enrolled",
            )
        return load_document(SiteIdentity, self.identity_file)
