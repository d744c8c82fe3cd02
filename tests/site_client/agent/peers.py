"""Real peers for the agent's tests: an authority that issues certificates, a TLS server that demands one, a proxy."""

from __future__ import annotations

import base64
import contextlib
import http.server
import socket
import ssl
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from site_client.approvals.enrolment import enrol
from site_client.approvals.site_folder import SiteFolder

PEM = serialization.Encoding.PEM
PKCS8 = serialization.PrivateFormat.PKCS8
DAY = timedelta(days=1)


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


@dataclass
class Authority:
    """A certificate authority in a folder; `load` takes one that a consortium made."""

    folder: Path
    key: Ed25519PrivateKey
    certificate: x509.Certificate

    @classmethod
    def make(cls, folder: Path, name: str = "consortium") -> Authority:
        """A new one."""
        folder.mkdir(parents=True)
        key, now = Ed25519PrivateKey.generate(), datetime.now(UTC)
        usage = x509.KeyUsage(True, False, False, False, False, True, True, False, False)
        certificate = (
            x509.CertificateBuilder()
            .subject_name(_name(name))
            .issuer_name(_name(name))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - 400 * DAY)
            .not_valid_after(now + 400 * DAY)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(usage, critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .sign(key, None)
        )
        made = cls(folder, key, certificate)
        made.ca.write_bytes(certificate.public_bytes(PEM))
        return made

    @property
    def ca(self) -> Path:
        """The authority's certificate."""
        return self.folder / "ca.crt"

    def issue(
        self,
        name: str,
        *,
        hosts: tuple[str, ...] = (),
        begins: timedelta = -DAY,
        ends: timedelta = 90 * DAY,
    ) -> tuple[Path, Path]:
        """Certificate and key files: for a server of `hosts`, or for a client where there are none."""
        key, now = ec.generate_private_key(ec.SECP384R1()), datetime.now(UTC)
        use = ExtendedKeyUsageOID.SERVER_AUTH if hosts else ExtendedKeyUsageOID.CLIENT_AUTH
        builder = (
            x509.CertificateBuilder()
            .subject_name(_name(name))
            .issuer_name(self.certificate.subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now + begins)
            .not_valid_after(now + ends)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.ExtendedKeyUsage([use]), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key()), critical=False
            )
        )
        if hosts:
            names = [x509.IPAddress(ip_address(h)) if h[0].isdigit() else x509.DNSName(h) for h in hosts]
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        certificate = builder.sign(self.key, None)
        place = self.folder / f"{name}-{certificate.serial_number:x}"
        cert_file, key_file = place.with_suffix(".crt"), place.with_suffix(".key")
        cert_file.write_bytes(certificate.public_bytes(PEM))
        key_file.touch(mode=0o600)
        key_file.write_bytes(key.private_bytes(PEM, PKCS8, serialization.NoEncryption()))
        return cert_file, key_file

    def revoke(self, certificate_file: Path) -> Path:
        """A revocation list with this one certificate."""
        certificate, now = x509.load_pem_x509_certificate(certificate_file.read_bytes()), datetime.now(UTC)
        revoked = (
            x509.RevokedCertificateBuilder()
            .serial_number(certificate.serial_number)
            .revocation_date(now - DAY)
            .build()
        )
        crl = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(self.certificate.subject)
            .last_update(now - DAY)
            .next_update(now + DAY)
            .add_revoked_certificate(revoked)
            .sign(self.key, None)
        )
        path = self.folder / "revoked.crl"
        path.write_bytes(crl.public_bytes(PEM))
        return path


def install_kit(folder: SiteFolder, authority: Authority, **validity: timedelta) -> None:
    """Give a site a TLS certificate of the authority, as an installed kit would."""
    certificate, key = authority.issue(folder.identity().site, **validity)
    folder.tls_certificate.write_bytes(certificate.read_bytes())
    folder.tls_key.unlink(missing_ok=True)
    folder.tls_key.touch(mode=0o600)
    folder.tls_key.write_bytes(key.read_bytes())


def make_site(root: Path, authority: Authority, hub: str = "127.0.0.1:1", name: str = "east") -> SiteFolder:
    """An enrolled site with its kit."""
    folder = SiteFolder(root / name)
    enrol(folder, name, hub, authority.ca)
    install_kit(folder, authority)
    return folder


@dataclass
class Answer:
    """What a server says to every request."""

    status: int = 200
    kind: str = "application/protobuf"
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


class TlsServer:
    """HTTP over TLS on loopback that demands a client certificate of `clients`; counts what it was asked.

    Without a certificate of its own it speaks plain HTTP.
    """

    def __init__(
        self,
        files: tuple[Path, Path] | None,
        clients: Path | None,
        answer: Callable[[str, bytes], Answer] = lambda path, body: Answer(),
        crl: Path | None = None,
    ) -> None:
        self.asked: list[str] = []
        self.peers: list[str] = []
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("content-length", "0")))
                outer.asked.append(self.path)
                if isinstance(self.connection, ssl.SSLSocket):
                    shown = self.connection.getpeercert() or {}
                    outer.peers += [value for part in shown.get("subject", ()) for _, value in part]
                said = answer(self.path, body)
                self.send_response_only(said.status)
                if "date" not in said.headers:
                    self.send_header("date", self.date_time_string())
                for name, value in said.headers.items():
                    self.send_header(name, value)
                self.send_header("content-type", said.kind)
                self.send_header("content-length", str(len(said.body)))
                self.end_headers()
                self.wfile.write(said.body)

            do_GET = do_POST

            def log_message(self, *_: object) -> None:
                """Quiet."""

        class Server(http.server.ThreadingHTTPServer):
            daemon_threads = True

            def finish_request(self, request: object, address: object) -> None:
                if context is None:
                    super().finish_request(request, address)  # type: ignore[arg-type]
                    return
                try:
                    with context.wrap_socket(request, server_side=True) as wrapped:  # type: ignore[arg-type]
                        super().finish_request(wrapped, address)  # type: ignore[arg-type]
                except OSError:
                    # What a hostile or refused client leaves behind.
                    pass

        context: ssl.SSLContext | None = None
        if files is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(*files)
            if clients is not None:
                context.verify_mode = ssl.CERT_REQUIRED
                context.load_verify_locations(clients)
            if crl is not None:
                context.load_verify_locations(crl)
                context.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF
        self._server = Server(("127.0.0.1", 0), Handler)
        self.port = int(self._server.server_address[1])
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    @property
    def address(self) -> str:
        """`127.0.0.1:port`."""
        return f"127.0.0.1:{self.port}"

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class ConnectProxy:
    """An HTTP proxy on loopback that opens tunnels, refuses them, wants credentials, or opens what passes."""

    def __init__(
        self,
        *,
        refuse: int = 0,
        credentials: str = "",
        intercept: tuple[Path, Path] | None = None,
    ) -> None:
        self.asked: list[str] = []
        self.opened = b""
        self._clients: list[socket.socket] = []
        self._refuse, self._credentials, self._intercept = refuse, credentials, intercept
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._open = True
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        """Its address."""
        return f"http://127.0.0.1:{self.port}"

    def close(self) -> None:
        """Stop listening; a second time is fine."""
        if not self._open:
            return
        self._open = False
        with socket.socket() as wake:
            wake.connect_ex(("127.0.0.1", self.port))
        self._thread.join()
        self._listener.close()
        for client in self._clients:
            # Tunnels that are open end too.
            with contextlib.suppress(OSError):
                client.shutdown(socket.SHUT_RDWR)

    def _serve(self) -> None:
        while True:
            client, _ = self._listener.accept()
            if not self._open:
                client.close()
                return
            self._clients.append(client)
            threading.Thread(target=self._handle, args=(client,), daemon=True).start()

    def _handle(self, client: socket.socket) -> None:
        try:
            head = b""
            while b"\r\n\r\n" not in head and (more := client.recv(4096)):
                head += more
            lines = head.decode("latin-1").split("\r\n")
            self.asked.append(lines[0])
            sent = {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in lines[1:])}
            wanted = "Basic " + base64.b64encode(self._credentials.encode()).decode()
            if self._credentials and sent.get("proxy-authorization") != wanted:
                client.sendall(
                    b"HTTP/1.1 407 Proxy Authentication Required\r\nProxy-Authenticate: Basic\r\n"
                    b"Content-Length: 0\r\n\r\n"
                )
                return
            if self._refuse:
                client.sendall(f"HTTP/1.1 {self._refuse} No\r\nContent-Length: 0\r\n\r\n".encode())
                return
            client.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
            if self._intercept is not None:
                context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
                context.load_cert_chain(*self._intercept)
                with context.wrap_socket(client, server_side=True) as opened:
                    self.opened += opened.recv(65536)
                return
            host, _, port = lines[0].split()[1].rpartition(":")
            with socket.create_connection((host, int(port)), 5) as hub:
                back = threading.Thread(target=_pump, args=(hub, client), daemon=True)
                back.start()
                _pump(client, hub)
                back.join(2)
        except OSError:
            pass
        finally:
            client.close()


def _pump(source: socket.socket, sink: socket.socket) -> None:
    try:
        while data := source.recv(65536):
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)
    except OSError:
        pass


def unused_port() -> int:
    """A port on which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
