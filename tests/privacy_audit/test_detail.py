"""Fine detail against the obvious path, and what it must find under a denser tile and must not find anywhere."""

from __future__ import annotations

import io
from dataclasses import replace
from functools import cache

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image

from pixcell_core.procedural import patient_look, render_field, site_look
from privacy_audit import detail, plants
from privacy_audit.detail import LOWEST, REACH, DetailIndex
from privacy_audit.features import describe
from privacy_audit.geometry import FAR_FACTOR, FINE_SIDE, NEAR_SHIFT, ORIENTATIONS, orient, thumbnails
from privacy_audit.neighbours import Standardiser
from privacy_audit.policy import load_policy
from privacy_audit.screen import CopyScreen, detail_score
from privacy_audit.spectrum import ShapeSpectra
from tests.privacy_audit.conftest import TextureEye, stain_of, tissue_tile

PRIVATE, INNOCENT, BLENDS = 60, 80, 30
PALE, DENSE = 0.2, 1.6  # factors of the stain


def drawn(count: int, seed: int, strength: float = 1.0) -> npt.NDArray[np.uint8]:
    rng = np.random.default_rng(seed)
    return np.stack([tissue_tile(rng, strength * stain_of(rng), 128) for _ in range(count)])


def fields(count: int, seed: int, strength: float) -> npt.NDArray[np.uint8]:
    """Drawn tiles with a gland in each: a dark soft ring of any place and size, which holds most of the variance."""
    rng = np.random.default_rng(seed + 100)
    y, x = np.mgrid[0:128, 0:128]
    out = drawn(count, seed, strength).astype(np.float64)
    for tile in out:
        (cy, cx), radius = rng.uniform(44, 84, size=2), rng.uniform(24, 40)
        tile *= 1.0 - 0.7 * np.exp(-(((np.hypot(y - cy, x - cx) - radius) / 9) ** 2))[..., None]
    return out.astype(np.uint8)


def small(tiles: npt.NDArray[np.uint8]) -> torch.Tensor:
    return thumbnails(torch.from_numpy(tiles).permute(0, 3, 1, 2).contiguous())[0]


def flattened(thumb: torch.Tensor) -> npt.NDArray[np.float64]:
    """The obvious path: evened, then filtered over the whole Fourier plane; of unit length."""
    image = detail._even_contrast(thumb[None])[0].double().numpy()
    cycles = np.fft.fftfreq(FINE_SIDE, 1 / FINE_SIDE)
    radius = np.hypot(cycles[:, None], cycles[None, :])
    spectrum = np.fft.fft2(image) * np.where((radius >= LOWEST) & (radius <= REACH), radius, 0.0)
    filtered = np.fft.ifft2(spectrum).real
    return np.asarray(filtered / np.linalg.norm(filtered))


def test_eight_symmetries_at_once_equal_the_slow_path() -> None:
    base, queries = small(drawn(30, 1)), small(drawn(7, 2))
    queries[0], queries[1], queries[2] = base[4], orient(base[9], 3), orient(base[11], 6)
    found = DetailIndex(base).best(queries, 3)
    known = np.stack([flattened(thumb) for thumb in base])
    slow = np.array(
        [
            [np.tensordot(known, flattened(orient(query, which)), axes=2) for which in range(ORIENTATIONS)]
            for query in queries
        ]
    )  # (q, 8, n)
    best = np.sort(slow.max(axis=1), axis=1)[:, ::-1][:, :3]
    np.testing.assert_allclose(found.correlation.numpy(), best, atol=2e-3)  # the base is kept in halves
    for query, (rows, turns) in enumerate(zip(found.row.tolist(), found.turn.tolist(), strict=True)):
        for place, (row, turn) in enumerate(zip(rows, turns, strict=True)):
            assert slow[query, turn, row] == pytest.approx(best[query, place], abs=2e-3)
    assert found.row[:3, 0].tolist() == [4, 9, 11]
    assert torch.equal(orient(base[9], 3), queries[1]) and float(found.correlation[:3, 0].min()) > 0.998


def test_blocks_of_queries_and_tiles_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    base, queries = small(drawn(30, 1)), small(drawn(7, 2))
    whole = DetailIndex(base).best(queries, 4)
    monkeypatch.setattr(detail, "_BLOCK", 3)
    pieces = DetailIndex(base).best(queries, 4)
    assert torch.equal(whole.row, pieces.row) and torch.equal(whole.turn, pieces.turn)
    torch.testing.assert_close(whole.correlation, pieces.correlation)
    assert DetailIndex(base[:2]).best(queries, 4).row.shape == (7, 2)
    assert DetailIndex(base).best(queries[:0], 4).row.shape == (0, 4)


def slow_shift(query: torch.Tensor, known: npt.NDArray[np.float64]) -> tuple[float, tuple[int, int, int]]:
    """Every symmetry, and every shift that wraps round, one after the other."""
    best = (-1.0, (0, 0, 0))
    half = FINE_SIDE // 2
    # Row dx of `across` is the known tile moved by dx, so that one product serves all of them.
    across = np.stack([np.roll(known, dx, axis=1) for dx in range(-half, half)])
    for turn in range(ORIENTATIONS):
        turned = flattened(orient(query, turn))
        for dy in range(-half, half):
            values = np.tensordot(across, np.roll(turned, -dy, axis=0), axes=2)
            for dx in range(-half, half):
                near = max(abs(dy), abs(dx)) <= NEAR_SHIFT
                best = max(best, (float(values[dx + half]) * (1.0 if near else FAR_FACTOR), (turn, dy, dx)))
    return best


@pytest.mark.parametrize("which", [0, 5])
def test_shifts_equal_the_slow_path(which: int) -> None:
    base, foreign = small(drawn(4, 1)), small(drawn(1, 2))
    query = torch.cat([orient(torch.roll(base[2], (9, -14), dims=(0, 1)), which)[None], foreign])
    candidates = torch.tensor([[3, 2], [1, 0]])
    found = DetailIndex(base).best_shift(query, candidates)
    for number, rows in enumerate(candidates.tolist()):
        slow = [(*slow_shift(query[number], flattened(base[row])), row) for row in rows]
        value, place, row = max(slow)
        assert float(found.correlation[number]) == pytest.approx(value, abs=1e-4)
        assert (int(found.row[number]), tuple(found.aligned[number].tolist())) == (row, place)
    assert found.row.tolist()[0] == 2 and float(found.correlation[0]) > 0.9 * FAR_FACTOR


@cache
def _blended_and_innocent() -> tuple[torch.Tensor, torch.Tensor, tuple[int, ...], torch.Tensor]:
    """Thumbnails: pale private tiles; turned ones under dense tiles of others, and their rows; dense tiles of others."""
    private, others = fields(PRIVATE, 5, PALE), fields(INNOCENT, 6, DENSE)
    rng = np.random.default_rng(7)
    rows = tuple(rng.choice(PRIVATE, BLENDS, replace=False).tolist())
    made = [
        plants.blend(plants.dihedral(private[row], others[0], rng), others[int(rng.integers(INNOCENT))], rng)
        for row in rows
    ]
    among_themselves = [
        plants.blend(tile, others[-number], rng) for number, tile in enumerate(others[:40], 1)
    ]
    return small(private), small(np.stack(made)), rows, small(np.stack([*others, *among_themselves]))


def found_blends() -> float:
    """Share of the blends whose source is named with a correlation that no innocent tile reaches."""
    private, blends, rows, innocent = _blended_and_innocent()
    index = DetailIndex(private)
    highest = float(index.best(innocent, 1).correlation.max())
    best = index.best(blends, 1)
    return float(((best.correlation > highest) & (best.row == torch.tensor(rows)[:, None])).float().mean())


def test_a_pale_tile_under_a_dense_one_is_found_and_innocent_tiles_are_not() -> None:
    assert found_blends() >= 0.95


def test_innocent_tiles_stay_near_chance() -> None:
    policy = load_policy("core").copies
    base, queries = small(drawn(100, 8)), small(drawn(100, 9))
    scores = detail_score(DetailIndex(base).best(queries, 1).correlation[:, 0].double().numpy(), policy)
    assert scores.max() < 0.45 and np.median(scores) < 0.1


@pytest.mark.parametrize("off", ["contrast", "frequencies", "both"])
def test_the_same_blends_are_missed_when_nothing_is_evened(off: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if off != "frequencies":
        monkeypatch.setattr(detail, "_even_contrast", lambda thumbs: thumbs.float())
    if off != "contrast":
        plan = detail._plan(torch.device("cpu"))
        level = replace(plan, weight=torch.ones_like(plan.weight))
        monkeypatch.setattr(detail, "_plan", lambda device: level)
    assert found_blends() < 0.8


def test_the_screen_flags_pale_blends_by_their_fine_detail_alone() -> None:
    private, others = fields(PRIVATE, 5, PALE), fields(INNOCENT, 6, DENSE)
    rng = np.random.default_rng(8)
    rows = rng.choice(PRIVATE, BLENDS, replace=False)
    blends = np.stack([plants.blend(private[row], others[int(rng.integers(INNOCENT))], rng) for row in rows])
    reference, null, planted = (
        describe(torch.from_numpy(tiles).permute(0, 3, 1, 2).contiguous(), TextureEye())
        for tiles in (private, others, blends)
    )
    standardise = Standardiser.fit(reference.embeddings, null.embeddings)
    shapes = ShapeSpectra.fit(reference.thumbs, null.thumbs)
    found = {}
    for chance in (load_policy("core").copies.chance_detail, 1.0):  # 1: detail never counts
        policy = load_policy("core").copies.model_copy(update={"chance_detail": chance})
        screen = CopyScreen(reference, standardise, shapes, policy)
        highest = screen.score(null, "null").score.max()
        scores = screen.score(planted, "planted")
        found[chance] = float(((scores.score > highest) & (scores.match == rows)).mean())
    with_detail, without = found.values()
    assert with_detail >= 0.9 and without <= 0.6, found


def test_empty_fields_resemble_nothing() -> None:
    rng = np.random.default_rng(0)
    glass = rng.normal(240, 1.0, size=(40, 128, 128, 3)).clip(0, 255).astype(np.uint8)
    thumbs = torch.cat([small(glass), torch.zeros(3, FINE_SIDE, FINE_SIDE)])
    found = DetailIndex(thumbs[:20]).best(thumbs[20:], 1).correlation
    assert bool(found.isfinite().all()) and float(found.max()) < 0.2


def test_compression_makes_nothing_alike() -> None:
    def compressed(seed: int) -> torch.Tensor:
        field = render_field(
            896, 896, site=site_look(seed), patient=patient_look(seed, seed), tissue=None, seed=seed
        )
        tiles = field.rgb.reshape(4, 224, 4, 224, 3).swapaxes(1, 2).reshape(16, 224, 224, 3)
        streams = [io.BytesIO() for _ in tiles]
        for tile, stream in zip(tiles, streams, strict=True):
            Image.fromarray(tile).save(stream, "JPEG", quality=20)
        return small(np.stack([np.array(Image.open(stream).convert("RGB")) for stream in streams]))

    found = DetailIndex(torch.cat([compressed(1), compressed(2)])).best(compressed(3), 1).correlation
    assert float(found.max()) < 0.16


def test_a_correlation_of_detail_counts_from_chance_on() -> None:
    policy = load_policy("core").copies
    at = policy.chance_detail + np.array([-0.05, 0.0, policy.half_detail, 3 * policy.half_detail])
    np.testing.assert_allclose(detail_score(at, policy), [0.0, 0.0, 0.5, policy.confirm_score])
