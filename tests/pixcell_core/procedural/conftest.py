"""Fields drawn once for all tests of the procedural package."""

from __future__ import annotations

import pytest

from pixcell_core.procedural import Field, TissueClass, patient_look, render_field, site_look


@pytest.fixture(scope="session")
def scanned() -> Field:
    """A mixed field as a site's scanner writes it."""
    return render_field(384, 448, site=site_look(3), patient=patient_look(3, 1), tissue=None, seed=11)


@pytest.fixture(scope="session")
def unscanned() -> Field:
    """The same kind of field through a perfect instrument: only dyes and 8-bit rounding remain."""
    site = site_look(3).without_scanner()
    return render_field(384, 384, site=site, patient=patient_look(3, 1), tissue=None, seed=11)


@pytest.fixture(scope="session")
def by_class() -> dict[TissueClass, list[Field]]:
    """Four patients of two sites per class, no glass."""
    return {
        tissue: [
            render_field(
                320,
                320,
                site=site_look(n % 2),
                patient=patient_look(n % 2, n),
                tissue=tissue,
                seed=100 + n,
                coverage=1.0,
            )
            for n in range(4)
        ]
        for tissue in TissueClass
    }
