"""Commands of runs: `pixcell run start|watch|stop|resume`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from pydantic import BaseModel

from pixcell_core.cli.contract import FormatOption, OutputFormat, command, emit_note
from pixcell_core.cli.main import group
from pixcell_core.errors import ConnectionFailedError, RefusedError
from server.pretraining import options as pretraining

if TYPE_CHECKING:
    from server.layout import ServerLayout
    from server.rounds.requests import LoopSettings, When

DirOption = Annotated[Path, typer.Option("--dir", help="The coordinator's folder.")]
StudyArgument = Annotated[str, typer.Argument(help="Id of the study, or name of a pretraining job.")]
WaitOption = Annotated[
    bool,
    typer.Option("--wait", help="Wait for the end; exit 1 if it fails or is stopped, 3 after --timeout."),
]
TimeoutOption = Annotated[float, typer.Option(help="Seconds to wait with --wait.")]
ReadyOption = Annotated[float, typer.Option(help="Seconds the sites have to become ready.", min=0.0)]
PollOption = Annotated[
    float,
    typer.Option(
        help="Seconds between the loop's looks at replies; up to five times that while none come.", min=0.001
    ),
]
RoundTimeoutOption = Annotated[
    float | None,
    typer.Option(help="Seconds a round waits in this run, at most what the study says (its default)."),
]
DAY_S = 86_400.0


def register(root: typer.Typer) -> None:
    """Add the commands to `root`."""
    run = group(root, "run")

    @run.command("start")
    @command
    def start(
        study_id: StudyArgument,
        folder: DirOption,
        wait: WaitOption = False,
        timeout: TimeoutOption = DAY_S,
        ready_timeout: ReadyOption = 180.0,
        round_timeout: RoundTimeoutOption = None,
        poll: PollOption = 0.2,
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
    ) -> BaseModel:
        """Start a study's rounds, or go on after the last committed one; or a job of central pretraining."""
        from server.pretraining.phase import is_pretraining, start_job
        from server.rounds.requests import LoopSettings

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
        settings = LoopSettings(poll_s=poll, ready_timeout_s=ready_timeout, round_timeout_s=round_timeout)
        return _begin(_layout(folder), study_id, settings, wait, timeout)

    @run.command("resume")
    @command
    def resume(
        study_id: StudyArgument,
        folder: DirOption,
        wait: WaitOption = False,
        timeout: TimeoutOption = DAY_S,
        ready_timeout: ReadyOption = 180.0,
        round_timeout: RoundTimeoutOption = None,
        poll: PollOption = 0.2,
        format: FormatOption = OutputFormat.TEXT,
    ) -> BaseModel:
        """Go on with a run that was stopped or failed, after its last committed round."""
        from server.rounds.requests import LoopSettings

        layout = _layout(folder)
        _say_where(layout, study_id)
        settings = LoopSettings(poll_s=poll, ready_timeout_s=ready_timeout, round_timeout_s=round_timeout)
        return _begin(layout, study_id, settings, wait, timeout)

    @run.command("stop")
    @command
    def stop(
        study_id: StudyArgument,
        folder: DirOption,
        after_round: Annotated[
            bool, typer.Option("--after-round", help="Let the round in hand be committed first.")
        ] = False,
        wait: Annotated[bool, typer.Option(help="Wait until it has stopped; exit 3 after --timeout.")] = True,
        timeout: Annotated[float, typer.Option(help="Seconds to wait for it.")] = 3600.0,
        phase: pretraining.PhaseOption = None,
        now: Annotated[
            bool,
            typer.Option("--now", help="A pretraining job: at once, not after its next checkpoint."),
        ] = False,
        format: FormatOption = OutputFormat.TEXT,
    ) -> BaseModel:
        """Stop a run or a pretraining job. Committed rounds and checkpoints are kept; start or resume it to go on."""
        from server.pretraining.phase import stop_job, watches_job

        if watches_job(folder, study_id, phase):
            return stop_job(folder, study_id, now=now)
        layout = _layout(folder)
        return _stop(layout, study_id, "after-round" if after_round else "now", wait, timeout)

    @run.command("watch")
    @command
    def watch(
        study_id: StudyArgument,
        folder: DirOption,
        once: Annotated[bool, typer.Option("--once", help="Show the state and leave.")] = False,
        timeout: Annotated[float, typer.Option(help="Seconds to watch.")] = DAY_S,
        phase: pretraining.PhaseOption = None,
        format: FormatOption = OutputFormat.TEXT,
    ) -> BaseModel:
        """Watch a run to its end: a row per site, what each lacks, why a site did not count and what to do."""
        from server.pretraining.phase import watch_job, watches_job
        from server.rounds.run_view import show_run
        from server.rounds.watching import follow, read_run, require_success

        if watches_job(folder, study_id, phase):
            return watch_job(folder, study_id, once=once, timeout=timeout)
        layout = _layout(folder)
        if once:
            state = read_run(layout, study_id)
        else:
            state = follow(layout, study_id, timeout)
            if state.state == "failed":
                require_success(layout, state)
        return show_run(layout.run(study_id), state)


def _layout(folder: Path) -> ServerLayout:
    from server.layout import ServerLayout

    return ServerLayout(folder.absolute()).check()


def _begin(
    layout: ServerLayout, study_id: str, settings: LoopSettings, wait: bool, timeout: float
) -> BaseModel:
    from server.rounds.run_view import show_run
    from server.rounds.watching import follow, read_run, require_success

    _submit(layout, study_id, settings)
    state = follow(layout, study_id, timeout) if wait else read_run(layout, study_id)
    if wait:
        require_success(layout, state)
    return show_run(layout.run(study_id), state)


def _submit(layout: ServerLayout, study_id: str, settings: LoopSettings) -> None:
    from datetime import UTC, datetime

    from pixcell_core.contracts.atomic import write_atomically
    from server.rounds.board import UNFINISHED, RunBoard
    from server.rounds.requests import StopRequest
    from server.studies.book import StudyBook

    study = StudyBook(layout.registry()).get(study_id)
    settings.timeout_of(study)
    if datetime.now(UTC) >= study.expires_at:
        raise RefusedError(
            f"Study {study_id} expired on {study.expires_at:%Y-%m-%d %H:%M} UTC; no site may train it any more.",
            hint="Create a new study with a later end (--days) under a new --id; sites approve it anew.",
            code="study-expired",
        )
    require_hub(layout)
    board = RunBoard(layout.registry(), study_id)
    before = board.read()
    if before is not None and before.state in UNFINISHED and before.state != "submitted":
        raise RefusedError(
            f"A run of {study_id} is already {before.state}.",
            hint=f"Watch it: pixcell run watch {study_id} --dir {layout.root}",
            code="run-active",
        )
    StopRequest(layout.run(study_id)).clear()
    settings.write(layout.run(study_id))
    board.submit(study)
    write_atomically(layout.requests / f"{study_id}.json", b"{}")


def require_hub(layout: ServerLayout) -> None:
    """Refuse with a hint where no hub runs on this folder."""
    if not layout.ready.is_file():
        raise ConnectionFailedError(
            "The hub is not running.",
            hint=f"Start it: pixcell hub start --dir {layout.root}",
            code="hub-down",
        )


def _say_where(layout: ServerLayout, study_id: str) -> None:
    """Tell where a run goes on; refuse where there is nothing to go on with."""
    from server.rounds.watching import read_run

    state = read_run(layout, study_id)
    if state.state == "completed":
        raise RefusedError(
            f"The run of {study_id} is complete: all {state.rounds} rounds are committed.",
            hint="More rounds are another study, which the sites approve anew.",
            code="run-completed",
        )
    emit_note(
        f"{study_id} was {state.state} after {state.committed} of {state.rounds} rounds; it goes on with round "
        f"{min(state.committed + 1, state.rounds)}. A site that has trained this round already sends the same update "
        "and charges nothing."
    )


def _stop(layout: ServerLayout, study_id: str, when: When, wait: bool, timeout: float) -> BaseModel:
    from server.rounds.board import UNFINISHED
    from server.rounds.requests import StopRequest
    from server.rounds.run_view import show_run
    from server.rounds.watching import follow, read_run

    state = read_run(layout, study_id)
    if state.state not in UNFINISHED:
        raise RefusedError(
            f"The run of {study_id} is not going on: it is {state.state}.",
            hint=f"See it: pixcell run watch {study_id} --once --dir {layout.root}",
            code="run-not-active",
        )
    require_hub(layout)
    StopRequest(layout.run(study_id)).ask(when)
    if wait:
        state = follow(layout, study_id, timeout)
    return show_run(layout.run(study_id), state)
