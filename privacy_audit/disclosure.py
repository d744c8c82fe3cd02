"""Burnt-in text, pen ink and labels on released tiles: what names a patient outright.

Three detectors that look at pixels alone. Ink: colours that no mixture of haematoxylin and eosin gives. Text: dark or
white signs of one height on one line. Labels: blocks of parallel black bars. They are made to miss little and to be
checked by a person: a hit is a REVIEW until a signed reading of the tiles confirms it (FAIL) or clears it (PASS).

Legend: B tiles, H W pixels.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from scipy.stats import fisher_exact

from pixcell_core.cli.progress import progress
from privacy_audit.evidence_parts import DisclosureEvidence, MarkEvidence
from privacy_audit.policy import DisclosurePolicy, Policy
from privacy_audit.result import Status, TestResult
from privacy_audit.tiles import TileSource

NAME = "burnt-in text, ink and labels"
_CHUNK = 256
_HOLDOUT_TILES = 3000
_BLOCK = 16  # pixels: side of a block that is looked at for bars
_DARK, _LIGHT = (
    (60, 85, 110),
    (248, 225, 205),
)  # levels at which signs are cut out: smoothed letters have grey rims
_DENSITY = -np.log10((np.arange(256, dtype=np.float32) + 1.0) / 256.0)  # optical density of every grey value
Tile = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Found:
    """What the detectors measured on one tile."""

    ink: float
    glyphs: int
    blocks: int


def gather(synthetic: TileSource, holdout: TileSource, rng: np.random.Generator) -> DisclosureEvidence:
    """Look at every released tile, and at up to 3,000 holdout tiles to know what this hospital's tissue looks like."""
    count = len(holdout.ids)
    rows = np.sort(rng.choice(count, size=min(count, _HOLDOUT_TILES), replace=False))
    released, clean = _all(synthetic, None), _all(holdout, rows)
    return DisclosureEvidence(
        ink=np.array([one.ink for one in released]),
        glyphs=np.array([one.glyphs for one in released], dtype=np.int64),
        blocks=np.array([one.blocks for one in released], dtype=np.int64),
        holdout_row=rows.astype(np.int64),
        holdout_ink=np.array([one.ink for one in clean]),
        holdout_glyphs=np.array([one.glyphs for one in clean], dtype=np.int64),
        holdout_blocks=np.array([one.blocks for one in clean], dtype=np.int64),
    )


def look(tile: Tile) -> Found:
    """Run the three detectors on one tile (H, W, 3) uint8."""
    return Found(ink_share(tile), longest_line(tile), label_blocks(tile))


def ink_share(tile: Tile) -> float:
    """Share of pixels whose colour no mixture of haematoxylin and eosin gives.

    By optical density both stains take most green and least blue (Ruifrok & Johnston 2001). Green pens take more red
    than green, blue pens more red than green and hardly any blue, red pens about as much blue as green, black pens as
    much of all three.
    """
    red, green, blue = (_DENSITY[tile[:, :, channel]] for channel in range(3))
    # Overdrawn nuclei have no red at all and little blue: a blue pen is bright in blue.
    blue_pen = (red > 1.22 * green) & (blue < 0.3) & (red > 0.55)
    green_pen = (red > 1.35 * green) & (blue > 0.6 * green)
    red_pen = (blue > 0.7 * green) & (red < 0.3 * green) & (green > 0.75)
    black_pen = (np.minimum(np.minimum(red, green), blue) > 0.75) & (blue > 0.85 * green)
    strong = np.maximum(np.maximum(red, green), blue) > 0.35
    return float((strong & (green_pen | blue_pen | red_pen | black_pen)).mean())


def longest_line(tile: Tile) -> int:
    """Most signs on one line: dark, or light on darker ground, of one height, one baseline, and close together."""
    red, green, blue = (np.ascontiguousarray(tile[:, :, channel]) for channel in range(3))
    darkest = np.maximum(np.maximum(red, green), blue)
    lightest = np.minimum(np.minimum(red, green), blue)
    best = 0
    for mask in [darkest < level for level in _DARK] + [lightest > level for level in _LIGHT]:
        # Where most of a tile is dark or glass, what is left over is no writing.
        if 0 < np.count_nonzero(mask) < 0.4 * mask.size:
            best = max(best, _line(mask, best))
    return best


def label_blocks(tile: Tile) -> int:
    """Blocks of 16 px in which all rows (or all columns) repeat each other and run between black and white."""
    rows, columns = tile.shape[0] // _BLOCK, tile.shape[1] // _BLOCK
    cut = tile[: rows * _BLOCK, : columns * _BLOCK]
    sums = cut[:, :, 0].astype(np.uint16) + cut[:, :, 1] + cut[:, :, 2]
    highest = sums.reshape(rows, _BLOCK, -1).max(axis=1).reshape(rows, columns, _BLOCK).max(axis=2)
    lowest = sums.reshape(rows, _BLOCK, -1).min(axis=1).reshape(rows, columns, _BLOCK).min(axis=2)
    # Few blocks of tissue run between black and white: only these are looked at.
    row, column = np.nonzero(highest - lowest >= 3 * 120)
    if not len(row):
        return 0
    inside = cut.reshape(rows, _BLOCK, columns, _BLOCK, 3)[row, :, column].astype(np.float32)
    red, green, blue = (np.ascontiguousarray(inside[..., channel]) for channel in range(3))
    spread = np.maximum(np.maximum(red, green), blue) - np.minimum(np.minimum(red, green), blue)
    colourful = spread.mean(axis=(1, 2))
    grey = (red + green + blue) / 3.0
    down = np.abs(np.diff(grey, axis=1)).mean(axis=(1, 2))
    across = np.abs(np.diff(grey, axis=2)).mean(axis=(1, 2))
    low, high = np.minimum(down, across), np.maximum(down, across)
    return int(((colourful <= 30) & (low < 0.1 * high) & (high > 15)).sum())


def hits(evidence: DisclosureEvidence, policy: DisclosurePolicy) -> npt.NDArray[np.bool_]:
    """Which released tiles show something that a person has to look at; (S,)."""
    return np.asarray(severity(evidence, policy)[0] > 1.0)


def severity(
    evidence: DisclosureEvidence, policy: DisclosurePolicy
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """How much the detectors saw, as multiples of what is still nothing, the worst of the three; (S,) and (n,)."""
    limits = _limits(policy)

    def worst(*seen: npt.NDArray[np.float64] | npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        # A policy that calls one sign a hit has the limit 0; any more than that is then twice too much.
        ratios = [
            values / limit if limit > 0 else 2.0 * (values > 0)
            for values, limit in zip(seen, limits, strict=True)
        ]
        return np.asarray(np.max(ratios, axis=0), dtype=np.float64)

    return (
        worst(evidence.ink, evidence.glyphs, evidence.blocks),
        worst(evidence.holdout_ink, evidence.holdout_glyphs, evidence.holdout_blocks),
    )


def _limits(policy: DisclosurePolicy) -> tuple[float, float, float]:
    """What is still nothing: ink, signs on a line, blocks; by the policy alone, so that a dirty holdout excuses no name."""
    return policy.min_ink_share, policy.min_glyphs - 1.0, policy.min_label_blocks - 1.0


def dirty(evidence: DisclosureEvidence, policy: DisclosurePolicy) -> bool:
    """Whether the holdout itself shows more than the policy's least, on more tiles than a stray one or two."""

    seen = np.stack([evidence.holdout_ink, evidence.holdout_glyphs, evidence.holdout_blocks])
    if not seen.size:
        return False
    return bool((np.quantile(seen, policy.holdout_quantile, axis=1) > _limits(policy)).any())


def result(evidence: DisclosureEvidence, policy: Policy, read: MarkEvidence | None) -> TestResult:
    """The test: any hit is a person's to look at; `read` is what a signed reading of the hits said."""
    found = hits(evidence, policy.disclosure)
    _, glyphs, blocks = _limits(policy.disclosure)
    text, labels = int((evidence.glyphs > glyphs).sum()), int((evidence.blocks > blocks).sum())
    count = int(found.sum())
    status = Status.REVIEW if count else Status.PASS
    why = (
        f"{count} of {len(found)} released tiles show something like writing ({text}), a label ({labels}) or ink: a "
        "person has to look at each (pixcell audit review)."
        if count
        else f"None of {len(found)} released tiles shows writing, ink or a label."
    )
    if count and read is not None:
        status, why = _read(count, read, policy.review.max_p)
    if count and dirty(evidence, policy.disclosure):
        why += (
            " The holdout's own tiles show as much: either they bear marks themselves, and then the training tiles may, or "
            "the detectors mistake this tissue. Nothing is excused by it."
        )
    return TestResult(
        name=NAME,
        section="attribution",
        claim="No released tile carries writing, pen ink or a piece of a label.",
        statistic="released tiles with a sign of text, ink or a barcode",
        value=float(count),
        null="what the same detectors see on holdout tiles",
        threshold=0.0,
        direction="lower is safer",
        status=status,
        why=why,
        cannot_show="Writing fainter or smaller than the detectors see, and names said by other means than signs.",
        details={
            "text": text,
            "labels": labels,
            "highest_ink_share": round(float(evidence.ink.max()), 6),
            **(
                {"read": read.shown, "confirmed": read.marked, "reviewer": read.reviewer, "queue": read.queue}
                if read
                else {}
            ),
        },
    )


def _read(count: int, read: MarkEvidence, max_p: float) -> tuple[Status, str]:
    """What a reader's calls make of the hits; who also calls clean tissue marked confirms nothing alone."""
    table = [[read.marked, read.shown - read.marked], [read.decoy_marked, read.decoys - read.decoy_marked]]
    p = float(fisher_exact(table, alternative="greater").pvalue)
    seen = f"{read.shown} of {count} tiles that the detectors brought up were read among {read.decoys} others"
    if read.marked and (not read.decoy_marked or p < max_p):
        return Status.FAIL, f"{seen}: {read.marked} of them bear text, ink or a label."
    if read.open:
        return Status.REVIEW, f"{seen}; {read.open} have no decision yet."
    if read.marked or read.unsure or read.decoy_marked:
        return Status.REVIEW, (
            f"{seen}. The reviewer called {read.marked} of them and {read.decoy_marked} others marked and was unsure of "
            f"{read.unsure}: a second reader has to look."
        )
    if read.shown < count:
        return (
            Status.REVIEW,
            f"{seen}, and none bears a mark. The other {count - read.shown} nobody has read.",
        )
    return Status.PASS, f"{seen}: none bears text, ink or a label."


def _all(source: TileSource, rows: npt.NDArray[np.int64] | None) -> list[Found]:
    wanted = np.arange(len(source.ids)) if rows is None else rows
    found: list[Found] = []
    # Most of the work leaves the interpreter's lock.
    with (
        progress(f"reading {source.name} tiles for text and ink", total=len(wanted), unit="tiles") as bar,
        ThreadPoolExecutor(torch.get_num_threads()) as pool,
    ):
        for start in range(0, len(source.ids), _CHUNK):
            inside = wanted[(wanted >= start) & (wanted < start + _CHUNK)]
            if not len(inside):
                continue
            pixels = source.read(start, start + _CHUNK)[(inside - start).tolist()]
            found += pool.map(look, pixels.permute(0, 2, 3, 1).contiguous().numpy())
            bar.advance(len(inside))
    return found


def _line(mask: npt.NDArray[np.bool_], least: int = 0) -> int:
    """Most signs on one line; anything where they cannot be more than `least`."""
    import cv2

    padded = np.pad(mask.view(np.uint8), 1)
    _, labels, stats, _ = cv2.connectedComponentsWithStats(padded, connectivity=8)
    side = min(mask.shape)
    left, top, width, height, area = stats.T
    fill = area / (width * height)
    likely = (height >= 6) & (height <= side // 3) & (width >= 0.1 * height) & (width <= 1.6 * height)
    likely &= (fill >= 0.15) & (fill <= 0.95) & (area >= 8)
    likely[0] = False  # the ground
    if np.count_nonzero(likely) <= least:
        return 0
    # One transform for all signs: between two of them lies ground, so no sign is nearer than the ground around it.
    depth = cv2.distanceTransform(padded, cv2.DIST_L2, 3)
    signs = []
    for number in np.flatnonzero(likely).tolist():
        x, y, w, h = int(left[number]), int(top[number]), int(width[number]), int(height[number])
        here = slice(y, y + h), slice(x, x + w)
        # The thickest stroke: a stroke is thin against the sign it draws; a nucleus or a lumen is not.
        thickness = 2.0 * float(depth[here][labels[here] == number].max()) - 1.0
        if thickness <= 0.36 * h:
            signs.append((x, y + h, w, h))
    signs.sort()
    best = 0
    for start, first in enumerate(signs):
        run, last = 1, first
        for sign in signs[start + 1 :]:
            gap = sign[0] - (last[0] + last[2])
            level = abs(sign[1] - first[1]) <= max(1.0, 0.12 * first[3])
            alike = abs(sign[3] - first[3]) <= max(1.0, 0.2 * first[3])
            if -0.2 * first[3] <= gap <= 1.2 * first[3] and level and alike:
                run, last = run + 1, sign
        best = max(best, run)
    return best
