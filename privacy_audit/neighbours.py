"""Exact nearest neighbours in streamed blocks: bounded memory, no index, no missed copy.

Legend: q queries, n tiles of the base, d embedding width, P patients.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

QUERY_BLOCK = 512
BASE_BLOCK = 4096


@dataclass(frozen=True)
class Standardiser:
    """Per-dimension centre and scale; fitted on training and holdout together, so that neither is favoured."""

    mean: Tensor
    scale: Tensor

    @classmethod
    def fit(cls, *groups: Tensor) -> Standardiser:
        """Fit on the union of (n, d) groups."""
        both = torch.cat([group.float() for group in groups])
        return cls(both.mean(dim=0), both.std(dim=0).clamp_min(1e-6))

    def __call__(self, embeddings: Tensor) -> Tensor:
        """Standardise (n, d) and divide by sqrt(d), so that distances do not depend on the width."""
        return (embeddings.float() - self.mean) / self.scale / embeddings.shape[1] ** 0.5


def nearest(queries: Tensor, base: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k nearest rows of the base by Euclidean distance.

    Returns:
        distances (q, k) ascending and indices (q, k) int64; k is cut to n.
    """
    k = min(k, len(base))
    distances, indices = [], []
    for start in range(0, len(queries), QUERY_BLOCK):
        block = queries[start : start + QUERY_BLOCK]
        best = torch.empty(len(block), 0)
        where = torch.empty(len(block), 0, dtype=torch.int64)
        for low in range(0, len(base), BASE_BLOCK):
            part = _squared_distances(block, base[low : low + BASE_BLOCK])
            near, at = part.topk(min(k, part.shape[1]), largest=False)
            best = torch.cat([best, near], dim=1)
            where = torch.cat([where, at + low], dim=1)
            best, order = best.topk(min(k, best.shape[1]), largest=False)
            where = where.gather(1, order)
        distances.append(best.clamp_min(0).sqrt())
        indices.append(where)
    return torch.cat(distances), torch.cat(indices)


def most_similar(queries: Tensor, base: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k base rows with the largest dot product: products (q, k), best first, and indices (q, k)."""
    k = min(k, len(base))
    products, indices = [], []
    for start in range(0, len(queries), QUERY_BLOCK):
        block = queries[start : start + QUERY_BLOCK]
        best = torch.empty(len(block), 0)
        where = torch.empty(len(block), 0, dtype=torch.int64)
        for low in range(0, len(base), BASE_BLOCK):
            part = block @ base[low : low + BASE_BLOCK].T
            near, at = part.topk(min(k, part.shape[1]))
            best = torch.cat([best, near], dim=1)
            where = torch.cat([where, at + low], dim=1)
            best, order = best.topk(min(k, best.shape[1]))
            where = where.gather(1, order)
        products.append(best)
        indices.append(where)
    return torch.cat(products), torch.cat(indices)


def patient_minima(queries: Tensor, base: Tensor, patient: Tensor, patients: int) -> Tensor:
    """D[s, p]: distance from query s to the nearest tile of patient p.

    Args:
        queries: (q, d). base: (n, d). patient: (n,) int64, the patient of each base row.
        patients: P; a patient without a tile gets infinity.

    Returns:
        (q, P) float32.
    """
    minima = torch.full((len(queries), patients), float("inf"))
    for start in range(0, len(queries), QUERY_BLOCK):
        block = queries[start : start + QUERY_BLOCK]
        rows = minima[start : start + QUERY_BLOCK]
        for low in range(0, len(base), BASE_BLOCK):
            part = _squared_distances(block, base[low : low + BASE_BLOCK]).clamp_min(0).sqrt()
            owner = patient[low : low + BASE_BLOCK].expand(len(block), -1)
            rows.scatter_reduce_(1, owner, part, reduce="amin")
    return minima


def _squared_distances(queries: Tensor, base: Tensor) -> Tensor:
    return (queries * queries).sum(1)[:, None] + (base * base).sum(1)[None, :] - 2.0 * queries @ base.T
