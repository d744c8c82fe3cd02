"""The registry's cost: a committed round beside the bare files of one, a head, an act, a board, and looking at a board.

Run: ``python bench/bench_registry.py [FOLDER [URL PASSWORD_FILE]]``. Measured on FOLDER's disk (default: the working
folder), the bare files and the registry in turn, so that a busy machine shows in both. With a PostgreSQL URL of an
empty database the same on that server.
"""

from __future__ import annotations

import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import numpy as np

from pixcell_core.contracts.canonical import digest
from pixcell_core.contracts.round import KnownHead, RoundRecord
from pixcell_core.contracts.spool import arrays_digest, arrays_to_bytes
from server.registry.address import RegistryAddress
from server.registry.events import ActLog
from server.registry.registry import Registry
from server.registry.schema import require_current
from server.rounds.board import RunBoard
from server.rounds.heads import HeadBook
from server.rounds.store import RoundStore
from tests.any_study import any_study

ROUNDS, REPEATS = 60, 300
NOW = datetime.now(UTC)
STUDY = any_study(
    id="bench",
    expires_at=datetime(2100, 1, 1, tzinfo=UTC),
    rounds=1000,
    steps_per_round=1,
    tiles_per_patient=1,
    sites=tuple(f"site-{i}" for i in range(20)),
)


def wall_ms(act: Callable[[], object]) -> float:
    """Milliseconds of one call."""
    start = time.perf_counter()
    act()
    return 1e3 * (time.perf_counter() - start)


def said(costs: list[float]) -> str:
    """Median and 95th percentile in milliseconds."""
    costs = sorted(costs)
    return f"median {statistics.median(costs):.2f} ms, 95th percentile {costs[int(0.95 * len(costs))]:.2f} ms"


def rounds(registry: Registry, folder: Path, parameters: int) -> None:
    """Commit rounds, and write the same bytes bare: flushed beside their place, renamed, folder flushed."""
    adapter = {"block": np.zeros((parameters,), dtype=np.float32)}
    data, named = arrays_to_bytes(adapter), arrays_digest(adapter)
    study = STUDY.model_copy(update={"id": f"bench-{parameters}"})
    store = RoundStore(registry, folder / study.id, study)
    store.open()
    bare_folder = folder / f"bare-{parameters}"
    bare_folder.mkdir()

    def bare(number: int) -> None:
        arrays_to_bytes(adapter)
        filled = bare_folder / f".partial-{number}"
        filled.mkdir()
        with (filled / "adapter.safetensors").open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        for place in (filled, bare_folder):
            descriptor = os.open(place, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
            if place == filled:
                os.rename(filled, bare_folder / f"{number:05d}")

    previous, ours, theirs = None, [], []
    for number in range(ROUNDS):
        record = RoundRecord(
            study_id=study.id,
            study_digest=study.digest,
            round=number,
            previous=previous,
            adapter_digest=named,
            included=study.sites,
            excluded=(),
            started_at=NOW,
            committed_at=NOW,
        )
        ours.append(wall_ms(lambda record=record: store.commit(record, adapter)))  # type: ignore[misc]
        theirs.append(wall_ms(lambda number=number: bare(number)))  # type: ignore[misc]
        previous = record.digest
    ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
    print(
        f"a round of {parameters:,} parameters: {said(ours)}; {ratio:.2f} x its bare files ({said(theirs)})"
    )


def small(registry: Registry) -> None:
    """Everything without tensors."""
    board, heads, log = RunBoard(registry, STUDY.id), HeadBook(registry), ActLog(registry)
    state = board.submit(STUDY)
    board.write(state)
    heads.note("site-0", KnownHead(sequence=0, hash=digest(b"0")))
    log.note("bench", "first")
    for what, act in (
        ("a board of 20 sites, written", lambda _: board.write(state)),
        ("a board, read", lambda _: board.read()),
        ("a head, on disk", lambda i: heads.note("site-0", KnownHead(sequence=i + 1, hash=digest(b"h")))),
        ("an act, on disk", lambda _: log.note("bench", "again")),
    ):
        costs = [wall_ms(partial(act, i)) for i in range(REPEATS)]
        print(f"{what}: {said(costs)}")


def main(folder: Path, address: RegistryAddress | None) -> None:
    """Measure one registry."""
    place = Path(tempfile.mkdtemp(dir=folder, prefix="bench-registry-"))
    try:
        registry = Registry(address or RegistryAddress.of_folder(place))
        print(f"making the tables: {wall_ms(lambda: require_current(registry)):.0f} ms")
        small(registry)
        for parameters in (10_000, 5_000_000):
            rounds(registry, place, parameters)
        registry.close()
    finally:
        shutil.rmtree(place)


if __name__ == "__main__":
    here = Path(sys.argv[1] if len(sys.argv) > 1 else ".").absolute()
    main(here, RegistryAddress.parse(sys.argv[2], Path(sys.argv[3]), here) if len(sys.argv) > 3 else None)
