"""The same tiles in further forms, beside the audited ones: DICOM instances, and PNG with content credentials."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from pixcell_core.contracts.canonical import read_bounded
from pixcell_core.contracts.release import TRAINED_ALGORITHMIC_MEDIA, ReleaseManifest
from pixcell_core.errors import BadInputError, PixcellError
from pixcell_core.trust.bundle_files import MAX_FILE_BYTES
from pixcell_core.trust.keys import MAX_KEY_BYTES, SigningKey
from pixcell_core.trust.tile_c2pa import c2pa_name, without_credential
from pixcell_core.trust.tile_dicom import dicom_name, encode_dicom
from pixcell_core.trust.tile_jpeg import decode_named
from site_client.release.workspace import ReleaseFolder

_MAX_CHAIN_BYTES = 65_536
_NO_THUMBNAIL = {"builder": {"thumbnail": {"enabled": False}}}


class CredentialError(BadInputError):
    """Content credentials cannot be written."""

    default_code = "no-content-credentials"


@dataclass(frozen=True)
class ContentCredentials:
    """Who signs content credentials: a certificate chain in PEM, the signer's first, and its Ed25519 key."""

    chain: str
    key: Ed25519PrivateKey

    @classmethod
    def load(cls, chain: Path, key: Path) -> ContentCredentials:
        """From files; the key file like every private key: for its owner alone."""
        SigningKey.load(key)
        try:
            loaded = serialization.load_pem_private_key(read_bounded(key, MAX_KEY_BYTES), password=None)
            text = read_bounded(chain, _MAX_CHAIN_BYTES).decode("ascii")
        except (ValueError, UnsupportedAlgorithm) as error:
            raise CredentialError(
                f"{chain.name} is not a PEM certificate chain.", hint="Give the signer's certificate first."
            ) from error
        assert isinstance(loaded, Ed25519PrivateKey)
        return cls(text, loaded)

    def sign(self, png: bytes, title: str) -> bytes:
        """The PNG with one C2PA manifest: created by a trained model, no thumbnail, no place, no person.

        Raises `CredentialError` where the extra is not installed or the chain does not fit the key.
        """
        try:
            import c2pa
        except ImportError as error:
            raise CredentialError(
                "Content credentials need the C2PA library, which is not installed here.",
                hint="Install the extra: pip install 'pixcell[c2pa]'. Everything else works without it.",
                code="c2pa-not-installed",
            ) from error
        action = {"action": "c2pa.created", "digitalSourceType": TRAINED_ALGORITHMIC_MEDIA}
        claim: dict[str, Any] = {
            "claim_generator_info": [{"name": "pixcell"}],
            "title": title,
            "format": "image/png",
            "assertions": [{"label": "c2pa.actions.v2", "data": {"actions": [action]}}],
        }
        out = io.BytesIO()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)
                context = c2pa.Context(c2pa.Settings.from_dict(_NO_THUMBNAIL))
                signer = c2pa.Signer.from_callback(self.key.sign, c2pa.C2paSigningAlg.ED25519, self.chain)
                c2pa.Builder(claim, context).sign(signer, "image/png", io.BytesIO(png), out)
        except c2pa.C2paError as error:
            raise CredentialError(
                f"The content credential of {title} could not be made: {error}.",
                hint="The chain must begin with the key's certificate (use: e-mail or document signing) and hold its CA.",
            ) from error
        signed = out.getvalue()
        if without_credential(signed, name=title) != png:
            raise PixcellError(
                "The C2PA library changed more of the tile than its credential.",
                hint="Report this with the version of c2pa-python; export without content credentials.",
                code="tile-swapped",
            )
        return signed


@dataclass(frozen=True)
class OtherForms:
    """Which further forms an export writes."""

    dicom: bool = False
    credentials: ContentCredentials | None = None

    def write(self, release: ReleaseFolder, manifest: ReleaseManifest, folder: Path) -> dict[str, Path]:
        """Write the forms into `folder`; returns each file by its name in the bundle."""
        if self.credentials is not None and manifest.tile_format != "png":
            raise CredentialError(
                "Content credentials are written into PNG tiles, and these are JPEG.",
                hint="Draft the release as PNG, or export without content credentials.",
            )
        written: dict[str, Path] = {}
        for name, data in self._files(release, manifest):
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
            written[name] = path
        return written

    def _files(self, release: ReleaseFolder, manifest: ReleaseManifest) -> Iterator[tuple[str, bytes]]:
        if not self.dicom and self.credentials is None:
            return
        for number, tile in enumerate(manifest.tiles, start=1):
            data = read_bounded(release.tiles / tile.name, MAX_FILE_BYTES)
            if self.dicom:
                yield dicom_name(tile), encode_dicom(decode_named(data, tile.name), manifest, number)
            if self.credentials is not None:
                yield c2pa_name(tile), self.credentials.sign(data, tile.name)
