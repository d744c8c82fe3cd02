"""The Flower ServerApp installed at the coordinator: one run of one study.

The adapter of round 0 is all zeros (FFA-LoRA trains B from zero, A is drawn from the study's seed at every site),
so the coordinator needs no torch: names and shapes were read from the base model when the study was created.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from pixcell_core.contracts.canonical import digest, parse_json, read_bounded
from pixcell_core.contracts.spool import Arrays, read_arrays
from pixcell_core.contracts.study import Study
from pixcell_core.errors import BadInputError, PixcellError, RefusedError
from server.enrolment.sites import SiteBook
from server.hub.bundle import FOLDER_KEY, STUDY_KEY, build_bundle
from server.layout import START_ADAPTER, ServerLayout
from server.log_anchor.desk import HeadDesk
from server.rounds.board import LiveBoard, RunBoard
from server.rounds.heads import HeadBook
from server.rounds.loop import RoundLoop
from server.rounds.masked_rounds import MaskedRounds
from server.rounds.requests import LoopSettings
from server.rounds.store import RoundStore
from server.studies.book import StudyBook

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the study that the run's configuration names."""
    layout = ServerLayout(Path(str(context.run_config[FOLDER_KEY]))).check()
    study = StudyBook(layout.registry()).get(str(context.run_config[STUDY_KEY]))
    run_study(grid, layout, study)


def run_study(grid: Grid, layout: ServerLayout, study: Study, settings: LoopSettings | None = None) -> None:
    """Run `study` on `grid` with the coordinator's folder; the board tells how it ends, whatever happens."""
    folder = layout.run(study.id)
    registry = layout.registry()
    board = RunBoard(registry, study.id)
    live = LiveBoard(board, study)
    book = SiteBook(registry)
    try:
        require_announced_app(study)
        waits = settings or LoopSettings.read(folder)
        heads = HeadBook(registry)
        masked = study.aggregation.masking is not None
        loop = RoundLoop(
            grid,
            study,
            {site: book.get(site) for site in study.sites},
            lambda: read_nodes(layout.nodes),
            RoundStore(registry, folder, study),
            live,
            heads,
            waits,
            folder=folder,
            exchange=MaskedRounds(grid, study, heads, live, folder=folder / "masked", poll_s=waits.poll_s)
            if masked
            else None,
            logs=HeadDesk(layout),
        )
        loop.run(read_start(folder))
    except PixcellError as error:
        board.fail_if_unfinished(f"{error.message} {error.hint}")
        raise
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            board.fail_if_unfinished(_unforeseen(error))
            raise
        full = PixcellError(
            f"The disk of {layout.root} is full.",
            hint=f"Make room, then: pixcell run resume {study.id}. Committed rounds are whole.",
            code="disk-full",
        )
        board.fail_if_unfinished(f"{full.message} {full.hint}")
        raise full from error
    except BaseException as error:
        board.fail_if_unfinished(_unforeseen(error))
        raise


def _unforeseen(error: BaseException) -> str:
    return f"The round loop failed: {type(error).__name__}. Its trace is in the executor's log."


def require_announced_app(study: Study) -> None:
    """Refuse a study that names another bundle than the hub announces: every site would refuse its rounds."""
    if study.app_digest is not None and study.app_digest != digest(build_bundle()):
        raise RefusedError(
            f"Study {study.id} was made for another release of the coordinator: its app digest is another.",
            hint="Start it with that release, or create the study again under a new --id; sites approve it anew.",
            code="app-differs",
        )


def read_nodes(path: Path) -> Mapping[str, int]:
    """Node id per enrolled site, as the hub wrote it."""
    if not path.is_file():
        return {}
    value = parse_json(read_bounded(path), name=path.name)
    return {str(site): int(node) for site, node in value.items()}


def read_start(folder: Path) -> Arrays:
    """The adapter of round 0."""
    path = folder / START_ADAPTER
    if not path.is_file():
        raise BadInputError(
            "The run has no start adapter.",
            hint="Create the study with --base FOLDER, which makes one.",
            code="no-start",
        )
    return read_arrays(path)
