"""Several sites: the worst one under a declared assumption, the composition without it, both always shown."""

from __future__ import annotations

import math

import pytest

from pixcell_core.errors import BadInputError
from pixcell_core.private.accounting import GaussianEvent, epsilon
from pixcell_core.private.closed_form import gaussian_epsilon
from pixcell_core.private.consortium import consortium_epsilon

SITES = {"north": [GaussianEvent(1.0, 8.0, 50)], "south": [GaussianEvent(1.0, 5.0, 50)], "new": []}


def test_disjoint_patients_are_touched_by_their_own_site_alone() -> None:
    found = consortium_epsilon(SITES, 1e-5, disjoint=True)
    assert found.stated == found.worst == epsilon(SITES["south"], 1e-5)
    assert found.worst_site == "south" and found.per_site["new"].value == 0.0
    assert "declared by the sites, not proved" in str(found)
    both = gaussian_epsilon(math.sqrt(50 / 64 + 50 / 25), 1e-5)
    assert found.composed.value == pytest.approx(both, abs=1e-3)
    assert f"without that assumption epsilon {math.ceil(found.composed.value * 100) / 100:.2f}" in str(found)


def test_shared_patients_compose_over_all_sites() -> None:
    found = consortium_epsilon(SITES, 1e-5, disjoint=False)
    assert found.stated == found.composed and found.stated.value > found.worst.value
    assert "nothing is assumed" in found.assumption
    # Composition is tighter than adding the sites' epsilons up, and never below the worst of them.
    assert found.worst.value < found.composed.value < sum(e.value for e in found.per_site.values())
    for part in ("per patient", "delta 1e-05", "south"):
        assert part in str(found), part


def test_no_site_and_a_bad_delta_are_refused() -> None:
    with pytest.raises(BadInputError, match="no site"):
        consortium_epsilon({}, 1e-5, disjoint=True)
    with pytest.raises(BadInputError, match="delta"):
        consortium_epsilon(SITES, 0.0, disjoint=True)
