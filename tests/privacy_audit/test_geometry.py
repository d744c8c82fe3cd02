"""Haematoxylin correlation against the obvious path, and what it must and must not be blind to."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from privacy_audit import geometry


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 10_000), overlap=st.sampled_from([0.5, 0.7, 1.0]), scale=st.sampled_from([0.01, 1.0])
)
def test_fft_correlation_equals_the_slow_path(seed: int, overlap: float, scale: float) -> None:
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(2, 12, 12)) * scale
    plan = geometry.Shifts.of(12, overlap)
    left = geometry.spectra(torch.from_numpy(a)[None], plan, moving=False)
    right = geometry.spectra(torch.from_numpy(b)[None], plan, moving=True)
    score, shift = geometry.correlate(left, right, plan)
    slow, where = geometry.correlation_slow(a, b, overlap)
    assert float(score[0]) == pytest.approx(slow, abs=1e-4)
    assert tuple(shift[0].tolist()) == where


@pytest.mark.parametrize("shift", [(0, 0), (8, -3), (-16, 0), (5, 12)])
def test_a_shifted_crop_is_found_at_its_shift(shift: tuple[int, int]) -> None:
    field = torch.from_numpy(np.random.default_rng(3).normal(size=(96, 96))).float()
    dy, dx = shift
    fixed, moving = field[32:64, 32:64], field[32 + dy : 64 + dy, 32 + dx : 64 + dx]
    plan = geometry.Shifts.of(32, 0.5)
    score, found = geometry.correlate(
        geometry.spectra(fixed[None], plan, moving=False),
        geometry.spectra(moving[None], plan, moving=True),
        plan,
    )
    overlap = (32 - abs(dy)) * (32 - abs(dx)) / 32**2
    assert tuple(found[0].tolist()) == shift
    factor = 1.0 if shift == (0, 0) else geometry.FAR_FACTOR
    assert float(score[0]) == pytest.approx(factor * np.sqrt(overlap), abs=1e-3)


def test_orientations_are_the_eight_symmetries() -> None:
    image = torch.arange(16.0).reshape(1, 4, 4)
    seen = {tuple(geometry.orient(image, k).flatten().tolist()) for k in range(geometry.ORIENTATIONS)}
    assert len(seen) == 8


def test_stain_changes_leave_the_thumbnail_alone(tissue: torch.Tensor) -> None:
    density = -torch.log10((tissue.float() + 1) / 256)
    restained = (256 * 10 ** (-1.3 * density) - 1).round().clamp(0, 255).to(torch.uint8)
    before, after = geometry.thumbnails(tissue)[0], geometry.thumbnails(restained)[0]
    for a, b in zip(before, after, strict=True):
        assert float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]) > 0.97


def test_empty_glass_resembles_nothing() -> None:
    rng = np.random.default_rng(0)
    glass = torch.from_numpy(rng.normal(240, 1.0, size=(6, 3, 64, 64)).clip(0, 255).astype(np.uint8))
    thumbs, texture = geometry.thumbnails(glass)
    vectors = geometry.pooled(thumbs)
    assert float(texture.max()) < 0.02
    assert float((vectors @ vectors.T).max()) < 0.5
