"""The DICOM form of a tile: read back by a reader written for this test, and by pydicom where it is installed."""

from __future__ import annotations

import io
import struct

import numpy as np

from pixcell_core.trust.tile_dicom import dicom_name, encode_dicom
from tests.pixcell_core.contracts.test_release_documents import manifest

PIXELS = np.random.default_rng(2).integers(0, 255, (5, 7, 3), dtype=np.uint8)
MANIFEST = manifest()


def elements(data: bytes) -> list[tuple[int, int, str, bytes]]:
    """Explicit VR Little Endian (PS3.5, 7.1.2), read plainly."""
    assert data[:128] == b"\0" * 128 and data[128:132] == b"DICM"
    at, found = 132, []
    while at < len(data):
        group, number = struct.unpack_from("<HH", data, at)
        kind = data[at + 4 : at + 6].decode()
        if kind in {"OB", "OW", "SQ", "UN", "UT"}:
            (length,), at = struct.unpack_from("<I", data, at + 8), at + 12
        else:
            (length,), at = struct.unpack_from("<H", data, at + 6), at + 8
        assert length % 2 == 0, "values have even length"
        found.append((group, number, kind, data[at : at + length]))
        at += length
    assert at == len(data)
    return found


def test_it_says_that_it_is_synthetic_and_keeps_the_pixels() -> None:
    found = elements(encode_dicom(PIXELS, MANIFEST, 2))
    by_tag = {(group, number): value for group, number, _, value in found}
    assert by_tag[0x0008, 0x001C].strip() == b"YES"
    assert by_tag[0x0008, 0x0008] == b"DERIVED\\SECONDARY "
    pixels = np.frombuffer(by_tag[0x7FE0, 0x0010][: PIXELS.size], np.uint8).reshape(PIXELS.shape)
    assert np.array_equal(pixels, PIXELS)
    tags = [(group, number) for group, number, _, _ in found]
    assert tags == sorted(tags) and len(set(tags)) == len(tags), "tags ascend, each once"
    (length,) = struct.unpack("<I", by_tag[0x0002, 0x0000])
    meta = [entry for entry in found if entry[0] == 2][1:]
    assert length == sum(8 + 4 * (kind == "OB") + len(value) for _, _, kind, value in meta)


def test_identifiers_follow_from_the_pixels_and_are_within_limits() -> None:
    one, two = encode_dicom(PIXELS, MANIFEST, 1), encode_dicom(PIXELS[::-1], MANIFEST, 1)
    assert one == encode_dicom(PIXELS, MANIFEST, 1)
    uids = [
        {(g, n): v.rstrip(b"\0") for g, n, kind, v in elements(data) if kind == "UI"} for data in (one, two)
    ]
    assert uids[0][0x0008, 0x0018] != uids[1][0x0008, 0x0018]
    assert uids[0][0x0020, 0x000D] == uids[1][0x0020, 0x000D]
    assert all(
        len(uid) <= 64 and uid.replace(b".", b"").isdigit() for found in uids for uid in found.values()
    )
    limits = {"CS": 16, "SH": 16, "LO": 64, "DA": 8, "IS": 12, "ST": 1024, "PN": 64}
    for _, _, kind, value in elements(one):
        parts = value.split(b"\\") if kind == "CS" else [value]
        assert all(len(part.strip()) <= limits.get(kind, 10**9) for part in parts)
    assert dicom_name(MANIFEST.tiles[1]) == "dicom/00002.dcm"


def test_pydicom_reads_it() -> None:
    import pydicom

    found = pydicom.dcmread(io.BytesIO(encode_dicom(PIXELS, MANIFEST, 3)))
    assert found.SyntheticData == "YES"
    assert found.PatientIdentityRemoved == "YES"
    assert list(found.ImageType) == ["DERIVED", "SECONDARY"]
    assert found.SOPClassUID.name == "Secondary Capture Image Storage"
    assert np.array_equal(found.pixel_array, PIXELS)
