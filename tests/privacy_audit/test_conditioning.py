"""Conditioning pairs: a redrawn condition is caught, an innocent release is not, and wrong files are refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from privacy_audit import conditioning, plants
from privacy_audit.conditioning import Conditions, ConditionsError, read_conditions
from privacy_audit.evidence_parts import ConditioningEvidence
from privacy_audit.features import describe
from privacy_audit.geometry import correlation_slow, orient
from privacy_audit.keypoints import agreement
from privacy_audit.neighbours import Standardiser
from privacy_audit.pairs import correlations, pair_scores
from privacy_audit.plants import Maker
from privacy_audit.policy import load_policy
from privacy_audit.result import Status
from privacy_audit.subject import Group, cohort_of
from tests.privacy_audit.conftest import TextureEye, Tile, stain_of, tissue_tile

POLICY = load_policy("core")
SIDE = 64


def group(name: str, tiles: list[Tile], patients: list[str]) -> Group:
    pixels = torch.from_numpy(np.stack(tiles)).permute(0, 3, 1, 2).contiguous()
    ids = tuple(f"{patient or name}/{row}.png" for row, patient in enumerate(patients))
    return Group(name, ids, tuple(patients), ("",) * len(ids), describe(pixels, TextureEye()))


def world(redrawn: int, seed: int = 0) -> tuple[Group, Group, Group]:
    """24 released tiles, the first `redrawn` of which are their conditioning tile, noisy and turned."""
    rng = np.random.default_rng(seed)
    names = [f"p{number:02d}" for number in range(12) for _ in range(2)]
    train = [tissue_tile(rng, stain_of(rng), SIDE) for _ in names]
    holdout = [tissue_tile(rng, stain_of(rng), SIDE) for _ in names]
    drawn = [
        np.clip(np.rot90(train[row]) + rng.normal(0, 8, (SIDE, SIDE, 3)), 0, 255).astype(np.uint8)
        if row < redrawn
        else tissue_tile(rng, stain_of(rng), SIDE)
        for row in range(len(names))
    ]
    return (
        group("train", train, names),
        group("holdout", holdout, [f"h{name}" for name in names]),
        group("synthetic", drawn, [""] * len(names)),
    )


def measure(redrawn: int, seed: int = 0) -> ConditioningEvidence:
    train, holdout, synthetic = world(redrawn, seed)
    standardise = Standardiser.fit(train.features.embeddings, holdout.features.embeddings)
    pairs = Conditions({row: (row,) for row in range(len(synthetic))})
    return conditioning.gather(
        pairs, synthetic, train, holdout, cohort_of(train, holdout), standardise, POLICY.copies
    )


def judged(evidence: ConditioningEvidence) -> Status:
    p = conditioning.p_value(evidence, POLICY, np.random.default_rng(0))
    return conditioning.result(evidence, p, p, POLICY).status


def test_one_redrawn_condition_fails_the_release() -> None:
    evidence = measure(1)
    assert judged(evidence) is Status.FAIL
    assert evidence.own[0] > 0.75 > evidence.own[1:].max()


def test_an_innocent_release_passes() -> None:
    assert all(judged(measure(0, seed)) is Status.PASS for seed in range(4))


def test_many_faint_resemblances_need_a_person_and_many_beyond_all_look_alikes_fail() -> None:
    evidence = measure(0)
    faint = replace(evidence, own=evidence.other + 0.05)
    assert judged(faint) is Status.REVIEW
    beyond = replace(evidence, own=np.maximum(evidence.other, evidence.other.max() + 0.01))
    assert beyond.own.max() < POLICY.copies.confirm_score and judged(beyond) is Status.FAIL
    assert judged(replace(evidence, own=evidence.other - 0.05)) is Status.PASS  # farther is no leak


def test_conditions_that_resemble_each_other_get_look_alikes_of_their_own() -> None:
    assert conditioning.distinct([[4, 2, 7], [4, 7, 2], [4, 2, 7]]) == [4, 7, 2]
    assert conditioning.distinct([[4], [4]]) == [4, 4]  # no others are there


@pytest.mark.parametrize("kept", [True, False])
def test_the_best_of_five_conditions_is_held_against_the_best_of_five(kept: bool) -> None:
    """Innocent blends of like tiles: with one look-alike for all five the test fails nearly every one of them."""
    rng = np.random.default_rng(2)
    failed = 0
    for _ in range(20):
        own = rng.uniform(0.1, 0.5, (300, 5)).max(axis=1)
        other = rng.uniform(0.1, 0.5, (300, 5 if kept else 1)).max(axis=1)
        evidence = ConditioningEvidence(np.arange(300), own, other, np.repeat(np.arange(60), 5))
        p = conditioning.p_value(evidence, POLICY, rng)
        failed += p < 0.05
    assert failed <= 4 if kept else failed == 20


def test_the_p_value_of_exchangeable_scores_is_no_smaller_than_it_claims() -> None:
    rng = np.random.default_rng(1)
    rejected = 0
    for _ in range(300):
        owner = np.repeat(np.arange(20), 3)
        shared = rng.normal(0.3, 0.05, 20)[owner]  # tiles of a patient go together
        own, other = (np.clip(shared + rng.normal(0, 0.05, 60), 0, 0.7) for _ in range(2))
        evidence = ConditioningEvidence(np.arange(60), own, other, owner)
        rejected += conditioning.p_value(evidence, POLICY, rng) < 0.05
    assert rejected / 300 <= 0.08


def test_correlations_agree_with_the_slow_path() -> None:
    train, _, synthetic = world(3)
    pairs = [(0, 0), (1, 1), (5, 9)]
    for (left, right), score in zip(pairs, correlations(synthetic, train, pairs, 0.5).score, strict=True):
        slow = max(
            correlation_slow(
                orient(synthetic.features.thumbs[left].float(), which).double().numpy(),
                train.features.thumbs[right].double().numpy(),
                0.5,
            )[0]
            for which in (range(8) if left == 0 else (0,))
        )
        assert score >= slow - 1e-4
        if left == 0:
            assert score == pytest.approx(slow, abs=1e-4)


def turned(tile: Tile, filler: Tile, rng: np.random.Generator) -> Tile:
    return plants.turn(tile, filler, rng)


def turned_and_zoomed(tile: Tile, filler: Tile, rng: np.random.Generator) -> Tile:
    return plants.zoom(plants.turn(tile, filler, rng), filler, rng)


def mirrored_and_zoomed(tile: Tile, filler: Tile, rng: np.random.Generator) -> Tile:
    return plants.zoom(np.ascontiguousarray(tile[:, ::-1]), filler, rng)


@pytest.mark.parametrize("maker", [turned, plants.zoom, turned_and_zoomed, mirrored_and_zoomed])
def test_keypoints_see_a_redrawn_condition_that_correlation_cannot(maker: Maker) -> None:
    """Tiles of 128 pixels, as released ones are: smaller ones have too few keypoints to agree on."""
    rng = np.random.default_rng(4)
    names = [f"p{number:02d}" for number in range(16)]
    train, holdout, drawn = ([tissue_tile(rng, stain_of(rng), 128) for _ in names] for _ in range(3))
    drawn[:12] = [maker(train[row], drawn[row], rng) for row in range(12)]
    known, others = group("train", train, names), group("holdout", holdout, [f"h{name}" for name in names])
    released = group("synthetic", drawn, [""] * len(names))
    standardise = Standardiser.fit(known.features.embeddings, others.features.embeddings)
    found = conditioning.gather(
        Conditions({row: (row,) for row in range(16)}),
        released, known, others, cohort_of(known, others), standardise, POLICY.copies,
    )  # fmt: skip
    own = [(row, row) for row in range(16)]
    shape = correlations(released, known, own, 0.5).score
    assert (found.own >= shape).all(), "no power is lost"
    unrelated = max(found.own[12:].max(), found.other.max())
    assert unrelated < POLICY.copies.confirm_score, "what was not redrawn is not confirmed"
    assert (found.own[:12] > unrelated).sum() >= 8
    assert shape[:12].max() < 0.4 and np.median(found.own[:12]) > 2.5 * np.median(shape[:12])
    assert judged(found) is Status.FAIL


def test_pair_scores_are_the_screens_own_combination() -> None:
    train, _, synthetic = world(3)
    pairs = [(0, 0), (2, 2), (7, 1)]
    found = correlations(synthetic, train, pairs, 0.5)
    for (left, right), shape, mirrored, score in zip(
        pairs,
        found.score,
        found.mirrored,
        pair_scores(synthetic, train, pairs, POLICY.copies, "test"),
        strict=True,
    ):
        a, b = synthetic.features.keypoints[left : left + 1], train.features.keypoints[right : right + 1]
        inliers = [agreement(a, b, mirrored=flag).inliers for flag in (False, True)]
        points = [max(n - 3, 0) / (max(n - 3, 0) + 3.0) for n in inliers]  # the shipped policy's two threes
        assert score == pytest.approx(max(1 - (1 - shape) * (1 - points[int(mirrored)]), *points))


def test_three_kinds_of_file_say_the_same(tmp_path: Path) -> None:
    rows = [("s/0.png", "p/1"), ("s/0.png", "p/2"), ("s/1.png", "p/2"), ("s/9.png", "p/1")]
    (tmp_path / "a.csv").write_text("surrogate,tile\n" + "".join(f"{a},{b}\n" for a, b in rows))
    table = pa.table({"surrogate": [a for a, _ in rows], "tile": [b for _, b in rows]})
    pq.write_table(table, tmp_path / "a.parquet")
    record = {
        "s/0.png": {"policy": "own", "sources": ["p/1", "p/2"]},
        "s/1.png": {"policy": "own", "sources": ["p/2"]},
    }
    (tmp_path / "a.json").write_text(json.dumps(record))
    for name in ("a.csv", "a.parquet", "a.json"):
        found = read_conditions(tmp_path / name, ["s/0.png", "s/1.png"], ["p/1", "p/2"])
        assert found.rows == {0: (0, 1), 1: (1,)}


@pytest.mark.parametrize(
    ("name", "data", "code"),
    [
        ("a.csv", b"surrogate,tile\ns/0.png,p/3\n", "conditions-unknown-tile"),
        ("a.csv", b"surrogate,tile\n", "conditions-incomplete"),
        ("a.csv", b"tile,other\n", "bad-conditions"),
        ("a.csv", b"\xff\xfe", "bad-conditions"),
        ("a.parquet", b"PAR1 no", "bad-conditions"),
        ("a.json", b"[]", "bad-conditions"),
    ],
)
def test_wrong_files_are_refused(tmp_path: Path, name: str, data: bytes, code: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ConditionsError) as caught:
        read_conditions(tmp_path / name, ["s/0.png"], ["p/1"])
    assert caught.value.code == code and caught.value.exit_code == 4


def test_without_conditions_it_says_aloud_that_it_was_not_tested() -> None:
    found = conditioning.result(None, None, None, POLICY)
    assert not found.tested and not found.gating and "--conditions" in found.why
    demanded = conditioning.result(
        None, None, None, POLICY.model_copy(update={"required": ("conditioning",)})
    )
    assert demanded.gating and demanded.status is Status.REVIEW
