"""The tree against published vectors, a naive recursive oracle, and forged proofs."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pixcell_core.trust.merkle import (
    EMPTY_ROOT,
    RunningRoot,
    consistency_proof,
    inclusion_proof,
    leaf_hash,
    merkle_root,
    node_hash,
    verify_consistency,
    verify_inclusion,
)

# The eight leaves and roots of the reference test data of Certificate Transparency implementations.
VECTOR_LEAVES = [
    bytes.fromhex(text)
    for text in (
        "",
        "00",
        "10",
        "2021",
        "3031",
        "40414243",
        "5051525354555657",
        "606162636465666768696a6b6c6d6e6f",
    )
]
VECTOR_ROOTS = [
    "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
    "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
    "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
    "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
]


def oracle_root(leaves: list[bytes]) -> bytes:
    """RFC 6962, section 2.1, word for word."""
    if not leaves:
        return hashlib.sha256(b"").digest()
    if len(leaves) == 1:
        return hashlib.sha256(b"\x00" + leaves[0]).digest()
    cut = 1
    while cut * 2 < len(leaves):
        cut *= 2
    return hashlib.sha256(b"\x01" + oracle_root(leaves[:cut]) + oracle_root(leaves[cut:])).digest()


def numbered(count: int) -> list[bytes]:
    return [b"leaf %d" % number for number in range(count)]


@pytest.mark.parametrize("size", range(1, 9))
def test_published_roots(size: int) -> None:
    assert merkle_root(VECTOR_LEAVES[:size]).hex() == VECTOR_ROOTS[size - 1]


def test_empty_root() -> None:
    assert merkle_root([]) == EMPTY_ROOT == oracle_root([])
    assert EMPTY_ROOT.hex() == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


def test_published_inclusion_proof() -> None:
    # RFC 6962, section 2.1.3: with seven leaves the path of d0 is [b, h, l], that of d6 is [i, k].
    leaves = VECTOR_LEAVES[:7]
    hashed = [leaf_hash(leaf) for leaf in leaves]
    b = hashed[1]
    h = node_hash(hashed[2], hashed[3])
    i = node_hash(hashed[4], hashed[5])
    l_node = node_hash(i, hashed[6])
    k = node_hash(node_hash(hashed[0], hashed[1]), h)
    assert inclusion_proof(leaves, 0) == [b, h, l_node]
    assert inclusion_proof(leaves, 6) == [i, k]
    # Same section: PROOF(3, D[7]) = [c, d, g, l]; PROOF(4, D[7]) = [l]; PROOF(6, D[7]) = [i, j, k].
    g = node_hash(hashed[0], hashed[1])
    assert consistency_proof(leaves, 3) == [hashed[2], hashed[3], g, l_node]
    assert consistency_proof(leaves, 4) == [l_node]
    assert consistency_proof(leaves, 6) == [i, hashed[6], k]


@given(st.lists(st.binary(max_size=12), max_size=70))
@settings(max_examples=80, deadline=None)
def test_root_is_the_oracle(leaves: list[bytes]) -> None:
    tree = RunningRoot()
    for count, leaf in enumerate(leaves):
        assert tree.root() == oracle_root(leaves[:count])
        tree.append(leaf)
    assert tree.root() == merkle_root(leaves) == oracle_root(leaves)
    assert tree.copy() == tree


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 31, 33])
def test_every_inclusion_proof_verifies_and_only_there(size: int) -> None:
    leaves = numbered(size)
    root = oracle_root(leaves)
    for index in range(size):
        proof = inclusion_proof(leaves, index)
        for other in range(size):
            assert verify_inclusion(leaves[index], other, size, proof, root) is (other == index)
        assert not verify_inclusion(b"another", index, size, proof, root)
        assert not verify_inclusion(leaves[index], index, size, [*proof, root], root)
        if proof:
            assert not verify_inclusion(leaves[index], index, size, proof[:-1], root)
            assert not verify_inclusion(leaves[index], index, size, [*proof[:-1], b"\0" * 32], root)
        assert not verify_inclusion(leaves[index], index, size, proof, b"\0" * 32)
    assert not verify_inclusion(leaves[0], -1, size, [], root)
    assert not verify_inclusion(leaves[0], size, size, [], root)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8, 13, 16, 17, 21])
def test_every_consistency_proof_verifies_and_a_rewritten_past_does_not(size: int) -> None:
    leaves = numbered(size)
    root = oracle_root(leaves)
    for old in range(1, size + 1):
        proof = consistency_proof(leaves, old)
        old_root = oracle_root(leaves[:old])
        assert verify_consistency(old, size, old_root, root, proof)
        rewritten = [b"forged", *leaves[1:]]
        forged_root = oracle_root(rewritten)
        assert not verify_consistency(old, size, old_root, forged_root, proof)
        assert not verify_consistency(old, size, old_root, forged_root, consistency_proof(rewritten, old))
        for other in range(1, size + 1):
            if other != old:
                assert not verify_consistency(other, size, old_root, root, proof)
        for position in range(len(proof)):
            assert not verify_consistency(old, size, old_root, root, proof[:position] + proof[position + 1 :])
            broken = [*proof]
            broken[position] = bytes(32)
            assert not verify_consistency(old, size, old_root, root, broken)


def test_a_node_is_not_a_leaf() -> None:
    # Without domain separation these two trees would share a root (second preimage).
    two = numbered(2)
    fused = leaf_hash(two[0]) + leaf_hash(two[1])
    assert merkle_root(two) != merkle_root([fused])


def test_out_of_range_and_hostile_proofs() -> None:
    leaves = numbered(4)
    for index in (-1, 4):
        with pytest.raises(IndexError):
            inclusion_proof(leaves, index)
    for old in (0, 5):
        with pytest.raises(IndexError):
            consistency_proof(leaves, old)
    root = merkle_root(leaves)
    assert not verify_inclusion(leaves[0], 0, 4, [b"short"], root)
    assert not verify_inclusion(leaves[0], 0, 2**70, [root] * 65, root)
    assert not verify_consistency(0, 4, EMPTY_ROOT, root, [])
    assert not verify_consistency(3, 4, root, root, [])
