"""The audit's streamed exact neighbours against faiss' exact search, and their memory over a file of a million rows.

python bench/bench_neighbours.py                       paired CPU time against faiss.knn
python bench/bench_neighbours.py --rows 1000000        peak memory over a file of that many rows of 1536 halves
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from privacy_audit.neighbours import DEFAULT_MEMORY, VectorFile, nearest

WIDTH, WRITE_AT_ONCE = 1536, 20_000


def main() -> None:
    """Print the ratio, or the memory."""
    options = _options()
    torch.set_num_threads(1)
    if options.rows:
        on_disk(options.rows, options.queries, options.memory, options.folder)
    else:
        against_faiss()


def against_faiss() -> None:
    """Paired CPU time on two shapes; the nearest row must be the same."""
    import faiss
    from paired import compare, show

    faiss.omp_set_num_threads(1)
    rng = np.random.default_rng(0)
    for rows, queries, width in ((20_000, 500, 512), (20_000, 1_000, 1536)):
        base, asked = (rng.standard_normal((n, width)).astype(np.float32) for n in (rows, queries))
        ours = nearest(torch.from_numpy(asked), torch.from_numpy(base), 5)[1].numpy()
        theirs = faiss.knn(asked, base, 5, metric=faiss.METRIC_L2)[1]
        assert (ours[:, 0] == theirs[:, 0]).all(), "the nearest row differs"
        found = compare(
            lambda asked=asked, base=base: nearest(torch.from_numpy(asked), torch.from_numpy(base), 5),
            lambda asked=asked, base=base: faiss.knn(asked, base, 5, metric=faiss.METRIC_L2),
            repeats=9,
        )
        show(f"5 nearest of {rows:,} for {queries} queries, {width} numbers each", "faiss.knn", found)


def on_disk(rows: int, asked: int, memory: int, folder: Path | None) -> None:
    """Write a file of rows, search it, find the planted neighbours and print the peak memory of this process."""
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory(dir=folder) as room:
        path = Path(room) / "base.npy"
        planted = rng.choice(rows, asked, replace=False)
        queries = np.empty((asked, WIDTH), dtype=np.float32)
        with path.open("wb") as handle:
            np.lib.format.write_array_header_1_0(
                handle, {"descr": "<f2", "fortran_order": False, "shape": (rows, WIDTH)}
            )
            for low in range(0, rows, WRITE_AT_ONCE):
                count = min(WRITE_AT_ONCE, rows - low)
                part = rng.standard_normal((count, WIDTH), dtype=np.float32).astype(np.float16)
                inside = np.flatnonzero((planted >= low) & (planted < low + count))
                queries[inside] = part[planted[inside] - low]
                handle.write(part.tobytes())
        size = path.stat().st_size
        start = time.process_time()
        distances, where = nearest(torch.from_numpy(queries + 0.01), VectorFile.open(path), 10, memory=memory)
        seconds = time.process_time() - start
    assert (where[:, 0].numpy() == planted).all(), "a planted neighbour was missed"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(
        f"{asked:,} queries over {rows:,} rows of {WIDTH} halves ({size / 1e9:.2f} GB): {seconds:.1f} CPU s, peak memory "
        f"of the process {peak / 1e9:.2f} GB (bound {memory / 1e9:.2f} GB), all planted neighbours first "
        f"(distance {float(distances[:, 0].max()):.2f})"
    )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=0, help="search a file of so many rows instead")
    parser.add_argument("--queries", type=int, default=1_000, help="rows that are searched for in it")
    parser.add_argument("--memory", type=int, default=DEFAULT_MEMORY, help="bound in bytes")
    parser.add_argument("--folder", type=Path, help="where the file is written for the time of the run")
    return parser.parse_args()


if __name__ == "__main__":
    main()
