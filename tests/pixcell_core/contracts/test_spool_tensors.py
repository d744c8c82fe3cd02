"""Tensor bytes are those of the safetensors library, whatever is in them."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from safetensors.numpy import load, save

from pixcell_core.contracts.spool import Arrays, arrays_digest, arrays_from_bytes, arrays_to_bytes

CASES: dict[str, Arrays] = {
    "one": {"w": np.arange(6, dtype=np.float32).reshape(2, 3)},
    "names": {
        name: np.full((3,), i, dtype=np.float32) for i, name in enumerate(("b", "a", "a.b", "A-1", "_"))
    },
    "turned": {
        "t": np.arange(12, dtype=np.float32).reshape(3, 4).T,
        "s": np.arange(9, dtype=np.float32)[::2],
    },
    "empty": {"e": np.zeros((0, 4), dtype=np.float32), "w": np.ones(1, dtype=np.float32)},
    "number": {"n": np.array(2.5, dtype=np.float32)},
    "special": {"x": np.array([0.0, -0.0, 1e-45, 3.4e38], dtype=np.float32)},
    "many": {f"layer{i}.lora_B.default.weight": np.full((4, 2), i, dtype=np.float32) for i in range(200)},
}


@pytest.mark.parametrize("case", CASES)
def test_bytes_and_digest_are_the_librarys(case: str) -> None:
    arrays = CASES[case]
    slow = save(
        {name: np.ascontiguousarray(arrays[name]).reshape(arrays[name].shape) for name in sorted(arrays)}
    )
    assert arrays_to_bytes(arrays) == slow
    assert arrays_digest(arrays) == "sha256:" + hashlib.sha256(slow).hexdigest()
    for name, value in load(slow).items():
        np.testing.assert_array_equal(value, arrays[name])
    assert set(arrays_from_bytes(slow)) == set(arrays)


def test_one_bit_is_another_digest() -> None:
    first = CASES["one"]
    other = {"w": first["w"].copy()}
    other["w"][0, 0] = np.nextafter(np.float32(0), np.float32(1))
    renamed = {"v": first["w"]}
    assert len({arrays_digest(first), arrays_digest(other), arrays_digest(renamed)}) == 3
