"""What the audit's screen costs at size: CPU seconds of every stage, measured small and projected to full size.

    python bench/bench_audit_size.py --private 20000 --released 1000

Tiles are made, not read: described ones are drawn once and multiplied by turning, rolling and mixing, so that words of
keypoints and spectra are as real ones are. Stages that compare all with all grow with released x private, the others
with the number of tiles; the projection says which is which. `bench_audit_run.py` runs a whole audit instead.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from pixcell_core.procedural import patient_look, render_field, site_look
from privacy_audit import screen
from privacy_audit.detail import DetailIndex
from privacy_audit.eye import SecondEye
from privacy_audit.features import TileFeatures, describe, join
from privacy_audit.geometry import orient
from privacy_audit.keypoints import KEPT, Keypoints
from privacy_audit.neighbours import Standardiser, patient_minima
from privacy_audit.policy import load_policy
from privacy_audit.screen import CopyScreen
from privacy_audit.spectrum import ShapeSpectra, patient_distances

SIDE, POOL, BLOCK = 224, 256, 2048
PATIENTS = 120
FULL_HOLDOUT = 3_000


def main() -> None:
    """Measure and project."""
    options = _options()
    clock: dict[str, float] = {}
    policy = load_policy("core")
    holdout = options.holdout
    planted = 14 * policy.self_test.planted_per_kind + policy.self_test.recoloured_tiles
    eye = SecondEye(policy.copies.eye_pixels)
    tiles = _tiles()
    with _stage(clock, "looking"):
        pool = join([describe(block, eye) for block in tiles.split(128)])
    private, null, released = (
        _multiplied(pool, n, seed) for seed, n in enumerate((options.private, holdout, options.released))
    )
    queries = join([released, null])
    _timed(clock, CopyScreen, "_candidates_by_spectrum", "spectra: all with all")
    _timed(clock, CopyScreen, "_candidates_by_shape", "pooled shape: all with all")
    _timed(clock, DetailIndex, "best", "fine detail: all with all")
    _timed(clock, DetailIndex, "best_shift", "fine detail: shifts of candidates")
    _timed(clock, CopyScreen, "_agree", "keypoints: votes and verification")
    _timed(clock, CopyScreen, "_best_turns", "correlation: coarse")
    _timed(clock, CopyScreen, "_verify", "correlation: fine")
    _timed(clock, screen, "nearest", "second eye: all with all")
    standardise = Standardiser.fit(private.embeddings, null.embeddings)
    with _stage(clock, "index"):
        shapes = ShapeSpectra.fit(private.thumbs, null.thumbs)
        engine = CopyScreen(private, standardise, shapes, policy.copies)
    engine.score(queries, "searching for near copies")
    base, shape_base = standardise(private.embeddings), shapes.base(private.thumbs)
    owner = torch.arange(len(private)) * PATIENTS // len(private)
    with _stage(clock, "patient distances: all with all"):
        patient_minima(standardise(released.embeddings), base, owner, PATIENTS)
        patient_distances(shapes.queries(released.thumbs), shape_base, owner, PATIENTS)
    full_queries = 10_000 + FULL_HOLDOUT + planted
    full_tiles = 100_000 + full_queries
    here = len(queries)
    total = 0.0
    print(
        f"{options.private} private tiles, {here} searched ({options.released} released, {holdout} holdout)"
    )
    print("| stage | CPU s here | grows with | CPU s at 10,000 against 100,000 |\n|---|---|---|---|")
    for name, seconds in clock.items():
        if name == "looking":
            words, factor = "tiles", full_tiles / POOL
        elif name == "index":
            # Choosing the words is a fixed cost once there are enough keypoints: the projection is too high.
            words, factor = "private tiles, at most", 100_000 / options.private
        elif name.startswith("patient"):
            words, factor = (
                "released x private",
                (10_000 + planted) * 100_000 / options.released / options.private,
            )
        elif name.endswith("all with all"):
            words, factor = "searched x private", full_queries * 100_000 / here / options.private
        elif name.startswith("keypoints"):
            # Votes grow with the lists of the words (once their number is at its limit), the rest with the queries.
            words, factor = (
                "searched, at most x private",
                full_queries / here * max(1.0, 100_000 / options.private) ** 0.5,
            )
        else:
            words, factor = "searched", full_queries / here
        total += seconds * factor
        print(f"| {name} | {seconds:.1f} | {words} | {seconds * factor:.0f} |")
    print(f"| all | {sum(clock.values()):.1f} | | {total:.0f} ({total / 120:.0f} min on two cores) |")
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB")


def _tiles() -> torch.Tensor:
    parts = []
    for number in range(POOL // 16):
        field = render_field(
            4 * SIDE,
            4 * SIDE,
            site=site_look(number // 4),
            patient=patient_look(number // 4, number),
            tissue=None,
            seed=number,
            coverage=1.0,
        ).rgb
        parts.append(field.reshape(4, SIDE, 4, SIDE, 3).swapaxes(1, 2).reshape(16, SIDE, SIDE, 3))
    return torch.from_numpy(np.concatenate(parts)).permute(0, 3, 1, 2).contiguous()


def _multiplied(pool: TileFeatures, count: int, seed: int) -> TileFeatures:
    """`count` tiles that no two are alike: shapes turned and rolled, keypoints mixed from several tiles."""
    draw = torch.Generator().manual_seed(seed)
    source = torch.randint(POOL, (count,), generator=draw)
    turns, rolls = torch.randint(8, (count,), generator=draw), torch.randint(64, (count, 2), generator=draw)
    thumbs = torch.empty(count, 64, 64, dtype=torch.float16)
    for row in range(count):
        turned = orient(pool.thumbs[source[row]], int(turns[row]))
        thumbs[row] = torch.roll(turned, tuple(rolls[row].tolist()), dims=(0, 1))
    rich = torch.nonzero(pool.keypoints.count == KEPT)[:, 0]
    mixed = rich[torch.randint(len(rich), (count, KEPT), generator=draw)]
    column = torch.arange(KEPT).expand(count, KEPT)
    descriptor = torch.empty(count, KEPT, 128, dtype=torch.uint8)
    for rows, out in zip(mixed.split(BLOCK), descriptor.split(BLOCK), strict=True):
        noise = torch.randint(-6, 7, out.shape, generator=draw, dtype=torch.int16)
        out[:] = (pool.keypoints.descriptor[rows, column[: len(rows)]].short() + noise).clamp(0, 255)
    spread = pool.embeddings.std(dim=0)
    embeddings = torch.empty(count, len(spread), dtype=torch.float16)
    for rows, out in zip(source.split(BLOCK), embeddings.split(BLOCK), strict=True):
        out[:] = pool.embeddings[rows] + 0.5 * spread * torch.randn(out.shape, generator=draw)
    names = tuple(f"{seed}-{row}" for row in range(count))
    return TileFeatures(
        names,
        names,
        thumbs,
        pool.texture[source],
        embeddings,
        Keypoints(
            pool.keypoints.place[mixed, column], descriptor, torch.full((count,), KEPT, dtype=torch.int16)
        ),
    )


@contextmanager
def _stage(clock: dict[str, float], name: str) -> Iterator[None]:
    start = time.process_time()
    yield
    clock[name] = clock.get(name, 0.0) + time.process_time() - start


def _timed(clock: dict[str, float], owner: Any, attribute: str, name: str) -> None:
    """Count the CPU time of a function of the screen from now on."""
    act: Callable[..., Any] = getattr(owner, attribute)

    def measured(*args: Any, **kwargs: Any) -> Any:
        with _stage(clock, name):
            return act(*args, **kwargs)

    setattr(owner, attribute, measured)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--private", type=int, default=20_000)
    parser.add_argument("--released", type=int, default=500)
    parser.add_argument("--holdout", type=int, default=500)
    return parser.parse_args()


if __name__ == "__main__":
    main()
