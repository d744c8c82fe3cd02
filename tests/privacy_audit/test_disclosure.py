"""Text, ink and labels: planted on tissue they are found, and clean tissue is left alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from privacy_audit.disclosure import hits, ink_share, label_blocks, longest_line, result, severity
from privacy_audit.evidence_parts import DisclosureEvidence, MarkEvidence
from privacy_audit.policy import load_policy
from privacy_audit.result import Status
from tests.privacy_audit.conftest import Tile, stain_of, tissue_tile

CORE = load_policy("core")
POLICY = CORE.disclosure
SIDE = 128


def tissue(count: int, seed: int = 0) -> list[Tile]:
    rng = np.random.default_rng(seed)
    return [tissue_tile(rng, stain_of(rng), SIDE) for _ in range(count)]


def write(tile: Tile, rng: np.random.Generator, colour: tuple[int, int, int]) -> Tile:
    """A line of seven letters and digits, 20 px high."""
    image = Image.fromarray(tile.copy())
    words = "".join(rng.choice(list("ABCDEFGHKLMNPRSTUVXYZ0123456789"), 7))
    place = (int(rng.integers(2, 20)), int(rng.integers(5, SIDE - 30)))
    ImageDraw.Draw(image).text(place, words, fill=colour, font=ImageFont.load_default(size=20))
    return np.asarray(image)


def scribble(tile: Tile, rng: np.random.Generator, colour: tuple[int, int, int]) -> Tile:
    image = Image.fromarray(tile.copy())
    points = [tuple(int(v) for v in rng.integers(0, SIDE, 2)) for _ in range(4)]
    ImageDraw.Draw(image).line(points, fill=colour, width=6)
    return np.asarray(image)


def barcode(tile: Tile, rng: np.random.Generator) -> Tile:
    out = tile.copy()
    bars = np.repeat((rng.random(30) > 0.5) * 255, 2)
    top = int(rng.integers(0, SIDE - 48))
    out[top : top + 48, 20:80] = bars[None, :, None]
    return out


@pytest.mark.parametrize("colour", [(0, 0, 0), (20, 20, 30), (255, 255, 255)])
def test_writing_is_found_in_nine_of_ten_tiles(colour: tuple[int, int, int]) -> None:
    rng = np.random.default_rng(1)
    found = [longest_line(write(tile, rng, colour)) >= POLICY.min_glyphs for tile in tissue(24)]
    assert np.mean(found) >= 0.9


@pytest.mark.parametrize("colour", [(20, 120, 60), (30, 50, 170), (200, 25, 40), (15, 15, 20)])
def test_pens_of_four_colours_are_found(colour: tuple[int, int, int]) -> None:
    rng = np.random.default_rng(2)
    found = [ink_share(scribble(tile, rng, colour)) > POLICY.min_ink_share for tile in tissue(24)]
    assert np.mean(found) >= 0.9


def test_pieces_of_a_barcode_are_found_in_both_directions() -> None:
    rng = np.random.default_rng(3)
    coded = [barcode(tile, rng) for tile in tissue(12)]
    for tiles in (coded, [np.ascontiguousarray(tile.transpose(1, 0, 2)) for tile in coded]):
        assert all(label_blocks(tile) >= POLICY.min_label_blocks for tile in tiles)


def test_clean_tissue_in_many_stains_is_left_alone() -> None:
    for tile in tissue(60, seed=4):
        assert ink_share(tile) <= POLICY.min_ink_share
        assert longest_line(tile) < POLICY.min_glyphs
        assert label_blocks(tile) == 0


def evidence(
    ink: list[float], glyphs: list[int], blocks: list[int], usual: float = 0.0
) -> DisclosureEvidence:
    clean = np.zeros(50, dtype=np.int64)
    return DisclosureEvidence(
        np.array(ink), np.array(glyphs), np.array(blocks), np.arange(50), np.full(50, usual), clean, clean
    )


def test_one_hit_of_any_kind_is_a_review_and_none_a_pass() -> None:
    assert result(evidence([0.0, 0.0], [0, 1], [0, 1]), CORE, None).status is Status.PASS
    for one in (
        evidence([0.2, 0.0], [0, 0], [0, 0]),
        evidence([0.0, 0.0], [0, 7], [0, 0]),
        evidence([0.0, 0.0], [0, 0], [2, 0]),
    ):
        found = result(one, CORE, None)
        assert found.status is Status.REVIEW and found.value == 1.0 and found.gating


def read(
    marked: int = 0, unsure: int = 0, shown: int = 3, decoy_marked: int = 0, left: int = 0
) -> MarkEvidence:
    return MarkEvidence("sha256:0", "sha256:1", marked, unsure, shown, decoy_marked, 0, 10, left)


@pytest.mark.parametrize(
    ("reading", "status"),
    [
        (None, Status.REVIEW),
        (read(), Status.PASS),
        (read(marked=1), Status.FAIL),
        (read(marked=3, decoy_marked=1), Status.FAIL),
        (
            read(marked=1, decoy_marked=2),
            Status.REVIEW,
        ),  # who calls clean tissue marked confirms nothing alone
        (read(decoy_marked=1), Status.REVIEW),
        (read(unsure=1), Status.REVIEW),
        (read(left=1), Status.REVIEW),
        (read(marked=1, left=1), Status.FAIL),
        (read(shown=2), Status.REVIEW),  # a hit that nobody was shown is not cleared
    ],
)
def test_a_signed_reading_confirms_or_clears_every_hit(reading: MarkEvidence | None, status: Status) -> None:
    three = evidence([0.2, 0.3, 0.0, 0.0], [0, 0, 9, 0], [0, 0, 0, 0])
    found = result(three, CORE, reading)
    assert found.status is status and found.value == 3.0 and found.gating


def test_a_reading_of_nothing_changes_nothing() -> None:
    assert result(evidence([0.0], [0], [0]), CORE, read(shown=0)).status is Status.PASS


def test_severity_orders_hits_and_agrees_with_them() -> None:
    seen = evidence([0.05, 0.2, 0.0, 0.0], [0, 0, 30, 3], [0, 0, 0, 1])
    released, clean = severity(seen, POLICY)
    assert hits(seen, POLICY).tolist() == (released > 1.0).tolist() == [True, True, True, False]
    assert np.argsort(-released).tolist()[:2] == [1, 2] and (clean <= 1.0).all()
    strict = POLICY.model_copy(update={"min_label_blocks": 1})  # a limit of nothing at all
    assert hits(evidence([0.0], [0], [1]), strict).all() and not hits(evidence([0.0], [0], [0]), strict).any()


def test_a_dirty_holdout_excuses_no_name() -> None:
    """Two of 50 holdout tiles bear a name of 20 signs: a released name of ten is a hit all the same, and it is said why."""
    clean = evidence([0.0, 0.0], [10, 0], [0, 0])
    names = clean.holdout_glyphs.copy()
    names[:2] = 20
    dirty_holdout = replace(clean, holdout_glyphs=names)
    assert hits(dirty_holdout, POLICY).tolist() == [True, False]
    found = result(dirty_holdout, CORE, None)
    assert found.status is Status.REVIEW and found.details["text"] == 1
    assert "The holdout's own tiles show as much" in found.why
    assert "holdout's own tiles" not in result(clean, CORE, None).why
    # Decoys of a reading are tiles without a mark, so the holdout's own names are none.
    assert (severity(dirty_holdout, POLICY)[1] > 1.0).sum() == 2
    assert hits(evidence([0.05], [0], [0], usual=0.06), POLICY).all()


def test_a_detector_that_sees_nothing_would_fail_these_tests() -> None:
    """The mutant: without its strokes a written tile reads as clean."""
    rng = np.random.default_rng(5)
    blind: Callable[[Tile], int] = lambda tile: longest_line(np.full_like(tile, 200))  # noqa: E731
    assert not any(blind(write(tile, rng, (0, 0, 0))) for tile in tissue(4))
