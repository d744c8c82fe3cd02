"""Commands of the agent: `pixcell site start`, `status`, `proxy`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pixcell_core.cli.contract import FormatOption, OutputFormat, command, emit_note
from pixcell_core.cli.main import group
from pixcell_core.errors import BadInputError

if TYPE_CHECKING:
    from site_client.agent.proxy_setting import ProxyShown
    from site_client.agent.status import SiteStatus

SiteDir = Annotated[Path, typer.Option("--site-dir", help="The site's folder.")]


def register(root: typer.Typer) -> None:
    """Add the command to `root`."""
    site = group(root, "site")

    @site.command("start")
    @command
    def start(
        site_dir: SiteDir,
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
            float,
            typer.Option(
                help="Longest pause between two looks at the hub, seconds; after a message it is shorter.",
                min=0.05,
                max=60.0,
            ),
        ] = 3.0,
        runtime_port: Annotated[
            int, typer.Option(help="Loopback port between agent and executor; 0 takes one.")
        ] = 0,
        ready_file: Annotated[
            Path | None, typer.Option(help="Written when the hub let this site in.")
        ] = None,
        proxy: Annotated[
            str | None,
            typer.Option(
                help="http://host:port of the proxy to the hub, or 'direct'; else site.json, HTTPS_PROXY."
            ),
        ] = None,
        proxy_credentials_file: Annotated[
            Path | None, typer.Option(help="File of mode 600 with the proxy's user:password.")
        ] = None,
        unsafe_no_guard: Annotated[
            bool, typer.Option("--unsafe-no-guard", help="Do not refuse other outbound connections.")
        ] = False,
        format: FormatOption = OutputFormat.TEXT,
    ) -> None:
        """Run this site until it is told to stop: polls the hub, outbound only, with the app installed here."""
        from site_client.agent.proxy import choose_way_out
        from site_client.agent.supervisor import Supervisor, SupervisorSettings, trainer_command
        from site_client.approvals.site_folder import SiteFolder

        folder = SiteFolder(site_dir.absolute())
        way_out = choose_way_out(folder.identity(), proxy, proxy_credentials_file, hub=hub)
        if way_out.proxy is not None:
            way_out.proxy.credentials()
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
                folder,
                hub,
                poll,
                runtime_port,
                trainer,
                ready_file.absolute() if ready_file else None,
                way_out,
                not unsafe_no_guard,
            ),
            emit_note,
        ).run()

    @site.command("status")
    @command
    def status(
        site_dir: SiteDir,
        fresh: Annotated[
            float, typer.Option(help="Seconds for which an accepted heartbeat counts.", min=5.0, max=3600.0)
        ] = 30.0,
        format: FormatOption = OutputFormat.TEXT,
    ) -> SiteStatus:
        """Show whether the hub hears this site, its certificate, trainer and studies; exit 1 when it does not."""
        from site_client.agent.status import site_status
        from site_client.approvals.site_folder import SiteFolder

        return site_status(SiteFolder(site_dir.absolute()), fresh_s=fresh)

    @site.command("proxy")
    @command
    def proxy_setting(
        site_dir: SiteDir,
        address: Annotated[
            str | None,
            typer.Argument(
                help="http://host:port, 'direct' for none whatever the environment says, or 'unset'."
            ),
        ] = None,
        credentials_file: Annotated[
            Path | None, typer.Option(help="File of mode 600 with the proxy's user:password.")
        ] = None,
        show: Annotated[bool, typer.Option("--show", help="Only show what is in force.")] = False,
        format: FormatOption = OutputFormat.TEXT,
    ) -> ProxyShown:
        """Set or show the proxy on the way to the hub; takes effect when the agent starts next."""
        from site_client.agent.proxy_setting import set_proxy, show_proxy
        from site_client.approvals.site_folder import SiteFolder

        folder = SiteFolder(site_dir.absolute())
        if address is None or show:
            return show_proxy(folder)
        return set_proxy(folder, address, credentials_file)
