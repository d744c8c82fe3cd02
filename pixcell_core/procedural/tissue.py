"""Where each tissue lies: regions with smooth borders, tumour nests, glands, clefts and bare glass."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum, StrEnum

import cv2
import numpy as np
import numpy.typing as npt

from pixcell_core.procedural.patient import PatientLook
from pixcell_core.procedural.texture import COARSE, FloatPlane, coarse_noise, resize, smooth_noise

Mask = npt.NDArray[np.bool_]
Codes = npt.NDArray[np.uint8]


class TissueClass(StrEnum):
    """What a pathologist would call a region."""

    tumor = "tumor"
    stroma = "stroma"
    gland = "gland"
    lymphoid = "lymphoid"

    @property
    def code(self) -> int:
        """Value of this class in a label map; 0 is bare glass."""
        return list(TissueClass).index(self) + 1


class Compartment(IntEnum):
    """What a pixel is made of, finer than its class: a tumour region also holds collagen septa."""

    GLASS = 0
    TUMOR = 1
    COLLAGEN = 2
    EPITHELIUM = 3
    LYMPHOID = 4
    LUMEN = 5


@dataclass(frozen=True)
class GlandOutline:
    """A gland's basement membrane: `points` (n, 2) as x, y in pixels, and the inward unit normals (n, 2)."""

    points: npt.NDArray[np.float64]
    inward: npt.NDArray[np.float64]


@dataclass(frozen=True)
class Layout:
    """The plan of a field: class `labels`, `compartments`, gland outlines and each pixel's depth into its gland."""

    labels: Codes
    compartments: Codes
    glands: tuple[GlandOutline, ...]
    gland_depth: FloatPlane | None
    epithelium_px: float


def plan(
    rng: np.random.Generator,
    height: int,
    width: int,
    *,
    mpp: float,
    patient: PatientLook,
    tissue: TissueClass | None,
    coverage: float,
) -> Layout:
    """Lay out a field. `coverage` is the share of the field that is tissue rather than bare glass."""
    labels = _regions(rng, height, width, mpp=mpp, tissue=tissue)
    glass = _glass(rng, height, width, mpp=mpp, coverage=coverage)
    epithelium_px = 0.62 * patient.gland_radius_um / mpp
    glands, membrane = _glands(rng, labels, glass, patient=patient, mpp=mpp)
    labels[(membrane > 0) & (glass == 0)] = TissueClass.gland.code
    labels[glass > 0] = 0

    table = np.array(
        [Compartment.GLASS, Compartment.TUMOR, Compartment.COLLAGEN, Compartment.COLLAGEN, Compartment.LYMPHOID],
        np.uint8,
    )
    compartments = cv2.LUT(labels, np.resize(table, 256))
    septa = np.abs(coarse_noise(rng, height, width, 70 / mpp, octaves=2)) < 0.025 * patient.septa_um
    compartments[septa & (compartments == Compartment.TUMOR)] = Compartment.COLLAGEN
    depth: FloatPlane | None = None
    if glands:
        inside = ((membrane > 0) & (labels > 0)).astype(np.uint8)
        depth = cv2.distanceTransform(inside, cv2.DIST_L2, 3)
        apical = np.float32(0.10 * epithelium_px) * smooth_noise(rng, height, width, 5 / mpp)
        compartments[inside > 0] = Compartment.EPITHELIUM
        compartments[depth + apical > epithelium_px] = Compartment.LUMEN
    return Layout(labels, np.asarray(compartments, np.uint8), glands, depth, epithelium_px)


def _regions(rng: np.random.Generator, height: int, width: int, *, mpp: float, tissue: TissueClass | None) -> Codes:
    """Class of every pixel: the strongest of one smooth field per class, the dominant one lifted to its share."""
    rows, columns = -(-height // COARSE), -(-width // COARSE)
    scores = np.stack(
        [smooth_noise(rng, rows, columns, 150 / mpp / COARSE, octaves=3) for _ in TissueClass]
    )
    scores[TissueClass.lymphoid.code - 1] -= 0.7
    if tissue is not None:
        lead = tissue.code - 1
        rest = np.delete(scores, lead, axis=0).max(axis=0)
        share = rng.uniform(0.72, 0.92)
        scores[lead] += np.quantile(rest - scores[lead], share)
    full = [resize(score, height, width) for score in scores]
    best, labels = full[0].copy(), np.ones((height, width), np.uint8)
    for code, score in enumerate(full[1:], start=2):
        labels[score > best] = code
        np.maximum(best, score, out=best)
    return labels


def _glass(rng: np.random.Generator, height: int, width: int, *, mpp: float, coverage: float) -> Codes:
    """1 where there is no tissue: outside an organic border, and in thin tears."""
    if coverage >= 1:
        return np.zeros((height, width), np.uint8)
    rows, columns = -(-height // COARSE), -(-width // COARSE)
    y, x = np.mgrid[-1 : 1 : rows * 1j, -1 : 1 : columns * 1j].astype(np.float32)
    shift = rng.uniform(-0.35, 0.35, 2)
    outer = (np.abs(x - shift[0]) ** 3 + np.abs(y - shift[1]) ** 3).astype(np.float32)
    outer += 0.30 * smooth_noise(rng, rows, columns, 130 / mpp / COARSE, octaves=4)
    tear = np.abs(smooth_noise(rng, rows, columns, 110 / mpp / COARSE, octaves=3))
    tear += 0.35 * np.clip(1.1 - smooth_noise(rng, rows, columns, 160 / mpp / COARSE), 0, None)
    empty = resize(outer - np.quantile(outer, min(coverage + 0.02, 1.0)).astype(np.float32), height, width) > 0
    empty |= resize(tear, height, width) < 0.05
    return empty.astype(np.uint8)


def _glands(
    rng: np.random.Generator, labels: Codes, glass: Codes, *, patient: PatientLook, mpp: float
) -> tuple[tuple[GlandOutline, ...], Codes]:
    """Pack glands into the gland regions: their outlines, and a mask of what lies within them."""
    height, width = labels.shape
    membrane = np.zeros((height, width), np.uint8)
    radius = patient.gland_radius_um / mpp
    rows, columns = hexagonal(rng, height, width, 2.16 * radius, jitter=0.10, margin=radius)
    inside = np.clip(rows, 0, height - 1), np.clip(columns, 0, width - 1)
    chosen = (labels[inside] == TissueClass.gland.code) & (glass[inside] == 0)
    outlines = []
    angle = np.linspace(0, 2 * np.pi, 72, endpoint=False)
    for row, column in zip(rows[chosen], columns[chosen], strict=True):
        wobble = np.ones_like(angle)
        for order in (2, 3, 4, 5, 7):
            wobble += rng.normal(0, 0.11 / order**0.5) * np.cos(order * angle + rng.uniform(0, 2 * np.pi))
        r = radius * np.clip(wobble * rng.uniform(0.78, 1.02), 0.45, 1.06)
        points = np.stack([column + r * np.cos(angle), row + r * np.sin(angle)], axis=1)
        tangent = np.roll(points, -1, axis=0) - np.roll(points, 1, axis=0)
        inward = np.stack([-tangent[:, 1], tangent[:, 0]], axis=1)
        inward /= np.maximum(np.linalg.norm(inward, axis=1, keepdims=True), 1e-6)
        outlines.append(GlandOutline(points, inward))
        cv2.fillPoly(membrane, [np.round(points * 16).astype(np.int32)], 1, shift=4)
    return tuple(outlines), membrane


def hexagonal(
    rng: np.random.Generator, height: int, width: int, spacing: float, *, jitter: float, margin: float = 0.0
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Rows and columns of a jittered hexagonal lattice over the field and `margin` around it, in random order."""
    step = spacing * 0.866
    start = rng.uniform(0, spacing, 2) - margin - spacing
    lines = np.arange(start[0], height + margin + step, step)
    marks = np.arange(start[1], width + margin + spacing, spacing)
    rows = np.repeat(lines, len(marks)) + rng.normal(0, jitter * spacing, len(lines) * len(marks))
    odd = np.repeat(np.arange(len(lines)) % 2, len(marks)) * spacing / 2
    columns = np.tile(marks, len(lines)) + odd + rng.normal(0, jitter * spacing, len(rows))
    keep = (rows >= -margin) & (rows < height + margin) & (columns >= -margin) & (columns < width + margin)
    order = rng.permutation(int(keep.sum()))
    return rows[keep][order].astype(np.int64), columns[keep][order].astype(np.int64)
