"""Keypoints against closed forms: known transforms come back, mirror images are computed and not searched again."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from pixcell_core.procedural import patient_look, render_field, site_look
from privacy_audit.geometry import evened, haematoxylin
from privacy_audit.keypoints import SIDE, WIDTH, Keypoints, agreement, find_keypoints, mirror
from privacy_audit.votes import VoteIndex
from tests.privacy_audit.conftest import stain_of, tissue_tile


def points(*tiles: np.ndarray) -> Keypoints:
    pixels = torch.from_numpy(np.stack(tiles)).permute(0, 3, 1, 2).contiguous()
    return find_keypoints(evened(haematoxylin(pixels), SIDE))


@pytest.fixture(scope="module")
def field() -> np.ndarray:
    site = site_look(3)
    return render_field(
        2 * SIDE, 2 * SIDE, site=site, patient=patient_look(3, 1), tissue=None, seed=5, coverage=1.0
    ).rgb


@pytest.fixture(scope="module")
def crowd() -> np.ndarray:
    rng = np.random.default_rng(6)
    return np.stack([tissue_tile(rng, stain_of(rng), 64) for _ in range(40)])


def window(field: np.ndarray, degrees: float, zoom: float, shift: tuple[float, float]) -> np.ndarray:
    """What a camera sees that is turned, zoomed and shifted about the middle of the field."""
    turn = np.radians(degrees)
    a, b = np.cos(turn) / zoom, np.sin(turn) / zoom
    middle, half = field.shape[0] / 2, SIDE / 2
    # PIL maps output (x, y) to input: input = middle + shift + A (output - half).
    cx = middle + shift[0] - a * half + b * half
    cy = middle + shift[1] - b * half - a * half
    image = Image.fromarray(field).transform(
        (SIDE, SIDE), Image.Transform.AFFINE, (a, -b, cx, b, a, cy), Image.Resampling.BICUBIC
    )
    return np.array(image)


@pytest.mark.parametrize(
    ("degrees", "zoom", "shift"), [(15, 1, (0, 0)), (-40, 1, (6, -9)), (0, 1.4, (0, 0)), (200, 0.75, (5, 5))]
)
def test_a_known_transform_comes_back(
    field: np.ndarray, degrees: float, zoom: float, shift: tuple[float, float]
) -> None:
    both = points(window(field, 0, 1, (0, 0)), window(field, degrees, zoom, shift))
    found = agreement(both[:1], both[1:], mirrored=False)
    assert found.inliers >= 6
    assert found.zoom == pytest.approx(zoom, rel=0.05)
    assert (found.degrees + degrees + 180) % 360 - 180 == pytest.approx(0, abs=3)
    # The middle of the first camera, in the second camera's pixels, in closed form.
    turn = np.radians(-degrees)
    turned = zoom * np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    expected = SIDE / 2 + turned @ -np.array(shift)
    middle = found.transform @ np.array([SIDE / 2, SIDE / 2, 1.0])
    assert np.abs(middle - expected).max() < 2.5
    # Each drawn match line obeys the transform.
    here = np.concatenate([found.here, np.ones((len(found.here), 1))], axis=1) @ found.transform.T
    assert np.abs(here - found.there).max() < 6


def test_mirroring_keypoints_equals_searching_the_mirror_image(field: np.ndarray) -> None:
    tile = window(field, 0, 1, (0, 0))
    computed, searched = mirror(points(tile)), points(np.ascontiguousarray(tile[:, ::-1]))
    partner = agreement(computed, searched, mirrored=False)
    count = int(computed.count[0])
    assert len(partner.here) > 0.6 * count
    assert np.abs(partner.transform - np.eye(2, 3)).max() < 0.1
    place = searched.place[0, : int(searched.count[0])].float()
    moved, unmoved = [], []
    for row in range(count):
        x, y, _, angle = computed.place[0, row].float()
        turn = ((place[:, 3] - angle + 180) % 360 - 180).abs()
        near = torch.nonzero((torch.hypot(place[:, 0] - x, place[:, 1] - y) < 0.2) & (turn < 1))[:, 0]
        if len(near):
            there = searched.descriptor[0, near[0]].float()
            moved.append(float((computed.descriptor[0, row].float() - there).norm() / there.norm()))
            unmoved.append(float((points(tile).descriptor[0, row].float() - there).norm() / there.norm()))
    assert len(moved) > 0.6 * count
    assert np.median(moved) < 0.05 < 0.3 < np.median(unmoved)


def test_a_mirrored_copy_is_matched_in_the_coordinates_of_the_tile_as_it_is(field: np.ndarray) -> None:
    tile = window(field, 0, 1, (0, 0))
    first, second = points(np.ascontiguousarray(tile[:, ::-1])), points(tile)
    found = agreement(first, second, mirrored=True)
    assert found.inliers > agreement(first, second, mirrored=False).inliers
    assert np.abs((SIDE - 1 - found.here[:, 0]) - found.there[:, 0]).max() < 4.5


def test_unrelated_and_empty_tiles_agree_on_nothing(crowd: np.ndarray) -> None:
    found = points(*crowd)
    most = max(
        agreement(found[a : a + 1], found[b : b + 1], mirrored=flip).inliers
        for a in range(8)
        for b in range(8, 16)
        for flip in (False, True)
    )
    assert most <= 7
    glass = points(np.full((64, 64, 3), 240, dtype=np.uint8))
    assert int(glass.count[0]) == 0
    assert agreement(glass, found[:1], mirrored=False).inliers == 0
    assert VoteIndex(found).vote(glass, 3)[0].row.size == 0


def test_votes_find_a_turned_and_mirrored_copy_among_the_crowd(crowd: np.ndarray) -> None:
    index = VoteIndex(points(*crowd))
    turned = np.array(Image.fromarray(crowd[7]).rotate(30, Image.Resampling.BICUBIC))
    mirrored = np.ascontiguousarray(crowd[9][:, ::-1])
    first, second = index.vote(points(turned, mirrored), 3)
    assert (first.row[0], first.mirrored[0]) == (7, False)
    assert (second.row[0], second.mirrored[0]) == (9, True)


def test_votes_equal_counting_pair_by_pair(crowd: np.ndarray) -> None:
    """The inverted file against the slow path: every pair of keypoints looked at on its own."""
    found = points(*crowd[:10])
    index = VoteIndex(found)
    query = found[3:4]
    word, signature = index._encode(query.descriptor[0, : int(query.count[0])])
    tally = np.zeros((10, 24))
    for tile in range(10):
        count = int(found.count[tile])
        words, signatures = index._encode(found.descriptor[tile, :count])
        for i in range(len(word)):
            for j in range(count):
                far = int(np.bitwise_count(signature[i] ^ signatures[j]))
                sizes = found.place[tile, j, 2].float().log2() - query.place[0, i, 2].float().log2()
                if word[i] == words[j] and far <= 22 and abs(float(sizes)) <= 1:
                    turn = (float(found.place[tile, j, 3]) - float(query.place[0, i, 3])) % 360
                    tally[tile, int(turn * 24 / 360) % 24] += index._weight[word[i]] * np.exp(
                        -((far / 16.0) ** 2)
                    )
    slow = (tally + np.roll(tally, 1, axis=1)).max(axis=1)
    frame = np.stack([query.place[0, : len(word), 3], query.place[0, : len(word), 2].log2()], 1)
    hits = index._hits(np.zeros(len(word), dtype=np.int64), word, signature, frame)
    tiles, votes = index._tally(hits, 0, len(hits.asker), 10)
    fast = np.zeros(10)
    fast[tiles] = votes
    assert np.allclose(fast, slow, rtol=1e-4)


def test_keypoints_repeat_and_join(crowd: np.ndarray) -> None:
    once, again = points(*crowd[:3]), points(*crowd[:3])
    assert torch.equal(once.descriptor, again.descriptor) and torch.equal(once.place, again.place)
    both = Keypoints.join([once[:1], once[1:]])
    assert torch.equal(both.descriptor, once.descriptor) and both.descriptor.shape[-1] == WIDTH
