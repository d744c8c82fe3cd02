"""Conditioning policies: what each shows, whom it mixes, what it refuses."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pixcell_core.contracts.study import PatientVotes
from pixcell_core.errors import BadInputError, RefusedError
from pixcell_core.private.condition_search import VotedConditions
from pixcell_core.training.feature_store import FeatureStore, FeatureStoreWriter
from site_client.generate.conditions import (
    Blend,
    Condition,
    OwnTile,
    PrivateConditions,
    TileEmbeddings,
    check_policy_name,
    pool_policy,
)


def pool_of(tiles_per_patient: list[int], seed: int = 0, labels: bool = True) -> TileEmbeddings:
    generator = torch.Generator().manual_seed(seed)
    patients = tuple(f"p{i}" for i, n in enumerate(tiles_per_patient) for _ in range(n))
    return TileEmbeddings(
        torch.randn(len(patients), 1, 8, generator=generator),
        patients,
        tuple(f"tile-{i}" for i in range(len(patients))),
        tuple(("stroma", "tumour")[i % 2] if labels else None for i in range(len(patients))),
    )


def owners(pool: TileEmbeddings, sources: tuple[str, ...]) -> list[str]:
    return [pool.patients[pool.tiles.index(tile)] for tile in sources]


def test_own_follows_one_private_tile_and_claims_nothing() -> None:
    pool = pool_of([3, 2, 4])
    for condition in OwnTile(pool).draw(9, np.random.default_rng(1)):
        (tile,) = condition.sources
        row = pool.tiles.index(tile)
        assert torch.equal(condition.vector, pool.vectors[row])
        assert condition.label == pool.labels[row]
    assert "No differential-privacy claim" in OwnTile.promise


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(1, 6), min_size=3, max_size=8),
    st.integers(3, 5),
    st.integers(1, 12),
    st.integers(0, 2**31),
    st.booleans(),
)
def test_a_blend_always_holds_tiles_of_k_different_patients(
    sizes: list[int], k: int, count: int, seed: int, labels: bool
) -> None:
    pool = pool_of(sizes, seed, labels)
    if len(sizes) < k:
        with pytest.raises(RefusedError) as refused:
            Blend(pool, k).draw(count, np.random.default_rng(seed))
        assert refused.value.code == "too-few-patients"
        return
    drawn = Blend(pool, k).draw(count, np.random.default_rng(seed))
    assert len(drawn) == count
    for condition in drawn:
        assert len(condition.sources) == len(set(owners(pool, condition.sources))) == k
        rows = [pool.tiles.index(tile) for tile in condition.sources]
        mean = pool.vectors[rows].mean(0)
        cosine = torch.nn.functional.cosine_similarity(condition.vector.flatten(), mean.flatten(), dim=0)
        assert cosine.item() == pytest.approx(1.0, abs=1e-4), "every patient weighs the same"
        lengths = pool.vectors[rows].flatten(1).norm(dim=1)
        assert condition.vector.norm().item() == pytest.approx(lengths.mean().item(), rel=1e-3)


def test_no_patient_is_shown_more_often_than_others() -> None:
    """A patient with many tiles is not the anchor more often: patients take turns."""
    pool = pool_of([50, 1, 1])
    first = Counter(owners(pool, c.sources)[0] for c in OwnTile(pool).draw(30, np.random.default_rng(2)))
    assert set(first.values()) == {10}


def test_a_blend_takes_the_nearest_tiles_and_keeps_to_the_anchors_label() -> None:
    near, far = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    vectors = torch.stack([near, near, near, far, near + 0.1, far])[:, None]
    pool = TileEmbeddings(
        vectors,
        ("a", "b", "b", "b", "c", "c"),
        ("a0", "b-near-other-label", "b-near", "b-far", "c-near", "c-far"),
        ("stroma", "tumour", "stroma", "stroma", "stroma", "stroma"),
    )
    drawn = Blend(pool, 3).draw(3, np.random.default_rng(0))
    (condition,) = [c for c in drawn if c.sources[0] == "a0"]
    assert set(condition.sources) == {"a0", "b-near", "c-near"} and condition.label == "stroma"


def test_conditions_are_drawn_again_alike_from_the_same_seed() -> None:
    pool = pool_of([3, 3, 3, 3])
    one = Blend(pool, 3).draw(5, np.random.default_rng(4))
    again = Blend(pool, 3).draw(5, np.random.default_rng(4))
    other = Blend(pool, 3).draw(5, np.random.default_rng(5))
    assert [c.sources for c in one] == [c.sources for c in again] != [c.sources for c in other]


def test_ties_and_copies_never_bring_a_patient_in_twice() -> None:
    """Every tile the same, one patient with nine of them, labels in disagreement: still k different patients."""
    patients = ("a",) * 9 + ("b", "c", "c")
    labels = ("stroma",) * 10 + ("tumour", None)
    pool = TileEmbeddings(torch.ones(12, 1, 8), patients, tuple(f"t{i}" for i in range(12)), tuple(labels))
    for seed in range(5):
        for condition in Blend(pool, 3).draw(6, np.random.default_rng(seed)):
            assert sorted(owners(pool, condition.sources)) == ["a", "b", "c"]
            assert torch.allclose(condition.vector, torch.ones(1, 8)) and condition.label == "stroma"


def test_the_check_of_k_patients_catches_a_blend_of_nearest_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mutant that takes the k nearest tiles, whoever they are of, mixes fewer patients on the same pool."""

    def nearest(
        self: Blend, pool: TileEmbeddings, flat: torch.Tensor, patients: np.ndarray, anchor: int
    ) -> Condition:
        rows = torch.argsort(flat @ flat[anchor], descending=True)[: self.k].tolist()
        return Condition(pool.vectors[rows].mean(0), None, tuple(pool.tiles[r] for r in rows))

    pool = pool_of([6, 6, 6], seed=1)
    pool = TileEmbeddings(pool.vectors.sort(dim=0).values, pool.patients, pool.tiles, pool.labels)
    monkeypatch.setattr(Blend, "_around", nearest)
    drawn = Blend(pool, 3).draw(9, np.random.default_rng(0))
    assert min(len(set(owners(pool, c.sources))) for c in drawn) < 3


@pytest.mark.parametrize("k", [-1, 0, 1, 2])
def test_a_blend_of_fewer_than_three_is_refused(k: int) -> None:
    with pytest.raises(RefusedError) as refused:
        pool_policy("blend", k, pool_of([2, 2, 2]))
    assert refused.value.code == "blend-too-small"


def test_promises_say_what_they_do_not_hold() -> None:
    pool = pool_of([2, 2, 2, 2])
    own, blend = pool_policy("own", 1, pool), pool_policy("blend", 4, pool)
    assert (own.name, blend.name) == ("own", "blend")
    for policy in (own, blend):
        assert "No differential-privacy claim" in policy.promise
    assert "may resemble its tile, its patient and its label" in own.promise
    for said in (
        "4 different patients",
        "not removed",
        "other 3 patients",
        "labels are those of private tiles",
    ):
        assert said in blend.promise


def voted_conditions(
    histogram: np.ndarray, labels: tuple[str, ...] = ("stroma", "tumour")
) -> VotedConditions:
    votes = PatientVotes(
        noise_multiplier=2.0,
        iterations=1,
        candidates=histogram.shape[1],
        labels=labels,
        candidates_digest="sha256:" + "0" * 64,
    )
    candidates = torch.arange(histogram.shape[1] * 8.0).reshape(1, -1, 1, 8)
    return VotedConditions(candidates, histogram[None], votes, "interpolation")


def test_private_conditions_follow_the_noisy_votes_and_stand_on_no_tile() -> None:
    voted = voted_conditions(np.array([[30.0, -4.0, 0.0], [3.9, 0.0, 10.0]]))
    drawn = PrivateConditions(voted).draw(2000, np.random.default_rng(3))
    assert all(condition.sources == () for condition in drawn)
    found = Counter((c.label, int(c.vector[0, 0]) // 8) for c in drawn)
    assert found.keys() == {("stroma", 0), ("tumour", 2)}, "what is under the threshold is not drawn"
    assert found["stroma", 0] / 2000 == pytest.approx(0.75, abs=0.04)
    again = PrivateConditions(voted).draw(2000, np.random.default_rng(3))
    assert [c.label for c in again] == [c.label for c in drawn]
    promise = PrivateConditions(voted).promise
    for said in (
        "unit patient",
        "add-or-remove-one",
        "noise multiplier 2 in 1 iteration,",
        "privacy statement",
    ):
        assert said in promise
    assert "epsilon 2" not in promise and "uniform" not in promise


def test_private_conditions_without_a_winner_are_uniform_and_say_so() -> None:
    policy = PrivateConditions(voted_conditions(np.full((2, 3), 3.9)))
    found = Counter((c.label, int(c.vector[0, 0]) // 8) for c in policy.draw(3000, np.random.default_rng(0)))
    assert len(found) == 6 and max(found.values()) < 620
    assert "uniform over candidates" in policy.promise
    unlabelled = PrivateConditions(voted_conditions(np.array([[30.0, 0.0]]), labels=()))
    assert {c.label for c in unlabelled.draw(5, np.random.default_rng(0))} == {None}


def test_names() -> None:
    assert [check_policy_name(name) for name in ("own", "blend", "private")] == ["own", "blend", "private"]
    for name in ("Private", "Blend", ""):
        with pytest.raises(BadInputError, match="no conditioning policy"):
            check_policy_name(name)
    with pytest.raises(BadInputError, match="does not look at private tiles"):
        pool_policy("private", 3, pool_of([2, 2, 2]))


def test_an_empty_store_is_an_input_error(tmp_path: Path) -> None:
    FeatureStoreWriter(tmp_path, {}).close()
    with pytest.raises(BadInputError) as refused:
        TileEmbeddings.from_store(FeatureStore.open(tmp_path))
    assert refused.value.code == "no-patients"
