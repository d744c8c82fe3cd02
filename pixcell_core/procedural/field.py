"""A field of tissue: pixels, class labels, nuclei and dye concentrations, all from one seed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import cv2
import numpy as np
import numpy.typing as npt

from pixcell_core.errors import BadInputError
from pixcell_core.procedural.cells import Cells, populate
from pixcell_core.procedural.patient import PatientLook
from pixcell_core.procedural.stain import RGB, SiteLook, scan, transmit
from pixcell_core.procedural.texture import Fibres, FloatPlane, coarse_noise, fibres, generator, grain
from pixcell_core.procedural.tissue import Compartment, Layout, TissueClass, plan

#: Smallest side that can be rendered, pixels.
MIN_SIDE = 32


@dataclass(frozen=True)
class Field:
    """A rendered field of (H, W) pixels.

    `rgb` uint8 (H, W, 3); `labels` uint8 (H, W), 0 for glass, else `TissueClass.code`; `nuclei` int32 (H,
    W), 0 or the number of the nucleus; `nucleus_kinds` uint8 (n + 1,), the kind of each nucleus number
    (entry 0 unused); `compartments` uint8 (H, W), values of `Compartment`; `haematoxylin` and `eosin`
    float32 (H, W), optical density.
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

    `tissue` dominates the field (about four fifths of it); None mixes all classes. `coverage` is the share
    of the field that is tissue; 1 leaves no glass. Equal arguments give equal pixels. Raises BadInputError
    for a size, scale or coverage that cannot be drawn.
    """
    if min(height, width) < MIN_SIDE or not 0.1 <= mpp <= 4.0 or not 0.0 < coverage <= 1.0:
        raise BadInputError(
            f"Cannot draw a field of {height} x {width} pixels at {mpp} um/px with coverage {coverage}.",
            hint=f"Use sides from {MIN_SIDE} pixels, 0.1 to 4 um/px, and a coverage above 0 and at most 1.",
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
    cells = populate(rng, layout, collagen, patient=patient, mpp=mpp)
    haematoxylin, eosin = _dye(rng, layout, collagen, cells, site=site, patient=patient, mpp=mpp)
    layout.compartments[(cells.mucin > 0.35) & (layout.compartments == Compartment.EPITHELIUM)] = (
        Compartment.MUCIN
    )
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
    cells: Cells,
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

    eosin = _by_compartment(
        codes, TUMOR=0.46, COLLAGEN=0.50, EPITHELIUM=0.46, LYMPHOID=0.34, LUMEN=0.03, LAMINA=0.34
    )
    eosin += (
        _by_compartment(codes, TUMOR=0.07, COLLAGEN=0.035, EPITHELIUM=0.06, LYMPHOID=0.06, LAMINA=0.05) * fine
    )
    eosin += (
        _by_compartment(
            codes, TUMOR=0.085, COLLAGEN=0.07, EPITHELIUM=0.04, LYMPHOID=0.11, LUMEN=0.04, LAMINA=0.10
        )
        * rough
    )
    eosin += _by_compartment(codes, TUMOR=0.06, EPITHELIUM=0.06, LYMPHOID=0.03) * tint
    eosin += _by_compartment(codes, COLLAGEN=0.13, LAMINA=0.12) * collagen.texture
    gap = np.clip(np.float32(2.0 * patient.looseness - 3.0) - 1.6 * collagen.texture, 0, 1)
    eosin *= 1 - _by_compartment(codes, COLLAGEN=0.85) * gap
    gap = np.clip(np.float32(0.7 * patient.looseness - 0.9) - collagen.texture - 0.55 * rough, 0, 1)
    eosin *= 1 - _by_compartment(codes, LAMINA=0.8) * gap
    border = np.zeros((height, width), np.float32)
    border[:-1] += cells.cell[:-1] != cells.cell[1:]
    border[:, :-1] += cells.cell[:, :-1] != cells.cell[:, 1:]
    eosin += _by_compartment(codes, TUMOR=0.16, EPITHELIUM=0.18) * np.minimum(border, 1)
    empty = np.clip((cells.reach - np.float32(4.6 / mpp)) / np.float32(2.5 / mpp), 0, 1)
    eosin *= 1 - _by_compartment(codes, TUMOR=0.3, LYMPHOID=0.85) * empty
    haematoxylin = _by_compartment(
        codes, TUMOR=0.25, COLLAGEN=0.04, EPITHELIUM=0.16, LYMPHOID=0.14, LUMEN=0.01, LAMINA=0.05
    )
    haematoxylin *= 1 - _by_compartment(codes, LYMPHOID=0.8) * empty
    if layout.gland_depth is not None:
        apical = np.clip(layout.gland_depth / np.float32(layout.epithelium_px), 0, 1)
        pale = _by_compartment(codes, EPITHELIUM=1.0)
        eosin *= 1 - 0.25 * pale * apical
        haematoxylin *= 1 - 0.5 * pale * apical
        drop = cells.mucin * pale
        eosin *= 1 - 0.9 * drop
        haematoxylin *= 1 - 0.4 * drop
    if layout.vessels:
        eosin += np.float32(0.85) * cells.blood
    haematoxylin *= 1 + np.float32(0.25) * fine

    solid = np.minimum(cells.density * np.float32(1.6), 1)
    eosin *= 1 - np.float32(0.65) * solid
    haematoxylin *= 1 - solid
    haematoxylin += cells.density * (1 + np.float32(0.15) * fine)
    thickness = 1 + np.float32(patient.thickness_variation) * coarse_noise(rng, height, width, 180 / mpp)
    for plane, strength in (
        (haematoxylin, site.haematoxylin_strength * patient.haematoxylin),
        (eosin, site.eosin_strength * patient.eosin),
    ):
        plane *= thickness
        plane *= np.float32(strength)
        np.maximum(plane, 0, out=plane)
    return haematoxylin, eosin
