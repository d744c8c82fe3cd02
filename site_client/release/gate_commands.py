"""`pixcell release sign|refuse|export|withdraw`: who says yes or no, what leaves, and what is taken back."""

from __future__ import annotations

import sys
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from pixcell_core.cli.contract import FormatOption, OutputFormat, command

SiteDirOption = Annotated[Path, typer.Option("--site-dir", help="The site's folder.")]
ReleaseOption = Annotated[
    str | None, typer.Option("--release", help="Which release (see `release show`); the newest if left out.")
]
CaOption = Annotated[
    Path | None,
    typer.Option("--ca", help="The consortium's authority (ca.crt); without it the one of the enrolment."),
]
RevocationsOption = Annotated[
    list[Path] | None,
    typer.Option("--revocations", help="The consortium's list of revoked certificates (repeatable)."),
]


class Role(StrEnum):
    """For whom a signer speaks."""

    AUDITOR = "auditor"
    SITE = "site"
    DATA_PROTECTION = "data-protection"


class Audience(StrEnum):
    """Who may receive the tiles: parties to a written agreement, registered users, anyone."""

    AGREEMENT = "agreement"
    REGISTERED = "registered"
    PUBLIC = "public"


RoleOption = Annotated[Role, typer.Option("--role", help="For whom you sign.")]


def register(app: typer.Typer) -> None:
    """Add the commands to the group `release`."""
    app.command("sign")(sign)
    app.command("refuse")(refuse)
    app.command("export")(export)
    app.command("withdraw")(withdraw)


@command
def sign(
    site_dir: SiteDirOption,
    key: Annotated[Path, typer.Option("--key", help="The signer's private key file.")],
    audit: Annotated[
        Path | None,
        typer.Option("--audit", help="Output folder of `pixcell audit run`; auditors must give it."),
    ] = None,
    role: RoleOption = Role.AUDITOR,
    exception: Annotated[
        str | None, typer.Option("--exception", help="Why a REVIEW may be released; signed with the verdict.")
    ] = None,
    approver: Annotated[
        str | None,
        typer.Option("--approver", help="Who answers for that exception; signed with the verdict."),
    ] = None,
    days: Annotated[int, typer.Option("--days", help="How long the verdict holds.")] = 365,
    audience: Annotated[
        Audience | None,
        typer.Option("--audience", help="Who may receive the tiles; without it what the site asked for."),
    ] = None,
    accept_policy: Annotated[
        str | None,
        typer.Option("--accept-policy", help="Another audit policy than the default: digest, name or file."),
    ] = None,
    certificate: Annotated[
        Path | None,
        typer.Option("--certificate", help="The auditor's kit of the consortium: checked now and at export."),
    ] = None,
    ca: CaOption = None,
    revocations: RevocationsOption = None,
    release: ReleaseOption = None,
    format: FormatOption = OutputFormat.TEXT,
) -> object:
    """Sign the audit's verdict on the sealed tiles, or add a signature; refused for other tiles, FAIL and INVALID."""
    from pixcell_core.contracts.gate import written
    from pixcell_core.contracts.verdict import VerdictException
    from pixcell_core.errors import BadInputError
    from pixcell_core.trust.keys import SigningKey
    from site_client.release.results import Signed
    from site_client.release.signers import Credentials
    from site_client.release.signing import sign_release
    from site_client.release.workspace import ReleaseWorkspace

    if (exception is None) != (approver is None) or exception == "" or approver == "":
        raise BadInputError(
            "An exception needs both its reason and the person who answers for it.",
            hint='Give --exception "TEXT" and --approver NAME together.',
            code="incomplete-exception",
        )
    if exception and role is not Role.AUDITOR:
        raise BadInputError(
            "An exception is part of the auditor's statement; others sign it as it is.",
            hint="Leave --exception and --approver out.",
            code="incomplete-exception",
        )
    stated = (
        written(VerdictException, reason=exception, approver=approver) if exception and approver else None
    )
    signed = sign_release(
        ReleaseWorkspace(site_dir),
        audit,
        SigningKey.load(key),
        now=datetime.now(UTC),
        role=role.value,
        release_id=release,
        exception=stated,
        days=days,
        audience=None if audience is None else audience.value,
        accepted_policy=accept_policy,
        credentials=Credentials.load(certificate, ca, revocations or ()),
    )
    return Signed.of(signed)


@command
def refuse(
    site_dir: SiteDirOption,
    key: Annotated[Path, typer.Option("--key", help="The private key file of who refuses.")],
    reason: Annotated[str, typer.Option("--reason", help="Why these tiles do not leave; signed.")],
    role: RoleOption = Role.AUDITOR,
    release: ReleaseOption = None,
    format: FormatOption = OutputFormat.TEXT,
) -> object:
    """Sign a refusal: one no keeps these tiles at the site, whoever signed before."""
    from pixcell_core.trust.keys import SigningKey
    from site_client.release.refuse import refuse_release
    from site_client.release.results import Refused
    from site_client.release.workspace import ReleaseWorkspace

    refused = refuse_release(
        ReleaseWorkspace(site_dir),
        SigningKey.load(key),
        reason,
        now=datetime.now(UTC),
        role=role.value,
        release_id=release,
    )
    return Refused.of(refused)


@command
def export(
    site_dir: SiteDirOption,
    out: Annotated[Path, typer.Option("--out", help="The bundle: a folder, or one file if it ends in .zip.")],
    dicom: Annotated[
        bool, typer.Option("--dicom", help="Also write each tile as DICOM, marked Synthetic Data = YES.")
    ] = False,
    c2pa_chain: Annotated[
        Path | None,
        typer.Option("--c2pa-chain", help="Also write PNG with content credentials: the signer's PEM chain."),
    ] = None,
    c2pa_key: Annotated[Path | None, typer.Option("--c2pa-key", help="Its Ed25519 private key file.")] = None,
    ca: CaOption = None,
    revocations: RevocationsOption = None,
    release: ReleaseOption = None,
    format: FormatOption = OutputFormat.TEXT,
) -> object:
    """Write the bundle of a signed release; refused without a valid verdict on exactly these tiles."""
    from pixcell_core.cli.progress import progress
    from pixcell_core.errors import BadInputError
    from site_client.release.export import export_release
    from site_client.release.other_forms import ContentCredentials, OtherForms
    from site_client.release.results import Exported
    from site_client.release.signers import Credentials
    from site_client.release.workspace import ReleaseWorkspace

    if (c2pa_chain is None) != (c2pa_key is None):
        raise BadInputError(
            "Content credentials need a certificate chain and its key.",
            hint="Give --c2pa-chain CHAIN.pem and --c2pa-key KEY.pem together.",
            code="no-content-credentials",
        )
    marks = ContentCredentials.load(c2pa_chain, c2pa_key) if c2pa_chain and c2pa_key else None
    with progress("writing bundle", unit="tiles") as bar:
        exported = export_release(
            ReleaseWorkspace(site_dir),
            out,
            now=datetime.now(UTC),
            release_id=release,
            credentials=Credentials.load(None, ca, revocations or ()),
            forms=OtherForms(dicom=dicom, credentials=marks),
            on_tile=bar.advance,
        )
    return Exported.of(exported)


@command
def withdraw(
    site_dir: SiteDirOption,
    reason: Annotated[
        str, typer.Option("--reason", help="Why the bundle must not be used any more; signed.")
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Also write the list of withdrawals here, to give to recipients."),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    release: ReleaseOption = None,
    format: FormatOption = OutputFormat.TEXT,
) -> object:
    """Take an exported release back: sign it onto the site's list of withdrawals. This cannot be undone."""
    from pixcell_core.errors import BadInputError, RefusedError
    from site_client.release.results import Withdrawn
    from site_client.release.withdraw import withdraw_release
    from site_client.release.workspace import ReleaseWorkspace

    workspace = ReleaseWorkspace(site_dir)
    asked = workspace.require().find(release)
    if not yes:
        if not sys.stdin.isatty():
            raise BadInputError(
                "Nobody is at the terminal to answer.", hint="Add --yes if you mean it.", code="needs-yes"
            )
        if not typer.confirm(f"Withdraw release {asked.release_id} for good?", err=True):
            raise RefusedError(
                "Not confirmed; nothing was withdrawn.",
                hint="Run it again when you are sure.",
                code="not-confirmed",
            )
    withdrawn = withdraw_release(
        workspace, reason, now=datetime.now(UTC), release_id=asked.release_id, out=out
    )
    return Withdrawn.of(withdrawn, workspace)
