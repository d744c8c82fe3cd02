"""A whole audit at size: `run_audit` itself, with its self-test and every set-level test, timed stage by stage.

    python bench/bench_audit_run.py                         a small one, a few minutes
    python bench/bench_audit_run.py --private 10000 --holdout 3000 --released 1000
    python bench/bench_audit_run.py --private 100000 --holdout 3000 --released 10000 --log audit.json

Tiles are drawn when they are read and stand nowhere: each is a mosaic of small squares cut from drawn tissue of its own
patient, so that no two are alike and none is a copy. A folder of PNG files adds the time to decode them, which is
measured beside it. Processor seconds are of all threads; half of them is what two cores need when nothing waits.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as `pixcell audit run` does, before torch is imported

import argparse
import cProfile
import json
import pstats
import resource
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from pixcell_core.procedural import patient_look, render_field, site_look
from privacy_audit import battery, run, screen
from privacy_audit.detail import DetailIndex
from privacy_audit.policy import load_policy
from privacy_audit.request import AuditRequest
from privacy_audit.screen import CopyScreen
from privacy_audit.tiles import decode_tile, pixel_digest

SIDE, FIELD, SQUARE, SITES = 224, 768, 32, 12
PATIENTS = {"training": 150, "holdout": 50, "synthetic": 40}
_SEEDS = {"training": 1, "holdout": 2, "synthetic": 3}
_DECODED = 200


class DrawnTiles:
    """Tiles of one group, drawn when they are read: equal rows give equal pixels."""

    def __init__(self, name: str, count: int, folder: Path) -> None:
        self.name, self._folder, self._seed = name, folder, _SEEDS[name]
        owner = np.arange(count) * PATIENTS[name] // count
        self._owner = owner
        self._ids = tuple(f"{self._seed}-{row:06d}" for row in range(count))
        self._patients = tuple("" if name == "synthetic" else f"{name}-{one:03d}" for one in owner.tolist())
        self._fields = [self._field(number) for number in range(PATIENTS[name])]

    @property
    def ids(self) -> Sequence[str]:
        """Numbers."""
        return self._ids

    @property
    def patients(self) -> Sequence[str]:
        """Tiles of a patient lie together; synthetic tiles have none."""
        return self._patients

    @property
    def strata(self) -> Sequence[str]:
        """Unknown."""
        return ("",) * len(self._ids)

    @property
    def classes(self) -> Sequence[str]:
        """Unknown."""
        return ("",) * len(self._ids)

    @property
    def folder(self) -> Path:
        """An empty folder."""
        return self._folder

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Draw tiles start..stop-1, uint8 (B, 3, H, W)."""
        tiles = np.stack([self._tile(row) for row in range(start, min(stop, len(self._ids)))])
        return torch.from_numpy(tiles).permute(0, 3, 1, 2).contiguous()

    def file_digests(self) -> list[str]:
        """Of the pixels: there are no files."""
        return [
            pixel_digest(tile)
            for start in range(0, len(self._ids), 256)
            for tile in self.read(start, start + 256).permute(0, 2, 3, 1).numpy()
        ]

    def _field(self, number: int) -> npt.NDArray[np.uint8]:
        # One set of sites for all groups, as one hospital splits its own patients.
        site = 1000 + number % SITES
        drawn = render_field(
            FIELD,
            FIELD,
            site=site_look(site),
            patient=patient_look(site, self._seed * 1000 + number),
            tissue=None,
            seed=self._seed * 100_000 + number,
            coverage=1.0,
        )
        return drawn.rgb

    def _tile(self, row: int) -> npt.NDArray[np.uint8]:
        rng = np.random.default_rng([self._seed, row])
        field, squares = self._fields[self._owner[row]], SIDE // SQUARE + 1
        top, left = rng.integers(0, SQUARE, size=2)
        places = rng.integers(0, FIELD - SQUARE, size=(squares * squares, 2)).tolist()
        canvas = np.empty((squares * SQUARE, squares * SQUARE, 3), dtype=np.uint8)
        for number, (y, x) in enumerate(places):
            down, across = number // squares * SQUARE, number % squares * SQUARE
            canvas[down : down + SQUARE, across : across + SQUARE] = field[y : y + SQUARE, x : x + SQUARE]
        return canvas[top : top + SIDE, left : left + SIDE]


class Clock:
    """Processor and wall seconds of named functions, without what other named functions take inside them."""

    def __init__(self, log: Path | None) -> None:
        self.seconds: dict[str, float] = {}
        self.walls: dict[str, float] = {}
        self.peaks: dict[str, float] = {}
        self._inside: list[list[float]] = []
        self._log, self._said = log, time.monotonic()

    def watch(self, owner: Any, attribute: str, name: str) -> None:
        """Count a function from now on."""
        act: Callable[..., Any] = getattr(owner, attribute)

        def measured(*args: Any, **kwargs: Any) -> Any:
            start, wall = time.process_time(), time.monotonic()
            self._inside.append([0.0, 0.0])
            try:
                return act(*args, **kwargs)
            finally:
                spent, waited = time.process_time() - start, time.monotonic() - wall
                inner = self._inside.pop()
                self.seconds[name] = self.seconds.get(name, 0.0) + spent - inner[0]
                self.walls[name] = self.walls.get(name, 0.0) + waited - inner[1]
                self.peaks[name] = _peak() / 1e9
                if self._inside:
                    self._inside[-1][0] += spent
                    self._inside[-1][1] += waited
                elif self._log and time.monotonic() - self._said > 1:
                    self._said = time.monotonic()
                    self._log.write_text(json.dumps(self.so_far(), indent=1) + "\n")

        setattr(owner, attribute, measured)

    def so_far(self) -> dict[str, Any]:
        """Figures of what has ended: a long run that is stopped has said this much."""
        return {"stages": self.seconds, "walls": self.walls, "peaks": self.peaks, "peak": _peak()}


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


def main() -> None:
    """Run the audit and print where the time went."""
    options = _options()
    torch.set_num_threads(options.threads)
    clock = Clock(options.log)
    _watch(clock)
    counts = {"training": options.private, "holdout": options.holdout, "synthetic": options.released}
    with tempfile.TemporaryDirectory(dir=options.folder) as room:
        root = Path(room)
        for name in counts:
            (root / name).mkdir()
        sources = {name: DrawnTiles(name, count, root / name) for name, count in counts.items()}
        decode = _decode_cost(sources["synthetic"], root)
        setattr(run, "open_tiles", lambda folder, *, name, **_: sources[name])  # noqa: B010
        request = AuditRequest(
            root / "training", root / "holdout", root / "synthetic", root / "out", load_policy("core"), seed=1
        )
        start, wall = time.process_time(), time.monotonic()
        profile = cProfile.Profile() if options.profile else None
        report = profile.runcall(run.run_audit, request) if profile else run.run_audit(request)
        cpu, wall = time.process_time() - start, time.monotonic() - wall
        cache = sum(path.stat().st_size for path in (root / "out").rglob("*") if path.is_file())
    if profile:
        pstats.Stats(profile).sort_stats("tottime").print_stats(45)
    drawn = clock.seconds.pop("drawing tiles", 0.0)
    peak = _peak()
    rows = sorted(clock.seconds.items(), key=lambda item: -item[1])
    rest = cpu - drawn - sum(clock.seconds.values())
    print(
        f"{options.released:,} released tiles, {options.holdout:,} holdout and {options.private:,} private of {SIDE} px, "
        f"{options.threads} threads, verdict {report.verdict.value}"
    )
    print("| stage | CPU s | wall s | peak memory until then, GB |\n|---|---|---|---|")
    for name, seconds in rows:
        print(f"| {name} | {seconds:.1f} | {clock.walls[name]:.1f} | {clock.peaks[name]:.2f} |")
    print(f"| the rest | {rest:.1f} | | |")
    total = cpu - drawn
    print(
        f"| all, without drawing the tiles ({drawn:.0f} CPU s) | {total:.1f} | {wall - clock.walls['drawing tiles']:.1f} | |"
    )
    for test in report.tests:
        print(f"{test.status.value:8} {test.name}: {test.why}")
    print(
        f"{total / 120:.1f} min on two cores when nothing waits; decoding PNG files would add {decode * 1e3:.2f} ms a tile; "
        f"peak memory {peak / 1e9:.2f} GB; written {cache / 1e9:.2f} GB"
    )
    if options.log:
        found = {
            "counts": counts, "threads": options.threads, "cpu": total, "wall": wall, "drawing": drawn,
            "decode_ms": decode * 1e3, **clock.so_far(),
            "tests": {test.name: [test.status.value, test.value, test.p] for test in report.tests},
        }  # fmt: skip
        options.log.write_text(json.dumps(found, indent=1) + "\n")


def _watch(clock: Clock) -> None:
    for owner, attribute, name in (
        (DrawnTiles, "read", "drawing tiles"),
        (run, "load_features", "describing"),
        (run, "find_duplicates", "near-duplicates among training tiles"),
        (run, "plant", "planting"),
        (run, "recoloured_holdout", "planting"),
        (run, "disjoint", "preconditions"),
        (run, "CopyScreen", "index"),
        (CopyScreen, "_candidates_by_spectrum", "retrieval: spectra"),
        (CopyScreen, "_candidates_by_shape", "retrieval: pooled shape"),
        (CopyScreen, "_best_turns", "correlation: coarse"),
        (CopyScreen, "_verify", "correlation: fine"),
        (CopyScreen, "_agree", "keypoints: votes and verification"),
        (DetailIndex, "best", "fine detail: all with all"),
        (DetailIndex, "best_shift", "fine detail: shifts of the candidates"),
        (screen, "nearest", "retrieval: second eye"),
        (run, "distances_by_eye", "patient distances"),
        (run, "distances_by_shape", "patient distances"),
        (run, "_identity", "identity curve"),
        (battery.strata, "gather", "strata"),
        (battery.linkability, "gather", "linkability"),
        (battery.cliques, "gather", "cliques"),
        (battery.disclosure, "gather", "disclosure"),
        (battery.context, "gather", "context"),
        (run, "judge", "judging: permutations and power"),
        (run, "write_site_page", "pages and files"),
        (battery, "write_review_queue", "pages and files"),
        (run, "write_report", "pages and files"),
        (run, "_subjects", "digests of the subjects"),
    ):
        clock.watch(owner, attribute, name)


def _decode_cost(source: DrawnTiles, root: Path) -> float:
    folder = root / "pictures"
    folder.mkdir()
    paths = []
    for row, tile in enumerate(source.read(0, _DECODED).permute(0, 2, 3, 1).numpy()):
        paths.append(folder / f"{row}.png")
        Image.fromarray(tile).save(paths[-1])
    start = time.process_time()
    for path in paths:
        decode_tile(path)
    return (time.process_time() - start) / len(paths)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--private", type=int, default=2_000)
    parser.add_argument("--holdout", type=int, default=1_000)
    parser.add_argument("--released", type=int, default=200)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--folder", type=Path, help="where the report and the cache are written for the time of the run"
    )
    parser.add_argument("--log", type=Path, help="write the figures as JSON too")
    parser.add_argument(
        "--profile", action="store_true", help="print the costliest functions (main thread alone)"
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
