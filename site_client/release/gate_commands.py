"""`pixcell release sign|refuse|export|withdraw`: who says yes or no, what leaves, and what is taken back."""

from __future__ import annotations

import sys
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from pixcell_core.cli.contract import FormatOption, OutputFormat, command
from site_client.release.options import Audience, ReleaseOption, SiteDirOption

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


LogOption = Annotated[
    Path | None,
    typer.Option(
        "--log", help="Your own log; without it the one of your folder, else KEY.log beside the key."
    ),
]
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
    log: LogOption = None,
    release: ReleaseOption = None,
    format: FormatOption = OutputFormat.TEXT,
) -> object:
    """Sign the audit's verdict on the sealed tiles, or add a signature; refused for other tiles, FAIL and INVALID."""
    from pixcell_core.contracts.gate import written
    from pixcell_core.contracts.verdict import VerdictException
    from pixcell_core.errors import BadInputError
    from pixcell_core.trust.keys import SigningKey
    from pixcell_core.trust.party_log import own_log
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
        own_log=own_log(key, log),
    )
    return Signed.of(signed)


@command
def refuse(
    site_dir: SiteDirOption,
    key: Annotated[Path, typer.Option("--key", help="The private key file of who refuses.")],
    reason: Annotated[str, typer.Option("--reason", help="Why these tiles do not leave; signed.")],
    role: RoleOption = Role.AUDITOR,
    log: LogOption = None,
    release: ReleaseOption = None,
    format: FormatOption = OutputFormat.TEXT,
) -> object:
    """Sign a refusal: one no keeps these tiles at the site, whoever signed before."""
    from pixcell_core.trust.keys import SigningKey
    from pixcell_core.trust.party_log import own_log
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
        own_log=own_log(key, log),
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
    site_dir: Annotated[
        Path | None, typer.Option("--site-dir", help="The site's folder; not needed with --bundle.")
    ] = None,
    reason: Annotated[
        str | None, typer.Option("--reason", help="Why the bundle must not be used any more; signed.")
    ] = None,
    key: Annotated[
        Path | None,
        typer.Option("--key", help="Your key, if you are another signer than the site: a list of your own."),
    ] = None,
    bundle: Annotated[
        Path | None, typer.Option("--bundle", help="Take back this bundle that you signed, without the site.")
    ] = None,
    take_up: Annotated[
        Path | None,
        typer.Option("--take-up", help="At the site: put a list on record that a signer sent."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Also write the list of withdrawals here, to give to recipients."),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    log: LogOption = None,
    release: ReleaseOption = None,
    format: FormatOption = OutputFormat.TEXT,
) -> object:
    """Take back what was exported: as the site, or as any signer, on a signed list. This cannot be undone."""
    from pixcell_core.errors import BadInputError
    from pixcell_core.trust.dsse import Envelope
    from pixcell_core.trust.keys import SigningKey
    from pixcell_core.trust.party_log import own_log
    from site_client.release.results import TakenUp, Withdrawn
    from site_client.release.withdraw import take_up_withdrawals, withdraw_bundle, withdraw_release
    from site_client.release.workspace import ReleaseWorkspace

    now = datetime.now(UTC)
    if take_up is not None and site_dir is not None and not (reason or key or bundle or out):
        return TakenUp(
            releases=take_up_withdrawals(ReleaseWorkspace(site_dir), Envelope.load(take_up), now=now)
        )
    if take_up is not None or not reason or (site_dir is None) == (bundle is None) or (bundle and not key):
        raise BadInputError(
            "This does not say what to take back, with whose key, and why.",
            hint="Give --site-dir DIR --reason TEXT (as another signer also --key KEY), --bundle BUNDLE --key KEY "
            "--reason TEXT, or --site-dir DIR --take-up LIST.",
            code="withdrawal-incomplete",
        )
    signer = None if key is None else SigningKey.load(key)
    own = None if key is None else own_log(key, log)
    if bundle is not None and signer is not None and own is not None:
        _ask(f"Withdraw {bundle.name} for good?", yes)
        return Withdrawn.of(withdraw_bundle(bundle, signer, reason, now=now, own_log=own, out=out))
    assert site_dir is not None
    workspace = ReleaseWorkspace(site_dir)
    asked = workspace.require().find(release)
    _ask(f"Withdraw release {asked.release_id} for good?", yes)
    withdrawn = withdraw_release(
        workspace, reason, now=now, release_id=asked.release_id, out=out, key=signer, own_log=own
    )
    return Withdrawn.of(withdrawn)


def _ask(question: str, yes: bool) -> None:
    from pixcell_core.errors import BadInputError, RefusedError

    if yes:
        return
    if not sys.stdin.isatty():
        raise BadInputError(
            "Nobody is at the terminal to answer.", hint="Add --yes if you mean it.", code="needs-yes"
        )
    if not typer.confirm(question, err=True):
        raise RefusedError(
            "Not confirmed; nothing was withdrawn.",
            hint="Run it again when you are sure.",
            code="not-confirmed",
        )
