"""The archive form of a bundle: any changed byte of the container fails, and nothing is unpacked unasked."""

from __future__ import annotations

import io
import struct
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pixcell_core.contracts.canonical import digest
from pixcell_core.trust.bundle_files import archive_bytes

if TYPE_CHECKING:
    from tests.site_client.release.conftest import Sample


def test_every_region_of_the_archive(sample: Sample, tmp_path: Path) -> None:
    path = tmp_path / "b.zip"
    end = len(sample.archive)
    directory = sample.archive.index(b"PK\x01\x02")
    places = {*range(0, 64), *range(directory, min(directory + 110, end)), *range(end - 40, end)}
    places |= set(range(0, end, max(1, end // 60)))
    for offset in sorted(places):
        changed = bytearray(sample.archive)
        changed[offset] ^= 0x01
        path.write_bytes(bytes(changed))
        assert sample.refuses(path).exit_code in (1, 4), f"byte {offset}"


@given(data=st.data())
@settings(max_examples=80, deadline=None)
def test_any_byte_of_the_archive(
    sample: Sample, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    changed = bytearray(sample.archive)
    changed[data.draw(st.integers(0, len(changed) - 1))] ^= data.draw(st.integers(1, 255))
    path = tmp_path_factory.getbasetemp() / "mutant.zip"
    path.write_bytes(bytes(changed))
    assert sample.refuses(path).exit_code in (1, 4)


def archive_with(files: list[tuple[str, bytes]], **options: int) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", options.get("compression", zipfile.ZIP_STORED)) as archive:
        for name, data in files:
            info = zipfile.ZipInfo(name, (options.get("year", 1980), 1, 1, 0, 0, 0))
            info.create_system = 3
            info.external_attr = 0o100644 << 16
            info.compress_type = options.get("compression", zipfile.ZIP_STORED)
            archive.writestr(info, data)
    return out.getvalue()


def test_archives_written_otherwise(sample: Sample, tmp_path: Path) -> None:
    with zipfile.ZipFile(io.BytesIO(sample.archive)) as archive:
        members = sorted((name, archive.read(name)) for name in archive.namelist())
    assert archive_with(members) == sample.archive == archive_bytes(members)
    mutants = [
        archive_with(members[::-1]),
        archive_with(members, year=1981),
        archive_with(members, compression=zipfile.ZIP_DEFLATED),
        archive_with([*members, ("tiles/", b"")]),
        archive_with([*members, ("../outside.txt", b"x")]),
        archive_with([*members, ("/etc/passwd", b"x")]),
        sample.archive + b"\0",
        b"\0" + sample.archive,
        sample.archive[:-1],
        b"PK\x03\x04" + sample.archive,
        b"",
        b"PK\x05\x06" + b"\0" * 18,
    ]
    with pytest.warns(UserWarning, match="Duplicate"):
        mutants.append(archive_with([*members, members[0]]))
    path = tmp_path / "b.zip"
    for mutant in mutants:
        path.write_bytes(mutant)
        sample.refuses(path)


def test_a_bomb_is_not_unpacked(tmp_path: Path, sample: Sample) -> None:
    members = [*sorted(sample.files.items()), ("tiles/00007.png", b"\0" * 40_000_000)]
    path = tmp_path / "bomb.zip"
    path.write_bytes(archive_with(members, compression=zipfile.ZIP_DEFLATED))
    assert path.stat().st_size < 1_000_000
    assert sample.refuses(path).code == "zip-bomb"


def test_a_little_compression_is_refused_too(tmp_path: Path, sample: Sample) -> None:
    members = [("README.txt", b"ab"), ("tiles/00001.png", bytes(range(256)) * 2)]
    path = tmp_path / "b.zip"
    path.write_bytes(archive_with(members, compression=zipfile.ZIP_DEFLATED))
    assert sample.refuses(path).code in {"bundle-form", "zip-bomb"}


def test_members_that_overlap_are_a_bomb(tmp_path: Path, sample: Sample) -> None:
    """Many entries of the directory point at the same bytes: the file is small, its contents would not be."""
    kernel = archive_with([("tiles/00001.png", b"x" * 100_000)])
    at = kernel.index(b"PK\x01\x02")
    body, entry, end = kernel[:at], kernel[at:-22], bytearray(kernel[-22:])
    entries = b"".join(entry.replace(b"00001", b"%05d" % number) for number in range(1, 1001))
    end[8:10] = end[10:12] = (1000).to_bytes(2, "little")
    end[12:16] = len(entries).to_bytes(4, "little")
    path = tmp_path / "overlap.zip"
    path.write_bytes(body + entries + bytes(end))
    assert sample.refuses(path).code == "zip-bomb"


def test_a_directory_larger_than_its_entries_is_not_read(tmp_path: Path, sample: Sample) -> None:
    made = bytearray(archive_with([("README.txt", b"a")]))
    made[-10:-6] = (2**31).to_bytes(4, "little")
    path = tmp_path / "directory.zip"
    path.write_bytes(bytes(made))
    assert sample.refuses(path).code == "zip-bomb"


def test_an_old_record_of_no_entries_before_a_new_one_of_many(tmp_path: Path, sample: Sample) -> None:
    """Zip64: the last record says that there is nothing, and a locator before it leads the reader to 20,000 entries."""
    kernel = archive_with([(f"tiles/{number:05d}.png", b"") for number in range(20_000)])
    at = kernel.index(b"PK\x01\x02")
    body, entries = kernel[:at], kernel[at:-22]
    long = struct.pack("<4sQ2H2L4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, 20_000, 20_000, len(entries), at)
    locator = struct.pack("<4sLQL", b"PK\x06\x07", 0, len(body + entries), 1)
    path = tmp_path / "zip64.zip"
    path.write_bytes(body + entries + long + locator + b"PK\x05\x06" + b"\0" * 18)
    with zipfile.ZipFile(path) as archive:
        assert len(archive.infolist()) == 20_000
    assert "another directory" in sample.refuses(path).message


def test_more_entries_than_were_announced(tmp_path: Path, sample: Sample) -> None:
    """The reader makes an object of every entry that fits, whatever number stands in the last record."""
    made = bytearray(archive_with([(f"tiles/{number:05d}.png", b"") for number in range(8)]))
    made[-14:-10] = (1).to_bytes(2, "little") * 2
    path = tmp_path / "b.zip"
    path.write_bytes(bytes(made))
    assert sample.refuses(path).code == "zip-bomb"


@pytest.mark.parametrize(
    "name", ["../outside.txt", "tiles/../../outside", "/etc/passwd", "..\\outside", "C:\\windows", "C:x"]
)
def test_a_path_that_climbs_out(tmp_path: Path, sample: Sample, name: str) -> None:
    path = tmp_path / "b.zip"
    path.write_bytes(archive_bytes(sorted([*sample.files.items(), (name, b"x")])))
    assert sample.refuses(path).code == "path-climbs-out"
    assert not (tmp_path.parent / "outside.txt").exists() and not (tmp_path / "outside").exists()


def test_a_member_without_a_name(tmp_path: Path, sample: Sample) -> None:
    path = tmp_path / "b.zip"
    path.write_bytes(archive_bytes([("\0", b""), *sorted(sample.files.items())]))
    assert sample.refuses(path).code == "bundle-form"


def test_an_extra_file_in_the_archive(tmp_path: Path, sample: Sample) -> None:
    path = tmp_path / "b.zip"
    path.write_bytes(archive_bytes(sorted([*sample.files.items(), ("notes.txt", b"x")])))
    assert sample.refuses(path).code == "foreign-file"


def test_the_archive_form_is_pinned() -> None:
    """Verification writes the archive again: its bytes must not drift between versions."""
    made = archive_bytes([("README.txt", b"a"), ("tiles/00001.png", b"b")])
    assert digest(made) == "sha256:aed4c0ef09bf25be0e01b322fa69ce939ee741fb24324b7481911c07c27dd625"
