"""Commands of runs: `pixcell run start`, `pixcell run watch`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import BaseModel

from pixcell_core.cli.contract import FormatOption, OutputFormat, command, emit_note
from pixcell_core.cli.main import group
from pixcell_core.errors import ConnectionFailedError, RefusedError, TimedOutError
from server.pretraining import options as pretraining

if TYPE_CHECKING:
    from pixcell_core.contracts.round import RunState
    from server.layout import ServerLayout
    from server.pretraining.phase import JobShown

DirOption = Annotated[Path, typer.Option("--dir", help="The coordinator's folder.")]
POLL_S = 0.3
SAY_EVERY_S = 5.0


class RunShown(BaseModel):
    """A run as it stands, with the folder of its committed rounds."""

    folder: Path
    adapter: Path | None
    run: dict[str, Any]

    def render(self) -> Any:
        """A table with one row per site."""
        from rich.table import Table

        run = self.run
        table = Table(
            title=f"{run['study_id']}: {run['state']}, {run['committed']} of {run['rounds']} rounds committed",
            caption=run["reason"] or None,
        )
        for column in (
            "site",
            "registered",
            "approved",
            "configured",
            "training",
            "rounds",
            "last reply",
            "note",
        ):
            table.add_column(column)
        for site in run["sites"]:
            marks = ["yes" if site[c] else "no" for c in ("registered", "approved", "configured", "training")]
            last = (site["last_reply_at"] or "")[11:19]
            table.add_row(site["site"], *marks, str(site["rounds_counted"]), last, site["note"])
        return table


def register(root: typer.Typer) -> None:
    """Add the commands to `root`."""
    run = group(root, "run")

    @run.command("start")
    @command
    def start(
        study_id: Annotated[str, typer.Argument(help="Id of the study.")],
        folder: DirOption,
        wait: Annotated[
            bool, typer.Option("--wait", help="Wait for the end; exit 1 if it fails, 3 after --timeout.")
        ] = False,
        timeout: Annotated[float, typer.Option(help="Seconds to wait with --wait.")] = 86_400.0,
        ready_timeout: Annotated[float, typer.Option(help="Seconds the sites have to become ready.")] = 180.0,
        poll: Annotated[float, typer.Option(help="Seconds between the loop's looks at replies.")] = 0.2,
        phase: pretraining.PhaseOption = None,
        tiles: pretraining.TilesOption = None,
        draw: pretraining.DrawOption = None,
        base: pretraining.BaseOption = None,
        tile_size: pretraining.TileSizeOption = None,
        steps: pretraining.StepsOption = None,
        batch_size: pretraining.BatchOption = None,
        learning_rate: pretraining.RateOption = None,
        seed: pretraining.SeedOption = None,
        threads: pretraining.ThreadsOption = None,
        processes: pretraining.ProcessesOption = None,
        device: pretraining.DeviceOption = None,
        checkpoint_every: pretraining.CheckpointOption = None,
        stuck_after: pretraining.StuckOption = None,
        restarts: pretraining.RestartsOption = None,
        format: FormatOption = OutputFormat.TEXT,
    ) -> RunShown | JobShown:
        """Start a study's rounds, or go on after the last committed one; or a job of central pretraining."""
        from server.layout import ServerLayout
        from server.pretraining.phase import is_pretraining, start_job

        job = {
            "tiles": tiles,
            "draw": draw,
            "base": base,
            "tile_size": tile_size,
            "steps": steps,
            "batch_size": batch_size,
            "learning_rate": learning_rate,
            "seed": seed,
            "threads": threads,
            "processes": processes,
            "device": device,
            "checkpoint_every": checkpoint_every,
            "stuck_after": stuck_after,
            "restarts": restarts,
        }
        if is_pretraining(phase, job):
            return start_job(folder, study_id, job, wait=wait, timeout=timeout)
        layout = ServerLayout(folder.absolute()).check()
        _submit(layout, study_id, {"poll_s": poll, "ready_timeout_s": ready_timeout})
        return _show(
            layout, study_id, _follow(layout, study_id, timeout) if wait else _read(layout, study_id)
        )

    @run.command("watch")
    @command
    def watch(
        study_id: Annotated[str, typer.Argument(help="Id of the study.")],
        folder: DirOption,
        once: Annotated[bool, typer.Option("--once", help="Show the state and leave.")] = False,
        timeout: Annotated[float, typer.Option(help="Seconds to watch.")] = 86_400.0,
        phase: pretraining.PhaseOption = None,
        format: FormatOption = OutputFormat.TEXT,
    ) -> RunShown | JobShown:
        """Watch a run to its end: a row per site, what each lacks, and why a site did not count."""
        from server.layout import ServerLayout
        from server.pretraining.phase import watch_job, watches_job

        if watches_job(folder, study_id, phase):
            return watch_job(folder, study_id, once=once, timeout=timeout)
        layout = ServerLayout(folder.absolute()).check()
        return _show(
            layout, study_id, _read(layout, study_id) if once else _follow(layout, study_id, timeout)
        )

    @run.command("stop")
    @command
    def stop(
        name: Annotated[str, typer.Argument(help="Name of the pretraining job.")],
        folder: DirOption,
        now: Annotated[
            bool, typer.Option("--now", help="At once: the steps since the last checkpoint are done again.")
        ] = False,
        format: FormatOption = OutputFormat.TEXT,
    ) -> JobShown:
        """End a pretraining job after its next checkpoint; start it again to go on from there."""
        from server.pretraining.phase import stop_job

        return stop_job(folder, name, now=now)


def _submit(layout: ServerLayout, study_id: str, loop: dict[str, float]) -> None:
    import json

    from pixcell_core.contracts.atomic import write_atomically
    from server.rounds.board import UNFINISHED, RunBoard
    from server.studies.book import StudyBook

    study = StudyBook(layout.registry()).get(study_id)
    if not layout.ready.is_file():
        raise ConnectionFailedError(
            "The hub is not running.",
            hint=f"Start it: pixcell hub start --dir {layout.root}",
            code="hub-down",
        )
    board = RunBoard(layout.registry(), study_id)
    before = board.read()
    if before is not None and before.state in UNFINISHED and before.state != "submitted":
        raise RefusedError(
            f"A run of {study_id} is already {before.state}.",
            hint=f"Watch it: pixcell run watch {study_id} --dir {layout.root}",
            code="run-active",
        )
    write_atomically(layout.run(study_id) / "loop.json", json.dumps(loop).encode())
    board.submit(study)
    write_atomically(layout.requests / f"{study_id}.json", b"{}")


def _read(layout: ServerLayout, study_id: str) -> RunState:
    from server.rounds.board import RunBoard

    state = RunBoard(layout.registry(), study_id).read()
    if state is None:
        raise RefusedError(
            f"No run of {study_id} was started.",
            hint=f"Start it: pixcell run start {study_id} --dir {layout.root}",
            code="no-run",
        )
    return state


def _show(layout: ServerLayout, study_id: str, state: RunState) -> RunShown:
    place = layout.run(study_id) / "rounds" / f"{state.committed:05d}" / "adapter.safetensors"
    return RunShown(
        folder=layout.run(study_id),
        adapter=place if place.is_file() else None,
        run=state.model_dump(mode="json"),
    )


def _follow(layout: ServerLayout, study_id: str, timeout: float) -> RunState:
    from server.rounds.board import UNFINISHED

    began = time.monotonic()
    end, said, last_line = began + timeout, 0.0, ""
    while True:
        state = _read(layout, study_id)
        line = _line(state)
        now = time.monotonic()
        if line != last_line or now - said > SAY_EVERY_S:
            emit_note(line if line != last_line else f"{state.state}: no change, {now - began:.0f} s")
            said, last_line = now, line
        if state.state not in UNFINISHED:
            break
        if not layout.ready.is_file():
            raise ConnectionFailedError(
                "The hub stopped while the run was going on.",
                hint="Start the hub and the run again: committed rounds are kept.",
                code="hub-down",
            )
        if now > end:
            raise TimedOutError(
                f"The run of {study_id} is not finished after {timeout:g} s; it goes on.",
                hint=f"Watch it: pixcell run watch {study_id} --dir {layout.root}",
            )
        time.sleep(POLL_S)
    if state.state == "failed":
        raise RefusedError(
            f"The run of {study_id} failed after {state.committed} committed rounds: {state.reason}",
            hint=f"See each site: pixcell run watch {study_id} --once --dir {layout.root}",
            code="run-failed",
        )
    return state


def _line(state: RunState) -> str:
    marks = []
    for site in state.sites:
        step = next(
            (c for c in ("training", "configured", "approved", "registered") if getattr(site, c)), "unknown"
        )
        marks.append(f"{site.site} {step}" + (f" ({site.note})" if site.note else ""))
    return (
        f"{state.state}: round {state.round}/{state.rounds}, {state.committed} committed; {', '.join(marks)}"
    )
