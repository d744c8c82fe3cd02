"""A tile with content credentials (C2PA): the sealed PNG with one more chunk, and nothing else changed.

C2PA 2.x stores its manifest in a PNG in one `caBX` chunk. Taken out, the sealed file must come back byte for byte: so a
verifier needs no C2PA library to know that the picture is the audited one. Whether the credential itself is true, any
C2PA reader says; this code does not.
"""

from __future__ import annotations

import zlib

from pixcell_core.contracts.release import ReleasedTile
from pixcell_core.trust.tile_png import TilePngError

MAX_CREDENTIAL_BYTES = 64 * 1024
_SIGNATURE_BYTES = 8
_KIND = b"caBX"


def c2pa_name(tile: ReleasedTile) -> str:
    """Where the form with content credentials lies in a bundle."""
    return f"c2pa/{tile.name[:5]}.png"


def without_credential(data: bytes, *, name: str) -> bytes:
    """The PNG without its one credential, at most 64 KiB; a file with none, two, or a larger one is refused."""
    kept, found, at = bytearray(data[:_SIGNATURE_BYTES]), 0, _SIGNATURE_BYTES
    while at < len(data):
        length = int.from_bytes(data[at : at + 4], "big")
        chunk = data[at : at + 12 + length]
        if len(chunk) != 12 + length or chunk[-4:] != zlib.crc32(chunk[4:-4]).to_bytes(4, "big"):
            raise _wrong(name, "it is cut off or damaged")
        if chunk[4:8] == _KIND:
            found += 1
            if length > MAX_CREDENTIAL_BYTES:
                raise _wrong(name, f"its credential is larger than {MAX_CREDENTIAL_BYTES} bytes")
            if at + len(chunk) == len(data):
                raise _wrong(name, "its credential lies behind its end")
        else:
            kept += chunk
        at += len(chunk)
    if found != 1:
        raise _wrong(name, f"it carries {found} credentials, not one")
    return bytes(kept)


def _wrong(name: str, why: str) -> TilePngError:
    return TilePngError(
        f"{name} is not a tile with content credentials: {why}.", hint="Export the release again."
    )
