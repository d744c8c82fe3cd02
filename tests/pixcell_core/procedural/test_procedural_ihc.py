"""The IHC partner shows the very nuclei of its H&E field, and DAB nowhere else."""

from __future__ import annotations

import numpy as np
import pytest

from pixcell_core.errors import BadInputError
from pixcell_core.procedural import Field, TissueClass, positive_nuclei, render_ihc, separate
from pixcell_core.procedural.ihc import dab_density
from pixcell_core.procedural.nuclei import NucleusKind
from pixcell_core.procedural.tissue import Compartment


def test_the_pair_is_a_function_of_field_marker_and_seed(scanned: Field) -> None:
    one = render_ihc(scanned, marker="Ki67", seed=4)
    assert one.shape == scanned.rgb.shape and one.dtype == np.uint8
    np.testing.assert_array_equal(one, render_ihc(scanned, marker="Ki67", seed=4))
    assert (one != render_ihc(scanned, marker="Ki67", seed=5)).any()
    assert (one != render_ihc(scanned, marker="PanCK", seed=4)).any()


def test_ki67_lies_inside_the_chosen_nuclei_only(scanned: Field) -> None:
    chosen = positive_nuclei(scanned, seed=4)
    dab = dab_density(scanned, marker="Ki67", seed=4)
    assert chosen.any() and not chosen[0]
    inside = chosen[scanned.nuclei]
    assert (dab[~inside] == 0).all()
    assert (dab[inside] > 0).all()


def test_the_pixels_are_registered(unscanned: Field) -> None:
    """Unmix the picture and find the same nuclei again; a picture moved by 8 pixels must do worse."""
    image = render_ihc(unscanned, marker="Ki67", seed=4)
    counterstain, dab = separate(image, unscanned.site, second=unscanned.site.dab)
    inside = positive_nuclei(unscanned, seed=4)[unscanned.nuclei]
    assert np.abs(dab[~inside]).mean() < 0.03
    assert dab[inside].mean() > 0.5
    assert np.roll(dab, 8, axis=1)[inside].mean() < 0.6 * dab[inside].mean()
    nuclei = unscanned.nuclei > 0
    assert counterstain[nuclei].mean() > 3 * counterstain[~nuclei].mean()


def test_tumour_proliferates_more_than_stroma(by_class: dict[TissueClass, list[Field]]) -> None:
    def share(kind: NucleusKind) -> float:
        positive = total = 0
        for fields in by_class.values():
            for field in fields:
                of_kind = field.nucleus_kinds == kind
                of_kind[0] = False
                positive += int(positive_nuclei(field, seed=1)[of_kind].sum())
                total += int(of_kind.sum())
        return positive / total

    assert share(NucleusKind.TUMOR) > 3 * share(NucleusKind.COLUMNAR) > 3 * share(NucleusKind.SPINDLE)
    assert share(NucleusKind.MITOSIS) == 1.0


def test_keratin_fills_epithelial_cytoplasm_only(scanned: Field) -> None:
    dab = dab_density(scanned, marker="PanCK", seed=4)
    epithelium = np.isin(scanned.compartments, [Compartment.TUMOR, Compartment.EPITHELIUM])
    stained = epithelium & (scanned.nuclei == 0)
    assert stained.any()
    assert (dab[stained] > 0).all() and (dab[~stained] == 0).all()


def test_an_unknown_marker_is_refused(scanned: Field) -> None:
    with pytest.raises(BadInputError, match="CD99") as refused:
        render_ihc(scanned, marker="CD99", seed=0)
    assert "Ki67" in refused.value.hint
