"""Commands of the consortium: `pixcell init`, `pixcell kit add`, `pixcell kit list`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import BaseModel

from pixcell_core.cli.contract import FormatOption, OutputFormat, command
from pixcell_core.cli.main import group

DirOption = Annotated[Path, typer.Option("--dir", help="The coordinator's folder.")]


class KitAdded(BaseModel):
    """One enrolled site."""

    site: str
    fingerprint: str

    def __str__(self) -> str:
        return (
            f"{self.site} is enrolled.\nFingerprint: {self.fingerprint}\n"
            "Read it over the phone: the site must see the same digits."
        )


class KitList(BaseModel):
    """All enrolled sites."""

    kits: list[KitAdded]

    def __str__(self) -> str:
        return "\n".join(f"{k.site}: {k.fingerprint}" for k in self.kits) or "no site is enrolled"


def register(root: typer.Typer) -> None:
    """Add the commands to `root`."""
    kit = group(root, "kit")

    @root.command("init")
    @command
    def init(
        folder: DirOption,
        host: Annotated[
            list[str] | None,
            typer.Option("--host", help="Name or address under which sites reach the hub; repeatable."),
        ] = None,
        format: FormatOption = OutputFormat.TEXT,
    ) -> Any:
        """Make a consortium: certificate authority, server certificate, secrets."""
        from server.enrolment.pki import initialise
        from server.layout import ServerLayout

        return initialise(ServerLayout(folder.absolute()), [*(host or []), "localhost", "127.0.0.1", "::1"])

    @kit.command("add")
    @command
    def add(
        request: Annotated[
            Path, typer.Argument(help="The request file a site made with `pixcell site enroll`.")
        ],
        folder: DirOption,
        format: FormatOption = OutputFormat.TEXT,
    ) -> KitAdded:
        """Enrol a site by its request file. Compare the fingerprint over the phone."""
        from server.enrolment.sites import SiteBook
        from server.layout import ServerLayout

        enrolled = SiteBook(ServerLayout(folder.absolute()).check().registry()).add(request)
        return KitAdded(site=enrolled.site, fingerprint=enrolled.fingerprint)

    @kit.command("list")
    @command
    def show(folder: DirOption, format: FormatOption = OutputFormat.TEXT) -> KitList:
        """List the enrolled sites and their fingerprints."""
        from server.enrolment.sites import SiteBook
        from server.layout import ServerLayout

        book = SiteBook(ServerLayout(folder.absolute()).check().registry())
        return KitList(kits=[KitAdded(site=s.site, fingerprint=s.fingerprint) for s in book.all()])
