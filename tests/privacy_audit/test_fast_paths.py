"""Every fast path of the audit against the slow, obvious one."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image, ImageDraw

from pixcell_core.procedural import patient_look, render_field, site_look
from privacy_audit import disclosure, preconditions, votes
from privacy_audit.features import TileFeatures
from privacy_audit.geometry import evened, evened_with_texture, haematoxylin, texture
from privacy_audit.keypoints import KEPT, WIDTH, Keypoints, agreement, agreements, find_keypoints, mirror
from privacy_audit.neighbours import Standardiser, patient_minima
from privacy_audit.patients import RankedDistances, View
from privacy_audit.preconditions import twin_clusters
from privacy_audit.spectrum import TURNS, ShapeSpectra, best_similarity, most_alike, patient_distances
from privacy_audit.subject import Group
from privacy_audit.votes import VoteIndex

SIDE = 224


@pytest.fixture(scope="module")
def tiles() -> npt.NDArray[np.uint8]:
    field = render_field(
        3 * SIDE, 3 * SIDE, site=site_look(2), patient=patient_look(2, 5), tissue=None, seed=9, coverage=1.0
    ).rgb
    cut = field.reshape(3, SIDE, 3, SIDE, 3).swapaxes(1, 2).reshape(9, SIDE, SIDE, 3)
    return np.ascontiguousarray(cut)


@pytest.fixture(scope="module")
def pixels(tiles: npt.NDArray[np.uint8]) -> torch.Tensor:
    return torch.from_numpy(tiles).permute(0, 3, 1, 2).contiguous()


def thumbs(count: int, seed: int) -> torch.Tensor:
    """Smooth noise: thumbnails with a spectrum, no two alike."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(count, 66, 66, generator=generator)
    return torch.nn.functional.avg_pool2d(noise, 3, stride=1).half()


def test_haematoxylin_equals_the_product_of_densities(pixels: torch.Tensor) -> None:
    vectors = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])
    unmix = np.linalg.inv(vectors / np.linalg.norm(vectors, axis=1, keepdims=True))[:, 0]
    slow = np.einsum("bchw,c->bhw", -np.log10((pixels.numpy().astype(np.float64) + 1) / 256), unmix)
    fast = haematoxylin(pixels)
    assert np.abs(fast.numpy() - slow).max() < 1e-5
    both = evened_with_texture(fast, 64)
    assert torch.equal(both[0], evened(fast, 64)) and torch.equal(both[1], texture(fast, 64))


def test_spectra_in_parts_give_the_best_of_four_turns() -> None:
    base, queries = thumbs(90, 1), thumbs(12, 2)
    queries[:6] = torch.rot90(base[:6].float(), 1, dims=(1, 2)).roll((5, -9), dims=(1, 2)).half()
    queries[6] = base[6].flip(-1)
    queries[7] = 0  # glass has no shape in any turn
    base[70] = 0
    shapes = ShapeSpectra.fit(base, queries)
    slow = torch.stack([shapes(queries, turn) @ shapes(base).T for turn in TURNS]).amax(dim=0)
    asked, searched = shapes.queries(queries), shapes.base(base)
    assert (best_similarity(asked, searched) - slow).abs().max() < 2e-6
    assert most_alike(asked, searched, 3)[:7, 0].tolist() == list(range(7))
    assert slow[:7].argmax(dim=1).tolist() == list(range(7))
    owner = torch.arange(90) // 9
    distances = [patient_minima(shapes(queries, turn), shapes(base), owner, 10) for turn in TURNS]
    fast = patient_distances(asked, searched, owner, 10)
    # Squares, because the root of a rounding error near nought is large.
    assert (fast**2 - torch.stack(distances).amin(dim=0) ** 2).abs().max() < 4e-6


def test_standardising_in_blocks_equals_the_formula() -> None:
    first, second = torch.randn(5000, 7) * 3 + 1, torch.randn(70, 7).half()
    both = torch.cat([first, second.float()])
    standardise = Standardiser.fit(first, second)
    slow = (both - both.mean(dim=0)) / both.std(dim=0) / 7**0.5
    assert torch.allclose(standardise(first, second), slow, atol=1e-5)
    assert torch.equal(standardise(first, second)[5000:], standardise(second))


def test_many_agreements_at_once_equal_one_by_one(pixels: torch.Tensor) -> None:
    found = find_keypoints(evened(haematoxylin(pixels), 128))
    turned = find_keypoints(evened(haematoxylin(torch.rot90(pixels[:1], 1, dims=(2, 3)).flip(-1)), 128))
    others = Keypoints(found.place, found.descriptor, found.count.clone())
    others.count[3], others.count[4] = 0, 1
    for flip in (False, True):
        flags = [flip, not flip] * 4 + [flip]
        together = agreements(turned, mirror(turned), others, flags)
        for row, flag in enumerate(flags):
            alone = agreement(turned, others[row : row + 1], mirrored=flag)
            assert together[row].inliers == alone.inliers
            assert np.array_equal(together[row].there, alone.there)
    assert agreements(turned, turned, others[:0], []) == []


def test_matches_follow_their_definition(pixels: torch.Tensor) -> None:
    """A match: each is the other's nearest, and the second nearest is clearly farther."""
    from privacy_audit.keypoints import _matches

    found = find_keypoints(evened(haematoxylin(pixels[:2]), 128))
    first, second = found[:1], found[1:]
    first.count[0] = 60
    rows, partners = _matches(first.descriptor.float(), first.count, second)[0]
    a = first.descriptor[0, :60].numpy().astype(np.int64)
    b = second.descriptor[0, : int(second.count[0])].numpy().astype(np.int64)
    squared = ((a[:, None] - b[None]) ** 2).sum(axis=2)
    expected = [
        (row, int(near[0]))
        for row, near in enumerate(np.argsort(squared, axis=1, kind="stable"))
        if squared[:, near[0]].argmin() == row
        and squared[row, near[0]] < np.float32(0.92**2) * squared[row, near[1]]
    ]
    assert list(zip(rows.tolist(), partners.tolist(), strict=True)) == expected and len(expected) >= 3


def test_grouped_words_are_nearly_always_the_nearest_and_votes_find_the_same_tiles(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    generator = torch.Generator().manual_seed(4)
    # Descriptors come in kinds, as real ones do.
    kinds = torch.rand(300, WIDTH, generator=generator) ** 3 * 160
    which = torch.randint(300, (120, KEPT), generator=generator)
    noise = torch.randn(120, KEPT, WIDTH, generator=generator) * 12
    descriptor = (kinds[which] + noise).clamp(0, 255).to(torch.uint8)
    place = torch.rand(120, KEPT, 4, generator=generator) * 100 + 1
    reference = Keypoints(place.half(), descriptor, torch.full((120,), KEPT, dtype=torch.int16))
    whole = VoteIndex(reference)
    monkeypatch.setattr(votes, "_EXHAUSTIVE", 50)
    grouped = VoteIndex(reference)
    assert len(whole._cells.heads) == 1 and len(grouped._cells.heads) > 10
    values = descriptor[:20].flatten(0, 1)
    assert (whole._cells.nearest(values) == grouped._cells.nearest(values)).float().mean() > 0.9
    assert len(grouped._cells.nearest(values[:0])) == 0
    noisy = (descriptor[:15].float() + torch.randn(15, KEPT, WIDTH, generator=generator) * 4).clamp(0, 255)
    queries = Keypoints(reference.place[:15], noisy.to(torch.uint8), reference.count[:15])
    for index in (whole, grouped):
        assert [int(one.row[0]) for one in index.vote(queries, 3)] == list(range(15))
    # Looking at the likely tiles alone leaves none of the best out.
    every = grouped.vote(queries, 4)
    monkeypatch.setattr(votes, "_MANY", 0)
    for looked_at in (2, 30, 1000):
        monkeypatch.setattr(votes, "_LOOKED_AT", looked_at)
        for one, other in zip(every, grouped.vote(queries, 4), strict=True):
            assert np.array_equal(one.row, other.row) and np.array_equal(one.votes, other.votes)
    # Asked together or one by one.
    together = grouped.vote(queries, 3)
    for row in range(15):
        alone = grouped.vote(queries[row : row + 1], 3)[0]
        assert np.array_equal(alone.row, together[row].row)
        assert np.allclose(alone.votes, together[row].votes)


def test_a_simulated_leak_ranks_as_the_whole_matrix_would() -> None:
    rng = np.random.default_rng(3)
    view = View(rng.random((80, 40)), rng.random((30, 40)))
    victims, planted = rng.choice(80, 9, replace=False), rng.choice(30, 9, replace=False)
    whole = view.released.copy()
    whole[victims] = view.planted[planted]
    slow, fast = RankedDistances.of(whole), view.leak(victims, planted)
    assert np.array_equal(slow.log_distance, fast.log_distance)
    assert np.array_equal(slow.patient, fast.patient)


@pytest.mark.parametrize("correlation", [0.98, 0.6])
def test_bounded_products_miss_no_twin(correlation: float) -> None:
    base = 3 * thumbs(150, 7)
    base[100:120] = base[:20] + 0.05 * torch.randn(20, 64, 64).half()
    nothing = torch.zeros(150)
    points = Keypoints(
        torch.zeros(150, KEPT, 4), torch.zeros(150, KEPT, WIDTH, dtype=torch.uint8), nothing.short()
    )
    names = tuple(str(row) for row in range(150))
    group = Group(
        "t", names, names, names, TileFeatures(names, names, base, nothing, torch.zeros(150, 2), points)
    )
    vectors = preconditions._pooled(group)
    products = (vectors @ vectors.T).numpy()
    bounds = preconditions._bounding(vectors)
    assert ((bounds @ bounds.T).numpy() >= products - 1e-5).all()
    parent = list(range(150))
    for row, column in zip(*np.nonzero(products >= correlation), strict=True):
        old, new = parent[row], parent[column]
        parent = [new if one == old else one for one in parent]
    assert twin_clusters(group, correlation) == len(set(parent)) <= 130


def _written(tile: npt.NDArray[np.uint8], number: int) -> npt.NDArray[np.uint8]:
    image = Image.fromarray(tile)
    pen = ImageDraw.Draw(image)
    colour = [(0, 0, 0), (255, 255, 255), (20, 60, 160), (10, 120, 40)][number % 4]
    pen.text((10, 20 + 9 * number), "PATIENT 123 X", fill=colour, font_size=16)
    pen.line((5, 100, 200, 120 + number), fill=colour, width=5)
    for left in range(20, 140, 6):
        pen.rectangle((left, 150, left + 2 + left % 4, 200), fill=(0, 0, 0))
        pen.rectangle((left + 3, 150, left + 5, 200), fill=(255, 255, 255))
    return np.array(image)


def _thickness(mask: npt.NDArray[np.bool_]) -> float:
    import cv2

    padded = np.pad(mask.astype(np.uint8), 1)
    return 2.0 * float(cv2.distanceTransform(padded, cv2.DIST_L2, 3).max()) - 1.0


def test_writing_ink_and_labels_are_measured_as_by_their_definitions(tiles: npt.NDArray[np.uint8]) -> None:
    import cv2

    for number, tile in enumerate([*tiles[:3], *(_written(tile, n) for n, tile in enumerate(tiles))]):
        density = -np.log10((tile.astype(np.float64) + 1) / 256)
        red, green, blue = density.reshape(-1, 3).T
        pens = (red > 1.35 * green) & (blue > 0.6 * green)
        pens |= (red > 1.22 * green) & (blue < 0.3) & (red > 0.55)
        pens |= (blue > 0.7 * green) & (red < 0.3 * green) & (green > 0.75)
        pens |= (density.reshape(-1, 3).min(axis=1) > 0.75) & (blue > 0.85 * green)
        share = (pens & (density.reshape(-1, 3).max(axis=1) > 0.35)).mean()
        assert abs(disclosure.ink_share(tile) - share) < 1e-4
        blocks = 0
        for top in range(0, SIDE, 16):
            for left in range(0, SIDE, 16):
                block = tile[top : top + 16, left : left + 16].astype(np.float64)
                grey = block.mean(axis=2)
                down, across = (np.abs(np.diff(grey, axis=axis)).mean() for axis in (0, 1))
                blocks += bool(
                    grey.max() - grey.min() >= 120
                    and (block.max(axis=2) - block.min(axis=2)).mean() <= 30
                    and min(down, across) < 0.1 * max(down, across)
                    and max(down, across) > 15
                )
        assert disclosure.label_blocks(tile) == blocks
        assert blocks >= 4 or number < 3
        # One transform for all signs gives each sign the stroke that it has alone.
        mask = tile.max(axis=2) < 110
        padded = np.pad(mask.view(np.uint8), 1)
        depth = cv2.distanceTransform(padded, cv2.DIST_L2, 3)
        count, labels = cv2.connectedComponents(padded, connectivity=8)
        for sign in range(1, min(count, 40)):
            assert 2.0 * float(depth[labels == sign].max()) - 1.0 == _thickness(labels == sign)
        longest = max(disclosure._line(one) for one in _masks(tile))
        assert disclosure.longest_line(tile) == longest
        assert longest >= 3 or number % 4 not in (3,)


def _masks(tile: npt.NDArray[np.uint8]) -> list[npt.NDArray[np.bool_]]:
    masks = [tile.max(axis=2) < level for level in (60, 85, 110)]
    masks += [tile.min(axis=2) > level for level in (248, 225, 205)]
    return [mask for mask in masks if 0 < mask.mean() < 0.4]
