"""How one patient's tissue is built: what stays the same across all slides of that patient."""

from __future__ import annotations

from dataclasses import dataclass

from pixcell_core.procedural.texture import generator


@dataclass(frozen=True)
class PatientLook:
    """One patient's variation. Lengths are in micrometres, angles in radians, the rest are factors around 1.

    `tumor_nucleus_um` and `normal_nucleus_um` are mean nuclear diameters; `tumor_spacing_um`,
    `stroma_spacing_um` and `lymphoid_spacing_um` are distances between neighbouring nuclei; `pleomorphism`
    is the relative spread of tumour nuclear size; `chromatin` scales the roughness of nuclear texture;
    `septa_um` is how wide the septa between tumour nests are; `lumina` how gland-forming the tumour is;
    `infiltrate` the share of lymphocytes in stroma; `mucin` the share of goblet cells; `looseness` the
    share of empty space between fibres.
    """

    seed: int
    tumor_nucleus_um: float
    normal_nucleus_um: float
    pleomorphism: float
    eccentricity: float
    chromatin: float
    nucleoli: float
    mitoses: float
    tumor_spacing_um: float
    stroma_spacing_um: float
    lymphoid_spacing_um: float
    septa_um: float
    lumina: float
    infiltrate: float
    gland_radius_um: float
    mucin: float
    fibre_angle: float
    fibre_wavelength_um: float
    fibre_width_um: float
    looseness: float
    blood: float
    haematoxylin: float
    eosin: float
    thickness_variation: float


def patient_look(site_seed: int, patient_seed: int) -> PatientLook:
    """Draw a patient; the same two seeds give the same one, equal numbers at two sites are two patients."""
    rng = generator(0x9A71E17, site_seed, patient_seed)
    nucleus = rng.uniform(8.2, 11.2)
    return PatientLook(
        seed=int(rng.integers(1 << 62)),
        tumor_nucleus_um=nucleus,
        normal_nucleus_um=rng.uniform(6.2, 7.4),
        pleomorphism=rng.uniform(0.12, 0.26),
        eccentricity=rng.uniform(1.12, 1.5),
        chromatin=rng.uniform(0.6, 1.4),
        nucleoli=rng.uniform(0.1, 0.8),
        mitoses=rng.uniform(0.002, 0.015),
        tumor_spacing_um=nucleus * rng.uniform(1.0, 1.25),
        stroma_spacing_um=rng.uniform(15.0, 24.0),
        lymphoid_spacing_um=rng.uniform(6.2, 7.6),
        septa_um=rng.uniform(3.0, 10.0),
        lumina=rng.beta(0.7, 1.0),
        infiltrate=rng.uniform(0.02, 0.3),
        gland_radius_um=rng.uniform(36.0, 62.0),
        mucin=rng.uniform(0.15, 0.9),
        fibre_angle=rng.uniform(0.0, 3.14159),
        fibre_wavelength_um=rng.uniform(28.0, 75.0),
        fibre_width_um=rng.uniform(0.9, 1.8),
        looseness=rng.uniform(0.1, 0.9),
        blood=rng.uniform(0.0, 1.0),
        haematoxylin=rng.uniform(0.85, 1.18),
        eosin=rng.uniform(0.8, 1.2),
        thickness_variation=rng.uniform(0.055, 0.14),
    )
