"""A trainer that dies: started by the crash tests, it forks one real process per case, each killed by SIGKILL.

Imports are paid once; every case then trains a tiny model with the real engine, ledger and noise. The points where a
process may die are found, not listed: every call that changes the disk, before, half-way and after (`disk_calls`), and
before and after every draw of noise and every step. Before noise is drawn, the trainer writes one byte to a file of
evidence, straight to the kernel, so that the evidence outlives the process: the ledger may never show fewer steps than
that file has bytes. After each draw it writes what identifies the noise.

    python crashing_trainer.py FOLDER SEED

Three kinds of cases: one death at every point of every scenario, several deaths after each other at random points, and
deaths at random times. After every death the ledger is read, and then the run is repeated to its end. Prints one JSON
line per case.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import random
import shutil
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
from site_client.ledger.cohorts import CohortBook
from site_client.ledger.ledger import Ledger, RoundCharge
from site_client.ledger.site import ledger_folder, open_site_ledger
from site_client.ledger.view import BudgetCap, read_ledger
from tests.site_client.ledger.disk_calls import REAL, watched_disk

Observer = Callable[[str], None]
CODE = "sha256:" + "c0de" * 16
SIGMA = 60.0
STEPS = {"first": 2, "study": 4, "cohort": 1, "torn": 1, "whole": 1, "behind": 1, "late": 1}
"""Steps that one whole run of a scenario charges and draws noise for. `late` is a fault, which must be caught."""


NOTHING: dict[str, object] = {"charged": 0, "drawn": 0}


class EvidentNoise(SystemNoiseSource):
    """Leaves evidence before and after each draw; a one-tensor model draws once per step."""

    def __init__(self, site_dir: Path, on_point: Observer) -> None:
        super().__init__()
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        self._evidence = REAL["open"](site_dir / "evidence", flags, 0o600)
        self._noise = REAL["open"](site_dir / "noise", flags, 0o600)
        self._on_point = on_point

    def gaussian(self, count: int) -> npt.NDArray[np.float64]:
        REAL["write"](self._evidence, b"n")
        self._on_point("noise about to be drawn")
        draws = super().gaussian(count)
        REAL["write"](self._noise, hashlib.sha256(draws.tobytes()).digest())
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


def train(
    ledger: Ledger,
    noise: EvidentNoise,
    on_point: Observer,
    steps: int,
    at_a_time: int = 1,
    cohort: str = "all",
    late: bool = False,
) -> None:
    """One round with the real engine. With `late`, the fault: each step is charged after its noise was drawn."""

    def stepped(trace: LocalStepTrace) -> None:
        on_point("step done")
        if late:
            reserved(trace.step)

    model = nn.Linear(4, 3, bias=False)
    charge = RoundCharge("crash", 1, 1.0, SIGMA, steps, 1.0, CODE, cohort=cohort)
    with ledger.reserve(charge, at_a_time=at_a_time) as reserved:
        run_private_steps(
            model,
            squares,
            Ones(),
            PrivacyParameters(SIGMA, 1.0, 1.0, steps, 3.0, 2, 1),
            torch.optim.SGD(model.parameters(), lr=0.1),
            noise_source=noise,
            sampler=EveryPatient(),
            reserve=(lambda step: None) if late else reserved,
            on_step=stepped,
        )


def vote(ledger: Ledger, noise: EvidentNoise, iterations: int) -> None:
    """Private conditions: each iteration is charged, then its histogram is noised."""
    charge = RoundCharge("crash", 0, 1.0, SIGMA, iterations, 1.0, CODE, purpose="conditions")
    with ledger.reserve(charge) as reserved:
        for index in range(iterations):
            reserved(index)
            noise.gaussian(8)


def run(site_dir: Path, scenario: str, on_point: Observer) -> None:
    """One whole run; `on_point` is told of every place where a process may die."""
    noise = EvidentNoise(site_dir, on_point)
    cohort = "all"
    if scenario == "cohort":
        cohort = "north-wing"
        CohortBook.open(site_dir).require(cohort, Ones.patients)
    cap = BudgetCap(40.0 if scenario == "study" else 50.0, 1e-5)
    with open_site_ledger(site_dir, site="north", cap=cap) as ledger:
        if scenario == "study":
            vote(ledger, noise, 1)
            train(ledger, noise, on_point, 3, at_a_time=2)
        else:
            late = scenario == "late"
            train(ledger, noise, on_point, STEPS[scenario], cohort=cohort, late=late)


def prepare(site_dir: Path, scenario: str) -> None:
    """The state a scenario starts from; the last three are what a crash in the middle of an append leaves."""
    site_dir.mkdir(parents=True)
    if scenario in ("first", "cohort", "late"):
        return
    run(site_dir, "first", lambda name: None)
    if scenario == "study":
        return
    folder, witness = ledger_folder(site_dir), site_dir / "private" / "ledger-heads.txt"
    before = {path: path.read_bytes() for path in (folder / "head.json", witness)}
    size = (folder / "ledger.jsonl").stat().st_size
    with open_site_ledger(site_dir) as ledger:
        ledger.reserve(RoundCharge("crash", 2, 1.0, SIGMA, 1, 1.0, CODE))(0)
        whole = (folder / "ledger.jsonl").read_bytes()
    cut = {"torn": size + (len(whole) - size) // 2, "whole": len(whole) - 1, "behind": len(whole)}[scenario]
    (folder / "ledger.jsonl").write_bytes(whole[:cut])
    for path, content in before.items():
        path.write_bytes(content)


def forked(site_dir: Path, scenario: str, on_point: Observer) -> int:
    """Start a run in a process of its own and return its number."""
    child = os.fork()
    if child == 0:
        try:
            with watched_disk(on_point):
                run(site_dir, scenario, on_point)
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(3)
        os._exit(0)
    return child


def die_at(number: int, note: Path) -> Observer:
    """Return an observer that kills its own process at the `number`-th point it is told of."""
    count = 0

    def on_point(name: str) -> None:
        nonlocal count
        if name.startswith("before"):
            return  # the disk is as it was at the point before
        if count == number:
            with open(note, "w") as stream:
                stream.write(name)
            os.kill(os.getpid(), signal.SIGKILL)
        count += 1

    return on_point


def ended(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def facts(site_dir: Path) -> dict[str, object]:
    """What the ledger says, and what really happened."""
    view = read_ledger(ledger_folder(site_dir))
    evidence, noise = (
        site_dir / "evidence",
        (site_dir / "noise").read_bytes() if (site_dir / "noise").exists() else b"",
    )
    prints = [noise[at : at + 32] for at in range(0, len(noise), 32)]
    return {
        "ok": view.check.ok,
        "charged": sum(event.steps for event in view.totals()),
        "drawn": evidence.stat().st_size if evidence.exists() else 0,
        "repeated_noise": len(prints) - len(set(prints)),
    }


def report(
    kind: str, scenario: str, before: dict[str, object], code: int, points: list[str], site_dir: Path
) -> None:
    """Say what was found after the death, and after one more run to the end, as a trainer does that is started again."""
    after = facts(site_dir)
    run(site_dir, scenario, lambda name: None)
    again = facts(site_dir)
    said = {"kind": kind, "scenario": scenario, "steps": STEPS[scenario], "ended": code, "points": points}
    print(json.dumps({**said, "before": before, "after": after, "again": again}), flush=True)


def every_point(folder: Path, scenario: str) -> None:
    """Die at point 0, 1, 2, … of a run, each in a fresh copy of the prepared state, until a run reaches its end."""
    prepared = folder / f"prepared-{scenario}"
    prepare(prepared, scenario)
    at, code = 0, -signal.SIGKILL
    while code == -signal.SIGKILL:
        site_dir, note = folder / f"case-{at:03d}", folder / f"point-{at:03d}"
        shutil.copytree(prepared, site_dir)
        before = facts(site_dir)
        code = ended(forked(site_dir, scenario, die_at(at, note)))
        point = note.read_text() if note.exists() else ""
        report("every", scenario, before, code, [point], site_dir)
        shutil.rmtree(site_dir)
        at += 3 if scenario == "late" else 1


def chains(folder: Path, seed: int, count: int) -> None:
    """Four deaths after each other in one folder, each at a random point, many of them while mending the last one."""
    chance = random.Random(seed)
    for case in range(count):
        site_dir, note = folder / f"chain-{case:03d}", folder / f"note-{case:03d}"
        scenario = chance.choice(("first", "cohort"))
        site_dir.mkdir(parents=True)
        points = []
        for _ in range(4):
            at = chance.randrange(chance.choice((30, 75)))
            code = ended(forked(site_dir, scenario, die_at(at, note)))
            points.append(note.read_text() if code == -signal.SIGKILL else "")
            assert facts(site_dir)["ok"], points
        report("chain", scenario, NOTHING, code, points, site_dir)
        shutil.rmtree(site_dir)


def killed_from_outside(folder: Path, seed: int, count: int) -> None:
    """Kill at random times, wherever the process is: between instructions, not between calls."""
    chance = random.Random(seed)
    for case in range(count):
        site_dir = folder / f"outside-{case:03d}"
        site_dir.mkdir(parents=True)
        child = forked(site_dir, "first", lambda name: None)
        time.sleep(chance.uniform(0.0, 0.06))
        os.kill(child, signal.SIGKILL)
        code = ended(child)
        report("outside", "first", NOTHING, code, [""], site_dir)


def main() -> None:
    folder, seed = Path(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)
    # Whatever is imported or built on first use is paid once, before the first fork.
    prepare(folder / "warm", "study")
    run(folder / "warm", "study", lambda name: None)
    # A collection in a child would touch, and so copy, every page it shares with its parent.
    gc.disable()
    gc.freeze()
    for scenario in STEPS:
        every_point(folder, scenario)
    chains(folder, seed, 12)
    killed_from_outside(folder, seed, 10)


if __name__ == "__main__":
    main()
