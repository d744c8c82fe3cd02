"""Command of the trainer: `pixcell site trainer`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pixcell_core.cli.contract import FormatOption, OutputFormat, command, emit_note
from pixcell_core.cli.main import group

if TYPE_CHECKING:
    from site_client.trainer.traces import TracesShown


def register(root: typer.Typer) -> None:
    """Add the command to `root`."""
    site = group(root, "site")

    @site.command("traces")
    @command
    def traces(
        site_dir: Annotated[Path, typer.Option("--site-dir", help="The site's folder.")],
        study: Annotated[str | None, typer.Option(help="Only the steps of this study.")] = None,
        format: FormatOption = OutputFormat.TEXT,
    ) -> TracesShown:
        """Show losses, gradient norms and clipped fractions of this site's own training; for its eyes alone."""
        from site_client.trainer.traces import TraceBook, TracesShown

        return TracesShown(steps=TraceBook(site_dir).steps(study))

    @site.command("trainer")
    @command
    def trainer(
        site_dir: Annotated[Path, typer.Option("--site-dir", help="The site's folder.")],
        base: Annotated[Path, typer.Option(help="Folder of the base transformer that the study names.")],
        features: Annotated[
            Path | None, typer.Option(help="Feature store to train on; SITE_DIR/features/train when absent.")
        ] = None,
        cohort: Annotated[
            str, typer.Option(help="Whose budget the ledger charges; 'all' is every patient of the site.")
        ] = "all",
        device: Annotated[str, typer.Option(help="Torch device: cpu, cuda.")] = "cpu",
        threads: Annotated[int, typer.Option(help="CPU threads.", min=1)] = 1,
        poll: Annotated[float, typer.Option(help="Seconds between looks at the spool.")] = 0.1,
        format: FormatOption = OutputFormat.TEXT,
    ) -> None:
        """Train what this site approved. Sees slides' features, has no network; stops on SIGTERM."""
        os.environ["OMP_NUM_THREADS"] = str(threads)
        from site_client.trainer.network_guard import refuse_network

        refuse_network(lambda event: emit_note(f"refused: {event}"))
        import torch

        torch.set_num_threads(threads)
        from site_client.approvals.site_folder import SiteFolder
        from site_client.trainer.service import TrainerSettings, serve_trainer

        serve_trainer(
            TrainerSettings(SiteFolder(site_dir.absolute()), base, device, poll, features, cohort), emit_note
        )
