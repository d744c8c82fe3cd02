"""A consortium whose parties have kits: the real commands' functions, called in this process."""

from __future__ import annotations

import atexit
import functools
import shutil
import ssl
import tempfile
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from server.enrolment.authority import Authority
from server.enrolment.kit_state import KitSigned
from server.enrolment.kits import KitBook
from server.enrolment.pki import initialise
from server.layout import ServerLayout
from site_client.approvals.enrolment import enrol
from site_client.approvals.kit import install_kit
from site_client.approvals.site_folder import SiteFolder
from tests.server.processes import pixcell

PASSPHRASE = b"correct horse battery staple"


def write_passphrase(folder: Path, text: bytes = PASSPHRASE) -> Path:
    """The passphrase in a file for the owner alone."""
    path = folder / "passphrase"
    path.write_bytes(text + b"\n")
    path.chmod(0o600)
    return path


def init_consortium(server: Path, *more: str | Path) -> Path:
    """`pixcell init`; returns the passphrase file, which lies beside the folder."""
    server.parent.mkdir(parents=True, exist_ok=True)
    passphrase = write_passphrase(server.parent)
    pixcell("init", "--dir", server, "--passphrase-file", passphrase, *more)
    return passphrase


def enrol_site(server: Path, site: Path, name: str, hub: str, role: str = "site") -> None:
    """`site enroll`, `kit approve`, `site install-kit`: what a site and its coordinator type."""
    made = pixcell(
        *("site", "enroll", "--site-dir", site, "--name", name, "--hub", hub),
        *("--ca", server / "pki" / "ca.crt"),
    )
    kit = pixcell(
        *("kit", "approve", made["request"], "--dir", server, "--role", role),
        *("--fingerprint", made["fingerprint"], "--passphrase-file", server.parent / "passphrase"),
    )
    pixcell("site", "install-kit", kit["kit"], "--site-dir", site)


@dataclass
class Enrolment:
    """A coordinator's folder with its opened authority, and the folders of its parties beside it."""

    root: Path
    layout: ServerLayout
    authority: Authority

    @property
    def ca(self) -> Path:
        """The CA certificate."""
        return self.layout.pki / "ca.crt"

    @property
    def book(self) -> KitBook:
        """The kits."""
        return KitBook(self.layout)

    def request(self, name: str, hub: str = "127.0.0.1:1", **more: Any) -> SiteFolder:
        """A party that made its keys and its request."""
        folder = SiteFolder(self.root / name)
        enrol(folder, name, hub, self.ca, **more)
        return folder

    def approve(self, folder: SiteFolder, role: Any = "site", **more: Any) -> KitSigned:
        """A kit for the request of a folder, the fingerprint read truly."""
        from pixcell_core.contracts.canonical import load_document
        from pixcell_core.contracts.enrolment import EnrolmentRequest

        spoken = load_document(EnrolmentRequest, folder.request).fingerprint
        return self.book.approve(folder.request, spoken, role, self.authority, **more)

    def party(self, name: str, role: Any = "site", now: datetime | None = None, **more: Any) -> SiteFolder:
        """A party with an installed kit."""
        folder = self.request(name)
        install_kit(folder, self.approve(folder, role, now=now, **more).kit, now)
        return folder


def make_enrolment(root: Path, which: str = "ours") -> Enrolment:
    """A consortium, its authority open. Made once for all tests and copied: stretching a passphrase is slow."""
    template, authority = _consortium(which)
    layout = ServerLayout(root / "server")
    shutil.copytree(template, layout.root)
    return Enrolment(root, layout, authority)


@functools.cache
def _consortium(which: str) -> tuple[Path, Authority]:
    folder = Path(tempfile.mkdtemp(prefix=f"consortium-{which}-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    layout = ServerLayout(folder / "server")
    initialise(layout, ["127.0.0.1", "localhost"], PASSPHRASE)
    return layout.root, Authority.open(layout.pki / "ca.crt", layout.pki, PASSPHRASE)


def client_context(ca: Path, party: SiteFolder | None) -> ssl.SSLContext:
    """TLS as a party speaks it: trusts this CA alone, and shows the party's certificate if there is one."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cafile=str(ca))
    if party is not None:
        context.load_cert_chain(str(party.tls_certificate), str(party.tls_key))
    return context
