"""`pixcell release draft|withhold|sign|export|show`: from the generator's tiles to a bundle, and nothing around the gate."""

from __future__ import annotations

from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from pixcell_core.cli.contract import FormatOption, OutputFormat, command
from pixcell_core.cli.main import group

SiteDirOption = Annotated[Path, typer.Option("--site-dir", help="The site's folder.")]
ReleaseOption = Annotated[
    str | None, typer.Option("--release", help="Which release (see `release show`); the newest if left out.")
]


class ReleaseAudience(StrEnum):
    """Who may receive the tiles: parties to a written agreement, registered users, anyone."""

    AGREEMENT = "agreement"
    REGISTERED = "registered"
    PUBLIC = "public"


def register(root: typer.Typer) -> None:
    """Add the site's `release` commands."""
    app = group(root, "release")
    app.command("draft")(draft)
    app.command("withhold")(withhold)
    app.command("sign")(sign)
    app.command("export")(export)
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
    generation: Annotated[
        Path | None, typer.Option("--generation", help="The generation record, if it lies elsewhere.")
    ] = None,
    format: FormatOption = OutputFormat.TEXT,
) -> object:
    """Seal a draft: re-encode and number the tiles, and name each by digest. Audit the folder it prints."""
    from pixcell_core.cli.progress import progress
    from site_client.release.draft import seal_draft
    from site_client.release.results import Drafted
    from site_client.release.sheet import Terms
    from site_client.release.workspace import ReleaseWorkspace

    defaults = Terms()
    with progress("sealing tiles", unit="tiles") as bar:
        release = seal_draft(
            ReleaseWorkspace(site_dir),
            tiles,
            now=datetime.now(UTC),
            site=site,
            terms=Terms(licence or defaults.licence, usage or defaults.usage),
            record_file=generation,
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
def sign(
    site_dir: SiteDirOption,
    audit: Annotated[Path, typer.Option("--audit", help="Output folder of `pixcell audit run`.")],
    key: Annotated[Path, typer.Option("--key", help="The auditor's private key file.")],
    exception: Annotated[
        str | None, typer.Option("--exception", help="Why a REVIEW may be released; signed with the verdict.")
    ] = None,
    approver: Annotated[
        str | None,
        typer.Option("--approver", help="Who answers for that exception; signed with the verdict."),
    ] = None,
    days: Annotated[int, typer.Option("--days", help="How long the verdict holds.")] = 365,
    audience: Annotated[
        ReleaseAudience, typer.Option("--audience", help="Who may receive the tiles.")
    ] = ReleaseAudience.AGREEMENT,
    accept_policy: Annotated[
        str | None,
        typer.Option("--accept-policy", help="Another audit policy than the default: digest, name or file."),
    ] = None,
    release: ReleaseOption = None,
    format: FormatOption = OutputFormat.TEXT,
) -> object:
    """Sign the audit's verdict on the sealed tiles; refused for other tiles, FAIL and INVALID."""
    from pixcell_core.contracts.verdict import VerdictException
    from pixcell_core.errors import BadInputError
    from pixcell_core.trust.keys import SigningKey
    from site_client.release.results import Signed
    from site_client.release.signing import sign_release
    from site_client.release.workspace import ReleaseWorkspace

    if (exception is None) != (approver is None) or exception == "" or approver == "":
        raise BadInputError(
            "An exception needs both its reason and the person who answers for it.",
            hint='Give --exception "TEXT" and --approver NAME together.',
            code="incomplete-exception",
        )
    stated = VerdictException(reason=exception, approver=approver) if exception and approver else None
    signed = sign_release(
        ReleaseWorkspace(site_dir),
        audit,
        SigningKey.load(key),
        now=datetime.now(UTC),
        release_id=release,
        exception=stated,
        days=days,
        audience=audience.value,
        accepted_policy=accept_policy,
    )
    return Signed.of(signed)


@command
def export(
    site_dir: SiteDirOption,
    out: Annotated[Path, typer.Option("--out", help="The bundle: a folder, or one file if it ends in .zip.")],
    release: ReleaseOption = None,
    format: FormatOption = OutputFormat.TEXT,
) -> object:
    """Write the bundle of a signed release; refused without a valid verdict on exactly these tiles."""
    from pixcell_core.cli.progress import progress
    from site_client.release.export import export_release
    from site_client.release.results import Exported
    from site_client.release.workspace import ReleaseWorkspace

    with progress("writing bundle", unit="tiles") as bar:
        exported = export_release(
            ReleaseWorkspace(site_dir), out, now=datetime.now(UTC), release_id=release, on_tile=bar.advance
        )
    return Exported.of(exported)


@command
def show(site_dir: SiteDirOption, format: FormatOption = OutputFormat.TEXT) -> object:
    """Show this site's releases, how far each has come, and what comes next."""
    from site_client.release.results import Releases
    from site_client.release.workspace import ReleaseWorkspace

    return Releases.of(ReleaseWorkspace(site_dir).require())
