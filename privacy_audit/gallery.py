"""The site's own page: released tiles beside their nearest training tiles, watermarked, never to be exported."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from privacy_audit.base_twins import nulls_of
from privacy_audit.charts import Place
from privacy_audit.evidence import Evidence
from privacy_audit.geometry import FINE_SIDE, evened, haematoxylin, orient
from privacy_audit.keypoints import SIDE, Agreement, agreement, find_keypoints
from privacy_audit.render import Pair, Picture, render_page
from privacy_audit.report import SITE_MARK, SITE_PAGE, AuditReport
from privacy_audit.screen import ScreenScores
from privacy_audit.tiles import TileSource

MAX_PAIRS = 60
LEAST_PAIRS = 12
LEAST_MATCHES = 4  # fewer places on one transform is what unrelated tiles have: no lines are drawn
_MOST_LINES = 24
_TURNS = ("as it is", "quarter turn", "half turn", "three-quarter turn")


def write_site_page(
    out: Path,
    report: AuditReport,
    train: TileSource,
    synthetic: TileSource,
    scores: ScreenScores,
    evidence: Evidence,
) -> None:
    """Write `site/report.html` with every flagged pair (at most 60) and the nearest unflagged ones for comparison."""
    flagged = {flag.synthetic for flag in report.flagged}
    p_values = nulls_of(evidence).p_values(scores.score)
    order = sorted(
        range(len(scores.score)),
        key=lambda row: (evidence.released_ids[row] not in flagged, -scores.score[row]),
    )
    pairs = []
    for row in order[: min(max(LEAST_PAIRS, len(flagged) + 6), MAX_PAIRS)]:
        match = int(scores.match[row])
        released, training = _pixels(synthetic, row), _pixels(train, match)
        found = matching(released, training)
        words, which = keypoint_words(found), 0
        if not scores.by_keypoints[row]:
            which, dy, dx = (int(value) for value in scores.aligned[row])
            words = _words(which, dy, dx)
        turned = orient(torch.from_numpy(released).permute(2, 0, 1), which).permute(1, 2, 0)
        pairs.append(
            Pair(
                synthetic=evidence.released_ids[row],
                training_tile=train.ids[match],
                score=float(scores.score[row]),
                p_value=float(p_values[row]),
                flagged=evidence.released_ids[row] in flagged,
                alignment=words,
                aligned=picture(turned.contiguous().numpy()),
                released=picture(released),
                training=picture(training),
                lines=match_lines(released, training, found),
                matches=found.inliers,
            )
        )
    path = out / SITE_PAGE
    partial = path.with_name(path.name + ".partial")
    partial.write_text(render_page(report, pairs), encoding="utf-8")
    partial.replace(path)


def matching(released: npt.NDArray[np.uint8], training: npt.NDArray[np.uint8]) -> Agreement:
    """Keypoints of two uint8 (H, W, 3) tiles that obey one transform; the released one as it is or mirrored."""
    first, second = (
        find_keypoints(evened(haematoxylin(torch.from_numpy(tile).permute(2, 0, 1)[None]), SIDE))
        for tile in (released, training)
    )
    found = [agreement(first, second, mirrored=mirrored) for mirrored in (False, True)]
    return max(found, key=lambda one: one.inliers)


def match_lines(
    released: npt.NDArray[np.uint8], training: npt.NDArray[np.uint8], found: Agreement
) -> tuple[tuple[Place, Place], ...]:
    """At most 24 pairs of places (x, y) that match, in pixels of each tile; none where too few agree to mean anything."""
    if found.inliers < LEAST_MATCHES:
        return ()
    # Spread over the tile from left to right, not the first that were found.
    order = np.argsort(found.here[:, 0], kind="stable")
    order = order[np.unique(np.linspace(0, len(order) - 1, min(_MOST_LINES, len(order))).astype(int))]
    here = found.here[order] * (np.array(released.shape[1::-1]) / SIDE)
    there = found.there[order] * (np.array(training.shape[1::-1]) / SIDE)
    return tuple(
        ((float(a[0]), float(a[1])), (float(b[0]), float(b[1]))) for a, b in zip(here, there, strict=True)
    )


def picture(pixels: npt.NDArray[np.uint8]) -> Picture:
    """A uint8 (H, W, 3) tile as the page shows it."""
    return Picture(data_uri(pixels), pixels.shape[1], pixels.shape[0])


def keypoint_words(found: Agreement) -> str:
    """The transform in words."""
    parts = [f"{found.inliers} matching places"]
    if found.mirrored:
        parts.append("mirrored")
    if abs(found.degrees) >= 1:
        parts.append(f"turned by {abs(found.degrees):.0f} degrees")
    if found.zoom > 0 and abs(found.zoom - 1) >= 0.03:
        parts.append(f"{1 / found.zoom:.2f} times as large as the training tile")
    return ", ".join(parts)


def _pixels(source: TileSource, row: int) -> npt.NDArray[np.uint8]:
    return source.read(row, row + 1)[0].permute(1, 2, 0).contiguous().numpy()


def data_uri(pixels: npt.NDArray[np.uint8]) -> str:
    """A PNG as data URI; the mark stands in the file too, so that a saved image is refused by the gate."""
    info = PngInfo()
    info.add_text("Comment", SITE_MARK.replace("–", "-"))
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG", pnginfo=info)
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()


def _words(which: int, dy: int, dx: int) -> str:
    turn = _TURNS[which % 4]
    if which >= 4:
        turn = "mirrored" if which == 4 else f"{turn}, mirrored"
    shifts = [
        f"{abs(shift) / FINE_SIDE:.0%} {direction}"
        for shift, direction in ((dy, "down or up"), (dx, "sideways"))
        if round(100 * abs(shift) / FINE_SIDE)
    ]
    return f"{turn}, shifted by {' and '.join(shifts)}" if shifts else turn


def decoded(uri: str) -> npt.NDArray[np.uint8]:
    """The uint8 (H, W, 3) tile behind a data URI that `data_uri` made."""
    with Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])), formats=("PNG",)) as image:
        return np.array(image.convert("RGB"))
