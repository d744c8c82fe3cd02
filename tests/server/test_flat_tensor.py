"""The adapter travels as one tensor and comes out as it went in; a lying buffer costs nothing."""

from __future__ import annotations

import io

import numpy as np
import pytest
from flwr.app import Array
from hypothesis import given
from hypothesis import strategies as st

from pixcell_core.contracts.spool import SpoolError, flatten, unflatten
from pixcell_core.flower.messages import decode_array, encode_flat

SHAPES = st.dictionaries(
    st.text("abc.", min_size=1, max_size=8),
    st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple),
    min_size=1,
    max_size=6,
)


@given(SHAPES, st.integers(0, 2**31))
def test_flat_and_back_is_the_same_adapter(shapes: dict[str, tuple[int, ...]], seed: int) -> None:
    rng = np.random.default_rng(seed)
    arrays = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    again = unflatten(flatten(arrays), shapes)
    assert again.keys() == arrays.keys()
    assert all(np.array_equal(again[name], arrays[name]) for name in arrays)
    with pytest.raises(SpoolError):
        unflatten(np.append(flatten(arrays), np.float32(0)), shapes)


@given(SHAPES, st.integers(0, 2**31))
def test_the_tensor_of_a_message_is_the_one_flower_makes(
    shapes: dict[str, tuple[int, ...]], seed: int
) -> None:
    rng = np.random.default_rng(seed)
    arrays = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    ours, slow = encode_flat(arrays), Array(flatten(arrays))
    assert (ours.data, ours.dtype, tuple(ours.shape), ours.stype) == (
        slow.data,
        slow.dtype,
        tuple(slow.shape),
        slow.stype,
    )
    turned = {name: value.T for name, value in arrays.items()}
    assert encode_flat(turned).data == Array(flatten(turned)).data


def saved(array: np.ndarray) -> bytes:
    """An .npy buffer."""
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=False)
    return stream.getvalue()


def test_only_the_announced_array_is_decoded() -> None:
    values = np.arange(6, dtype=np.float32)
    assert np.array_equal(decode_array(saved(values), (6,)), values)
    for bad in (
        saved(values.astype(np.float64)),
        saved(values.reshape(2, 3)),
        saved(values)[:-1],
        saved(values) + b"x",
        b"\x93NUMPY\x02\x00",
        b"",
    ):
        with pytest.raises((ValueError, EOFError)):
            decode_array(bad, (6,))
