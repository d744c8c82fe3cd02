"""Why a slide does not open: truncated, empty, or never a slide; found from the file's own structure."""

from __future__ import annotations

import logging
import mmap
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import tifffile

from pixcell_core.errors import BadInputError

_TIFF_MAGICS = (b"II*\x00", b"MM\x00*", b"II+\x00", b"MM\x00+")
#: Pixel Data and the end of an encapsulated sequence, explicit little endian as slide scanners write them.
_PIXEL_DATA = b"\xe0\x7f\x10\x00"
_SEQUENCE_END = b"\xfe\xff\xdd\xe0\x00\x00\x00\x00"
_SLIDE_SUFFIXES = "SVS, TIFF, SCN, NDPI, MRXS, BIF, VMS, SVSLIDE or DICOM"


def truncated_error(path: Path, detail: str) -> BadInputError:
    """The one error for a slide whose bytes end too early."""
    return BadInputError(
        f"{path} is truncated: {detail}. Pixels are missing, so no tile of it can be trusted.",
        hint="Copy the slide again (compare file sizes with the archive), or take its row out of slides.csv.",
        code="slide-truncated",
    )


def not_a_slide_error(path: Path) -> BadInputError:
    """The one error for a file that no slide format explains."""
    return BadInputError(
        f"{path} is not a whole-slide image that can be read.",
        hint=f"Give {_SLIDE_SUFFIXES} files (a folder for DICOM), or take its row out of slides.csv.",
        code="not-a-slide",
    )


def is_tiff(path: Path) -> bool:
    """Whether the file starts like a TIFF (SVS, SCN, NDPI and generic tiled TIFF all do)."""
    with path.open("rb") as handle:
        return handle.read(4) in _TIFF_MAGICS


class _Complaints(logging.Handler):
    """Collects what tifffile says about a file: it logs a broken chain of directories and reads on."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.seen = 0
        self._mine = threading.get_ident()

    def emit(self, record: logging.LogRecord) -> None:
        # Slides are read on several threads; each hears only about its own.
        self.seen += record.thread == self._mine


@contextmanager
def _listening() -> Iterator[_Complaints]:
    complaints, logger = _Complaints(), logging.getLogger("tifffile")
    logger.propagate = False
    logger.addHandler(complaints)
    try:
        yield complaints
    finally:
        logger.removeHandler(complaints)


def _tiff_end(path: Path, size: int) -> None:
    """Raise if a directory of the TIFF, or pixels it points to, lie past the end."""
    with tifffile.TiffFile(path) as tiff:
        if not len(tiff.pages):
            raise truncated_error(path, "its table of contents lies past its end")
        for number, page in enumerate(tiff.pages):
            if not isinstance(page, tifffile.TiffPage):
                page = page.aspage()
            ends = [o + n for o, n in zip(page.dataoffsets, page.databytecounts, strict=False) if n]
            if ends and max(ends) > size:
                raise truncated_error(
                    path, f"image {number} of it ends at byte {max(ends):,} of a file of {size:,} bytes"
                )


def check_tiff_extent(path: Path) -> int:
    """Refuse a TIFF-based slide whose directory or image data lie past the end of the file.

    OpenSlide opens such files when their directory comes first and fails only on the first missing tile,
    hours later; reading the offsets takes milliseconds.

    Returns:
        How many oddities the file has that a slide may have without being truncated.

    Raises:
        BadInputError: code `slide-truncated`.
    """
    with _listening() as complaints:
        try:
            _tiff_end(path, path.stat().st_size)
        except BadInputError:
            raise
        except Exception as error:
            raise truncated_error(path, "its table of contents cannot be read to the end") from error
    return complaints.seen


def check_dicom_extent(path: Path) -> None:
    """Refuse a DICOM instance whose pixel data are cut off.

    Pixel Data (7FE0,0010) is the last large element of a slide's instance. Encapsulated pixel data have no
    length of their own but end with a sequence delimiter (DICOM PS3.5, A.4); native ones say their length.

    Raises:
        BadInputError: code `slide-truncated`.
    """
    with path.open("rb") as handle, mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as body:
        starts = [body.rfind(_PIXEL_DATA + kind) for kind in (b"OB\0\0", b"OW\0\0")]
        start = max(starts)
        if start < 0:
            raise truncated_error(path, "this instance ends before its pixel data")
        length = body[start + 8 : start + 12]
        if len(length) < 4:
            raise truncated_error(path, "this instance ends before its pixel data")
        if length == b"\xff\xff\xff\xff":
            if body.rfind(_SEQUENCE_END, start) < 0:
                raise truncated_error(path, "the pixel data of this instance have no end")
        elif start + 12 + int.from_bytes(length, "little") > len(body):
            raise truncated_error(path, "the pixel data of this instance go on past its end")


def explain_unopened(path: Path, entry: Path) -> BadInputError:
    """Say why `entry` did not open as a slide, as exactly as its bytes allow."""
    if is_tiff(entry):
        try:
            if check_tiff_extent(entry):
                return truncated_error(path, "its list of images breaks off")
        except BadInputError as error:
            return error
    return not_a_slide_error(path)
