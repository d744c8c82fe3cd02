"""The coordinator's kits: signed for a request that was compared by phone, renewed, and revoked one by one."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509

from pixcell_core.contracts.atomic import write_atomically
from pixcell_core.contracts.canonical import load_document, read_bounded
from pixcell_core.contracts.enrolment import (
    EnrolmentRequest,
    HubAddress,
    Kit,
    RevocationList,
    RevokedCertificate,
    Role,
)
from pixcell_core.errors import BadInputError, RefusedError
from pixcell_core.trust.certificates import (
    fingerprint,
    node_public_key,
    party_of,
    public_key_digest,
    read_authority,
    read_certificate,
    tls_public_key,
    to_pem,
)
from pixcell_core.trust.dsse import Envelope
from pixcell_core.trust.expiry import ExpiryWarning, days_left, expiry_warning
from pixcell_core.trust.kits import open_kit, sign_kit, sign_revocations
from server.enrolment.authority import Authority
from server.enrolment.kit_state import KitSigned, KitState, Revoked
from server.enrolment.revocations import read_revocations, revocations_file
from server.enrolment.sites import SiteBook
from server.layout import ServerLayout
from server.registry.events import ActLog

KIT_DAYS = 365
MAX_REQUEST_BYTES = 65_536
REQUEST_FILE = "request.json"
KIT_SUFFIX = ".kit.json"


class KitBook:
    """All kits of one consortium, in its folder. Reading needs no key; signing needs the opened authority."""

    def __init__(self, layout: ServerLayout) -> None:
        self._layout = layout
        self._folder = layout.root / "kits"
        self._ca = read_authority(read_bounded(layout.pki / "ca.crt", 65_536))

    def parties(self) -> list[str]:
        """Names of all parties that ever got a kit, sorted."""
        return sorted(p.parent.name for p in self._folder.glob(f"*/{REQUEST_FILE}"))

    def kits(self, party: str) -> list[Kit]:
        """The kits of a party, oldest first; an input error for an unknown party."""
        return [open_kit(Envelope.load(path), self._ca) for path in self._files(party)]

    def request(self, party: str) -> EnrolmentRequest:
        """The request the latest kit of a party was made from."""
        self._files(party)
        return load_document(EnrolmentRequest, self._folder / party / REQUEST_FILE, MAX_REQUEST_BYTES)

    def states(self, now: datetime | None = None) -> list[KitState]:
        """The latest kit of every party."""
        revoked = read_revocations(self._layout, self._ca).serials
        return [self._state(self.kits(party)[-1], revoked, now) for party in self.parties()]

    def state(self, party: str, now: datetime | None = None) -> KitState:
        """The latest kit of one party."""
        revoked = read_revocations(self._layout, self._ca).serials
        return self._state(self.kits(party)[-1], revoked, now)

    def approve(
        self,
        request_file: Path,
        spoken: str,
        role: Role,
        authority: Authority,
        *,
        days: int = KIT_DAYS,
        hub: HubAddress | None = None,
        now: datetime | None = None,
    ) -> KitSigned:
        """Sign a kit for a request whose fingerprint was read over the phone.

        The same request again returns the kit it has. Raises `fingerprint-differs`, `shared-identity`,
        `site-exists`, `key-revoked`, or an input error for a damaged request.
        """
        request = load_document(EnrolmentRequest, request_file, MAX_REQUEST_BYTES)
        check_request(request)
        compare_fingerprints(spoken, request)
        with self._lock():
            earlier = self._check_identity(request, role)
            revoked = read_revocations(self._layout, self._ca).serials
            same = [kit for kit in earlier if kit.request_digest == request.digest]
            if any(serial_of(kit) in revoked for kit in earlier if _tls_key(kit) == _tls_key(request)):
                raise RefusedError(
                    f"The TLS key of {request.site} was revoked.",
                    hint="The party makes a new one: pixcell site enroll --new-tls-key; then approve that request.",
                    code="key-revoked",
                )
            moment = (now or datetime.now(UTC)).replace(microsecond=0)
            if not (same and same[-1] is earlier[-1] and same[-1].expires_at > moment):
                self._sign(request, role, authority, len(earlier) + 1, days, hub, moment)
            # After the kit, so that a party is known once its kit lies there whole; again where it was interrupted.
            write_atomically(self._folder / request.site / REQUEST_FILE, request.to_bytes())
            self._enter(request, role, request_file)
            return self._signed(request.site, revoked, moment)

    def renew(
        self,
        party: str,
        authority: Authority,
        *,
        days: int = KIT_DAYS,
        hub: HubAddress | None = None,
        now: datetime | None = None,
    ) -> KitSigned:
        """The next version of a party's kit, for the same keys. The earlier certificate stays valid to its end."""
        moment = (now or datetime.now(UTC)).replace(microsecond=0)
        with self._lock():
            last = self.kits(party)[-1]
            revoked = read_revocations(self._layout, self._ca).serials
            if serial_of(last) in revoked:
                raise RefusedError(
                    f"The kit of {party} was revoked and is not renewed.",
                    hint="The party makes a new TLS key (pixcell site enroll --new-tls-key); approve that request.",
                    code="kit-revoked",
                )
            self._sign(
                self.request(party), last.role, authority, last.version + 1, days, hub or last.hub, moment
            )
            return self._signed(party, revoked, moment)

    def revoke(
        self, party: str, authority: Authority, *, reason: str = "", now: datetime | None = None
    ) -> Revoked:
        """Take back every certificate of a party by a list with the next number. Others are not touched."""
        moment = (now or datetime.now(UTC)).replace(microsecond=0)
        with self._lock():
            kits = self.kits(party)
            old = read_revocations(self._layout, self._ca)
            fresh = tuple(
                RevokedCertificate(
                    serial=serial_of(kit),
                    party=party,
                    version=kit.version,
                    revoked_at=moment,
                    reason=reason[:200],
                )
                for kit in kits
                if serial_of(kit) not in old.serials
            )
            if not fresh:
                raise RefusedError(
                    f"All kits of {party} are revoked already.",
                    hint="Nothing needs to be done.",
                    code="kit-revoked",
                )
            listed = RevocationList(
                consortium=fingerprint(self._ca),
                number=old.number + 1,
                issued_at=moment,
                revoked=(*old.revoked, *fresh),
            )
            envelope = sign_revocations(listed, authority.signing_key)
            write_atomically(revocations_file(self._layout), envelope.to_bytes())
            ActLog(self._layout.registry()).note(
                "kit-revoked", f"{party} list {listed.number} {listed.digest}"
            )
        return Revoked(party=party, certificates=len(fresh), number=listed.number)

    def _files(self, party: str) -> list[Path]:
        folder = self._folder / party
        numbered = {int(p.name.removesuffix(KIT_SUFFIX)): p for p in folder.glob(f"[0-9]*{KIT_SUFFIX}")}
        if party not in self.parties() or not numbered:
            raise BadInputError(
                f"No kit was made for '{party}'.",
                hint="See `pixcell kit list`. A new party sends its request; then `pixcell kit approve REQUEST`.",
                code="unknown-party",
            )
        return [numbered[number] for number in sorted(numbered)]

    def _check_identity(self, request: EnrolmentRequest, role: Role) -> list[Kit]:
        """The earlier kits of this very party; refuses another party's keys, other keys, or another role."""
        book = SiteBook(self._layout.registry())
        # The book may hold sites of before there were kits.
        known = {name: book.get(name) for name in book.names()}
        known |= {name: self.request(name) for name in self.parties()}
        for name, other in known.items():
            if name == request.site:
                if (other.node_key, other.approval_key) != (request.node_key, request.approval_key):
                    raise RefusedError(
                        f"A party named {name} is enrolled with other keys.",
                        hint="Ask whether it made new keys. If so, revoke this kit and enrol it under a new name.",
                        code="site-exists",
                    )
            elif _keys(other) & _keys(request):
                raise RefusedError(
                    f"{request.site} carries a key of {name}: two parties cannot share an identity.",
                    hint="Each party runs `pixcell site enroll` in its own folder.",
                    code="shared-identity",
                )
        if request.site not in self.parties():
            return []
        earlier = self.kits(request.site)
        if earlier[-1].role != role:
            raise RefusedError(
                f"{request.site} is enrolled as {earlier[-1].role}, not as {role}.",
                hint="One name has one role: enrol the other role under a name of its own.",
                code="role-differs",
            )
        return earlier

    def _sign(
        self,
        request: EnrolmentRequest,
        role: Role,
        authority: Authority,
        version: int,
        days: int,
        hub: HubAddress | None,
        now: datetime,
    ) -> None:
        end = min(now + timedelta(days=days), self._ca.not_valid_after_utc)
        if end <= now:
            raise RefusedError(
                f"The consortium's CA expired on {end:%Y-%m-%d}: nothing it signs is accepted any more.",
                hint="Make a new consortium (pixcell init in another folder), or look at this machine's clock.",
                code="ca-expired",
            )
        node = public_key_digest(node_public_key(request.node_key, request.site)) if role == "site" else None
        certificate = authority.certify_party(request.site, role, tls_public_key(request), node, now, end)
        kit = Kit(
            consortium=fingerprint(self._ca),
            party=request.site,
            role=role,
            version=version,
            certificate=to_pem(certificate),
            ca=to_pem(self._ca),
            hub=hub,
            request_digest=request.digest,
            node_key=request.node_key,
            approval_key=request.approval_key,
            issued_at=now,
            expires_at=end,
        )
        folder = self._folder / request.site
        write_atomically(
            folder / f"{version:06d}{KIT_SUFFIX}", sign_kit(kit, authority.signing_key).to_bytes()
        )
        ActLog(self._layout.registry()).note("kit-signed", f"{request.site}/{version} {kit.digest}")

    def _enter(self, request: EnrolmentRequest, role: Role, request_file: Path) -> None:
        """Tell the hub the site's node key. Only sites take part in rounds; a known site stays as it is."""
        if role == "site":
            book = SiteBook(self._layout.registry())
            if request.site not in book.names():
                book.add(request_file)

    def _state(self, kit: Kit, revoked: frozenset[str], now: datetime | None) -> KitState:
        moment = now or datetime.now(UTC)
        serial = serial_of(kit)
        warning = None
        if serial not in revoked:
            hint = f"Renew it: pixcell kit renew {kit.party}"
            warning = expiry_warning(f"The kit of {kit.party}", kit.expires_at, moment, hint=hint)
        return KitState(
            party=kit.party,
            role=kit.role,
            version=kit.version,
            serial=serial,
            fingerprint=self.request(kit.party).fingerprint,
            expires_at=kit.expires_at,
            days_left=days_left(kit.expires_at, moment),
            revoked=serial in revoked,
            kit=self._folder / kit.party / f"{kit.version:06d}{KIT_SUFFIX}",
            warning=str(warning) if warning else "",
        )

    def _signed(self, party: str, revoked: frozenset[str], now: datetime) -> KitSigned:
        return KitSigned(**self._state(self.kits(party)[-1], revoked, now).model_dump())

    @contextmanager
    def _lock(self) -> Iterator[None]:
        """One signing command at a time: version and list numbers are each given once."""
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with (self._folder / ".lock").open("w") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            yield


def check_request(request: EnrolmentRequest) -> None:
    """Refuse a request one of whose keys is damaged or of the wrong kind."""
    node_public_key(request.node_key, request.site)
    request.verify_key()
    tls_public_key(request)


def compare_fingerprints(spoken: str, request: EnrolmentRequest) -> None:
    """Refuse where the digits heard over the phone are not those of the request in hand."""
    if "".join(spoken.lower().split()) != request.fingerprint.replace(" ", ""):
        raise RefusedError(
            f"The fingerprint that was read is not that of this request: {request.fingerprint}.",
            hint="The request may have been exchanged on its way, or the digits were misheard. Call the party again "
            "on a number you know; sign nothing until they agree.",
            code="fingerprint-differs",
        )


def serial_of(kit: Kit) -> str:
    """Serial number of a kit's certificate, hexadecimal."""
    return party_of(read_certificate(kit.certificate.encode("ascii"))).serial


def expiry_warnings(layout: ServerLayout, now: datetime | None = None) -> list[ExpiryWarning]:
    """What ends within 30 days, or ended: the CA, the hub's certificate, every kit in force. For the board."""
    moment = now or datetime.now(UTC)
    revoked = read_revocations(layout, read_authority(read_bounded(layout.pki / "ca.crt", 65_536))).serials
    ends: list[tuple[str, datetime | x509.Certificate, str]] = []
    for what, name, hint in (
        ("The consortium's CA", "ca.crt", "Make a new consortium in good time."),
        ("The hub's certificate", "server.crt", "Renew it: pixcell kit renew-hub."),
    ):
        ends.append((what, read_certificate(read_bounded(layout.pki / name, 65_536), name), hint))
    book = KitBook(layout)
    for party in book.parties():
        kit = book.kits(party)[-1]
        if serial_of(kit) not in revoked:
            ends.append((f"The kit of {party}", kit.expires_at, f"Renew it: pixcell kit renew {party}."))
    found = (expiry_warning(what, end, moment, hint=hint) for what, end, hint in ends)
    return [warning for warning in found if warning is not None]


def _keys(request: EnrolmentRequest) -> set[str]:
    tls = {_tls_key(request)} if request.tls_request is not None else set()
    return {request.node_key, request.approval_key} | tls


def _tls_key(holder: Kit | EnrolmentRequest) -> str:
    if isinstance(holder, Kit):
        key = read_certificate(holder.certificate.encode("ascii")).public_key()
        return public_key_digest(key)  # type: ignore[arg-type]
    return public_key_digest(tls_public_key(holder))
