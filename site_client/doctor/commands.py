"""Command of the doctor: `pixcell site doctor`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pixcell_core.cli.contract import FormatOption, OutputFormat, command, emit_note
from pixcell_core.cli.main import group

if TYPE_CHECKING:
    from site_client.doctor.finding import DoctorReport


def register(root: typer.Typer) -> None:
    """Add the command to `root`."""
    site = group(root, "site")

    @site.command("doctor")
    @command
    def doctor(
        site_dir: Annotated[Path, typer.Option("--site-dir", help="The site's folder.")],
        study: Annotated[
            Path | None,
            typer.Option(help="Study file to compare with; the one approved here, when there is just one."),
        ] = None,
        base: Annotated[Path | None, typer.Option(help="Folder of the base transformer.")] = None,
        device: Annotated[str, typer.Option(help="Torch device of the trainer: cpu, cuda.")] = "cpu",
        hub: Annotated[str | None, typer.Option(help="Address of the hub, if it moved.")] = None,
        proxy: Annotated[
            str | None, typer.Option(help="Proxy to try, or 'direct'; else what the agent would use.")
        ] = None,
        proxy_credentials_file: Annotated[
            Path | None, typer.Option(help="File of mode 600 with the proxy's user:password.")
        ] = None,
        other_host: Annotated[
            str | None,
            typer.Option(help="HOST:PORT that the firewall must stop; contacted only when given."),
        ] = None,
        timeout: Annotated[float, typer.Option(help="Seconds for each answer.", min=0.5, max=120.0)] = 10.0,
        deep: Annotated[bool, typer.Option("--deep", help="Also compare every byte of every slide.")] = False,
        shareable: Annotated[
            bool, typer.Option("--shareable", help="Leave out what tells of slides and patients.")
        ] = False,
        format: FormatOption = OutputFormat.TEXT,
    ) -> DoctorReport:
        """Ask everything that made a site fail before; exit 1 if a check fails. Changes nothing."""
        from site_client.agent.proxy import choose_way_out
        from site_client.approvals.book import ApprovalBook, read_study
        from site_client.approvals.site_folder import SiteFolder
        from site_client.doctor.question import Question
        from site_client.doctor.visit import visit

        folder = SiteFolder(site_dir.absolute())
        identity = folder.identity()
        compared = read_study(study) if study is not None else None
        if compared is None:
            approved = [s.study for s in ApprovalBook(folder).studies() if s.valid]
            compared = approved[0] if len(approved) == 1 else None
        asked = Question(
            folder=folder,
            identity=identity,
            hub=hub or identity.hub,
            way_out=choose_way_out(identity, proxy, proxy_credentials_file, hub=hub),
            study=compared,
            base=base,
            device=device,
            other_host=other_host,
            timeout_s=timeout,
            deep=deep,
        )
        return visit(asked, emit_note, shareable=shareable)
