"""Paired immunohistochemistry: the same field, the same nuclei, stained for a marker instead."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from pixcell_core.errors import BadInputError
from pixcell_core.procedural.field import Field
from pixcell_core.procedural.nuclei import NucleusKind
from pixcell_core.procedural.stain import RGB, scan, transmit
from pixcell_core.procedural.texture import FloatPlane, coarse_noise, generator, grain
from pixcell_core.procedural.tissue import Compartment

#: Share of nuclei of each kind that proliferate, for Ki67.
KI67_SHARE = {
    NucleusKind.TUMOR: 0.42,
    NucleusKind.MITOSIS: 1.0,
    NucleusKind.COLUMNAR: 0.10,
    NucleusKind.LYMPHOCYTE: 0.05,
    NucleusKind.SPINDLE: 0.015,
}
MARKERS = ("Ki67", "PanCK")


def positive_nuclei(field: Field, *, seed: int) -> npt.NDArray[np.bool_]:
    """Which nuclei are Ki67-positive, bool (n + 1,), indexed by nucleus number; entry 0 is False."""
    rng = generator(0x1C1, field.site.seed, seed)
    shares = np.zeros(256)
    for kind, share in KI67_SHARE.items():
        shares[kind] = share
    chosen = rng.random(len(field.nucleus_kinds)) < shares[field.nucleus_kinds]
    chosen[0] = False
    return np.asarray(chosen)


def dab_density(field: Field, *, marker: str, seed: int) -> FloatPlane:
    """DAB optical density, float32 (H, W): exactly 0 wherever the marker is absent.

    Ki67 is nuclear; PanCK fills the cytoplasm of tumour and gland epithelium. Raises BadInputError for
    another name.
    """
    if marker not in MARKERS:
        raise BadInputError(
            f"No procedural stain is known for the marker {marker!r}.",
            hint=f"Use one of: {', '.join(MARKERS)}.",
        )
    height, width = field.labels.shape
    rng = generator(0xDAB, field.site.seed, seed)
    texture = 1 + np.float32(0.12) * grain(rng, height, width, 0.5 / field.mpp)
    if marker == "Ki67":
        chosen = positive_nuclei(field, seed=seed)
        strength = np.where(chosen, rng.lognormal(-0.1, 0.35, len(chosen)), 0).astype(np.float32)
        return np.asarray(strength[field.nuclei] * np.maximum(texture, 0.3), np.float32)
    epithelium = (field.compartments == Compartment.TUMOR) | (field.compartments == Compartment.EPITHELIUM)
    cytoplasm = (epithelium & (field.nuclei == 0)).astype(np.float32)
    uneven = np.clip(1 + 0.28 * coarse_noise(rng, height, width, 40 / field.mpp), 0.4, None)
    return np.asarray(cytoplasm * uneven * np.maximum(texture, 0.3) * np.float32(0.85), np.float32)


def render_ihc(field: Field, *, marker: str = "Ki67", seed: int) -> RGB:
    """The IHC partner of a field, uint8 (H, W, 3): counterstain and DAB, registered to the pixel."""
    dab = dab_density(field, marker=marker, seed=seed)
    counterstain = np.minimum(field.haematoxylin, 2.0) * np.float32(0.55) + np.float32(0.08) * field.eosin
    channels = transmit(field.site, [(counterstain, field.site.haematoxylin), (dab, field.site.dab)])
    rng = generator(0x5CA, field.site.seed, seed)
    return scan(field.site, channels, mpp=field.mpp, rng=rng)
