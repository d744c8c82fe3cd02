"""A finished audit's site part with a queue in it, made by the audit's own writer: small, and quick to decide."""

from __future__ import annotations

import base64
import io
import re
import secrets
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from privacy_audit.blinding import Blinding
from privacy_audit.review.serving import serve_review
from privacy_audit.review.session import ReviewSession
from privacy_audit.review_candidates import ASKS, Candidate
from privacy_audit.review_queue import KEY, ReviewKey, write

SIDE = 96


def picture(seed: int) -> str:
    """A data URI of a small PNG: coarse blots, so that a person sees which are alike."""
    rng = np.random.default_rng(seed)
    blots = rng.integers(60, 255, (6, 6, 3)).astype(np.uint8)
    stream = io.BytesIO()
    Image.fromarray(blots).resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(stream, "PNG")
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode("ascii")


def make_queue(out: Path, pairs: int = 4, decoys: int = 4, marks: int = 0, clean: int = 0) -> Path:
    """`out` with queue and key: the pairs show one picture twice, the decoys two different ones; single tiles after."""
    (out / "site").mkdir(parents=True)
    kinds = ["pair"] * pairs + ["decoy"] * decoys + ["mark"] * marks + ["clean"] * clean
    rng = np.random.default_rng(7)
    order = [*rng.permutation(pairs + decoys), *(pairs + decoys + rng.permutation(marks + clean))]
    chosen, pictures = [], []
    for place in order:
        kind: Any = kinds[int(place)]
        alone = ASKS[kind] == "mark"
        chosen.append(
            Candidate(
                kind=kind,
                left=f"{kind}-{place}.png",
                left_row=int(place),
                left_digest=f"sha256:{place:064x}",
                training_row=None if alone else int(place),
                training_tile="" if alone else f"patient-{place}/t.png",
                training_digest="" if alone else f"sha256:{place + 100:064x}",
                score=0.5,
            )
        )
        right = int(place) if kind == "pair" else int(place) + 1000
        pictures.append((picture(int(place)), None if alone else picture(right)))
    write(out, chosen, pictures, Blinding(secrets.token_bytes(32)))
    return out


def kinds_of(out: Path) -> dict[str, str]:
    """What stands behind each item."""
    return {item.id: item.kind for item in ReviewKey.model_validate_json((out / KEY).read_text()).items}


@contextmanager
def served(session: ReviewSession, **more: Any) -> Iterator[tuple[str, list[BaseException]]]:
    """The real server on a real port; gives the page's address, and what the server ended with."""
    told, ended, ready = [], [], threading.Event()

    def say(address: str) -> None:
        told.append(address)
        ready.set()

    def run() -> None:
        try:
            serve_review(session, say=say, **({"idle_s": 60.0} | more))
        except BaseException as error:
            ended.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    assert ready.wait(20), ended
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/[A-Za-z0-9_-]{32}/", told[0])
    yield told[0], ended
    thread.join(20)
    assert not thread.is_alive()
