"""The files of a bundle, from a folder or from one archive in a single canonical byte form.

An archive is an uncompressed ZIP whose every byte follows from its members, so that a changed time
stamp, comment or order shows. Nothing is ever extracted to a path the archive names.
"""

from __future__ import annotations

import io
import os
import re
import stat
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Protocol

from pixcell_core.contracts.release import MAX_TILES
from pixcell_core.errors import BadInputError, RefusedError
from pixcell_core.trust.ro_crate import METADATA

MAX_FILES = 3 * MAX_TILES + 64
MAX_FILE_BYTES = 64 * 1024 * 1024
MAX_ARCHIVE_BYTES = 4 * 1024**3 - 1

README, MANIFEST, VERDICT, LISTING = "README.txt", "manifest.json", "verdict.dsse.json", "bundle.dsse.json"
REPORT, PAGE, SHEET = "audit/report.json", "audit/report.html", "sample-sheet.png"
SIGNERS, REQUEST = "signers.json", "request.dsse.json"
DATASHEET, DATASHEET_PAGE = "datasheet.md", "datasheet.html"
FIXED_NAMES = (README, MANIFEST, VERDICT, LISTING, REPORT, PAGE, SHEET, DATASHEET, METADATA)
OPTIONAL_NAMES = (SIGNERS, REQUEST, DATASHEET_PAGE)

_NAME = re.compile(
    r"tiles/\d{5}\.(png|jpg)|dicom/\d{5}\.dcm|c2pa/\d{5}\.png|keys/[0-9a-f]{64}\.pub|certificates/[0-9a-f]{64}\.json"
)
_END_OF_DIRECTORY = 22  # bytes of a ZIP's last record without a comment (APPNOTE 4.3.16)
_ZIP64_LOCATOR = 20  # bytes of the record before it that leads to another directory (APPNOTE 4.3.15)
_MAX_ENTRY = 512  # bytes of one entry of the directory: 46, its name, and room
_FIRST_MOMENT = (1980, 1, 1, 0, 0, 0)
_BLOCK = 1 << 20


class BundleFormError(RefusedError):
    """A bundle is not in the form in which bundles are written."""

    default_code = "bundle-form"


class BundleFiles(Protocol):
    """Read access to the files of a bundle."""

    def names(self) -> list[str]:
        """Paths of all files inside the bundle, sorted."""

    def read(self, name: str) -> bytes:
        """The bytes of one file, at most ``MAX_FILE_BYTES``."""

    def check_form(self) -> None:
        """Raise :class:`BundleFormError` where the container holds anything besides the files."""


def is_bundle_name(name: str) -> bool:
    """Whether a bundle may hold a file of this path."""
    return name in FIXED_NAMES or name in OPTIONAL_NAMES or _NAME.fullmatch(name) is not None


def require_bundle_name(name: str) -> None:
    """Refuse a path that no bundle holds; one that would lead out of the bundle by a name of its own."""
    parts = name.replace("\\", "/").split("/")
    if ".." in parts or name.startswith(("/", "\\")) or "\0" in name or re.match(r"[A-Za-z]:", name):
        raise _form(f"{_shown(name)} leads out of the bundle", "path-climbs-out")
    if not is_bundle_name(name):
        raise _form(f"it holds {_shown(name)}, which no bundle may hold", "foreign-file")


class FolderFiles:
    """A bundle that lies in a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def names(self) -> list[str]:
        """Paths of all files; links, special files, empty folders and hidden files are refused."""
        found: list[str] = []
        for here, folders, files in os.walk(self._folder, onerror=_unreadable):
            place = Path(here)
            if not folders and not files and place != self._folder:
                raise _form(f"the folder {_shown(place.name)} is empty and does not belong here")
            for name in (*folders, *files):
                path = place / name
                mode = path.lstat().st_mode
                inside = path.relative_to(self._folder).as_posix()
                if not (stat.S_ISDIR(mode) or stat.S_ISREG(mode)):
                    raise _form(f"{_shown(inside)} is a link or a special file")
                if stat.S_ISREG(mode):
                    found.append(inside)
            if len(found) > MAX_FILES:
                raise _form(f"it holds more than {MAX_FILES} files")
        return sorted(found)

    def read(self, name: str) -> bytes:
        """The bytes of one file."""
        try:
            with (self._folder / name).open("rb") as stream:
                return _bounded(stream, name)
        except OSError as error:
            raise BadInputError(
                f"Cannot read {name} in the bundle: {error.strerror or error}.", hint="Check its permissions."
            ) from error

    def check_form(self) -> None:
        """A folder has no form beyond its files."""


class ArchiveFiles:
    """A bundle in one uncompressed ZIP file."""

    def __init__(self, path: Path, archive: zipfile.ZipFile) -> None:
        self._path, self._archive = path, archive
        infos = archive.infolist()
        if len(infos) > MAX_FILES:
            raise _form(f"it holds more than {MAX_FILES} files")
        if sum(max(info.file_size, info.compress_size) for info in infos) > path.stat().st_size:
            # Stored members lie side by side in the file: more than it holds means inflation or overlap.
            raise _form("its members would unpack to more than the file holds", "zip-bomb")
        self._members = {info.filename: info for info in infos}
        if len(self._members) != len(infos):
            raise _form("one name stands twice in the archive")
        for info in infos:
            if not info.filename:
                raise _form("a member has no name")
            if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1 or info.is_dir():
                raise _form(f"{_shown(info.filename)} is compressed, encrypted or a folder")

    def names(self) -> list[str]:
        """Paths of all members."""
        return sorted(self._members)

    def read(self, name: str) -> bytes:
        """The bytes of one member."""
        try:
            with self._archive.open(self._members[name]) as stream:
                return _bounded(stream, name)
        except (zipfile.BadZipFile, OSError, EOFError, ValueError, NotImplementedError) as error:  # noqa: RUF100
            raise _form(f"{_shown(name)} is damaged") from error

    def check_form(self) -> None:
        """Write the archive again from its members and compare every byte."""
        with tempfile.TemporaryFile() as again:
            write_archive(again, ((name, self.read(name)) for name in self.names()))
            again.seek(0)
            with self._path.open("rb") as original:
                while True:
                    ours, theirs = again.read(_BLOCK), original.read(_BLOCK)
                    if ours != theirs:
                        raise _form("the archive's own bytes (order, times, comments, padding) were changed")
                    if not ours:
                        return


@contextmanager
def open_bundle(path: Path) -> Iterator[BundleFiles]:
    """Open a bundle folder or archive for reading."""
    if path.is_dir():
        yield FolderFiles(path)
        return
    if not path.is_file():
        raise BadInputError(
            f"There is no bundle at {path}.", hint="Give a bundle's folder or .zip file.", code="no-bundle"
        )
    if path.stat().st_size > MAX_ARCHIVE_BYTES:
        raise _form("the archive is larger than 4 GiB")
    _bound_directory(path)
    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, UnicodeDecodeError) as error:
        raise _form("it is neither a folder nor a whole ZIP archive") from error
    with archive:
        yield ArchiveFiles(path, archive)


def write_archive(stream: IO[bytes], members: Iterable[tuple[str, bytes]]) -> None:
    """Write members, given in sorted order, as the canonical uncompressed archive."""
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED, allowZip64=False) as archive:
        for name, data in members:
            info = zipfile.ZipInfo(name, _FIRST_MOMENT)
            info.create_system = 3
            info.external_attr = 0o100644 << 16
            archive.writestr(info, data)


def archive_bytes(members: Iterable[tuple[str, bytes]]) -> bytes:
    """The canonical archive in memory, for small bundles."""
    out = io.BytesIO()
    write_archive(out, members)
    return out.getvalue()


def _bound_directory(path: Path) -> None:
    """Look at the archive's last record before its directory is read into memory: it says how large that is."""
    with path.open("rb") as stream:
        size = stream.seek(0, os.SEEK_END)
        stream.seek(max(0, size - _END_OF_DIRECTORY - _ZIP64_LOCATOR))
        end = stream.read()
    before, end = end[:-_END_OF_DIRECTORY], end[-_END_OF_DIRECTORY:]
    if len(end) < _END_OF_DIRECTORY or not end.startswith(b"PK\x05\x06"):
        raise _form("it is neither a folder nor a whole ZIP archive")
    if before.startswith(b"PK\x06\x07") or end[20:] != b"\0\0":
        raise _form("another directory or a comment stands where none is written")
    entries, directory = int.from_bytes(end[10:12], "little"), int.from_bytes(end[12:16], "little")
    if directory > max(entries, 1) * _MAX_ENTRY or directory > size:
        raise _form("its directory is larger than its entries", "zip-bomb")
    _count_entries(path, size - _END_OF_DIRECTORY - directory, directory, entries)


def _count_entries(path: Path, start: int, length: int, entries: int) -> None:
    """Walk the directory, of which the reader makes an object for every entry it finds, however many were announced."""
    with path.open("rb") as stream:
        stream.seek(max(0, start))
        directory = stream.read(length)
    at = found = 0
    while at < length:
        head = directory[at : at + 46]
        at += 46 + sum(int.from_bytes(head[place : place + 2], "little") for place in (28, 30, 32))
        found += 1
        if found > entries or len(head) < 46:
            break
    if found != entries or at != length:
        raise _form("its directory is larger than its entries", "zip-bomb")


def _bounded(stream: IO[bytes], name: str) -> bytes:
    data = stream.read(MAX_FILE_BYTES + 1)
    if len(data) > MAX_FILE_BYTES:
        raise _form(f"{_shown(name)} is larger than {MAX_FILE_BYTES} bytes")
    return data


def _shown(name: str) -> str:
    """A name from a hostile archive, safe to print."""
    return ascii(name)[1:-1][:120]


def _unreadable(error: OSError) -> None:
    raise BadInputError(
        f"Cannot read the bundle: {error.strerror or error}.", hint="Check the permissions of its folders."
    ) from error


def _form(why: str, code: str | None = None) -> BundleFormError:
    return BundleFormError(
        f"This is not a bundle as it was exported: {why}.",
        hint="Do not use it. Fetch it again from the site that released it.",
        code=code,
    )
