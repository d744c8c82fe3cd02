"""The coordinator's book of enrolled sites: one document per site, added by hand after the fingerprint was read."""

from __future__ import annotations

from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec

from pixcell_core.contracts.atomic import write_atomically
from pixcell_core.contracts.canonical import load_document
from pixcell_core.contracts.enrolment import EnrolmentRequest
from pixcell_core.errors import BadInputError, RefusedError
from pixcell_core.trust import certificates


class SiteBook:
    """Enrolled sites in one folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def names(self) -> list[str]:
        """Names of the enrolled sites, sorted."""
        return sorted(path.stem for path in self._folder.glob("*.json"))

    def get(self, site: str) -> EnrolmentRequest:
        """The enrolment of one site; an input error if there is none."""
        path = self._folder / f"{site}.json"
        if not path.is_file():
            raise BadInputError(
                f"No site named {site} is enrolled.",
                hint="The site runs `pixcell site enroll` and sends its request; then `pixcell kit approve REQUEST`.",
                code="unknown-site",
            )
        return load_document(EnrolmentRequest, path)

    def add(self, request_file: Path) -> EnrolmentRequest:
        """Enrol the site of a request file. The same request twice is fine; another key for a known name is not."""
        request = load_document(EnrolmentRequest, request_file, max_bytes=65_536)
        request.verify_key()
        node_public_key(request)
        for name in self.names():
            other = self.get(name)
            if other == request:
                return other
            if name == request.site:
                raise RefusedError(
                    f"A site named {name} is enrolled with other keys.",
                    hint="Ask the site whether it made new keys. To replace it, remove its kit first.",
                    code="site-exists",
                )
            if other.node_key == request.node_key or other.approval_key == request.approval_key:
                raise RefusedError(
                    f"{request.site} carries a key of {name}: two sites cannot share an identity.",
                    hint="Each site runs `pixcell site enroll` in its own folder.",
                    code="shared-identity",
                )
        write_atomically(self._folder / f"{request.site}.json", request.to_bytes())
        return request


def node_public_key(request: EnrolmentRequest) -> ec.EllipticCurvePublicKey:
    """The site's P-384 node key; an input error if the text is not one."""
    return certificates.node_public_key(request.node_key, request.site)
