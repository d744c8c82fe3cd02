"""Names for real tiles in what may be shared: the same inside the hospital, meaningless outside.

A plain digest of a tile's pixels tells everybody who holds the tile that this hospital trained on it. Under a key that
never leaves, the digest names the tile to the site alone, and a root over many of them commits to the set without
letting anyone try sets out.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from pixcell_core.contracts import read_bounded
from pixcell_core.contracts.release import tiles_root
from pixcell_core.errors import BadInputError

KEY_FILE = "site/blinding.key"
"""Within an audit's folder: under the part that never leaves."""

KEY_BYTES = 32


@dataclass(frozen=True)
class Blinding:
    """A key for naming real tiles; `repr` does not show it."""

    _key: bytes

    def __repr__(self) -> str:
        return "Blinding(…)"

    def name(self, digest: str) -> str:
        """HMAC-SHA256 of a digest, as ``sha256:<hex>``."""
        return "sha256:" + hmac.new(self._key, digest.encode(), hashlib.sha256).hexdigest()

    def root(self, digests: Iterable[str]) -> str:
        """RFC 6962 root over the blinded digests."""
        return tiles_root(self.name(digest) for digest in digests)

    @classmethod
    def make(cls, out: Path, first: Path | None = None) -> Blinding:
        """The key of an audit in folder `out`: the one it has, that of the `first` audit to compare with, or a new one.

        Raises:
            BadInputError: the first audit's key is not there, so its commitments cannot be compared.
        """
        if first is not None:
            key = cls._read(first)
        else:
            key = cls._read(out) if (out / KEY_FILE).is_file() else secrets.token_bytes(KEY_BYTES)
        descriptor = os.open(out / KEY_FILE, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            os.write(descriptor, key)
        finally:
            os.close(descriptor)
        return cls(key)

    @staticmethod
    def _read(first: Path) -> bytes:
        path = first / KEY_FILE
        key = read_bounded(path, KEY_BYTES) if path.is_file() else b""
        if len(key) != KEY_BYTES:
            raise BadInputError(
                f"The audit in {first.name} has no whole {KEY_FILE}, so nobody can tell whether it saw the same tiles.",
                hint="Give the audit's whole folder, as it lies at the site, or run the audits again in new folders.",
                code="no-blinding-key",
            )
        return key
