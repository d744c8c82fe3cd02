"""Exact neighbours against the slow path and faiss; files of vectors, memory bound, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from pixcell_core.errors import BadInputError
from privacy_audit.neighbours import (
    BASE_BLOCK,
    Plan,
    VectorError,
    VectorFile,
    most_similar,
    nearest,
    patient_minima,
)


def cloud(seed: int, rows: int, width: int = 24) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("rows", [3, 64, 700, BASE_BLOCK + 64, 2 * BASE_BLOCK + 37])
@pytest.mark.parametrize("k", [1, 5])
def test_the_search_equals_comparing_all(rows: int, k: int) -> None:
    base, queries = cloud(0, rows), cloud(1, 21)
    distances, where = nearest(queries, base, k)
    slow = torch.cdist(queries.double(), base.double()).topk(min(k, rows), largest=False)
    assert torch.equal(where, slow.indices)
    assert torch.allclose(distances.double(), slow.values, atol=1e-4)
    products, at = most_similar(queries, base, k)
    best = (queries.double() @ base.double().T).topk(min(k, rows))
    assert torch.equal(at, best.indices) and torch.allclose(products.double(), best.values, atol=1e-4)


def test_top_one_is_that_of_faiss() -> None:
    import faiss

    base, queries = cloud(2, 9000, 64), cloud(3, 100, 64)
    found = nearest(queries, base, 3)[1]
    theirs = faiss.knn(queries.numpy(), base.numpy(), 3, metric=faiss.METRIC_L2)[1]
    assert (found.numpy()[:, 0] == theirs[:, 0]).all()


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_a_file_is_searched_as_its_tensor_is(tmp_path: Path, dtype: type) -> None:
    base, queries = cloud(4, 5000).numpy().astype(dtype), cloud(5, 30)
    np.save(tmp_path / "base.npy", base)
    file = VectorFile.open(tmp_path / "base.npy")
    assert len(file) == 5000 and torch.equal(file[10:20], torch.from_numpy(base[10:20]))
    in_memory, on_disk = (
        nearest(queries, torch.from_numpy(base), 4),
        nearest(queries, file, 4, memory=4_000_000),
    )
    assert torch.equal(in_memory[1], on_disk[1])
    owner = torch.arange(5000) % 7
    assert torch.allclose(
        patient_minima(queries, file, owner, 7), patient_minima(queries, torch.from_numpy(base), owner, 7)
    )


@pytest.mark.parametrize("fault", ["no file", "text", "integers", "three axes", "cut", "nan"])
def test_files_that_are_no_vectors_are_refused(tmp_path: Path, fault: str) -> None:
    path = tmp_path / "base.npy"
    values: np.ndarray = np.ones((40, 6), dtype=np.float32)
    if fault == "text":
        path.write_text("0.1 0.2")
    elif fault == "integers":
        np.save(path, values.astype(np.int32))
    elif fault == "three axes":
        np.save(path, values[None])
    elif fault == "cut":
        np.save(path, values)
        path.write_bytes(path.read_bytes()[:-8])
    elif fault == "nan":
        values[17, 2] = np.nan
        np.save(path, values)
    with pytest.raises(VectorError):
        nearest(torch.ones(2, 6), VectorFile.open(path), 1)


def test_an_object_array_is_never_unpickled(tmp_path: Path) -> None:
    np.save(tmp_path / "base.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(VectorError):
        VectorFile.open(tmp_path / "base.npy")


def test_the_plan_stays_within_its_memory_or_says_so() -> None:
    plan = Plan.within(1_500_000_000, 1536, 1000, 10)
    assert plan.base == BASE_BLOCK
    small = Plan.within(30_000_000, 1536, 64, 10)
    assert small.base < BASE_BLOCK and small.base * 1536 * 8 < 30_000_000
    with pytest.raises(BadInputError, match="do not fit"):
        Plan.within(1_000_000, 1536, 1000, 10)


def test_minima_do_not_depend_on_the_order_of_the_tiles() -> None:
    base, queries, owner = cloud(6, 300), cloud(7, 9), torch.arange(300) % 11
    order = torch.argsort(owner, stable=True)
    mixed = patient_minima(queries, base, owner, 12)
    assert torch.allclose(mixed, patient_minima(queries, base[order], owner[order], 12), atol=1e-5)
    assert torch.isinf(mixed[:, 11]).all()
    slow = torch.stack([torch.cdist(queries, base[owner == p]).amin(1) for p in range(11)], dim=1)
    assert torch.allclose(mixed[:, :11], slow, atol=1e-3)
