"""What a slide is on disk (a file, a DICOM folder, a file with its companion folder), and its digest."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from pixcell_core.errors import BadInputError

_DICOM_PREAMBLE = 128


@dataclass(frozen=True)
class SlideSource:
    """A slide as the admin names it (`path`) and the files whose bytes it is made of (sorted)."""

    path: Path
    members: tuple[Path, ...]

    @property
    def entry(self) -> Path:
        """The file OpenSlide is asked to open."""
        return self.path if self.path.is_file() else self.members[0]


def is_dicom_file(path: Path) -> bool:
    """Whether the file carries the DICOM magic word after its preamble."""
    with path.open("rb") as handle:
        head = handle.read(_DICOM_PREAMBLE + 4)
    return head[_DICOM_PREAMBLE:] == b"DICM"


def locate(path: Path) -> SlideSource:
    """Find the files a slide consists of.

    Raises:
        BadInputError: codes `slide-missing`, `slide-unreadable` (permission), `slide-empty` (zero bytes),
            `not-a-slide` (a folder without DICOM files).
    """
    if not path.exists():
        raise BadInputError(
            f"The slide {path} does not exist.",
            hint="Check the spelling in slides.csv; paths there are relative to the CSV file.",
            code="slide-missing",
        )
    try:
        if path.is_dir():
            members = tuple(sorted(p for p in path.iterdir() if p.is_file() and is_dicom_file(p)))
            if not members:
                raise BadInputError(
                    f"The folder {path} holds no DICOM file, so it is not a slide.",
                    hint="Name a slide file, or a folder that holds the DICOM instances of "
                    "exactly one slide.",
                    code="not-a-slide",
                )
            return SlideSource(path, members)
        size = path.stat().st_size
        with path.open("rb") as handle:
            handle.read(1)
    except PermissionError as error:
        raise BadInputError(
            f"This user may not read {path}; the slide itself may be fine.",
            hint="Give the site's user read permission on the slide and run again.",
            code="slide-unreadable",
        ) from error
    if size == 0:
        raise BadInputError(
            f"{path} has zero bytes: the copy of this slide never happened or was cut off.",
            hint="Copy the slide again from the scanner's archive, or take its row out of slides.csv.",
            code="slide-empty",
        )
    companion = path.with_suffix("")
    if path.suffix.lower() == ".mrxs" and companion.is_dir():
        return SlideSource(path, (path, *sorted(p for p in companion.rglob("*") if p.is_file())))
    return SlideSource(path, (path,))


def content_digest(source: SlideSource) -> str:
    """SHA-256 of the slide's bytes, as lower-case hex.

    One file: the digest of its bytes. Several files: the digest of the sorted digests of their bytes, so that
    neither names nor their order matter and a renamed copy of a DICOM folder is still the same slide.
    """
    digests = []
    for member in source.members:
        with member.open("rb") as handle:
            digests.append(hashlib.file_digest(handle, "sha256").hexdigest())
    if len(digests) == 1:
        return digests[0]
    return hashlib.sha256("".join(sorted(digests)).encode()).hexdigest()
