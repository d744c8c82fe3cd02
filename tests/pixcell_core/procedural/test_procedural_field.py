"""A field is a function of its arguments, and of every one of them; its planes agree with each other."""

from __future__ import annotations

import dataclasses
import time

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pixcell_core.errors import BadInputError
from pixcell_core.procedural import Field, TissueClass, patient_look, render_field, site_look
from pixcell_core.procedural.nuclei import NucleusKind
from pixcell_core.procedural.tissue import Compartment


def draw(*, site: int = 1, patient: int = 2, seed: int = 3, side: int = 192, mpp: float = 0.5) -> Field:
    return render_field(
        side,
        side,
        mpp=mpp,
        site=site_look(site),
        patient=patient_look(site, patient),
        tissue=TissueClass.tumor,
        seed=seed,
        coverage=1.0,
    )


def correlation(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.corrcoef(one.ravel().astype(float), other.ravel().astype(float))[0, 1])


def largest_shifted_correlation(one: np.ndarray, other: np.ndarray) -> float:
    """The best agreement over all circular shifts: what a moved copy would show."""
    a = (one - one.mean()) / one.std()
    b = (other - other.mean()) / other.std()
    product = np.fft.rfft2(a) * np.conj(np.fft.rfft2(b))
    return float(np.fft.irfft2(product, s=a.shape).max() / a.size)


def test_equal_arguments_give_equal_fields() -> None:
    one, other = draw(), draw()
    for name in ("rgb", "labels", "nuclei", "nucleus_kinds", "compartments", "haematoxylin", "eosin"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=name)


def test_a_field_does_not_depend_on_what_was_drawn_before() -> None:
    first = draw().rgb
    for patient in range(10):
        draw(patient=patient + 20, side=64)
    cv2.setRNGSeed(99)
    np.random.seed(7)
    np.testing.assert_array_equal(draw().rgb, first)


@pytest.mark.parametrize("change", [{"seed": 4}, {"patient": 5}, {"site": 6}])
def test_any_other_seed_gives_another_geometry(change: dict[str, int]) -> None:
    one, other = draw(), draw(**change)
    assert correlation(one.nuclei > 0, other.nuclei > 0) < 0.1
    # Not the same plan moved elsewhere either. A copy moved by (17, 40) would score 1.
    moved = np.roll(one.haematoxylin, (17, 40), axis=(0, 1))
    assert largest_shifted_correlation(moved, one.haematoxylin) > 0.99
    assert largest_shifted_correlation(other.haematoxylin, one.haematoxylin) < 0.35


@settings(max_examples=12, deadline=None)
@given(
    height=st.integers(32, 150),
    width=st.integers(32, 150),
    mpp=st.sampled_from([0.25, 0.5, 1.0, 2.0]),
    tissue=st.sampled_from([*TissueClass, None]),
    seed=st.integers(-(2**63), 2**64),
    coverage=st.floats(0.2, 1.0),
)
def test_any_size_and_scale_can_be_drawn(
    height: int, width: int, mpp: float, tissue: TissueClass | None, seed: int, coverage: float
) -> None:
    field = render_field(
        height,
        width,
        mpp=mpp,
        site=site_look(0),
        patient=patient_look(0, 0),
        tissue=tissue,
        seed=seed,
        coverage=coverage,
    )
    assert field.rgb.shape == (height, width, 3) and field.rgb.dtype == np.uint8
    for plane in (field.labels, field.nuclei, field.compartments, field.haematoxylin, field.eosin):
        assert plane.shape == (height, width)
    assert field.nuclei.dtype == np.int32 and field.labels.dtype == np.uint8
    assert field.nuclei.max() < len(field.nucleus_kinds)
    for stain in (field.haematoxylin, field.eosin):
        assert stain.dtype == np.float32 and np.isfinite(stain).all() and (stain >= 0).all()


@pytest.mark.parametrize(
    "wrong",
    [{"height": 8}, {"width": 31}, {"mpp": 0.0}, {"mpp": float("nan")}, {"coverage": 0.0}, {"coverage": 1.2}],
)
def test_what_cannot_be_drawn_is_refused_with_a_hint(wrong: dict[str, float]) -> None:
    arguments: dict[str, object] = {"height": 64, "width": 64, "mpp": 0.5, "coverage": 0.9, **wrong}
    with pytest.raises(BadInputError) as refused:
        render_field(
            arguments.pop("height"),
            arguments.pop("width"),
            site=site_look(0),
            patient=patient_look(0, 0),
            tissue=None,
            seed=0,
            **arguments,
        )
    assert refused.value.hint


def test_glass_is_bright_tissue_is_not_and_coverage_is_kept() -> None:
    for seed in range(3):
        site = site_look(seed)
        field = render_field(512, 512, site=site, patient=patient_look(seed, 0), tissue=None, seed=seed)
        glass, tissue = field.labels == 0, field.labels > 0
        assert 0.75 <= tissue.mean() <= 0.92
        # Away from the border, where the point spread function mixes the two.
        inner = cv2.erode(glass.astype(np.uint8), np.ones((7, 7), np.uint8)) > 0
        assert np.abs(field.rgb[inner].mean(axis=0) - np.asarray(site.background)).max() < 6
        assert field.rgb[inner].mean() > field.rgb[tissue].mean() + 25


def test_without_glass_every_pixel_is_tissue(by_class: dict[TissueClass, list[Field]]) -> None:
    assert all((field.labels > 0).all() for fields in by_class.values() for field in fields)


def test_the_class_asked_for_dominates(by_class: dict[TissueClass, list[Field]]) -> None:
    for tissue, fields in by_class.items():
        for field in fields:
            share = np.bincount(field.labels.ravel(), minlength=5) / field.labels.size
            assert share.argmax() == tissue.code
            assert share[tissue.code] > 0.5


def test_a_mixed_slide_shows_every_class() -> None:
    field = render_field(1024, 1024, site=site_look(1), patient=patient_look(1, 0), tissue=None, seed=0)
    assert set(np.unique(field.labels).tolist()) == {0, *(tissue.code for tissue in TissueClass)}


def test_nuclei_lie_where_haematoxylin_is(scanned: Field) -> None:
    inside = scanned.nuclei > 0
    outside = (scanned.labels > 0) & ~inside
    assert scanned.haematoxylin[inside].mean() > 4 * scanned.haematoxylin[outside].mean()
    # Every nucleus on its own, not only on average: a mask moved by some pixels would fail here.
    counts = np.bincount(scanned.nuclei.ravel())[1:]
    sums = np.bincount(scanned.nuclei.ravel(), scanned.haematoxylin.ravel())[1:]
    seen = counts > 30
    assert (sums[seen] / counts[seen] > 3 * scanned.haematoxylin[outside].mean()).mean() > 0.99
    moved = np.roll(inside, 12, axis=1)
    assert scanned.haematoxylin[moved].mean() < 0.6 * scanned.haematoxylin[inside].mean()


def test_nuclei_are_the_size_the_patient_has(by_class: dict[TissueClass, list[Field]]) -> None:
    for n, field in enumerate(by_class[TissueClass.tumor]):
        patient = patient_look(n % 2, n)
        counts = np.bincount(field.nuclei.ravel(), minlength=len(field.nucleus_kinds))
        whole = (counts > 0) & (field.nucleus_kinds == NucleusKind.TUMOR)
        whole[0] = False
        diameter = 2 * np.sqrt(np.median(counts[whole]) / np.pi) * field.mpp
        assert 0.8 * patient.tumor_nucleus_um < diameter < 1.2 * patient.tumor_nucleus_um


def test_scale_follows_micrometres_per_pixel() -> None:
    fine, coarse = draw(mpp=0.25, side=768), draw(mpp=0.5, side=384)

    def median_area(field: Field) -> float:
        counts = np.bincount(field.nuclei.ravel(), minlength=len(field.nucleus_kinds))[1:]
        return float(np.median(counts[(counts > 0) & (field.nucleus_kinds[1:] == NucleusKind.TUMOR)]))

    assert 3.0 < median_area(fine) / median_area(coarse) < 5.3


def test_columnar_nuclei_stay_out_of_the_lumen(by_class: dict[TissueClass, list[Field]]) -> None:
    for field in by_class[TissueClass.gland]:
        columnar = (field.nucleus_kinds == NucleusKind.COLUMNAR)[field.nuclei]
        assert columnar.sum() > 200
        assert (field.compartments[columnar] == Compartment.LUMEN).mean() < 0.05


def test_a_field_cannot_be_reassigned(scanned: Field) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        scanned.mpp = 1.0  # type: ignore[misc]


def test_a_slide_costs_little() -> None:
    """A budget, not a benchmark: three times what it costs on one idle core."""
    site = site_look(0)
    render_field(1024, 1024, site=site, patient=patient_look(0, 0), tissue=None, seed=0)
    start = time.process_time()
    for n in range(3):
        render_field(1024, 1024, site=site, patient=patient_look(0, n + 1), tissue=None, seed=n)
    assert (time.process_time() - start) / 3 < 1.2
