"""Conditioning policies: what each shows, whom it mixes, what it refuses."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pixcell_core.errors import BadInputError, RefusedError
from pixcell_core.training.feature_store import FeatureStore, FeatureStoreWriter
from site_client.generate.conditions import Blend, OwnTile, TileEmbeddings, policy_named


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
    for condition in OwnTile().draw(pool, 9, np.random.default_rng(1)):
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
            Blend(k).draw(pool, count, np.random.default_rng(seed))
        assert refused.value.code == "too-few-patients"
        return
    drawn = Blend(k).draw(pool, count, np.random.default_rng(seed))
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
    first = Counter(owners(pool, c.sources)[0] for c in OwnTile().draw(pool, 30, np.random.default_rng(2)))
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
    drawn = Blend(3).draw(pool, 3, np.random.default_rng(0))
    (condition,) = [c for c in drawn if c.sources[0] == "a0"]
    assert set(condition.sources) == {"a0", "b-near", "c-near"} and condition.label == "stroma"


def test_conditions_are_drawn_again_alike_from_the_same_seed() -> None:
    pool = pool_of([3, 3, 3, 3])
    one = Blend(3).draw(pool, 5, np.random.default_rng(4))
    again = Blend(3).draw(pool, 5, np.random.default_rng(4))
    other = Blend(3).draw(pool, 5, np.random.default_rng(5))
    assert [c.sources for c in one] == [c.sources for c in again] != [c.sources for c in other]


@pytest.mark.parametrize("k", [-1, 0, 1, 2])
def test_a_blend_of_fewer_than_three_is_refused(k: int) -> None:
    with pytest.raises(RefusedError) as refused:
        policy_named("blend", k)
    assert refused.value.code == "blend-too-small"


def test_names() -> None:
    assert policy_named("own", 1).name == "own"
    assert (
        policy_named("blend", 4).name == "blend"
        and "4 different patients" in policy_named("blend", 4).promise
    )
    for name in ("private", "Blend", ""):
        with pytest.raises(BadInputError, match="no conditioning policy"):
            policy_named(name, 3)


def test_an_empty_store_is_an_input_error(tmp_path: Path) -> None:
    FeatureStoreWriter(tmp_path, {}).close()
    with pytest.raises(BadInputError) as refused:
        TileEmbeddings.from_store(FeatureStore.open(tmp_path))
    assert refused.value.code == "no-patients"
