"""Runs a demonstration from slides to releases and says how it ended."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path

from deploy.local.board import Board
from deploy.local.consortium import LocalConsortium
from deploy.local.memory import MemoryWatch
from deploy.local.plan import DemoPlan
from deploy.local.processes import Processes
from deploy.local.summary import DemoSummary, honest_words, judge
from pixcell_core.errors import BadInputError


def _claim(plan: DemoPlan) -> None:
    """Take the output folder for this plan, or go on with the one it already holds."""
    out = plan.out
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(plan).items() if k != "out"}
    marker = out / "demo.json"
    if marker.exists():
        before = json.loads(marker.read_text())
        if before != settings:
            changed = ", ".join(k for k in settings if before.get(k) != settings[k])
            raise BadInputError(
                f"{out} holds a demonstration with other settings ({changed}).",
                hint="Give another --out, or remove that folder.",
                code="demo-settings-differ",
            )
        return
    if out.exists() and any(out.iterdir()):
        raise BadInputError(
            f"{out} is not empty and holds no demonstration.",
            hint="Give another --out.",
            code="out-not-empty",
        )
    out.mkdir(parents=True, exist_ok=True)
    marker.write_text(json.dumps(settings, indent=1))


def run_demo(plan: DemoPlan) -> DemoSummary:
    """Run (or resume) the demonstration in `plan.out`."""
    _claim(plan)
    for folder in ("logs", "stamps"):
        (plan.out / folder).mkdir(exist_ok=True)
    board = Board()
    processes = Processes(plan.out / "logs", plan.out / "stamps")
    consortium = LocalConsortium(plan, processes, board)
    start = time.monotonic()
    try:
        with MemoryWatch() as memory, board.shown():
            with board.stage("slides, tiles, features, pretraining"):
                consortium.prepare()
            with board.stage("enrolment, study, approvals"):
                study = consortium.enrol()
            with board.stage("federated rounds"):
                adapter = consortium.federate()
            with board.stage("surrogates, audit, gate"):
                consortium.release(study, adapter)
    finally:
        processes.stop()
    outcomes = list(consortium.outcomes.values())
    summary = DemoSummary(
        out=plan.out,
        sites=[asdict(outcome) for outcome in outcomes],
        seconds={k: round(v, 1) for k, v in board.seconds.items()},
        total_seconds=round(time.monotonic() - start, 1),
        peak_memory_mb=round(memory.peak_mb),
        notes=honest_words(plan, outcomes),
        as_expected=judge(plan, outcomes),
    )
    consortium.write(summary.model_dump(mode="json"))
    return summary
