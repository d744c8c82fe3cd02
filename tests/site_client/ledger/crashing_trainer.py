"""A trainer that dies: started by the crash tests, it forks one real process per case, each killed by SIGKILL.

Imports are paid once; every case then trains a tiny model with the real engine, ledger and noise. Before the noise
of a step is drawn, the trainer writes one byte to a file of evidence, straight to the kernel, so that the evidence
outlives the process: the ledger may never show fewer steps than that file has bytes.

    python crashing_trainer.py points FOLDER STEPS AT_A_TIME      one case per point where it can die
    python crashing_trainer.py random FOLDER STEPS AT_A_TIME N    N cases killed from outside at random times

Prints one JSON line per case: its folder, how it ended, the point it died at.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from pixcell_core.private.engine import run_private_steps
from pixcell_core.private.noise import SystemNoiseSource
from pixcell_core.private.parameters import LocalStepTrace, PrivacyParameters
from pixcell_core.private.sampling import EveryPatient
from site_client.ledger.ledger import RoundCharge
from site_client.ledger.site import open_site_ledger
from site_client.ledger.view import BudgetCap

CODE = "sha256:" + "c0de" * 16


class EvidentNoise(SystemNoiseSource):
    """Leaves one byte of evidence before each draw; a one-tensor model draws once per step."""

    def __init__(self, evidence: Path, on_point: Callable[[str], None]) -> None:
        super().__init__()
        self._evidence = os.open(evidence, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self._on_point = on_point

    def gaussian(self, count: int) -> npt.NDArray[np.float64]:
        os.write(self._evidence, b"n")
        self._on_point("noise about to be drawn")
        draws = super().gaussian(count)
        self._on_point("noise drawn")
        return draws


class Ones:
    """Three patients of two rows each."""

    patients: Sequence[str] = ("a", "b", "c")

    def rows(self, patient: str, k: int, rng: torch.Generator) -> tuple[Tensor, ...]:
        return (torch.ones(2, 4),)


def squares(model: nn.Module, rows: tuple[Tensor, ...]) -> Tensor:
    losses: Tensor = (model(rows[0]) - 1.0).pow(2).mean(1)
    return losses


def train(site_dir: Path, steps: int, at_a_time: int, on_point: Callable[[str], None]) -> None:
    """One round, as a trainer runs it; `on_point` is told of every place where a process may die."""

    def stepped(trace: LocalStepTrace) -> None:
        on_point("step done")

    model = nn.Linear(4, 3, bias=False)
    params = PrivacyParameters(20.0, 1.0, 1.0, steps, 3.0, 2, 1)
    cap = BudgetCap(50.0, 1e-5)
    with open_site_ledger(site_dir, site="north", cap=cap, on_point=on_point) as ledger:
        on_point("ledger open")
        with ledger.reserve(
            RoundCharge("crash", 1, 1.0, 20.0, steps, 1.0, CODE), at_a_time=at_a_time
        ) as reserved:
            run_private_steps(
                model,
                squares,
                Ones(),
                params,
                torch.optim.SGD(model.parameters(), lr=0.1),
                noise_source=EvidentNoise(site_dir / "evidence", on_point),
                sampler=EveryPatient(),
                reserve=reserved,
                on_step=stepped,
            )


def die_at(number: int, note: Path) -> Callable[[str], None]:
    """Return an observer that kills its own process at the `number`-th point it is told of."""
    count = 0

    def on_point(name: str) -> None:
        nonlocal count
        if count == number:
            note.write_text(name)
            os.kill(os.getpid(), signal.SIGKILL)
        count += 1

    return on_point


def forked(site_dir: Path, steps: int, at_a_time: int, on_point: Callable[[str], None]) -> int:
    site_dir.mkdir(parents=True)
    child = os.fork()
    if child == 0:
        try:
            train(site_dir, steps, at_a_time, on_point)
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(3)
        os._exit(0)
    return child


def main() -> None:
    mode, folder, steps, at_a_time = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    torch.set_num_threads(1)
    # Whatever is imported or built on first use is paid once, before the first fork.
    (folder / "first").mkdir()
    train(folder / "first", 1, 1, lambda name: None)
    cases = range(200) if mode == "points" else range(int(sys.argv[5]))
    chance = random.Random(7)
    for case in cases:
        site_dir = folder / f"case-{case:03d}"
        if mode == "points":
            child = forked(site_dir, steps, at_a_time, die_at(case, folder / f"point-{case:03d}"))
        else:
            child = forked(site_dir, steps, at_a_time, lambda name: None)
            time.sleep(chance.uniform(0.0, 0.12))
            os.kill(child, signal.SIGKILL)
        ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        note = folder / f"point-{case:03d}"
        point = note.read_text() if note.exists() else ""
        print(json.dumps({"folder": str(site_dir), "ended": ended, "point": point}), flush=True)
        if mode == "points" and ended == 0:
            break


if __name__ == "__main__":
    main()
