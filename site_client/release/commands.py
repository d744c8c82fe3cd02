"""`pixcell release …` before signing: draft, withhold, request, review, show. Signing and leaving: `gate_commands`."""

from __future__ import annotations

from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from pixcell_core.cli.contract import FormatOption, OutputFormat, command
from pixcell_core.cli.main import group
from site_client.release import gate_commands
from site_client.release.options import Audience, ReleaseOption, SiteDirOption

AcceptPolicyOption = Annotated[
    str | None,
    typer.Option("--accept-policy", help="Another audit policy than the default: digest, name or file."),
]


class TileForm(StrEnum):
    """The file format of released tiles."""

    PNG = "png"
    JPEG = "jpg"


def register(root: typer.Typer) -> None:
    """Add the site's `release` commands."""
    app = group(root, "release")
    app.command("draft")(draft)
    app.command("withhold")(withhold)
    app.command("request")(request)
    app.command("review")(review)
    gate_commands.register(app)
    app.command("show")(show)


@command
def draft(
    site_dir: SiteDirOption,
    tiles: Annotated[Path, typer.Option("--tiles", help="Folder that `pixcell site generate` wrote.")],
    site: Annotated[
        str | None, typer.Option("--site", help="The site's name, if it is not enrolled.")
    ] = None,
    licence: Annotated[str | None, typer.Option("--licence", help="Licence of the released tiles.")] = None,
    usage: Annotated[str | None, typer.Option("--usage", help="What the tiles may be used for.")] = None,
    contact: Annotated[
        str | None,
        typer.Option(
            "--contact", help="Whom to ask, and where the list of withdrawals is; in the datasheet."
        ),
    ] = None,
    generation: Annotated[
        Path | None, typer.Option("--generation", help="The generation record, if it lies elsewhere.")
    ] = None,
    tile_format: Annotated[
        TileForm, typer.Option("--tile-format", help="png keeps every pixel; jpg is a tenth of the size.")
    ] = TileForm.PNG,
    format: FormatOption = OutputFormat.TEXT,
) -> object:
    """Make a draft: re-encode and number the tiles, and name each by digest. Audit the folder it prints."""
    from pixcell_core.cli.progress import progress
    from pixcell_core.contracts.gate import written
    from site_client.release.draft import seal_draft
    from site_client.release.results import Drafted
    from site_client.release.sheet import Terms
    from site_client.release.workspace import ReleaseWorkspace

    defaults = Terms()
    terms = written(
        Terms, licence=licence or defaults.licence, usage=usage or defaults.usage, contact=contact or None
    )
    with progress("sealing tiles", unit="tiles") as bar:
        release = seal_draft(
            ReleaseWorkspace(site_dir),
            tiles,
            now=datetime.now(UTC),
            site=site,
            terms=terms,
            record_file=generation,
            tile_format=tile_format.value,
            on_tile=bar.advance,
        )
    return Drafted.of(release, site_dir)


@command
def withhold(
    site_dir: SiteDirOption,
    audit: Annotated[
        Path, typer.Option("--audit", help="The audit that said REVIEW and flagged some tiles.")
    ],
    release: ReleaseOption = None,
    format: FormatOption = OutputFormat.TEXT,
) -> object:
    """Leave the flagged tiles out: seal a second draft, to be audited again. Once, and it is said in the bundle."""
    from site_client.release.results import Drafted
    from site_client.release.withhold import withhold_flagged
    from site_client.release.workspace import ReleaseWorkspace

    filtered = withhold_flagged(ReleaseWorkspace(site_dir), audit, now=datetime.now(UTC), release_id=release)
    return Drafted.of(filtered, site_dir)


@command
def request(
    site_dir: SiteDirOption,
    audience: Annotated[
        Audience, typer.Option("--audience", help="Who may receive the tiles.")
    ] = Audience.AGREEMENT,
    purpose: Annotated[str | None, typer.Option("--purpose", help="What the release is for.")] = None,
    policy: Annotated[
        str | None, typer.Option("--policy", help="The audit policy to judge by: a shipped name or a file.")
    ] = None,
    signers: Annotated[
        Path | None,
        typer.Option(
            "--signers", help="Who may sign and how many must; without it the site and one auditor."
        ),
    ] = None,
    release: ReleaseOption = None,
    format: FormatOption = OutputFormat.TEXT,
) -> object:
    """Ask for a release: sign which tiles go before which signers, for whom, judged by which policy."""
    from site_client.release.request import DEFAULT_PURPOSE, request_release
    from site_client.release.results import Requested
    from site_client.release.workspace import ReleaseWorkspace

    asked = request_release(
        ReleaseWorkspace(site_dir),
        now=datetime.now(UTC),
        release_id=release,
        audience=audience.value,
        purpose=purpose or DEFAULT_PURPOSE,
        policy=policy,
        signers_file=signers,
    )
    return Requested.of(asked)


@command
def review(
    site_dir: SiteDirOption,
    audit: Annotated[
        Path | None, typer.Option("--audit", help="Output of `pixcell audit run`, to be checked and filed.")
    ] = None,
    accept_policy: AcceptPolicyOption = None,
    release: ReleaseOption = None,
    format: FormatOption = OutputFormat.TEXT,
) -> object:
    """Look at a sealed release before signing; with --audit, check the audit against it and file its report."""
    from site_client.release.results import ReviewShown
    from site_client.release.review import review_release
    from site_client.release.workspace import ReleaseWorkspace

    reviewed = review_release(
        ReleaseWorkspace(site_dir),
        audit,
        now=datetime.now(UTC),
        release_id=release,
        accepted_policy=accept_policy,
    )
    return ReviewShown.of(reviewed)


@command
def show(
    site_dir: SiteDirOption,
    release: Annotated[str | None, typer.Option("--release", help="Only this one.")] = None,
    format: FormatOption = OutputFormat.TEXT,
) -> object:
    """Show this site's releases, how far each has come, and what blocks the next step."""
    from site_client.release.results import Releases
    from site_client.release.workspace import ReleaseWorkspace

    return Releases.of(ReleaseWorkspace(site_dir).require(), datetime.now(UTC), release)
