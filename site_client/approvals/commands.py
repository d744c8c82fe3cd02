"""Commands of consent: `pixcell site enroll`, `install-kit`, `approve`, `deny`, `revoke`, `studies`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pixcell_core.cli.confirm import confirm
from pixcell_core.cli.contract import FormatOption, OutputFormat, command, emit_note
from pixcell_core.cli.main import group

if TYPE_CHECKING:
    from pixcell_core.contracts.study import Study
    from site_client.approvals.book import Decision
    from site_client.approvals.listing import StudiesShown, StudyShown

SiteDir = Annotated[Path, typer.Option("--site-dir", help="The site's folder.")]
StudyFile = Annotated[Path, typer.Argument(help="The study file the coordinator sent.")]
Yes = Annotated[bool, typer.Option("--yes", help="Do not ask.")]


def register(root: typer.Typer) -> None:
    """Add the commands to `root`."""
    site = group(root, "site")

    @site.command("enroll")
    @command
    def enroll(
        site_dir: SiteDir,
        name: Annotated[str, typer.Option("--name", help="The site's public name.")],
        hub: Annotated[str, typer.Option("--hub", help="Address of the hub, host:port.")],
        ca: Annotated[Path, typer.Option("--ca", help="The consortium's CA certificate (ca.crt).")],
        ca_fingerprint: Annotated[
            str | None,
            typer.Option("--ca-fingerprint", help="What the coordinator read; another CA is refused."),
        ] = None,
        new_tls_key: Annotated[
            bool,
            typer.Option("--new-tls-key", help="Make a new TLS key, to be used once its kit is installed."),
        ] = False,
        format: FormatOption = OutputFormat.TEXT,
    ) -> object:
        """Make this site's keys and the request for the coordinator."""
        from site_client.approvals.enrolment import enrol
        from site_client.approvals.site_folder import SiteFolder

        folder = SiteFolder(site_dir.absolute())
        return enrol(folder, name, hub, ca, ca_fingerprint=ca_fingerprint, new_tls_key=new_tls_key)

    @site.command("install-kit")
    @command
    def install(
        kit: Annotated[Path, typer.Argument(help="The kit the coordinator signed for this site.")],
        site_dir: SiteDir,
        format: FormatOption = OutputFormat.TEXT,
    ) -> object:
        """Verify the kit and put its certificate in place."""
        from site_client.approvals.kit import install_kit
        from site_client.approvals.site_folder import SiteFolder

        return install_kit(SiteFolder(site_dir.absolute()), kit)

    @site.command("approve")
    @command
    def approve(
        study: StudyFile,
        site_dir: SiteDir,
        epsilon_cap: Annotated[
            float | None,
            typer.Option(help="Allow less than the study asks for: epsilon, in its unit and at its delta."),
        ] = None,
        days: Annotated[
            int | None, typer.Option(help="Allow it for so many days only.", min=1, max=3650)
        ] = None,
        yes: Yes = False,
        format: FormatOption = OutputFormat.TEXT,
    ) -> object:
        """Read a study and sign that it may run here."""
        return _decide(study, site_dir, "approve", yes, epsilon_cap, days)

    @site.command("deny")
    @command
    def deny(
        study: StudyFile, site_dir: SiteDir, yes: Yes = False, format: FormatOption = OutputFormat.TEXT
    ) -> object:
        """Sign that a study may not run here."""
        return _decide(study, site_dir, "deny", yes)

    @site.command("revoke")
    @command
    def revoke(
        study: StudyFile, site_dir: SiteDir, yes: Yes = False, format: FormatOption = OutputFormat.TEXT
    ) -> object:
        """Withdraw an approval; it takes effect at the next round."""
        return _decide(study, site_dir, "revoke", yes)

    @site.command("studies")
    @command
    def studies(
        site_dir: SiteDir,
        study: Annotated[
            str | None,
            typer.Argument(help="Id, or the first digits of the digest, of one study to show whole."),
        ] = None,
        format: FormatOption = OutputFormat.TEXT,
    ) -> StudiesShown | StudyShown:
        """List the studies this site decided about and what holds now; or show one."""
        from site_client.approvals.listing import list_studies, show_study
        from site_client.approvals.site_folder import SiteFolder

        folder = SiteFolder(site_dir.absolute())
        folder.identity()
        return list_studies(folder) if study is None else show_study(folder, study)


def _decide(
    study_file: Path,
    site_dir: Path,
    decision: Decision,
    yes: bool,
    epsilon_cap: float | None = None,
    days: int | None = None,
) -> object:
    from datetime import UTC, datetime, timedelta

    from site_client.approvals.book import ApprovalBook, read_study
    from site_client.approvals.site_folder import SiteFolder

    study = read_study(study_file)
    book = ApprovalBook(SiteFolder(site_dir.absolute()))
    if decision == "approve":
        cap = study.epsilon_cap if epsilon_cap is None else epsilon_cap
        emit_note(
            f"Study {study.id}, digest {study.digest}\n"
            f"  {study.rounds} rounds x {study.steps_per_round} steps, q {study.sample_rate}, "
            f"sigma {study.noise_multiplier}, C {study.max_grad_norm}\n"
            f"  may spend at most epsilon {cap} per {study.unit} at delta {study.delta} here "
            f"(neighbouring cohorts: {study.adjacency}); not covered: what conditions surrogates "
            f"({study.conditioning.mode})\n"
            f"  base {study.base_digest}\n  code {study.code_digest}\n"
            f"  app  {study.app_digest or 'none: this site will refuse its rounds until the study names one'}\n"
            f"  {_who_sees(study)}"
        )
    if not yes:
        confirm(f"{decision.capitalize()} study {study.id}?", otherwise="nothing was signed")
    end = min(study.expires_at, datetime.now(UTC) + timedelta(days=days)) if days is not None else None
    return book.decide(study, decision, epsilon_cap=epsilon_cap, expires_at=end)


def _who_sees(study: Study) -> str:
    """Whether the coordinator sees this site's updates; under masks, whose keys they are masked with."""
    from pixcell_core.contracts.masking import MIN_COHORT

    masking = study.aggregation.masking
    if masking is None:
        return "the coordinator sees each update of this site"
    fewest = max(masking.threshold, MIN_COHORT)
    keys = "".join(f"\n    {key.site}  {key.key_id}" for key in masking.identities)
    return (
        f"under masks: the coordinator sees the sum of at least {fewest} sites; compare their keys by phone, each "
        f"site reads its own with `pixcell key show SITE/keys/approval.pub`:{keys}"
    )
