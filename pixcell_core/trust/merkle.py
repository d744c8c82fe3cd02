"""The Merkle tree of RFC 6962: roots, inclusion and consistency proofs, and their verification.

Hashes are SHA-256. A leaf is ``H(0x00 || data)``, a node ``H(0x01 || left || right)`` (RFC 6962, section
2.1), so that a node can never be passed off as a leaf. Verification follows RFC 9162, sections 2.1.3.2
and 2.1.4.2.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

HASH_BYTES = 32
MAX_PROOF_HASHES = 64


def leaf_hash(data: bytes) -> bytes:
    """``SHA-256(0x00 || data)``, 32 bytes."""
    return hashlib.sha256(b"\x00" + data).digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    """``SHA-256(0x01 || left || right)``, 32 bytes."""
    return hashlib.sha256(b"\x01" + left + right).digest()


EMPTY_ROOT = hashlib.sha256(b"").digest()
"""Root of the tree without leaves: the hash of the empty string."""


@dataclass
class RunningRoot:
    """The root of a growing tree in O(log n) memory: one hash per complete subtree, largest first."""

    size: int = 0
    _peaks: list[tuple[int, bytes]] = field(default_factory=list)

    def append(self, data: bytes) -> None:
        """Add a leaf holding ``data``."""
        self.append_hash(leaf_hash(data))

    def append_hash(self, hashed_leaf: bytes) -> None:
        """Add a leaf of which only the hash is known."""
        height, here = 0, hashed_leaf
        while self._peaks and self._peaks[-1][0] == height:
            here = node_hash(self._peaks.pop()[1], here)
            height += 1
        self._peaks.append((height, here))
        self.size += 1

    def root(self) -> bytes:
        """Root over the leaves so far."""
        if not self._peaks:
            return EMPTY_ROOT
        here = self._peaks[-1][1]
        for _, peak in reversed(self._peaks[:-1]):
            here = node_hash(peak, here)
        return here

    def copy(self) -> RunningRoot:
        """An independent tree with the same leaves."""
        return RunningRoot(self.size, list(self._peaks))


def merkle_root(leaves: Iterable[bytes]) -> bytes:
    """Root over the leaves' data, in the order given."""
    tree = RunningRoot()
    for data in leaves:
        tree.append(data)
    return tree.root()


def inclusion_proof(leaves: Sequence[bytes], index: int) -> list[bytes]:
    """Audit path of leaf ``index`` (RFC 6962, section 2.1.1), lowest sibling first."""
    if not 0 <= index < len(leaves):
        raise IndexError(f"no leaf {index} among {len(leaves)}")
    return _path([leaf_hash(data) for data in leaves], index)


def consistency_proof(leaves: Sequence[bytes], old_size: int) -> list[bytes]:
    """Proof that the first ``old_size`` leaves are a prefix of all of them (RFC 6962, section 2.1.2)."""
    if not 0 < old_size <= len(leaves):
        raise IndexError(f"no tree of {old_size} leaves before one of {len(leaves)}")
    return _subproof([leaf_hash(data) for data in leaves], old_size, whole=True)


def verify_inclusion(data: bytes, index: int, size: int, proof: Sequence[bytes], root: bytes) -> bool:
    """Whether ``data`` is leaf ``index`` of the tree of ``size`` leaves with ``root`` (RFC 9162, 2.1.3.2)."""
    if not 0 <= index < size or not _plausible(proof, root):
        return False
    first, last = index, size - 1
    here = leaf_hash(data)
    for sibling in proof:
        if last == 0:
            return False
        if first & 1 or first == last:
            here = node_hash(sibling, here)
            while not first & 1 and first:
                first >>= 1
                last >>= 1
        else:
            here = node_hash(here, sibling)
        first >>= 1
        last >>= 1
    return last == 0 and here == root


def verify_consistency(
    old_size: int, new_size: int, old_root: bytes, new_root: bytes, proof: Sequence[bytes]
) -> bool:
    """Whether the tree of ``new_size`` only appended to the tree of ``old_size`` (RFC 9162, 2.1.4.2)."""
    if not 0 < old_size <= new_size or not _plausible(proof, old_root, new_root):
        return False
    if old_size == new_size:
        return not proof and old_root == new_root
    # A complete old tree is itself the first node of the path.
    path = [old_root, *proof] if old_size & (old_size - 1) == 0 else list(proof)
    if not path:
        return False
    first, last = old_size - 1, new_size - 1
    while first & 1:
        first >>= 1
        last >>= 1
    old_here = new_here = path[0]
    for sibling in path[1:]:
        if last == 0:
            return False
        if first & 1 or first == last:
            old_here = node_hash(sibling, old_here)
            new_here = node_hash(sibling, new_here)
            while not first & 1 and first:
                first >>= 1
                last >>= 1
        else:
            new_here = node_hash(new_here, sibling)
        first >>= 1
        last >>= 1
    return last == 0 and old_here == old_root and new_here == new_root


def _plausible(proof: Sequence[bytes], *roots: bytes) -> bool:
    return len(proof) <= MAX_PROOF_HASHES and all(len(item) == HASH_BYTES for item in (*proof, *roots))


def _split(size: int) -> int:
    """The largest power of two smaller than ``size``."""
    return 1 << ((size - 1).bit_length() - 1)


def _root_of_hashes(hashes: Sequence[bytes]) -> bytes:
    tree = RunningRoot()
    for item in hashes:
        tree.append_hash(item)
    return tree.root()


def _path(hashes: Sequence[bytes], index: int) -> list[bytes]:
    if len(hashes) == 1:
        return []
    cut = _split(len(hashes))
    if index < cut:
        return [*_path(hashes[:cut], index), _root_of_hashes(hashes[cut:])]
    return [*_path(hashes[cut:], index - cut), _root_of_hashes(hashes[:cut])]


def _subproof(hashes: Sequence[bytes], old_size: int, *, whole: bool) -> list[bytes]:
    if old_size == len(hashes):
        return [] if whole else [_root_of_hashes(hashes)]
    cut = _split(len(hashes))
    if old_size <= cut:
        return [*_subproof(hashes[:cut], old_size, whole=whole), _root_of_hashes(hashes[cut:])]
    return [*_subproof(hashes[cut:], old_size - cut, whole=False), _root_of_hashes(hashes[:cut])]
