"""Command of the hub: `pixcell hub start`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pixcell_core.cli.contract import FormatOption, OutputFormat, command, emit_note
from pixcell_core.cli.main import group


def register(root: typer.Typer) -> None:
    """Add the command to `root`."""
    hub = group(root, "hub")

    @hub.command("start")
    @command
    def start(
        folder: Annotated[Path, typer.Option("--dir", help="The coordinator's folder.")],
        host: Annotated[str, typer.Option(help="Address the public door listens on.")] = "127.0.0.1",
        port: Annotated[
            int, typer.Option(help="Port of the public door; 0 takes a free one.", min=0, max=65535)
        ] = 0,
        ready_file: Annotated[
            Path | None, typer.Option(help="Written when sites can connect: address and process, as JSON.")
        ] = None,
        format: FormatOption = OutputFormat.TEXT,
    ) -> None:
        """Run the hub until it is told to stop (SIGTERM or Ctrl-C)."""
        from server.hub.service import HubSettings, serve_hub
        from server.layout import ServerLayout

        emit_note("starting the hub …")
        serve_hub(HubSettings(ServerLayout(folder.absolute()).check(), host, port, ready_file))
