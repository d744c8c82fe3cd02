"""Exact nearest neighbours in streamed blocks: bounded memory, no index, no missed copy.

The base is read once, block by block, from memory or from a file; every block is compared with all queries by one
matrix product, on the processor or on a GPU. A selection over thousands of products costs as much as making them,
so columns are first reduced to the minima of small groups: the k nearest lie in the k groups of smallest minimum.

Legend: q queries, n tiles of the base, d embedding width, P patients, G groups of columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from pixcell_core.cli.progress import progress
from pixcell_core.errors import BadInputError

QUERY_BLOCK = 1024
BASE_BLOCK = 4096
DEFAULT_MEMORY = 1_500_000_000
_GROUP = 64
_LEAST_BLOCK = 256


# Given base rows (m, d): what to minimise for a block of queries (q, d), as (q, m).
Measure = Callable[[Tensor], Callable[[Tensor], Tensor]]


class VectorError(BadInputError):
    """A file of vectors cannot be used."""

    default_code = "bad-vectors"


class Base(Protocol):
    """Rows to search: a tensor, or a file that is read piece by piece."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: slice, /) -> Tensor: ...


@dataclass(frozen=True)
class VectorFile:
    """Vectors (n, d) in a `.npy` file of float16 or float32, read block by block and never held whole."""

    path: Path
    rows: int
    width: int
    dtype: np.dtype[np.floating]  # type: ignore[type-arg]
    offset: int

    @classmethod
    def open(cls, path: Path) -> VectorFile:
        """Read the header.

        Raises:
            VectorError: no `.npy` file of two axes in float16 or float32, or shorter than its header says.
        """
        try:
            with path.open("rb") as handle:
                version = np.lib.format.read_magic(handle)
                read = (
                    np.lib.format.read_array_header_1_0
                    if version == (1, 0)
                    else np.lib.format.read_array_header_2_0
                )
                shape, fortran, dtype = read(handle)
                offset = handle.tell()
            size = path.stat().st_size
        except (OSError, ValueError) as error:
            raise VectorError(
                f"{path.name} cannot be read as a file of vectors: {error}.", hint="Write it with numpy.save."
            ) from error
        if len(shape) != 2 or fortran or dtype not in (np.float16, np.float32):
            raise VectorError(
                f"{path.name} holds {dtype} of {len(shape)} axes.",
                hint="Save one row per tile as float16 or float32, in C order.",
            )
        if size != offset + shape[0] * shape[1] * dtype.itemsize:
            raise VectorError(f"{path.name} is cut short.", hint="Write it again.")
        return cls(path, shape[0], shape[1], dtype, offset)

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, rows: slice, /) -> Tensor:
        """Rows low..high-1 as they are stored.

        Raises:
            VectorError: a value is not a number.
        """
        low, high, _ = rows.indices(self.rows)
        values = np.fromfile(
            self.path,
            dtype=self.dtype,
            count=(high - low) * self.width,
            offset=self.offset + low * self.width * self.dtype.itemsize,
        )
        if not np.isfinite(values).all():
            raise VectorError(
                f"{self.path.name} holds values that are no numbers, in rows {low} to {high}.",
                hint="Compute the embeddings again.",
            )
        return torch.from_numpy(values.reshape(high - low, self.width))


@dataclass(frozen=True)
class Plan:
    """How much is compared at once: `base` rows with `queries` rows, within a memory bound."""

    base: int
    queries: int

    @classmethod
    def within(cls, memory: int, width: int, queries: int, k: int) -> Plan:
        """The largest blocks that stay within `memory` bytes with the queries themselves and what was found.

        Raises:
            BadInputError: the queries alone do not fit.
        """
        held = queries * (width * 4 + k * 12)
        per_base = width * (4 + 4)  # as stored and as float32
        at_once = min(QUERY_BLOCK, max(queries, 1))
        room = int(0.8 * memory) - held
        rows = room // (per_base + 4 * 3 * at_once)
        if rows < _LEAST_BLOCK:
            raise BadInputError(
                f"{queries} queries of {width} numbers do not fit into {memory} bytes.",
                hint="Raise the memory bound or ask for fewer queries at once.",
                code="too-little-memory",
            )
        return cls(min(BASE_BLOCK, rows // _GROUP * _GROUP), at_once)


@dataclass(frozen=True)
class Standardiser:
    """Per-dimension centre and scale; fitted on training and holdout together, so that neither is favoured."""

    mean: Tensor
    scale: Tensor

    @classmethod
    def fit(cls, *groups: Tensor) -> Standardiser:
        """Fit on the union of (n, d) groups."""
        count = sum(len(group) for group in groups)
        blocks = [block for group in groups for block in group.split(BASE_BLOCK)]
        mean = torch.stack([block.double().sum(dim=0) for block in blocks]).sum(dim=0) / count
        squares = torch.stack([((block - mean) ** 2).sum(dim=0) for block in blocks]).sum(dim=0)
        return cls(mean.float(), (squares / (count - 1)).sqrt().float().clamp_min(1e-6))

    def __call__(self, *groups: Tensor) -> Tensor:
        """Standardise (n, d) groups, one after the other, and divide by sqrt(d): distances do not depend on the width."""
        width = groups[0].shape[1]
        out = torch.empty(sum(len(group) for group in groups), width)
        low = 0
        for group in groups:
            # Block by block: of a hundred thousand rows no second copy may stand beside the result.
            for block in group.split(BASE_BLOCK):
                rows = out[low : low + len(block)]
                torch.sub(block.float(), self.mean, out=rows).div_(self.scale).div_(width**0.5)
                low += len(block)
        return out


def nearest(
    queries: Tensor,
    base: Base,
    k: int,
    *,
    memory: int = DEFAULT_MEMORY,
    device: torch.device | str = "cpu",
    label: str = "",
) -> tuple[Tensor, Tensor]:
    """The k nearest rows of the base by Euclidean distance.

    Args:
        queries: (q, d). base: (n, d), a tensor or a `VectorFile`. k: is cut to n.
        memory: bound in bytes on what is held beside the base itself. device: where products are made.
        label: names the work on a progress bar; none without.

    Returns:
        distances (q, k) ascending and indices (q, k) int64, on the processor.
    """
    # Scaled once here, not at every product.
    values, where = smallest(
        -2.0 * queries.float(), base, k, _squared, memory=memory, device=device, label=label
    )
    norms = (queries.float() ** 2).sum(1)[:, None]
    return (values + norms).clamp_min(0).sqrt(), where


def most_similar(
    queries: Tensor, base: Base, k: int, *, memory: int = DEFAULT_MEMORY, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """The k base rows with the largest dot product: products (q, k), best first, and indices (q, k)."""
    values, where = smallest(-queries.float(), base, k, _product, memory=memory, device=device)
    return -values, where


def smallest(
    queries: Tensor,
    base: Base,
    k: int,
    measure: Measure,
    *,
    memory: int = DEFAULT_MEMORY,
    device: torch.device | str = "cpu",
    label: str = "",
) -> tuple[Tensor, Tensor]:
    """The k smallest values of a measure over the base: (q, k) ascending, and indices (q, k)."""
    k = min(k, len(base))
    plan = Plan.within(memory, queries.shape[1], len(queries), k)
    blocks = queries.to(device).split(plan.queries)
    best = [torch.empty(len(block), 0, device=device) for block in blocks]
    where = [torch.empty(len(block), 0, dtype=torch.int64, device=device) for block in blocks]
    for low, part in base_blocks(base, plan.base, device, label):
        values = measure(part)
        for number, block in enumerate(blocks):
            near, at = _smallest(values(block), min(k, len(part)))
            near = torch.cat([best[number], near], dim=1)
            at = torch.cat([where[number], at + low], dim=1)
            best[number], order = near.topk(min(k, near.shape[1]), largest=False)
            where[number] = at.gather(1, order)
    if not blocks or not len(queries):
        return torch.empty(0, k), torch.empty(0, k, dtype=torch.int64)
    return torch.cat(best).to("cpu"), torch.cat(where).to("cpu")


def patient_minima(
    queries: Tensor,
    base: Base,
    patient: Tensor,
    patients: int,
    *,
    device: torch.device | str = "cpu",
    label: str = "",
) -> Tensor:
    """D[s, p]: distance from query s to the nearest tile of patient p.

    Args:
        queries: (q, d). base: (n, d). patient: (n,) int64, the patient of each base row; fastest where the tiles of a
            patient lie together.
        patients: P; a patient without a tile gets infinity. label: names the work on a progress bar; none without.

    Returns:
        (q, P) float32.
    """
    minima = minima_by_patient(
        -2.0 * queries.float(), base, patient, patients, _squared, device=device, label=label
    )
    norms = (queries.float() ** 2).sum(1)[:, None]
    return (minima + norms).clamp_min_(0).sqrt_()


def minima_by_patient(
    queries: Tensor,
    base: Base,
    patient: Tensor,
    patients: int,
    measure: Measure,
    *,
    device: torch.device | str = "cpu",
    label: str = "",
) -> Tensor:
    """Smallest value of a measure over the tiles of each patient, (q, P); see `patient_minima`."""
    minima = torch.full((len(queries), patients), float("inf"), device=device)
    blocks = queries.to(device).split(QUERY_BLOCK)
    for low, part in base_blocks(base, BASE_BLOCK, device, label):
        values = measure(part)
        owners, lengths = torch.unique_consecutive(patient[low : low + len(part)], return_counts=True)
        runs, names = lengths.tolist(), owners.tolist()
        for number, block in enumerate(blocks):
            rows = minima[number * QUERY_BLOCK : number * QUERY_BLOCK + len(block)]
            for name, run in zip(names, values(block).split(runs, dim=1), strict=True):
                rows[:, name] = torch.minimum(rows[:, name], run.amin(dim=1))
    return minima.to("cpu")


def product(block: Tensor, part: Tensor) -> Tensor:
    """block · partᵀ. On a processor numpy's BLAS makes it: it is the faster one where it was measured."""
    if block.device.type != "cpu":
        return block @ part.T
    return torch.from_numpy(block.numpy() @ part.numpy().T)


def _product(part: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda block: product(block, part)


def _squared(part: Tensor) -> Callable[[Tensor], Tensor]:
    """|b|² − 2 q·b, of queries that are scaled by −2."""
    squares = (part * part).sum(1)
    return lambda block: product(block, part).add_(squares)


def _smallest(products: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k smallest of each row, ascending, and their columns."""
    rows, columns = products.shape
    groups = columns // _GROUP
    if groups < 4 * k or columns % _GROUP:
        return products.topk(k, largest=False)
    # Column c belongs to group c % G: a reduction along the outer axis runs over whole cache lines.
    grouped = products.view(rows, _GROUP, groups)
    chosen = grouped.amin(dim=1).topk(k, largest=False).indices  # (rows, k)
    candidates = grouped.gather(2, chosen[:, None, :].expand(rows, _GROUP, k)).reshape(rows, -1)
    near, at = candidates.topk(k, largest=False)
    return near, at // k * groups + chosen.gather(1, at % k)


def base_blocks(
    base: Base, size: int, device: torch.device | str = "cpu", label: str = ""
) -> Iterator[tuple[int, Tensor]]:
    """Blocks of the base as float32 on a device, each with its first row; `label` names the work on a progress bar."""
    with progress(label, total=len(base), unit="tiles") if label else nullcontext() as bar:
        for low in range(0, len(base), size):
            part = base[low : low + size].to(device).float()
            yield low, part
            if bar is not None:
                bar.advance(len(part))
