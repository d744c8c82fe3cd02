"""Beer-Lambert holds: dyes mix as optical densities, and the mixture can be taken apart again."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pixcell_core.procedural import Field, TissueClass, patient_look, render_field, separate, site_look
from pixcell_core.procedural.stain import scan, transmit
from pixcell_core.procedural.texture import fibres, generator, smooth_noise


@given(seed=st.integers(0, 10**9))
def test_stain_vectors_are_unit_positive_and_far_apart(seed: int) -> None:
    site = site_look(seed)
    for vector in (site.haematoxylin, site.eosin, site.dab):
        assert np.linalg.norm(vector) == pytest.approx(1.0)
        assert min(vector) > 0
    # Nearly parallel dyes could not be separated: keep at least 15 degrees between them.
    assert np.dot(site.haematoxylin, site.eosin) < np.cos(np.radians(15))
    assert all(200 < level <= 255 for level in site.background)


def test_separation_recovers_what_was_mixed(unscanned: Field) -> None:
    haematoxylin, eosin = separate(unscanned.rgb, unscanned.site)
    # Rounding to 8 bits hurts most where little light is left.
    lit = unscanned.rgb.min(axis=2) > 25
    assert lit.mean() > 0.9
    for found, mixed in ((haematoxylin, unscanned.haematoxylin), (eosin, unscanned.eosin)):
        error = np.abs(found - mixed)[lit]
        assert np.median(error) < 0.01
        assert np.percentile(error, 99) < 0.06


def test_separation_with_another_sites_dyes_does_not(unscanned: Field) -> None:
    """The mutant: wrong vectors must be seen by the measure above."""
    other = site_look(3).without_scanner()
    swapped = other.__class__(**{**other.__dict__, "haematoxylin": other.dab})
    found, _ = separate(unscanned.rgb, swapped)
    assert np.percentile(np.abs(found - unscanned.haematoxylin), 99) > 0.2


def test_separation_survives_the_scanner(scanned: Field) -> None:
    haematoxylin, _ = separate(scanned.rgb, scanned.site)
    assert np.corrcoef(haematoxylin.ravel(), scanned.haematoxylin.ravel())[0, 1] > 0.9


@given(one=st.floats(0, 1.5), two=st.floats(0, 1.5))
def test_densities_add(one: float, two: float) -> None:
    site = site_look(2)
    plane = np.ones((4, 4), np.float32)
    both = transmit(site, [(plane * one, site.haematoxylin), (plane * two, site.haematoxylin)])
    summed = transmit(site, [(plane * np.float32(one + two), site.haematoxylin)])
    for a, b in zip(both, summed, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4)


def test_sites_differ_more_than_slides_of_one_site() -> None:
    def colour(site: int, seed: int) -> np.ndarray:
        look, patient = site_look(site), patient_look(site, 0)
        field = render_field(256, 256, site=look, patient=patient, tissue=TissueClass.stroma, seed=seed)
        return np.asarray(field.rgb[field.labels > 0].mean(axis=0))

    means = {site: [colour(site, seed) for seed in range(3)] for site in range(5)}
    within = np.mean([np.std(values, axis=0).mean() for values in means.values()])
    between = np.std([np.mean(values, axis=0) for values in means.values()], axis=0).mean()
    assert between > 1.5 * within


def test_a_perfect_scanner_only_rounds() -> None:
    site = site_look(1).without_scanner()
    channels = [np.full((8, 8), level, np.float32) for level in (10.4, 100.6, 254.9)]
    image = scan(site, channels, mpp=0.5, rng=generator(0))
    assert image.tolist() == np.broadcast_to([10, 101, 255], (8, 8, 3)).tolist()


def test_channels_keep_their_order_through_compression() -> None:
    site = site_look(1)
    channels = [np.full((64, 64), level, np.float32) for level in (200.0, 120.0, 60.0)]
    image = scan(site, channels, mpp=0.5, rng=generator(0))
    np.testing.assert_allclose(image.reshape(-1, 3).mean(axis=0), [200, 120, 60], atol=2.5)


@given(length=st.floats(3, 12), octaves=st.integers(1, 3), seed=st.integers(0, 2**32))
def test_smooth_noise_has_zero_mean_and_unit_variance(length: float, octaves: int, seed: int) -> None:
    plane = smooth_noise(generator(seed), 256, 256, length, octaves=octaves)
    assert abs(plane.mean()) < 0.25
    assert 0.8 < plane.std() < 1.2


@pytest.mark.parametrize("length", [4.0, 9.0, 20.0])
def test_smooth_noise_has_the_length_asked_for(length: float) -> None:
    """Neighbours one length apart hardly agree, neighbours a fifth of it apart almost do."""
    plane = smooth_noise(generator(1), 512, 512, length)
    near, far = round(max(length / 5, 1)), round(1.5 * length)
    assert np.corrcoef(plane[near:].ravel(), plane[:-near].ravel())[0, 1] > 0.8
    assert abs(np.corrcoef(plane[far:].ravel(), plane[:-far].ravel())[0, 1]) < 0.3


@pytest.mark.parametrize("angle", [0.0, 0.8, 1.6, 2.4])
def test_fibres_run_along_the_angle_they_report(angle: float) -> None:
    drawn = fibres(generator(5), 256, 256, angle=angle, wavelength=110, width_px=2.5)
    down, across = np.gradient(drawn.texture)
    rows, columns = np.mgrid[0:256, 0:256]
    local = drawn.angle_at(rows.ravel(), columns.ravel()).reshape(256, 256)
    along = np.abs(np.cos(local) * across + np.sin(local) * down).mean()
    athwart = np.abs(np.cos(local) * down - np.sin(local) * across).mean()
    assert athwart > 2.5 * along
