"""The ledger's cost: one append until it is safely on disk, opening and verifying a long ledger, asking for room.

Run: ``python bench/bench_ledger.py [FOLDER]``. Appends are measured on FOLDER's disk (default: the working folder),
beside bare appends of the same length that wait for the same disk, in turn, so that a busy machine shows in both.
Everything that only computes is measured in memory (/dev/shm where there is one).
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from pixcell_core.trust.keys import SigningKey
from site_client.ledger.export import BudgetExport, export_of, verify_export
from site_client.ledger.ledger import Ledger, RoundCharge
from site_client.ledger.view import BudgetCap, read_ledger

RECORDS = 10_000
ON_DISK = 500
CODE = "sha256:" + "c0de" * 16
CAP = BudgetCap(8.0, 1e-5)
LINE = b"x" * 780 + b"\n"


def charge(steps: int, round: int = 1) -> RoundCharge:
    """A round whose noise is large enough that ten thousand steps stay under the cap."""
    return RoundCharge("bench", round, 1.0, 500.0, steps, 1.0, CODE)


def timed(act: Callable[[], object]) -> tuple[float, float]:
    """CPU and wall seconds of one call."""
    cpu, wall = time.process_time(), time.perf_counter()
    act()
    return time.process_time() - cpu, time.perf_counter() - wall


def said(costs: list[tuple[float, float]]) -> str:
    """Median and 95th percentile of wall time, and median of CPU time, in milliseconds."""
    cpu, wall = (sorted(1e3 * cost[side] for cost in costs) for side in (0, 1))
    return (
        f"median {statistics.median(wall):.2f} ms, 95th percentile {wall[int(0.95 * len(wall))]:.2f} ms, "
        f"fastest {wall[0]:.2f} ms, CPU {statistics.median(cpu):.2f} ms"
    )


def appends_on_disk(folder: Path, key: SigningKey) -> None:
    """Time `ON_DISK` appends and as many bare ones, in turn."""
    descriptor = os.open(folder / "bare", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def bare() -> None:
        os.write(descriptor, LINE)
        os.fsync(descriptor)

    with Ledger.open(folder / "ledger", key, CAP) as ledger:
        steps = ledger.reserve(charge(ON_DISK))
        pairs = [(timed(lambda index=index: steps(index)), timed(bare)) for index in range(ON_DISK)]  # type: ignore[misc]
    os.close(descriptor)
    print(f"append, on disk with its head: {said([ours for ours, _ in pairs])}")
    print(f"bare append and fsync, same disk, in turn: {said([theirs for _, theirs in pairs])}")


def long_ledger(folder: Path, key: SigningKey) -> None:
    """Time what grows with the ledger."""
    with Ledger.open(folder, key, CAP) as ledger:
        steps = ledger.reserve(charge(RECORDS))
        costs = [timed(lambda index=index: steps(index)) for index in range(RECORDS)]  # type: ignore[misc]
        print(f"append without a disk, first 1,000 of {RECORDS:,}: {said(costs[:1000])}")
        print(f"append without a disk, last 1,000 of {RECORDS:,}: {said(costs[-1000:])}")
        steps.close()
        cpu, wall = timed(lambda: ledger.reserve(charge(1, 2)))
        print(f"asking for room after {RECORDS:,} charges: {wall:.3f} s, CPU {cpu:.3f} s")
    kept: list[BudgetExport] = []
    for what, act in (
        (f"verify {RECORDS:,} records", lambda: read_ledger(folder, key.verify_key).require_whole()),
        (f"open a ledger of {RECORDS:,} records", lambda: Ledger.open(folder, key).close()),
        ("export it", lambda: kept.append(export_of(folder, read_ledger(folder)))),
        ("verify the export", lambda: verify_export(kept[0])),
    ):
        cpu, wall = timed(act)
        print(f"{what}: {wall:.2f} s, CPU {cpu:.2f} s")


def main() -> None:
    """Print one line per measurement."""
    key = SigningKey.generate()
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=sys.argv[1] if len(sys.argv) > 1 else ".") as name:
        appends_on_disk(Path(name), key)
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as name:
        long_ledger(Path(name) / "ledger", key)


if __name__ == "__main__":
    main()
