"""The near-copy screen end to end on every planted kind, and mutants of it that the self-test must catch."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import numpy as np
import pytest
import torch

from privacy_audit import plants, screen, votes
from privacy_audit.copies import Conformal
from privacy_audit.coverage import proven_kinds
from privacy_audit.features import TileFeatures, canonical_digest, describe
from privacy_audit.neighbours import Standardiser
from privacy_audit.result import Status
from privacy_audit.screen import CopyScreen, ScreenScores
from privacy_audit.self_test import sensitivity
from privacy_audit.spectrum import TURNS, ShapeSpectra
from tests.privacy_audit.conftest import TextureEye, small_policy, stain_of, tissue_tile

PER_KIND, REFERENCE, NULL = 8, 60, 110
LIMITS = {"patch64"}  # reported without a gate
NO_DETAIL = {"chance_detail": 1.0}  # fine detail finds turns and shifts by itself: here it never counts
HARD = {"zoom07", "patch128"}  # nuclei are few in so small a tile


@pytest.fixture(scope="module")
def tiles() -> np.ndarray:
    rng = np.random.default_rng(21)
    return np.stack([tissue_tile(rng, stain_of(rng), 64) for _ in range(REFERENCE + NULL)])


def look(tiles: np.ndarray) -> TileFeatures:
    return _look(tiles.tobytes(), tiles.shape)


@cache
def _look(raw: bytes, shape: tuple[int, ...]) -> TileFeatures:
    pixels = torch.from_numpy(np.frombuffer(raw, dtype=np.uint8).reshape(shape).copy())
    return describe(pixels.permute(0, 3, 1, 2).contiguous(), TextureEye())


@pytest.fixture(scope="module")
def planted(tiles: np.ndarray) -> tuple[TileFeatures, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(5)
    made, kinds, source = [], [], []
    for number, kind in enumerate(plants.KINDS):
        for row in rng.choice(REFERENCE, PER_KIND, replace=False):
            made.append(kind.make(tiles[row], tiles[REFERENCE + int(rng.integers(NULL))], rng))
            kinds.append(number)
            source.append(int(row))
    return look(np.stack(made)), np.array(kinds), np.array(source)


def build(tiles: np.ndarray, **changes: float) -> CopyScreen:
    reference, null = look(tiles[:REFERENCE]), look(tiles[REFERENCE:])
    standardise = Standardiser.fit(reference.embeddings, null.embeddings)
    policy = small_policy().copies.model_copy(update=changes)
    return CopyScreen(reference, standardise, ShapeSpectra.fit(reference.thumbs, null.thumbs), policy)


def self_test(
    tiles: np.ndarray, planted: tuple[TileFeatures, np.ndarray, np.ndarray], **changes: float
) -> tuple[Status, set[str]]:
    """Status of the self-test and the keys of the kinds that reached their gates."""
    features, kinds, source = planted
    engine, policy = build(tiles, **changes), small_policy()
    scores = engine.score(features, "planted")
    null = Conformal(engine.score(look(tiles[REFERENCE:]), "null").score)
    nothing = np.zeros(len(kinds), dtype=bool)
    found = sensitivity(
        scores.score, kinds, nothing, scores.match == source, null, policy.copies, policy.self_test
    )
    words = proven_kinds(found.detections)
    return found.status, {kind.key for kind in plants.KINDS if kind.words in words}


def test_every_planted_kind_is_found_and_traced_to_its_source(
    tiles: np.ndarray, planted: tuple[TileFeatures, np.ndarray, np.ndarray]
) -> None:
    features, kinds, source = planted
    engine = build(tiles)
    scores = engine.score(features, "planted")
    highest = float(engine.score(look(tiles[REFERENCE:]), "null").score.max())
    for number, kind in enumerate(plants.KINDS):
        if kind.key in LIMITS:
            continue
        rows = kinds == number
        hit = (scores.score[rows] > highest) & (scores.match[rows] == source[rows])
        assert hit.mean() >= (0.6 if kind.key in HARD else 0.85), f"{kind.key}: {hit.sum()} of {rows.sum()}"


def test_the_self_test_passes_on_the_screen_as_it_is(
    tiles: np.ndarray, planted: tuple[TileFeatures, np.ndarray, np.ndarray]
) -> None:
    status, proven = self_test(tiles, planted)
    assert status is Status.PASS and proven == {kind.key for kind in plants.KINDS} - LIMITS


@pytest.fixture
def blind_to_turns(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(screen, "orient", lambda images, which: images)
    yield


@pytest.mark.usefixtures("blind_to_turns")
def test_a_screen_that_ignores_turns_is_invalid(
    tiles: np.ndarray, planted: tuple[TileFeatures, np.ndarray, np.ndarray]
) -> None:
    status, proven = self_test(tiles, planted, voted_candidates=0, **NO_DETAIL)
    assert status is Status.INVALID and "d4" not in proven and "exact" in proven


@pytest.mark.usefixtures("blind_to_turns")
def test_keypoints_alone_need_the_mirror_image(
    tiles: np.ndarray, planted: tuple[TileFeatures, np.ndarray, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "d4" in self_test(tiles, planted, **NO_DETAIL)[1]
    for room in (votes, screen):
        monkeypatch.setattr(room, "mirror", lambda points: points)
    assert "d4" not in self_test(tiles, planted, **NO_DETAIL)[1]


def test_a_screen_without_keypoints_is_blind_to_zoom_and_to_turns_between_the_quarters(
    tiles: np.ndarray, planted: tuple[TileFeatures, np.ndarray, np.ndarray]
) -> None:
    status, proven = self_test(tiles, planted, voted_candidates=0)
    assert status is Status.INVALID and not {"zoom07", "rot15"} & proven
    assert {"exact", "jpeg50", "d4", "stain", "blur", "noise", "elastic", "shift25"} <= proven


def test_a_screen_without_shift_search_is_invalid(
    tiles: np.ndarray, planted: tuple[TileFeatures, np.ndarray, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = screen.Shifts.of
    monkeypatch.setattr(screen.Shifts, "of", lambda side, overlap, device: original(side, 1.0, device))
    status, proven = self_test(tiles, planted, voted_candidates=0, **NO_DETAIL)
    assert status is Status.INVALID and not {"shift25", "shift50"} & proven


def test_a_screen_that_follows_colour_is_invalid(
    tiles: np.ndarray, planted: tuple[TileFeatures, np.ndarray, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = torch.from_numpy(tiles[:REFERENCE]).float().mean(dim=(1, 2))

    def by_colour(engine: CopyScreen, queries: TileFeatures, label: str) -> ScreenScores:
        colour = queries.embeddings[:, : 3 * 64].reshape(len(queries), 3, 64).mean(dim=2)
        near, at = torch.cdist(colour, reference).min(dim=1)
        nothing = np.zeros(len(queries))
        return ScreenScores(
            score=(-near).double().numpy(),
            match=at.numpy(),
            aligned=np.zeros((len(queries), 3), dtype=np.int64),
            correlation=nothing,
            detail=nothing,
            inliers=nothing.astype(np.int64),
            by_keypoints=nothing.astype(bool),
        )

    monkeypatch.setattr(CopyScreen, "score", by_colour)
    assert self_test(tiles, planted)[0] is Status.INVALID


@pytest.mark.usefixtures("blind_to_turns")
def test_fine_detail_finds_turns_and_shifts_by_itself(
    tiles: np.ndarray, planted: tuple[TileFeatures, np.ndarray, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = screen.Shifts.of
    monkeypatch.setattr(screen.Shifts, "of", lambda side, overlap, device: original(side, 1.0, device))
    assert {"d4", "shift25", "blend"} <= self_test(tiles, planted, voted_candidates=0)[1]


def test_spectra_are_blind_to_shifts_and_half_turns() -> None:
    field = torch.from_numpy(np.random.default_rng(3).normal(size=(1, 64, 64))).float()
    shapes = ShapeSpectra.fit(torch.randn(20, 64, 64, generator=torch.Generator().manual_seed(0)))
    here, rolled = shapes(field), shapes(torch.roll(field, (9, -14), dims=(1, 2)))
    assert float((here * rolled).sum()) > 0.999
    half = shapes(torch.rot90(field, 2, dims=(1, 2)))
    assert float((here * half).sum()) > 0.999
    quarter = torch.rot90(field, 1, dims=(1, 2))
    assert max(float((shapes(quarter, turn) * here).sum()) for turn in TURNS) > 0.999


def test_canonical_digests_name_all_eight_images_of_a_tile_alike() -> None:
    rng = np.random.default_rng(1)
    tile, oblong = (rng.integers(0, 255, (33, width, 3), dtype=np.uint8) for width in (33, 40))
    even = np.full((33, 33, 3), 200, dtype=np.uint8)  # decided by the last row alone
    even[-1, -2] = 0
    for one in (tile, oblong, even):
        turned = [np.rot90(one, k) for k in range(4)]
        assert len({canonical_digest(t) for t in (*turned, *(t[:, ::-1] for t in turned))}) == 1
    other = tile.copy()
    other[0, 0, 0] ^= 1
    assert canonical_digest(other) != canonical_digest(tile)
