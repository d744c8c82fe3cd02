"""Which copies the screen finds, kind by kind, at a false-positive rate of one in a thousand.

    python bench/copies --data DIR --out results.jsonl      real tiles and drawn ones, K = 60 a kind
    python bench/copies --quick                             drawn tiles only, a minute
    python bench/copies --data DIR --real-only --part untouched     the half of the real groups on which nothing was chosen
    python bench/copies --data DIR --real-only --kinds blend --seed 3   another split of the groups
    python bench/copies --data DIR --rate 0.00033334        at the p of large releases: above every one of 3,000 tiles

Every kind of copy of the audit's ladder is planted from training tiles and searched by the audit's own screen; the
threshold is the score that one holdout tile in a thousand exceeds. One record per data set and kind is appended to
the file, and kinds that stand there already (same data, K and code) are not measured again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from beyond import BEYOND
from tiles import TileSet, part_of, procedural_tiles, real_tiles

from privacy_audit.copies import Conformal
from privacy_audit.eye import SecondEye
from privacy_audit.features import TileFeatures, describe, join
from privacy_audit.intervals import clopper_pearson_lower, clopper_pearson_upper, two_sided
from privacy_audit.neighbours import Standardiser
from privacy_audit.plants import KINDS, CopyKind, recolour
from privacy_audit.policy import load_policy
from privacy_audit.screen import CopyScreen
from privacy_audit.self_test import TEXTURE_FLOOR
from privacy_audit.spectrum import ShapeSpectra

RATE = 1e-3
GOALS = {
    "exact": 0.95, "jpeg50": 0.95, "noise": 0.95, "blur": 0.95, "stain": 0.95, "d4": 0.95, "elastic": 0.95,
    "shift25": 0.90, "shift50": 0.90, "zoom07": 0.80, "rot15": 0.80, "blend": 0.80, "patch128": 0.50,
}  # fmt: skip
CLEAN = "innocent"
RECOLOURED = "recoloured"
_ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Bench:
    """One data set, its screen and its threshold."""

    name: str
    train: TileSet
    holdout: TileSet
    per_kind: int
    seed: int
    policy: str
    rate: float = RATE

    def prepare(self) -> None:
        """Describe both sides, build the screen and score the holdout."""
        settings = load_policy(self.policy).copies
        self.eye = SecondEye(settings.eye_pixels)
        start = time.process_time()
        self.reference, null = self._look(self.train.tiles), self._look(self.holdout.tiles)
        self.look_seconds = (time.process_time() - start) / (
            len(self.train.groups) + len(self.holdout.groups)
        )
        standardise = Standardiser.fit(self.reference.embeddings, null.embeddings)
        shapes = ShapeSpectra.fit(self.reference.thumbs, null.thumbs)
        self.screen = CopyScreen(self.reference, standardise, shapes, settings)
        start = time.process_time()
        self.null = self.screen.score(null, f"{self.name}: holdout")
        self.score_seconds = (time.process_time() - start) / len(null)
        self.conformal = Conformal(self.null.score)
        # The rate is a property of the threshold; a small holdout cannot reach one in a thousand.
        self.flag_p = max(self.rate, 1.0 / (len(null) + 1))

    def kind(self, kind: CopyKind) -> dict[str, Any]:
        """Plant `per_kind` copies of one kind and search them."""
        rng = np.random.default_rng([self.seed, *kind.key.encode()])
        usable = np.flatnonzero(self.reference.texture.numpy() > TEXTURE_FLOOR)
        rows = rng.choice(usable, size=self.per_kind, replace=len(usable) < self.per_kind)
        fillers = rng.integers(len(self.holdout.groups), size=self.per_kind)
        tiles = [
            kind.make(self.train.tiles[row], self.holdout.tiles[filler], rng)
            for row, filler in zip(rows, fillers, strict=True)
        ]
        scores = self.screen.score(self._look(np.stack(tiles)), f"{self.name}: {kind.key}")
        flagged = self.conformal.p_values(scores.score) <= self.flag_p
        found = int(flagged.sum())
        return {
            "found": found,
            "planted": self.per_kind,
            "sensitivity": found / self.per_kind,
            "lower": clopper_pearson_lower(found, self.per_kind),
            "right_source": int((scores.match[flagged] == rows[flagged]).sum()),
            "median_correlation": float(np.median(scores.correlation)),
            "median_detail": float(np.median(scores.detail)),
            "median_inliers": int(np.median(scores.inliers)),
        }

    def recoloured(self) -> dict[str, Any]:
        """Innocent tiles in the training stains: flagged against the same tiles in their own stains left out."""
        rng = np.random.default_rng([self.seed, 1])
        count = min(1000, len(self.holdout.groups))
        rows = rng.choice(len(self.holdout.groups), size=count, replace=False)
        models = rng.integers(len(self.train.groups), size=count)
        tiles = [
            recolour(self.holdout.tiles[row], self.train.tiles[model])
            for row, model in zip(rows, models, strict=True)
        ]
        scores = self.screen.score(self._look(np.stack(tiles)), f"{self.name}: recoloured").score
        threshold = self.conformal.threshold(self.flag_p)
        assert threshold is not None
        flagged = int((scores > threshold).sum())
        return {"found": flagged, "planted": count, "upper": clopper_pearson_upper(flagged, count)}

    def clean(self) -> dict[str, Any]:
        """The holdout judged by itself, split by group into halves: the rate that the threshold really has."""
        rng = np.random.default_rng([self.seed, 2])
        groups = np.array(self.holdout.groups)
        flags = 0
        # Each group judged by all others, as the audit's own check does by fifths.
        names = rng.permutation(sorted(set(self.holdout.groups)))
        folds = {name: number % 5 for number, name in enumerate(names)}
        fold = np.array([folds[name] for name in groups])
        for number in range(5):
            judge = Conformal(self.null.score[fold != number])
            flags += int((judge.p_values(self.null.score[fold == number]) <= self.flag_p).sum())
        return {
            "found": flags,
            "planted": len(groups),
            "upper": clopper_pearson_upper(flags, len(groups)),
            "null_median": float(np.median(self.null.score)),
            "null_maximum": float(self.null.score.max()),
            "most_inliers": int(self.null.inliers.max()),
            "threshold": self.conformal.threshold(self.flag_p),
            "flag_p": self.flag_p,
            "look_ms": round(1e3 * self.look_seconds, 2),
            "score_ms": round(1e3 * self.score_seconds, 2),
        }

    def _look(self, tiles: npt.NDArray[np.uint8]) -> TileFeatures:
        return join(
            [
                describe(torch.from_numpy(tiles[i : i + 64]).permute(0, 3, 1, 2).contiguous(), self.eye)
                for i in range(0, len(tiles), 64)
            ]
        )


def main() -> None:
    """Measure what is missing from the record, then print the table."""
    options = _options()
    torch.set_num_threads(1)
    done = _read(options.out)
    for name, sides in _data(options):
        bench = Bench(name, *sides(), options.per_kind, options.seed, options.policy, options.rate)
        head = {
            "data": name,
            "per_kind": options.per_kind,
            "seed": options.seed,
            "rate": options.rate,
            "policy": load_policy(options.policy).digest,
            "code": _code(),
            "train": len(bench.train.groups),
            "holdout": len(bench.holdout.groups),
            "train_groups": len(set(bench.train.groups)),
            "holdout_groups": len(set(bench.holdout.groups)),
        }
        jobs: dict[str, Any] = {CLEAN: bench.clean, RECOLOURED: bench.recoloured}
        jobs |= {
            kind.key: partial(bench.kind, kind)
            for kind in (*KINDS, *BEYOND)
            if options.kinds is None or kind.key in options.kinds
        }
        missing = {key: act for key, act in jobs.items() if _key(head, key) not in done}
        if missing:
            bench.prepare()
        for key, act in missing.items():
            record = {**head, "kind": key, **act(), "device": _device(), "torch": torch.__version__}
            done[_key(head, key)] = record
            with options.out.open("a", encoding="utf-8") as handle:
                handle.write(json.dumps(record) + "\n")
        print(table([done[_key(head, key)] for key in jobs]))


def table(records: list[dict[str, Any]]) -> str:
    """The table of one data set in Markdown."""
    head = records[0]
    lines = [
        f"### {head['data']}: {head['train']} training tiles of {head['train_groups']} groups, "
        f"{head['holdout']} holdout tiles of {head['holdout_groups']} others",
        "",
        "| planted | found | share | 95 % interval | goal | met | right source | inliers (median) |",
        "|---|---|---|---|---|---|---|---|",
    ]
    words = {kind.key: kind.words for kind in (*KINDS, *BEYOND)}
    for record in records:
        found, planted = record["found"], record["planted"]
        low, high = two_sided(found, planted)
        if record["kind"] == CLEAN:
            goal, met, label = (
                "",
                "",
                f"nothing (holdout, judged by other groups; nominal {record['flag_p']:.2%})",
            )
        elif record["kind"] == RECOLOURED:
            nominal = records[0]["flag_p"]
            goal, label = f"≤ {2 * nominal:.2%}", "nothing (holdout in training stains)"
            met = "yes" if found / planted <= 2 * nominal else "no"
        else:
            wanted = GOALS.get(record["kind"])
            label = words[record["kind"]]
            goal = "reported" if wanted is None else f"≥ {wanted:.2f}"
            enough = wanted is None or record["sensitivity"] >= wanted
            firm = wanted is None or wanted < 0.95 or record["lower"] >= 0.90
            met = "" if wanted is None else "yes" if enough and firm else "no"
        share = (
            f"{found / planted:.3f}"
            if record["kind"] not in (CLEAN, RECOLOURED)
            else f"{found / planted:.2%}"
        )
        lines.append(
            f"| {label} | {found} of {planted} | {share} | {low:.3f}–{high:.3f} | {goal} | {met} | "
            f"{record.get('right_source', '')} | {record.get('median_inliers', '')} |"
        )
    clean = records[0]
    lines += [
        "",
        f"Threshold {clean['threshold']:.3f} (holdout: median {clean['null_median']:.3f}, highest "
        f"{clean['null_maximum']:.3f}, at most {clean['most_inliers']} keypoints on one transform). "
        f"{clean['look_ms']} ms to describe a tile, {clean['score_ms']} ms to score it, CPU time on {clean['device']}.",
        "",
    ]
    return "\n".join(lines)


def _data(options: argparse.Namespace) -> list[tuple[str, Any]]:
    rng = np.random.default_rng(options.seed)
    sets: list[tuple[str, Any]] = []
    if options.data is not None:

        def real() -> tuple[TileSet, TileSet]:
            if options.part == "all":
                return real_tiles(options.data).split(0.35, rng)
            # The numbers were chosen under one split: another would mix the two parts again.
            train, holdout = real_tiles(options.data).split(0.35, np.random.default_rng(0))
            return part_of(train, holdout, options.part)

        sets.append(("real tiles" if options.part == "all" else f"real tiles, {options.part} part", real))
    if options.real_only:
        return sets
    train, holdout = (320, 400) if options.quick else (1600, 3200)

    def drawn() -> tuple[TileSet, TileSet]:
        return procedural_tiles(train, options.seed + 1), procedural_tiles(holdout, options.seed + 2)

    sets.append(("procedural tiles", drawn))
    return sets


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python bench/copies", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--data", type=Path, help="folder with `tiles/` and `slides/`; without it only drawn tiles"
    )
    parser.add_argument("--out", type=Path, default=Path("copies.jsonl"), help="record, appended to")
    parser.add_argument("--per-kind", type=int, default=None, help="planted copies of each kind (60)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--rate", type=float, default=RATE, help="share of innocent tiles above the threshold (.001)"
    )
    parser.add_argument("--policy", default="core", help="audit policy whose screen is measured")
    parser.add_argument("--real-only", action="store_true", help="leave the drawn tiles out")
    parser.add_argument(
        "--part",
        choices=("all", "tuned", "untouched"),
        default="all",
        help="real groups: all, or the half on which the numbers of fine detail were chosen, or the other half",
    )
    parser.add_argument("--kinds", nargs="+", metavar="KIND", help="only these kinds of copy")
    parser.add_argument("--quick", action="store_true", help="few drawn tiles, 20 copies a kind")
    options = parser.parse_args()
    if options.per_kind is None:
        options.per_kind = 20 if options.quick else 60
    if options.real_only and options.data is None:
        parser.error("--real-only needs --data")
    unknown = set(options.kinds or ()) - {kind.key for kind in (*KINDS, *BEYOND)}
    if unknown:
        parser.error(f"no such kind of copy: {', '.join(sorted(unknown))}")
    if options.data is not None and not (options.data / "tiles").is_dir():
        parser.error(f"{options.data} has no folder `tiles`")
    return options


def _read(path: Path) -> dict[str, dict[str, Any]]:
    if not path.is_file():
        return {}
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    return {_key(record, record["kind"]): record for record in records}


def _key(record: dict[str, Any], kind: str) -> str:
    parts = ("data", "per_kind", "seed", "policy", "code", "train", "holdout")
    return "|".join(str(record[part]) for part in parts) + f"|{record.get('rate', RATE)}|{kind}"


def _code() -> str:
    """Digest of the modules that decide a score: a record of other code is not this code's record."""
    names = (
        "geometry",
        "detail",
        "keypoints",
        "votes",
        "screen",
        "spectrum",
        "neighbours",
        "plants",
        "features",
    )
    files = [_ROOT / "privacy_audit" / f"{name}.py" for name in names]
    raw = b"".join(path.read_bytes() for path in (*files, Path(__file__).with_name("beyond.py")))
    return hashlib.sha256(raw).hexdigest()[:12]


def _device() -> str:
    for line in (
        Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if sys.platform == "linux" else []
    ):
        if line.startswith("model name"):
            return f"one core of {line.split(':', 1)[1].strip()}"
    return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
