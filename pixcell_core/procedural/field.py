"""A field of tissue: pixels, class labels, nuclei and dye concentrations, all from one seed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import cv2
import numpy as np
import numpy.typing as npt

from pixcell_core.errors import BadInputError
from pixcell_core.procedural.nuclei import NucleusBank, NucleusCanvas, NucleusKind, nucleus_bank
from pixcell_core.procedural.patient import PatientLook
from pixcell_core.procedural.stain import RGB, SiteLook, scan, transmit
from pixcell_core.procedural.texture import Fibres, FloatPlane, coarse_noise, fibres, generator, grain
from pixcell_core.procedural.tissue import Compartment, Layout, TissueClass, hexagonal, plan

#: Smallest side that can be rendered, pixels.
MIN_SIDE = 32


@dataclass(frozen=True)
class Field:
    """A rendered field of (H, W) pixels.

    `rgb` uint8 (H, W, 3); `labels` uint8 (H, W), 0 for glass, else `TissueClass.code`; `nuclei` int32 (H, W), 0 or the
    number of the nucleus; `nucleus_kinds` uint8 (n + 1,), the kind of each nucleus number (entry 0 unused);
    `compartments` uint8 (H, W), values of `Compartment`; `haematoxylin` and `eosin` float32 (H, W), optical density.
    """

    rgb: RGB
    labels: npt.NDArray[np.uint8]
    nuclei: npt.NDArray[np.int32]
    nucleus_kinds: npt.NDArray[np.uint8]
    compartments: npt.NDArray[np.uint8]
    haematoxylin: FloatPlane
    eosin: FloatPlane
    site: SiteLook
    mpp: float


@dataclass(frozen=True)
class _Cells:
    """Nuclei of a field and the cells around them: `cell` is the nearest nucleus, `reach` the distance to it (px)."""

    density: FloatPlane
    instances: npt.NDArray[np.int32]
    kinds: npt.NDArray[np.uint8]
    cell: npt.NDArray[np.int32]
    reach: FloatPlane
    mucin: FloatPlane


def render_field(
    height: int,
    width: int,
    *,
    mpp: float = 0.5,
    site: SiteLook,
    patient: PatientLook,
    tissue: TissueClass | None,
    seed: int,
    coverage: float = 0.86,
) -> Field:
    """Draw a field of `height` x `width` pixels at `mpp` micrometres per pixel.

    `tissue` dominates the field (about four fifths of it); None mixes all classes. `coverage` is the share of the
    field that is tissue; 1 leaves no glass. Equal arguments give equal pixels. Raises BadInputError for a size,
    scale or coverage that cannot be drawn.
    """
    if min(height, width) < MIN_SIDE or not 0.1 <= mpp <= 4.0 or not 0.0 < coverage <= 1.0:
        raise BadInputError(
            f"Cannot draw a field of {height} x {width} pixels at {mpp} um/px with coverage {coverage}.",
            hint=f"Use sides of at least {MIN_SIDE} pixels, 0.1 to 4 um/px, and a coverage above 0 and at most 1.",
        )
    rng = generator(0xF1E1D, site.seed, patient.seed, seed)
    layout = plan(rng, height, width, mpp=mpp, patient=patient, tissue=tissue, coverage=coverage)
    collagen = fibres(
        rng,
        height,
        width,
        angle=patient.fibre_angle,
        wavelength=patient.fibre_wavelength_um / mpp,
        width_px=patient.fibre_width_um / mpp,
    )
    cells = _place_cells(rng, layout, collagen, patient=patient, mpp=mpp)
    haematoxylin, eosin = _dye(rng, layout, collagen, cells, site=site, patient=patient, mpp=mpp)
    channels = transmit(site, [(haematoxylin, site.haematoxylin), (eosin, site.eosin)])
    return Field(
        rgb=scan(site, channels, mpp=mpp, rng=rng),
        labels=layout.labels,
        nuclei=cells.instances,
        nucleus_kinds=cells.kinds,
        compartments=layout.compartments,
        haematoxylin=haematoxylin,
        eosin=eosin,
        site=site,
        mpp=mpp,
    )


def _place_cells(
    rng: np.random.Generator, layout: Layout, collagen: Fibres, *, patient: PatientLook, mpp: float
) -> _Cells:
    """Stamp every nucleus: glands first (they are ordered), then the crowd of each compartment."""
    height, width = layout.labels.shape
    bank = nucleus_bank(patient, mpp)
    canvas = NucleusCanvas.blank(height, width, bank.reach + 4)
    kinds: list[npt.NDArray[np.uint8]] = [np.zeros(1, np.uint8)]

    def put(
        kind: NucleusKind,
        rows: npt.NDArray[np.int64],
        columns: npt.NDArray[np.int64],
        angle: npt.NDArray[np.float64],
        *,
        overlap: float,
    ) -> None:
        which = bank.choose(rng, kind, angle)
        gains = np.exp(rng.normal(0, 0.1, len(rows))).astype(np.float32)
        kept = canvas.stamp(bank.stamps[kind], which, rows, columns, gains, overlap=overlap)
        kinds.append(np.full(len(kept), kind, np.uint8))

    if layout.glands:
        put(NucleusKind.COLUMNAR, *_basal(rng, layout, patient=patient, mpp=mpp), overlap=0.25)
    codes = layout.compartments

    def crowd(compartment: Compartment, spacing_um: float, jitter: float, keep: float) -> tuple[
        npt.NDArray[np.int64], npt.NDArray[np.int64]
    ]:
        rows, columns = hexagonal(rng, height, width, spacing_um / mpp, jitter=jitter)
        chosen = (codes[rows, columns] == compartment) & (rng.random(len(rows)) < keep)
        return rows[chosen], columns[chosen]

    def any_angle(count: int) -> npt.NDArray[np.float64]:
        return rng.uniform(0, np.pi, count)

    rows, columns = crowd(Compartment.TUMOR, patient.tumor_spacing_um, 0.16, 0.95)
    dividing = rng.random(len(rows)) < patient.mitoses
    put(NucleusKind.MITOSIS, rows[dividing], columns[dividing], any_angle(int(dividing.sum())), overlap=0.05)
    put(NucleusKind.TUMOR, rows[~dividing], columns[~dividing], any_angle(int((~dividing).sum())), overlap=0.14)
    rows, columns = crowd(Compartment.LYMPHOID, patient.lymphoid_spacing_um, 0.13, 0.93)
    put(NucleusKind.LYMPHOCYTE, rows, columns, any_angle(len(rows)), overlap=0.2)
    rows, columns = crowd(Compartment.COLLAGEN, patient.stroma_spacing_um, 0.28, 0.85)
    tilt = collagen.angle_at(rows, columns) + rng.normal(0, 0.16, len(rows))
    put(NucleusKind.SPINDLE, rows, columns, np.asarray(tilt, np.float64), overlap=0.1)
    rows, columns = crowd(Compartment.COLLAGEN, 9.0, 0.3, 0.35 * patient.infiltrate)
    put(NucleusKind.LYMPHOCYTE, rows, columns, any_angle(len(rows)), overlap=0.1)

    instances = np.ascontiguousarray(canvas.cropped(canvas.instances), np.int32)
    density = np.ascontiguousarray(canvas.cropped(canvas.density), np.float32)
    cell, reach = _territories(instances)
    mucin = _mucin(rng, layout, bank, patient=patient, mpp=mpp)
    return _Cells(density, instances, np.concatenate(kinds), cell, reach, mucin)


def _basal(
    rng: np.random.Generator, layout: Layout, *, patient: PatientLook, mpp: float
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Positions (rows, columns) and directions of the nuclei that line each gland's basement membrane."""
    height, width = layout.labels.shape
    points, angles = [], []
    spacing = 0.86 * patient.normal_nucleus_um / mpp
    for gland in layout.glands:
        ring = np.vstack([gland.points, gland.points[:1]])
        length = np.concatenate([[0.0], np.cumsum(np.linalg.norm(np.diff(ring, axis=0), axis=1))])
        count = max(int(length[-1] / spacing), 4)
        at = (np.arange(count) + rng.normal(0, 0.18, count)) * spacing + rng.uniform(0, spacing)
        corner = np.clip(np.searchsorted(length, at % length[-1]) - 1, 0, len(gland.points) - 1)
        depth = patient.normal_nucleus_um / mpp * rng.uniform(0.75, 1.25, (count, 1))
        along = np.stack(
            [np.interp(at % length[-1], length, ring[:, 0]), np.interp(at % length[-1], length, ring[:, 1])], axis=1
        )
        points.append(along + gland.inward[corner] * depth)
        angles.append(np.arctan2(gland.inward[corner, 1], gland.inward[corner, 0]) + rng.normal(0, 0.15, count))
    where, turn = np.vstack(points), np.concatenate(angles)
    columns, rows = np.round(where[:, 0]).astype(np.int64), np.round(where[:, 1]).astype(np.int64)
    seen = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
    rows, columns, turn = rows[seen], columns[seen], turn[seen]
    lined = layout.compartments[rows, columns] == Compartment.EPITHELIUM
    return rows[lined], columns[lined], turn[lined]


def _mucin(
    rng: np.random.Generator, layout: Layout, bank: NucleusBank, *, patient: PatientLook, mpp: float
) -> FloatPlane:
    """Goblet vacuoles, 0..1: pale drops between the basal nuclei and the lumen."""
    height, width = layout.labels.shape
    plane = np.zeros((height, width), np.float32)
    for gland in layout.glands:
        stride = max(int(round(len(gland.points) * 7.0 / (2 * np.pi * patient.gland_radius_um))), 1)
        for k in range(int(rng.integers(stride)), len(gland.points), stride):
            if rng.random() > patient.mucin:
                continue
            depth = layout.epithelium_px * rng.uniform(0.58, 0.76)
            x, y = gland.points[k] + gland.inward[k] * depth
            size = rng.uniform(2.6, 4.4) / mpp
            tilt = float(np.degrees(np.arctan2(gland.inward[k, 1], gland.inward[k, 0])))
            cv2.ellipse(
                plane, ((float(x), float(y)), (size * 2.6, size * 1.7), tilt), float(rng.uniform(0.6, 1.0)), -1,
                cv2.LINE_AA,
            )
    return plane


def _territories(instances: npt.NDArray[np.int32]) -> tuple[npt.NDArray[np.int32], FloatPlane]:
    """Nearest nucleus of every pixel and the distance to it."""
    outside = (instances == 0).astype(np.uint8)
    if not outside.all():
        reach, component = cv2.distanceTransformWithLabels(outside, cv2.DIST_L2, 3, labelType=cv2.DIST_LABEL_PIXEL)
        inside = outside == 0
        table = np.zeros(int(component.max()) + 1, np.int32)
        table[component[inside]] = instances[inside]
        return table[component], cast(FloatPlane, reach)
    return np.zeros_like(instances), np.full(instances.shape, 1e3, np.float32)


def _by_compartment(codes: npt.NDArray[np.uint8], **values: float) -> FloatPlane:
    """A plane that holds one value per compartment, 0 where none is given."""
    table = np.zeros(256, np.float32)
    for name, value in values.items():
        table[Compartment[name]] = value
    return cast(FloatPlane, cv2.LUT(codes, table))


def _dye(
    rng: np.random.Generator,
    layout: Layout,
    collagen: Fibres,
    cells: _Cells,
    *,
    site: SiteLook,
    patient: PatientLook,
    mpp: float,
) -> tuple[FloatPlane, FloatPlane]:
    """Concentrations of haematoxylin and eosin over the field."""
    height, width = layout.labels.shape
    codes = layout.compartments
    fine = grain(rng, height, width, 0.45 / mpp)
    rough = coarse_noise(rng, height, width, 9 / mpp, octaves=2)
    tint = rng.normal(0, 1, len(cells.kinds)).astype(np.float32)[cells.cell]

    eosin = _by_compartment(codes, TUMOR=0.42, COLLAGEN=0.50, EPITHELIUM=0.40, LYMPHOID=0.30, LUMEN=0.03)
    eosin += _by_compartment(codes, TUMOR=0.07, COLLAGEN=0.03, EPITHELIUM=0.05, LYMPHOID=0.06) * fine
    eosin += _by_compartment(codes, TUMOR=0.05, COLLAGEN=0.05, EPITHELIUM=0.02, LYMPHOID=0.08, LUMEN=0.03) * rough
    eosin += _by_compartment(codes, TUMOR=0.05, EPITHELIUM=0.05, LYMPHOID=0.03) * tint
    eosin += _by_compartment(codes, COLLAGEN=0.17) * collagen.texture
    gap = np.clip(collagen.texture * -1.0 - np.float32(1.6 - 0.9 * patient.looseness), 0, 1)
    eosin *= 1 - _by_compartment(codes, COLLAGEN=0.95) * np.minimum(2.5 * gap, 1)
    border = np.zeros((height, width), np.float32)
    border[:-1] += cells.cell[:-1] != cells.cell[1:]
    border[:, :-1] += cells.cell[:, :-1] != cells.cell[:, 1:]
    eosin += _by_compartment(codes, TUMOR=0.10, EPITHELIUM=0.09) * np.minimum(border, 1)
    empty = np.clip((cells.reach - np.float32(4.2 / mpp)) / np.float32(2.5 / mpp), 0, 1)
    eosin *= 1 - _by_compartment(codes, TUMOR=0.45, LYMPHOID=0.8) * empty
    haematoxylin = _by_compartment(codes, TUMOR=0.20, COLLAGEN=0.03, EPITHELIUM=0.10, LYMPHOID=0.12, LUMEN=0.01)
    if layout.gland_depth is not None:
        apical = np.clip(layout.gland_depth / np.float32(layout.epithelium_px), 0, 1)
        pale = _by_compartment(codes, EPITHELIUM=1.0)
        eosin *= 1 - 0.35 * pale * apical
        haematoxylin *= 1 - 0.5 * pale * apical
        drop = cells.mucin * pale
        eosin *= 1 - 0.82 * drop
        haematoxylin += np.float32(0.04) * drop
    haematoxylin *= 1 + np.float32(0.25) * fine

    solid = np.minimum(cells.density * np.float32(1.6), 1)
    eosin *= 1 - np.float32(0.65) * solid
    haematoxylin *= 1 - solid
    haematoxylin += cells.density * (1 + np.float32(0.10) * fine)
    thickness = 1 + np.float32(patient.thickness_variation) * coarse_noise(rng, height, width, 180 / mpp)
    for plane, strength in (
        (haematoxylin, site.haematoxylin_strength * patient.haematoxylin),
        (eosin, site.eosin_strength * patient.eosin),
    ):
        plane *= thickness
        plane *= np.float32(strength)
        np.maximum(plane, 0, out=plane)
    return haematoxylin, eosin
