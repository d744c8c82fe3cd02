"""The site's own page: released tiles beside their nearest training tiles, watermarked, never to be exported."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from privacy_audit.copies import Conformal
from privacy_audit.evidence import Evidence
from privacy_audit.geometry import FINE_SIDE, orient
from privacy_audit.render import Pair, render_page
from privacy_audit.report import SITE_MARK, SITE_PAGE, AuditReport
from privacy_audit.screen import ScreenScores
from privacy_audit.tiles import TileSource

MAX_PAIRS = 60
LEAST_PAIRS = 12
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
    p_values = Conformal(evidence.null_scores).p_values(scores.score)
    order = sorted(
        range(len(scores.score)),
        key=lambda row: (evidence.released_ids[row] not in flagged, -scores.score[row]),
    )
    pairs = []
    for row in order[: min(max(LEAST_PAIRS, len(flagged) + 6), MAX_PAIRS)]:
        which, dy, dx = (int(v) for v in scores.aligned[row])
        released = orient(synthetic.read(row, row + 1)[0], which)
        match = int(scores.match[row])
        pairs.append(
            Pair(
                synthetic=evidence.released_ids[row],
                training_tile=train.ids[match],
                score=float(scores.score[row]),
                p_value=float(p_values[row]),
                flagged=evidence.released_ids[row] in flagged,
                alignment=_words(which, dy, dx),
                synthetic_uri=data_uri(released.permute(1, 2, 0).contiguous().numpy()),
                training_uri=data_uri(train.read(match, match + 1)[0].permute(1, 2, 0).contiguous().numpy()),
            )
        )
    path = out / SITE_PAGE
    partial = path.with_name(path.name + ".partial")
    partial.write_text(render_page(report, pairs), encoding="utf-8")
    partial.replace(path)


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
    if dy == 0 and dx == 0:
        return turn
    return f"{turn}, shifted by {abs(dy) / FINE_SIDE:.0%} down or up and {abs(dx) / FINE_SIDE:.0%} sideways"
