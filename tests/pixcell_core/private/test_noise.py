"""The noise source: published AES vectors, the normal law in its body and in its tail, and no second use."""

from __future__ import annotations

import copy
import os
import pickle

import numpy as np
import pytest
import torch
from scipy import stats

from pixcell_core.private.noise import (
    AesCtrSource,
    SystemNoiseSource,
    UnsafeFixedKeySource,
    gaussian_like,
)

KEY = bytes.fromhex("603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4")
COUNTER = bytes.fromhex("f0f1f2f3f4f5f6f7f8f9fafbfcfdfeff")
PLAINTEXT = bytes.fromhex(
    "6bc1bee22e409f96e93d7e117393172aae2d8a571e03ac9c9eb76fac45af8e51"
    "30c81c46a35ce411e5fbc1191a0a52eff69f2445df4f9b17ad2b417be66c3710"
)
CIPHERTEXT = bytes.fromhex(
    "601ec313775789a5b7a7f504bbf3d228f443e3ca4d62b59aca84e990cacaf5c5"
    "2b0930daa23de94ce87017ba2d84988ddfc9c58db67aada613c2dd08457941a6"
)


def test_keystream_is_aes_256_ctr_of_nist_sp_800_38a() -> None:
    stream = UnsafeFixedKeySource(KEY, COUNTER)
    found = stream.keystream(20) + stream.keystream(44)
    assert bytes(a ^ b for a, b in zip(found, PLAINTEXT, strict=True)) == CIPHERTEXT


def test_gaussian_is_the_sum_of_four_box_muller_halves_of_that_stream() -> None:
    words = np.frombuffer(UnsafeFixedKeySource(KEY, COUNTER).keystream(8 * 4 * 6), dtype="<u8") >> 11
    expected = np.zeros(6)
    for quarter in words.reshape(4, 6).astype(np.float64):
        radius = np.sqrt(-2.0 * np.log((quarter[:3] + 0.5) / 2**53))
        angle = 2.0 * np.pi * quarter[3:] / 2**53
        expected += 0.5 * np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])
    assert np.allclose(UnsafeFixedKeySource(KEY, COUNTER).gaussian(6), expected, rtol=1e-12, atol=0)


def test_body_and_tail_follow_the_normal_law() -> None:
    draws = UnsafeFixedKeySource(KEY, COUNTER).gaussian(2_000_000)
    assert stats.kstest(draws[:500_000], "norm").pvalue > 1e-3
    assert abs(draws.var() - 1.0) < 5 * np.sqrt(2 / draws.size)
    for limit in (2.0, 3.0, 4.0):
        expected = draws.size * 2 * stats.norm.sf(limit)
        for count in ((np.abs(draws) > limit).sum(), 2 * (draws > limit).sum(), 2 * (draws < -limit).sum()):
            assert abs(count - expected) < 7 * np.sqrt(expected), limit
    assert abs(np.corrcoef(draws[:-1], draws[1:])[0, 1]) < 5 / np.sqrt(draws.size)


def test_a_wrong_scale_of_half_a_percent_would_fail_the_variance_test() -> None:
    draws = UnsafeFixedKeySource(KEY, COUNTER).gaussian(2_000_000) * 1.005
    assert abs(draws.var() - 1.0) > 5 * np.sqrt(2 / draws.size)


def test_uniform_stays_below_one_and_is_uniform() -> None:
    draws = UnsafeFixedKeySource(KEY, COUNTER).uniform(200_000)
    assert draws.min() >= 0.0 and draws.max() < 1.0
    assert stats.kstest(draws, "uniform").pvalue > 1e-3

    class Ones(AesCtrSource):
        def keystream(self, count: int) -> bytes:
            return b"\xff" * count

    assert Ones(KEY, COUNTER).uniform(1)[0] == 1.0 - 2.0**-53
    assert np.isfinite(Ones(KEY, COUNTER).gaussian(4)).all()


def test_blocks_join_without_gap_or_repeat() -> None:
    draws = UnsafeFixedKeySource(KEY, COUNTER).gaussian((1 << 18) + 7)
    assert np.unique(draws).size == draws.size


def test_system_sources_never_agree() -> None:
    assert not np.array_equal(SystemNoiseSource().gaussian(8), SystemNoiseSource().gaussian(8))


def test_a_forked_process_does_not_continue_its_parents_stream() -> None:
    source = SystemNoiseSource()
    source.gaussian(1)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writer, source.keystream(16))
        os._exit(0)
    os.waitpid(child, 0)
    theirs = os.read(reader, 16)
    os.close(reader)
    os.close(writer)
    assert len(theirs) == 16 and theirs != source.keystream(16)


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_source_cannot_be_duplicated(duplicate: object) -> None:
    assert callable(duplicate)
    with pytest.raises(TypeError, match="noise source"):
        duplicate(SystemNoiseSource())


def test_wrong_key_length_is_refused() -> None:
    with pytest.raises(ValueError, match="32"):
        UnsafeFixedKeySource(b"short")


def test_gaussian_like_keeps_shape_and_stays_in_float64() -> None:
    noise = gaussian_like(UnsafeFixedKeySource(), torch.zeros(3, 5, dtype=torch.float32), 2.5)
    assert noise.dtype == torch.float64 and noise.shape == (3, 5)
    assert np.allclose(noise.numpy().ravel(), UnsafeFixedKeySource().gaussian(15) * 2.5)
