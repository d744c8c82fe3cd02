"""Command of the agent: `pixcell site start`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pixcell_core.cli.contract import FormatOption, OutputFormat, command, emit_note
from pixcell_core.cli.main import group
from pixcell_core.errors import BadInputError


def register(root: typer.Typer) -> None:
    """Add the command to `root`."""
    site = group(root, "site")

    @site.command("start")
    @command
    def start(
        site_dir: Annotated[Path, typer.Option("--site-dir", help="The site's folder.")],
        hub: Annotated[
            str | None, typer.Option(help="Address of the hub, if it moved since enrolment.")
        ] = None,
        with_trainer: Annotated[
            bool, typer.Option("--with-trainer", help="Also keep the trainer up (needs --base).")
        ] = False,
        base: Annotated[
            Path | None, typer.Option(help="Folder of the base transformer, for --with-trainer.")
        ] = None,
        cohort: Annotated[
            str, typer.Option(help="Whose budget the trainer charges; 'all' is every patient of the site.")
        ] = "all",
        threads: Annotated[int, typer.Option(help="CPU threads of the trainer.", min=1)] = 1,
        device: Annotated[str, typer.Option(help="Torch device of the trainer.")] = "cpu",
        poll: Annotated[
            float, typer.Option(help="Seconds between two looks at the hub.", min=0.05, max=60.0)
        ] = 3.0,
        runtime_port: Annotated[
            int, typer.Option(help="Loopback port between agent and executor; 0 takes one.")
        ] = 0,
        ready_file: Annotated[
            Path | None, typer.Option(help="Written when the hub let this site in.")
        ] = None,
        format: FormatOption = OutputFormat.TEXT,
    ) -> None:
        """Run this site until it is told to stop: polls the hub, outbound only, with the app installed here."""
        from site_client.agent.supervisor import Supervisor, SupervisorSettings, trainer_command
        from site_client.approvals.site_folder import SiteFolder

        folder = SiteFolder(site_dir.absolute())
        folder.identity()
        trainer: tuple[str, ...] = ()
        if with_trainer:
            if base is None:
                raise BadInputError(
                    "A trainer needs the base model.", hint="Give --base FOLDER.", code="no-base"
                )
            extra = ("--threads", str(threads), "--device", device, "--cohort", cohort)
            trainer = trainer_command(folder, base.absolute(), extra)
        Supervisor(
            SupervisorSettings(
                folder, hub, poll, runtime_port, trainer, ready_file.absolute() if ready_file else None
            ),
            emit_note,
        ).run()
