"""Which nucleus stands where: crowds of each compartment, rings of glands, lining and blood of vessels."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import cast

import cv2
import numpy as np
import numpy.typing as npt

from pixcell_core.procedural.nuclei import NucleusBank, NucleusCanvas, NucleusKind, nucleus_bank
from pixcell_core.procedural.patient import PatientLook
from pixcell_core.procedural.texture import Fibres, FloatPlane, coarse_noise
from pixcell_core.procedural.tissue import Compartment, Layout, Outline, hexagonal

Integers = npt.NDArray[np.int64]
Angles = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Cells:
    """Everything cellular in a field of (H, W) pixels.

    `density` float32 (H, W), haematoxylin of the nuclei alone; `instances` int32 (H, W), 0 or a nucleus
    number; `kinds` uint8 (n + 1,), the `NucleusKind` of each number (entry 0 unused); `cell` int32 (H, W),
    the nearest nucleus; `reach` float32 (H, W), pixels to it; `mucin` and `blood` float32 (H, W), 0..1.
    """

    density: FloatPlane
    instances: npt.NDArray[np.int32]
    kinds: npt.NDArray[np.uint8]
    cell: npt.NDArray[np.int32]
    reach: FloatPlane
    mucin: FloatPlane
    blood: FloatPlane


@dataclass
class _Crowd:
    """Puts nuclei on a canvas and remembers what kind each one is."""

    rng: np.random.Generator
    bank: NucleusBank
    canvas: NucleusCanvas
    kinds: list[npt.NDArray[np.uint8]] = field(default_factory=lambda: [np.zeros(1, np.uint8)])

    def put(
        self, kind: NucleusKind, rows: Integers, columns: Integers, angle: Angles, overlap: float
    ) -> None:
        """Stamp nuclei of one kind at the positions given, where there is room."""
        which = self.bank.choose(self.rng, kind, angle)
        gains = np.exp(self.rng.normal(0, 0.1, len(rows))).astype(np.float32)
        kept = self.canvas.stamp(self.bank.stamps[kind], which, rows, columns, gains, overlap=overlap)
        self.kinds.append(np.full(len(kept), kind, np.uint8))

    def put_turned(self, kind: NucleusKind, rows: Integers, columns: Integers, overlap: float) -> None:
        """The same with directions at random."""
        self.put(kind, rows, columns, self.rng.uniform(0, np.pi, len(rows)), overlap)


def populate(
    rng: np.random.Generator, layout: Layout, collagen: Fibres, *, patient: PatientLook, mpp: float
) -> Cells:
    """Stamp every nucleus: ordered ones first (glands, vessels), then the crowd of each compartment."""
    height, width = layout.labels.shape
    bank = nucleus_bank(patient, mpp)
    canvas = NucleusCanvas.blank(height, width, bank.reach + 4)
    crowd = _Crowd(rng, bank, canvas)
    codes = layout.compartments
    present = set(np.unique(codes[::4, ::4]).tolist())
    patchy = coarse_noise(rng, height, width, 60 / mpp, octaves=2)

    def scatter(
        where: Compartment, spacing_um: float, jitter: float, keep: float, patches: float = 0.0
    ) -> tuple[Integers, Integers]:
        rows, columns = hexagonal(rng, height, width, spacing_um / mpp, jitter=jitter)
        chance = keep * (1 + patches * patchy[rows, columns])
        chosen = (codes[rows, columns] == where) & (rng.random(len(rows)) < chance)
        return rows[chosen], columns[chosen]

    if layout.glands:
        crowd.put(NucleusKind.COLUMNAR, *_ring(rng, layout, patient=patient, mpp=mpp), overlap=0.22)
    for vessel in layout.vessels:
        crowd.put(NucleusKind.SPINDLE, *_lining(rng, vessel, height, width, mpp=mpp), overlap=0.1)
    if Compartment.TUMOR in present:
        rows, columns = scatter(Compartment.TUMOR, 0.88 * patient.tumor_spacing_um, 0.2, 0.9, 0.12)
        dividing = rng.random(len(rows)) < patient.mitoses
        crowd.put_turned(NucleusKind.MITOSIS, rows[dividing], columns[dividing], 0.05)
        crowd.put_turned(NucleusKind.TUMOR, rows[~dividing], columns[~dividing], 0.13)
    if Compartment.LYMPHOID in present:
        rows, columns = scatter(Compartment.LYMPHOID, 0.9 * patient.lymphoid_spacing_um, 0.24, 0.84, 0.17)
        crowd.put_turned(NucleusKind.LYMPHOCYTE, rows, columns, 0.15)
    for where, spacing, infiltrate in (
        (Compartment.COLLAGEN, patient.stroma_spacing_um, 0.3 * patient.infiltrate),
        (Compartment.LAMINA, 1.05 * patient.stroma_spacing_um, 0.22 + 0.8 * patient.infiltrate),
    ):
        if where not in present:
            continue
        rows, columns = scatter(where, spacing, 0.28, 0.8, 0.21)
        tilt = np.asarray(collagen.angle_at(rows, columns) + rng.normal(0, 0.16, len(rows)), np.float64)
        crowd.put(NucleusKind.SPINDLE, rows, columns, tilt, 0.1)
        rows, columns = scatter(where, 9.0, 0.3, infiltrate, 1.0)
        crowd.put_turned(NucleusKind.LYMPHOCYTE, rows, columns, 0.1)

    instances = canvas.field(canvas.instances)
    cell, reach = _territories(instances)
    return Cells(
        density=canvas.field(canvas.density),
        instances=instances,
        kinds=np.concatenate(crowd.kinds),
        cell=cell,
        reach=reach,
        mucin=_mucin(rng, layout, patient=patient, mpp=mpp),
        blood=_blood(rng, layout, patient=patient, mpp=mpp),
    )


def _along(rng: np.random.Generator, wall: Outline, spacing: float, jitter: float) -> tuple[Angles, Angles]:
    """Points (n, 2) about `spacing` pixels apart along a wall, and the inward normals there."""
    ring = np.vstack([wall.points, wall.points[:1]])
    length = np.concatenate([[0.0], np.cumsum(np.linalg.norm(np.diff(ring, axis=0), axis=1))])
    count = max(int(length[-1] / spacing), 3)
    at = ((np.arange(count) + rng.normal(0, jitter, count)) * spacing + rng.uniform(0, spacing)) % length[-1]
    corner = np.clip(np.searchsorted(length, at) - 1, 0, len(wall.points) - 1)
    points = np.stack([np.interp(at, length, ring[:, 0]), np.interp(at, length, ring[:, 1])], axis=1)
    return points, wall.inward[corner]


def _within(points: Angles, height: int, width: int) -> tuple[Integers, Integers, npt.NDArray[np.bool_]]:
    """Rows and columns of points inside the field, and which points those are."""
    columns, rows = np.round(points[:, 0]).astype(np.int64), np.round(points[:, 1]).astype(np.int64)
    seen = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
    return rows[seen], columns[seen], seen


def _ring(
    rng: np.random.Generator, layout: Layout, *, patient: PatientLook, mpp: float
) -> tuple[Integers, Integers, Angles]:
    """Rows, columns and directions of the nuclei that line each gland's basement membrane."""
    height, width = layout.labels.shape
    points, angles = [], []
    for gland in layout.glands:
        at, inward = _along(rng, gland, 0.80 * patient.normal_nucleus_um / mpp, 0.2)
        points.append(at + inward * (patient.normal_nucleus_um / mpp) * rng.uniform(0.75, 1.35, (len(at), 1)))
        angles.append(np.arctan2(inward[:, 1], inward[:, 0]) + rng.normal(0, 0.15, len(at)))
    rows, columns, seen = _within(np.vstack(points), height, width)
    lined = layout.compartments[rows, columns] == Compartment.EPITHELIUM
    return rows[lined], columns[lined], np.concatenate(angles)[seen][lined]


def _lining(
    rng: np.random.Generator, vessel: Outline, height: int, width: int, *, mpp: float
) -> tuple[Integers, Integers, Angles]:
    """Rows, columns and directions of the flat nuclei around a vessel."""
    at, inward = _along(rng, vessel, rng.uniform(13, 22) / mpp, 0.2)
    rows, columns, seen = _within(at - inward * 1.2 / mpp, height, width)
    return rows, columns, (np.arctan2(inward[:, 1], inward[:, 0]) + np.pi / 2)[seen]


def _mucin(rng: np.random.Generator, layout: Layout, *, patient: PatientLook, mpp: float) -> FloatPlane:
    """Goblet vacuoles, 0..1: pale drops between the basal nuclei and the lumen."""
    plane = np.zeros(layout.labels.shape, np.float32)
    for gland in layout.glands:
        points, inward = _along(rng, gland, 8.0 / mpp, 0.15)
        shown = rng.random(len(points)) < patient.mucin
        depth = layout.epithelium_px * rng.uniform(0.52, 0.74, len(points))
        size = rng.uniform(3.2, 5.4, len(points)) / mpp
        level = rng.uniform(0.7, 1.0, len(points))
        for k in np.flatnonzero(shown).tolist():
            x, y = points[k] + inward[k] * depth[k]
            tilt = float(np.degrees(np.arctan2(inward[k, 1], inward[k, 0])))
            box = ((float(x), float(y)), (float(size[k] * 2.7), float(size[k] * 1.7)), tilt)
            cv2.ellipse(plane, box, float(level[k]), -1, cv2.LINE_AA)
    return plane


def _blood(rng: np.random.Generator, layout: Layout, *, patient: PatientLook, mpp: float) -> FloatPlane:
    """Red cells, 0..1: discs of 7 um lying inside vessels, some vessels full and some empty."""
    plane = np.zeros(layout.labels.shape, np.float32)
    for vessel in layout.vessels:
        fill = rng.beta(0.6, 0.6)
        low, high = vessel.points.min(axis=0), vessel.points.max(axis=0)
        count = int(fill * np.prod(high - low) * mpp * mpp / 40)
        for x, y in rng.uniform(low, high, (count, 2)).tolist():
            gap = cv2.pointPolygonTest(vessel.points.astype(np.float32), (x, y), True)
            if gap > 3.0 / mpp:
                level, radius = float(rng.uniform(0.6, 1.0)), float(rng.uniform(2.6, 3.6) / mpp)
                cv2.circle(
                    plane, (round(x * 8), round(y * 8)), round(radius * 8), level, -1, cv2.LINE_AA, shift=3
                )
    return plane


def _territories(instances: npt.NDArray[np.int32]) -> tuple[npt.NDArray[np.int32], FloatPlane]:
    """Nearest nucleus of every pixel and the distance to it in pixels."""
    outside = (instances == 0).astype(np.uint8)
    if outside.all():
        return np.zeros_like(instances), np.full(instances.shape, 1e3, np.float32)
    reach, component = cv2.distanceTransformWithLabels(
        outside, cv2.DIST_L2, 3, labelType=cv2.DIST_LABEL_PIXEL
    )
    inside = outside == 0
    table = np.zeros(int(component.max()) + 1, np.int32)
    table[component[inside]] = instances[inside]
    return table[component], cast(FloatPlane, reach)
