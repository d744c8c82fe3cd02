"""A tile as a DICOM instance that says it is synthetic: Synthetic Data (0008,001C) = YES.

Written by hand because a bundle's bytes must follow from its tiles alone: verification writes each instance again and
compares, without a DICOM library and whatever its version. Secondary Capture (PS3.3 A.8.1) in Explicit VR Little
Endian, uncompressed (PS3.5 7.1.2, A.2). It names no real instance, no device and no person; its identifiers follow
from the pixels' digest (UUID-derived form, PS3.5 B.2).
"""

from __future__ import annotations

import hashlib
import struct

import numpy as np
import numpy.typing as npt

from pixcell_core.contracts.release import ReleasedTile, ReleaseManifest
from pixcell_core.trust.tile_png import MARK_TEXT, pixel_digest

_SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
_EXPLICIT_LITTLE_ENDIAN = "1.2.840.10008.1.2.1"
_LONG = frozenset({"OB", "OW", "SQ", "UN", "UT"})
_PADDED_WITH_NULL = frozenset({"UI", "OB"})


def dicom_name(tile: ReleasedTile) -> str:
    """Where the DICOM form of a tile lies in a bundle."""
    return f"dicom/{tile.name[:5]}.dcm"


def encode_dicom(pixels: npt.NDArray[np.uint8], manifest: ReleaseManifest, number: int) -> bytes:
    """The DICOM file of tile ``number`` (from 1): pixels uint8 (H, W, 3), unchanged."""
    height, width, _ = pixels.shape
    instance = _uid(f"{manifest.digest}:{number}:{pixel_digest(pixels)}")
    made = manifest.created_at
    generator = manifest.generator
    said = f"Synthetic tile {number} of {manifest.tile_count}: {MARK_TEXT}"
    elements = [
        _text(0x0008, 0x0005, "CS", "ISO_IR 192"),
        _text(0x0008, 0x0008, "CS", "DERIVED\\SECONDARY"),
        _text(0x0008, 0x0016, "UI", _SECONDARY_CAPTURE),
        _text(0x0008, 0x0018, "UI", instance),
        _text(0x0008, 0x001C, "CS", "YES"),
        _text(0x0008, 0x0020, "DA", f"{made:%Y%m%d}"),
        _text(0x0008, 0x0030, "TM", f"{made:%H%M%S}"),
        _text(0x0008, 0x0050, "SH", ""),
        _text(0x0008, 0x0060, "CS", "OT"),
        _text(0x0008, 0x0064, "CS", "SYN"),
        _text(0x0008, 0x0070, "LO", ""),
        _text(0x0008, 0x0090, "PN", ""),
        _text(
            0x0008, 0x2111, "ST", f"{said} Base {generator.base_digest}, adapter {generator.adapter_digest}"
        ),
        _text(0x0010, 0x0010, "PN", "SYNTHETIC"),
        _text(0x0010, 0x0020, "LO", f"SYNTHETIC-{number:05d}"),
        _text(0x0010, 0x0030, "DA", ""),
        _text(0x0010, 0x0040, "CS", ""),
        _text(0x0012, 0x0062, "CS", "YES"),
        _text(0x0012, 0x0063, "LO", "Made by a trained model; never a patient's image"),
        _text(0x0020, 0x000D, "UI", _uid(f"{manifest.digest}:study")),
        _text(0x0020, 0x000E, "UI", _uid(f"{manifest.digest}:series")),
        _text(0x0020, 0x0010, "SH", ""),
        _text(0x0020, 0x0011, "IS", "1"),
        _text(0x0020, 0x0013, "IS", str(number)),
        _short(0x0028, 0x0002, 3),
        _text(0x0028, 0x0004, "CS", "RGB"),
        _short(0x0028, 0x0006, 0),
        _short(0x0028, 0x0010, height),
        _short(0x0028, 0x0011, width),
        _short(0x0028, 0x0100, 8),
        _short(0x0028, 0x0101, 8),
        _short(0x0028, 0x0102, 7),
        _short(0x0028, 0x0103, 0),
        _element(0x7FE0, 0x0010, "OB", np.ascontiguousarray(pixels).tobytes()),
    ]
    return b"\0" * 128 + b"DICM" + _file_meta(instance) + b"".join(elements)


def _file_meta(instance: str) -> bytes:
    """Group 2 (PS3.10, 7.1), its length first."""
    elements = b"".join(
        [
            _element(0x0002, 0x0001, "OB", b"\x00\x01"),
            _text(0x0002, 0x0002, "UI", _SECONDARY_CAPTURE),
            _text(0x0002, 0x0003, "UI", instance),
            _text(0x0002, 0x0010, "UI", _EXPLICIT_LITTLE_ENDIAN),
            _text(0x0002, 0x0012, "UI", _uid("implementation")),
        ]
    )
    return _element(0x0002, 0x0000, "UL", struct.pack("<I", len(elements))) + elements


def _element(group: int, number: int, kind: str, value: bytes) -> bytes:
    if len(value) % 2:
        value += b"\0" if kind in _PADDED_WITH_NULL else b" "
    head = struct.pack("<HH", group, number) + kind.encode("ascii")
    if kind in _LONG:
        return head + struct.pack("<HI", 0, len(value)) + value
    return head + struct.pack("<H", len(value)) + value


def _text(group: int, number: int, kind: str, value: str) -> bytes:
    return _element(group, number, kind, value.encode("utf-8"))


def _short(group: int, number: int, value: int) -> bytes:
    return _element(group, number, "US", struct.pack("<H", value))


def _uid(text: str) -> str:
    """A UID under 2.25 from 128 bits of a digest."""
    return f"2.25.{int.from_bytes(hashlib.sha256(text.encode('utf-8')).digest()[:16], 'big')}"
