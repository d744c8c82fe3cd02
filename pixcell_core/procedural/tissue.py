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
    LAMINA = 6
    MUCIN = 7


#: What fills a region before its architecture is drawn into it.
GROUND = {
    TissueClass.tumor: Compartment.TUMOR,
    TissueClass.stroma: Compartment.COLLAGEN,
    TissueClass.gland: Compartment.LAMINA,
    TissueClass.lymphoid: Compartment.LYMPHOID,
}


@dataclass(frozen=True)
class Outline:
    """A closed wall of a gland or a vessel: `points` (n, 2) as x, y in pixels, inward normals (n, 2)."""

    points: npt.NDArray[np.float64]
    inward: npt.NDArray[np.float64]


@dataclass(frozen=True)
class Layout:
    """The plan of a field: class `labels`, `compartments`, walls, and depth into the gland in pixels."""

    labels: Codes
    compartments: Codes
    glands: tuple[Outline, ...]
    vessels: tuple[Outline, ...]
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

    table = np.zeros(256, np.uint8)
    for tissue_class, compartment in GROUND.items():
        table[tissue_class.code] = compartment
    compartments = np.asarray(cv2.LUT(labels, table), np.uint8)
    _architecture(rng, compartments, patient=patient, mpp=mpp)
    depth: FloatPlane | None = None
    if glands:
        inside = ((membrane > 0) & (labels > 0)).astype(np.uint8)
        depth = np.asarray(cv2.distanceTransform(inside, cv2.DIST_L2, 3), np.float32)
        apical = np.float32(0.10 * epithelium_px) * coarse_noise(rng, height, width, 9 / mpp, octaves=2)
        compartments[inside > 0] = Compartment.EPITHELIUM
        compartments[depth + apical > epithelium_px] = Compartment.LUMEN
    vessels = _vessels(rng, compartments, patient=patient, mpp=mpp)
    return Layout(labels, compartments, glands, vessels, depth, epithelium_px)


def _regions(
    rng: np.random.Generator, height: int, width: int, *, mpp: float, tissue: TissueClass | None
) -> Codes:
    """Class of every pixel: the strongest of one smooth field per class, the dominant one lifted."""
    rows, columns = -(-height // COARSE), -(-width // COARSE)
    scores = np.stack([smooth_noise(rng, rows, columns, 150 / mpp / COARSE, octaves=3) for _ in TissueClass])
    scores[TissueClass.lymphoid.code - 1] -= 0.5
    if tissue is not None:
        lead = tissue.code - 1
        rest = np.delete(scores, lead, axis=0).max(axis=0)
        share = rng.uniform(0.8, 0.97)
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
    outer += 0.43 * smooth_noise(rng, rows, columns, 130 / mpp / COARSE, octaves=4)
    empty = (
        resize(outer - np.quantile(outer, min(coverage + 0.02, 1.0)).astype(np.float32), height, width) > 0
    )
    # A tear follows the zero line of one smooth field and opens as wide as another one says.
    course = np.abs(smooth_noise(rng, rows, columns, 200 / mpp / COARSE, octaves=3))
    opening = smooth_noise(rng, rows, columns, 90 / mpp / COARSE, octaves=2)
    empty |= resize(course - np.float32(0.05) * np.clip(opening - 0.63, -0.07, 0.84), height, width) < 0
    return empty.astype(np.uint8)


def _architecture(rng: np.random.Generator, compartments: Codes, *, patient: PatientLook, mpp: float) -> None:
    """Divide tumour into nests by collagen septa, and open malignant lumina in it."""
    height, width = compartments.shape
    tumor = compartments == Compartment.TUMOR
    if not tumor.any():
        return
    septa = np.abs(coarse_noise(rng, height, width, 80 / mpp, octaves=3)) < 0.0112 * patient.septa_um
    compartments[septa & tumor] = Compartment.COLLAGEN
    if patient.lumina > 0.15:
        hollow = coarse_noise(rng, height, width, 34 / mpp, octaves=3) > 1.6 - 0.63 * patient.lumina
        compartments[hollow & tumor & ~septa] = Compartment.LUMEN


def _wall(
    rng: np.random.Generator, row: float, column: float, radius: float, wobble: float, squash: float
) -> Outline:
    """A wavy closed wall around a centre; `squash` is the ratio of its short axis to its long one."""
    angle = np.linspace(0, 2 * np.pi, 72, endpoint=False)
    r = np.ones_like(angle)
    for order in (2, 3, 4, 5, 7):
        r += rng.normal(0, wobble / order**0.5) * np.cos(order * angle + rng.uniform(0, 2 * np.pi))
    r = radius * np.clip(r, 0.45, 1.1)
    turn = rng.uniform(0, np.pi)
    x, y = r * np.cos(angle), r * np.sin(angle) * squash
    points = np.stack(
        [column + np.cos(turn) * x - np.sin(turn) * y, row + np.sin(turn) * x + np.cos(turn) * y], axis=1
    )
    tangent = np.roll(points, -1, axis=0) - np.roll(points, 1, axis=0)
    inward = np.stack([-tangent[:, 1], tangent[:, 0]], axis=1)
    return Outline(points, inward / np.maximum(np.linalg.norm(inward, axis=1, keepdims=True), 1e-6))


def _fill(plane: Codes, wall: Outline, value: int) -> None:
    """Fill a wall's inside, with sub-pixel corners."""
    cv2.fillPoly(plane, [np.round(wall.points * 16).astype(np.int32)], value, shift=4)


def _glands(
    rng: np.random.Generator, labels: Codes, glass: Codes, *, patient: PatientLook, mpp: float
) -> tuple[tuple[Outline, ...], Codes]:
    """Pack glands into the gland regions: their outlines, and a mask of what lies within them."""
    height, width = labels.shape
    membrane = np.zeros((height, width), np.uint8)
    radius = patient.gland_radius_um / mpp
    rows, columns = hexagonal(rng, height, width, 1.98 * radius, jitter=0.06, margin=radius)
    inside = np.clip(rows, 0, height - 1), np.clip(columns, 0, width - 1)
    chosen = (labels[inside] == TissueClass.gland.code) & (glass[inside] == 0)
    walls = []
    for row, column in zip(rows[chosen], columns[chosen], strict=True):
        wall = _wall(rng, row, column, radius * rng.uniform(0.86, 1.04), 0.09, rng.uniform(0.78, 1.0))
        walls.append(wall)
        _fill(membrane, wall, 1)
    return tuple(walls), membrane


def _vessels(
    rng: np.random.Generator, compartments: Codes, *, patient: PatientLook, mpp: float
) -> tuple[Outline, ...]:
    """Open a few small vessels in collagen; their lumen is written into `compartments`."""
    height, width = compartments.shape
    area_mm2 = height * width * (mpp / 1000) ** 2
    walls = []
    for _ in range(int(rng.poisson(40 * patient.blood * area_mm2))):
        row, column = float(rng.uniform(0, height)), float(rng.uniform(0, width))
        wall = _wall(rng, row, column, rng.uniform(6, 20) / mpp, 0.1, rng.uniform(0.35, 0.9))
        at = np.clip(np.round(wall.points).astype(int), 0, [width - 1, height - 1])
        around = compartments[at[:, 1], at[:, 0]]
        if np.all((around == Compartment.COLLAGEN) | (around == Compartment.LAMINA)):
            _fill(compartments, wall, int(Compartment.LUMEN))
            walls.append(wall)
    return tuple(walls)


def hexagonal(
    rng: np.random.Generator, height: int, width: int, spacing: float, *, jitter: float, margin: float = 0.0
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Rows and columns of a jittered hexagonal lattice over the field and `margin`, in random order."""
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
