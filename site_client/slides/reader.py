"""Reads one whole-slide image: its pixels at any scale and four facts about it, never its label or macro."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt
import openslide
from PIL import Image

from pixcell_core.errors import BadInputError
from site_client.slides.identity import SlideSource, locate
from site_client.slides.integrity import (
    check_dicom_extent,
    check_tiff_extent,
    explain_unopened,
    is_tiff,
    truncated_error,
)
from site_client.slides.resample import area_mean

#: A level may be this much coarser than asked and still count as fine enough (levels are rarely exact
#: halves).
LEVEL_TOLERANCE = 1.02
#: Plausible microns per pixel of a slide scan; anything else is a broken header.
MPP_RANGE = (0.05, 20.0)


@dataclass(frozen=True)
class SlideFacts:
    """All that leaves the slide file besides pixels: no label, no macro, no scanner, no date, no person."""

    vendor: str
    mpp: float
    mpp_assumed: bool
    width: int
    height: int
    levels: int
    #: Scanned rectangle (x, y, width, height) in level-0 pixels; the whole slide when the vendor gives none.
    bounds: tuple[int, int, int, int]


class SlideReader:
    """An open slide.

    Args:
        path: a slide file, or a folder with the DICOM instances of one slide.
        assumed_mpp: microns per pixel to use when the slide names none; never overrides the slide's own.

    Raises:
        BadInputError: `slide-missing`, `slide-unreadable`, `slide-empty`, `not-a-slide`, `slide-truncated`,
            `mpp-missing`, `mpp-implausible`, `dicom-mixed`.
    """

    def __init__(self, path: Path, *, assumed_mpp: float | None = None) -> None:
        self.source: SlideSource = locate(path)
        self.path = path
        entry = self.source.entry
        if path.is_file() and is_tiff(entry):
            check_tiff_extent(entry)
        for member in self.source.members if path.is_dir() else ():
            check_dicom_extent(member)
        try:
            self._slide = openslide.OpenSlide(str(entry))
        except (openslide.OpenSlideError, OSError) as error:
            raise explain_unopened(path, entry) from error
        try:
            if path.is_dir():
                self._check_one_series()
            self.facts = self._read_facts(assumed_mpp)
        except BaseException:
            self._slide.close()
            raise
        self._downsamples = tuple(float(d) for d in self._slide.level_downsamples)

    def __enter__(self) -> SlideReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Release the file."""
        self._slide.close()

    def level_for(self, mpp: float) -> int:
        """The coarsest level that is at least as fine as `mpp` microns per pixel (level 0 if none is)."""
        fine = [i for i, d in enumerate(self._downsamples) if d * self.facts.mpp <= mpp * LEVEL_TOLERANCE]
        return max(fine, default=0)

    def read(self, x: float, y: float, size_px: tuple[int, int], mpp: float) -> npt.NDArray[np.uint8]:
        """Read a rectangle at a physical scale.

        Args:
            x, y: left upper corner in level-0 pixels (fractions allowed).
            size_px: (width, height) of the result in pixels.
            mpp: microns per pixel of the result.

        Returns:
            uint8 array (height, width, 3). Downscaling averages areas; upscaling is bicubic. Parts the
            scanner never saw are white.

        Raises:
            BadInputError: code `slide-truncated` when the pixels cannot be decoded.
        """
        return self._read(x, y, size_px, mpp)[0]

    def overview(self, mpp: float, max_pixels: int = 16_000_000) -> Overview:
        """The scanned rectangle at about `mpp` microns per pixel (coarser if that exceeds `max_pixels`)."""
        left, top, width, height = self.facts.bounds
        area = width * height * (self.facts.mpp / mpp) ** 2
        if area > max_pixels:
            mpp *= (area / max_pixels) ** 0.5
        size = (max(1, round(width * self.facts.mpp / mpp)), max(1, round(height * self.facts.mpp / mpp)))
        rgb, seen = self._read(left, top, size, mpp, exact=False)
        return Overview(rgb=rgb, seen=seen, mpp=mpp, left=left, top=top)

    def _read(
        self, x: float, y: float, size_px: tuple[int, int], mpp: float, *, exact: bool = True
    ) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.bool_]]:
        """Pixels and where the scanner saw any; inexact means Pillow's box filter, which rounds a source pixel's
        share to all or nothing and takes a quarter of the memory: good enough for thumbnails.
        """
        level = self.level_for(mpp)
        down = self._downsamples[level]
        step = mpp / (self.facts.mpp * down)
        span_w, span_h = size_px[0] * step, size_px[1] * step
        level_x, level_y = x / down, y / down
        first_x, first_y = int(np.floor(level_x)), int(np.floor(level_y))
        off_x, off_y = level_x - first_x, level_y - first_y
        # Copies of level pixels; one more on each side so that a fractional corner never reads past
        # the block.
        raw_size = (int(np.ceil(span_w + off_x)) or 1, int(np.ceil(span_h + off_y)) or 1)
        try:
            raw = self._slide.read_region((round(first_x * down), round(first_y * down)), level, raw_size)
        except openslide.OpenSlideError as error:
            raise truncated_error(self.path, "part of its pixels cannot be decoded") from error
        alpha = raw.getchannel("A")
        flat = Image.new("RGB", raw.size, (255, 255, 255))
        flat.paste(raw, mask=alpha)
        if raw_size == size_px and step == 1.0 and not off_x and not off_y:
            return np.asarray(flat, dtype=np.uint8), np.asarray(alpha) > 127
        box = (off_x, off_y, min(off_x + span_w, raw_size[0]), min(off_y + span_h, raw_size[1]))
        seen = np.asarray(alpha.resize(size_px, Image.Resampling.BOX, box=box)) > 127
        if step == int(step) and not off_x and not off_y:
            return np.asarray(flat.reduce(int(step)), dtype=np.uint8), seen
        if step >= 1.0 and exact:
            return area_mean(np.asarray(flat, dtype=np.uint8), (off_x, off_y), step, size_px), seen
        kernel = Image.Resampling.BOX if step >= 1.0 else Image.Resampling.BICUBIC
        return np.asarray(flat.resize(size_px, kernel, box=box), dtype=np.uint8), seen

    def _read_facts(self, assumed_mpp: float | None) -> SlideFacts:
        properties = self._slide.properties
        width, height = self._slide.dimensions
        mpp, assumed = self._microns_per_pixel(assumed_mpp)
        bounds = (
            int(properties.get(openslide.PROPERTY_NAME_BOUNDS_X, 0)),
            int(properties.get(openslide.PROPERTY_NAME_BOUNDS_Y, 0)),
            int(properties.get(openslide.PROPERTY_NAME_BOUNDS_WIDTH, width)),
            int(properties.get(openslide.PROPERTY_NAME_BOUNDS_HEIGHT, height)),
        )
        clipped = (
            bounds[0],
            bounds[1],
            min(bounds[2], width - bounds[0]),
            min(bounds[3], height - bounds[1]),
        )
        return SlideFacts(
            vendor=str(properties.get(openslide.PROPERTY_NAME_VENDOR, "unknown")),
            mpp=mpp,
            mpp_assumed=assumed,
            width=int(width),
            height=int(height),
            levels=int(self._slide.level_count),
            bounds=clipped,
        )

    def _microns_per_pixel(self, assumed_mpp: float | None) -> tuple[float, bool]:
        properties = self._slide.properties
        own = [properties.get(openslide.PROPERTY_NAME_MPP_X), properties.get(openslide.PROPERTY_NAME_MPP_Y)]
        values = [float(v) for v in own if v is not None]
        if values:
            value, assumed = sum(values) / len(values), False
        elif assumed_mpp is not None:
            value, assumed = assumed_mpp, True
        else:
            raise BadInputError(
                f"{self.path} does not say its microns per pixel, so the size of a tile in tissue "
                "is unknown.",
                hint="If you know the scale (about 0.5 at 20x, 0.25 at 40x), run again with "
                "--assume-mpp VALUE; "
                "it is used only for slides that name none and is recorded as assumed.",
                code="mpp-missing",
            )
        if not MPP_RANGE[0] <= value <= MPP_RANGE[1]:
            raise BadInputError(
                f"{self.path} claims {value:g} microns per pixel, which no slide scanner produces.",
                hint="The header is broken: export the slide again with its calibration.",
                code="mpp-implausible",
            )
        return value, assumed

    def _check_one_series(self) -> None:
        """Refuse a folder whose DICOM files belong to more than one slide: which one is meant is unknown."""
        mine = self._slide.properties.get("openslide.quickhash-1")
        for member in self.source.members[1:]:
            try:
                with openslide.OpenSlide(str(member)) as other:
                    same = other.properties.get("openslide.quickhash-1") == mine
            except openslide.OpenSlideError:
                raise truncated_error(member, "this DICOM instance cannot be opened") from None
            if not same:
                raise BadInputError(
                    f"The folder {self.path} holds DICOM files of more than one slide.",
                    hint="Give each slide a folder of its own and name the folders in slides.csv.",
                    code="dicom-mixed",
                )


@dataclass(frozen=True)
class Overview:
    """A thumbnail made from the slide's own pyramid (never from its stored thumbnail, label or macro)."""

    #: (H, W, 3) uint8
    rgb: npt.NDArray[np.uint8]
    #: (H, W) bool, where the scanner recorded pixels
    seen: npt.NDArray[np.bool_]
    mpp: float
    left: int
    top: int
