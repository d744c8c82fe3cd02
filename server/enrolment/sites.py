"""The coordinator's book of enrolled sites: one row per site, added by hand after the fingerprint was read."""

from __future__ import annotations

from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec
from sqlalchemy import ColumnElement, Connection, insert, select
from sqlalchemy.exc import IntegrityError

from pixcell_core.contracts.canonical import digest, load_document
from pixcell_core.contracts.enrolment import EnrolmentRequest
from pixcell_core.errors import BadInputError, RefusedError
from pixcell_core.trust import certificates
from server.registry.events import note_act
from server.registry.registry import Registry
from server.registry.sealed import altered, seal, unseal
from server.registry.tables import SiteRow


class SiteBook:
    """Enrolled sites of the registry."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    def names(self) -> list[str]:
        """Names of the enrolled sites, sorted."""
        with self._registry.read() as connection:
            return sorted(connection.execute(select(SiteRow.site)).scalars())

    def get(self, site: str) -> EnrolmentRequest:
        """The enrolment of one site; an input error if there is none, or if its row was altered."""
        with self._registry.read() as connection:
            found = _read(connection, SiteRow.site == site)
        if not found:
            raise BadInputError(
                f"No site named {site} is enrolled.",
                hint="The site runs `pixcell site enroll` and sends its request; then `pixcell kit approve REQUEST`.",
                code="unknown-site",
            )
        return found[0]

    def all(self) -> list[EnrolmentRequest]:
        """Every enrolled site, by name."""
        with self._registry.read() as connection:
            return _read(connection)

    def add(self, request_file: Path) -> EnrolmentRequest:
        """Enrol the site of a request file. The same request twice is fine; another key for a known name is not."""
        request = load_document(EnrolmentRequest, request_file, max_bytes=65_536)
        request.verify_key()
        node_public_key(request)
        row = {
            "site": request.site,
            "node_key_digest": digest(request.node_key.encode()),
            "approval_key_digest": digest(request.approval_key.encode()),
            **seal(request),
        }
        try:
            with self._registry.write() as connection:
                connection.execute(insert(SiteRow).values(**row))
                note_act(connection, "site-enrolled", request.site)
        except IntegrityError:
            return self._already(request)
        return request

    def _already(self, request: EnrolmentRequest) -> EnrolmentRequest:
        """The same request that is enrolled already, or the error of what stands in its way."""
        others = {other.site: other for other in self.all()}
        same = others.get(request.site)
        if same == request:
            return same
        if same is not None:
            raise RefusedError(
                f"A site named {request.site} is enrolled with other keys.",
                hint="Ask the site whether it made new keys. To replace it, remove its kit first.",
                code="site-exists",
            )
        twin = next(
            o.site
            for o in others.values()
            if o.node_key == request.node_key or o.approval_key == request.approval_key
        )
        raise RefusedError(
            f"{request.site} carries a key of {twin}: two sites cannot share an identity.",
            hint="Each site runs `pixcell site enroll` in its own folder.",
            code="shared-identity",
        )


def _read(connection: Connection, *where: ColumnElement[bool]) -> list[EnrolmentRequest]:
    rows = connection.execute(select(SiteRow.__table__).where(*where).order_by(SiteRow.site)).all()
    found = []
    for row in rows:
        request = unseal(EnrolmentRequest, row.document, row.digest, what=f"site {row.site}")
        if (request.site, digest(request.node_key.encode()), digest(request.approval_key.encode())) != (
            row.site,
            row.node_key_digest,
            row.approval_key_digest,
        ):
            raise altered(f"site {row.site}")
        found.append(request)
    return found


def node_public_key(request: EnrolmentRequest) -> ec.EllipticCurvePublicKey:
    """The site's P-384 node key; an input error if the text is not one."""
    return certificates.node_public_key(request.node_key, request.site)
