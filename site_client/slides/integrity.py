"""Why a slide does not open: truncated, empty, or never a slide; found from the file's own structure."""

from __future__ import annotations

from pathlib import Path

import tifffile

from pixcell_core.errors import BadInputError

_TIFF_MAGICS = (b"II*\x00", b"MM\x00*", b"II+\x00", b"MM\x00+")
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


def check_tiff_extent(path: Path) -> None:
    """Refuse a TIFF-based slide whose directory or image data lie past the end of the file.

    OpenSlide opens such files when their directory comes first and fails only on the first missing tile,
    hours later; reading the offsets takes milliseconds.

    Raises:
        BadInputError: code `slide-truncated`.
    """
    size = path.stat().st_size
    try:
        with tifffile.TiffFile(path) as tiff:
            for number, page in enumerate(tiff.pages):
                if not isinstance(page, tifffile.TiffPage):
                    page = page.aspage()
                ends = [o + n for o, n in zip(page.dataoffsets, page.databytecounts, strict=False) if n]
                if ends and max(ends) > size:
                    raise truncated_error(
                        path, f"image {number} of it ends at byte {max(ends):,} of a file of {size:,} bytes"
                    )
    except BadInputError:
        raise
    except Exception as error:
        raise truncated_error(path, "its table of contents cannot be read to the end") from error


def explain_unopened(path: Path, entry: Path) -> BadInputError:
    """Say why `entry` did not open as a slide, as exactly as its bytes allow."""
    if is_tiff(entry):
        try:
            check_tiff_extent(entry)
        except BadInputError as error:
            return error
    return not_a_slide_error(path)
