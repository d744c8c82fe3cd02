"""Procedural H&E: tissue drawn from a seed, for demonstrations, tests and starter training.

Nothing here was measured on a person. A *site* fixes dyes and scanner, a *patient* fixes how the tissue is
built, a *seed* fixes where every cell lies; the same three give the same pixels, and any change of one
gives new geometry.
"""

from pixcell_core.procedural.field import Field, render_field
from pixcell_core.procedural.ihc import positive_nuclei, render_ihc
from pixcell_core.procedural.patient import PatientLook, patient_look
from pixcell_core.procedural.stain import SiteLook, separate, site_look
from pixcell_core.procedural.tissue import TissueClass

__all__ = [
    "Field",
    "PatientLook",
    "SiteLook",
    "TissueClass",
    "patient_look",
    "positive_nuclei",
    "render_field",
    "render_ihc",
    "separate",
    "site_look",
]
