"""What the release commands return: typed results with a text form for people."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

from pydantic import BaseModel, ConfigDict
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from pixcell_core.contracts.gate import LEAST_SIGNATURES
from pixcell_core.trust.bundle_files import SHEET
from site_client.release.export import ExportedBundle
from site_client.release.progress import progress_of
from site_client.release.refuse import RefusedRelease
from site_client.release.request import RequestedRelease
from site_client.release.review import Reviewed
from site_client.release.signing import SignedVerdict
from site_client.release.withdraw import WithdrawnBundle
from site_client.release.workspace import ORIGINS, POLICY, REFUSAL, ReleaseFolder, ReleaseWorkspace


class _Result(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Drafted(_Result):
    """A sealed draft. ``origins`` maps each sealed tile to the generator's file; it stays at the site."""

    release: str
    site: str
    tiles: int
    tiles_dir: Path
    manifest_digest: str
    sample_sheet: Path
    origins: Path
    privacy: str | None
    withheld: int
    site_dir: Path

    @classmethod
    def of(cls, release: ReleaseFolder, site_dir: Path) -> Drafted:
        """From the release's folder."""
        manifest = release.manifest()
        return cls(
            release=release.release_id,
            site=manifest.site,
            tiles=manifest.tile_count,
            tiles_dir=release.tiles,
            manifest_digest=manifest.digest,
            sample_sheet=release.path / SHEET,
            origins=release.path / ORIGINS,
            privacy=str(manifest.privacy) if manifest.privacy else None,
            withheld=manifest.filtered.withheld if manifest.filtered else 0,
            site_dir=site_dir,
        )

    def __str__(self) -> str:
        left_out = f", {self.withheld} withheld" if self.withheld else ""
        known = " --filtered-from FIRST" if self.withheld else ""
        return "\n".join(
            (
                f"✓ release {self.release} of {self.site}: {self.tiles} tiles sealed{left_out}",
                f"  {self.privacy or 'no differential privacy is claimed'}",
                f"  look at  {self.sample_sheet}",
                f"  ask      pixcell release request --site-dir {self.site_dir}   (left out: standing terms and signers)",
                f"  next     pixcell audit run --synthetic {self.tiles_dir} --train … --holdout …{known} --out OUT",
                f"  then     pixcell release sign --site-dir {self.site_dir} --audit OUT --key AUDITOR.key",
            )
        )


class Signed(_Result):
    """A signed verdict."""

    release: str
    verdict: str
    audience: str
    tiles: int
    signatures: int
    key_ids: tuple[str, ...]
    exception: str | None
    approver: str | None
    report_digest: str
    standing: str
    expires_at: datetime

    @classmethod
    def of(cls, signed: SignedVerdict) -> Signed:
        """From what signing returned."""
        predicate = signed.verdict.predicate
        return cls(
            release=signed.release.release_id,
            verdict=predicate.verdict,
            audience=predicate.audience,
            tiles=predicate.tile_count,
            signatures=len(signed.envelope.signatures),
            key_ids=signed.envelope.key_ids,
            exception=predicate.exception.reason if predicate.exception else None,
            approver=predicate.exception.approver if predicate.exception else None,
            report_digest=predicate.audit_report_digest,
            standing=signed.standing.words,
            expires_at=predicate.expires_at,
        )

    def __str__(self) -> str:
        lines = [
            f"✓ release {self.release}: {self.verdict} on {self.tiles} tiles, {self.standing}",
            f"  for {self.audience} use, until {self.expires_at:%Y-%m-%d}; evidence {self.report_digest}",
        ]
        if self.exception:
            lines.append(f"  exception by {self.approver}: {self.exception}")
        return "\n".join(lines)


class Exported(_Result):
    """A bundle that was written."""

    release: str
    bundle: Path
    bundle_digest: str
    tiles: int
    verdict: str
    signers: tuple[str, ...]

    @classmethod
    def of(cls, exported: ExportedBundle) -> Exported:
        """From what export returned."""
        return cls(
            release=exported.release.release_id,
            bundle=exported.path,
            bundle_digest=exported.digest,
            tiles=exported.report.tiles,
            verdict=exported.report.verdict,
            signers=tuple(s.key_id for s in exported.report.signers if s.role == "auditor"),
        )

    def __str__(self) -> str:
        return (
            f"✓ {self.bundle}: {self.tiles} tiles, verdict {self.verdict}, verified as a stranger would\n"
            f"  anyone checks it with  pixcell release verify {self.bundle} --trust AUDITOR.pub"
        )


class Requested(_Result):
    """A sealed release and the terms asked for it."""

    release: str
    tiles: int
    tiles_root: str
    audience: str
    purpose: str
    policy_digest: str
    policy_file: Path
    needed: int
    signers: tuple[str, ...]

    @classmethod
    def of(cls, asked: RequestedRelease) -> Requested:
        """From what the request returned."""
        named = () if asked.signers is None else asked.signers.signers
        return cls(
            release=asked.release.release_id,
            tiles=asked.request.tile_count,
            tiles_root=asked.request.tiles_root,
            audience=asked.request.audience,
            purpose=asked.request.purpose,
            policy_digest=asked.request.policy_digest,
            policy_file=asked.release.path / POLICY,
            needed=LEAST_SIGNATURES if asked.signers is None else asked.signers.needed,
            signers=tuple(f"{signer.role} {signer.name}" for signer in named) or ("site", "an auditor"),
        )

    def __str__(self) -> str:
        return "\n".join(
            (
                f"✓ release {self.release} requested: {self.tiles} tiles sealed under {self.tiles_root}",
                f"  for {self.audience} use: {self.purpose}",
                f"  to be judged by {self.policy_digest} ({self.policy_file})",
                f"  {self.needed} of {len(self.signers)} must sign: {', '.join(self.signers)}",
            )
        )


class ReviewShown(_Result):
    """A release as a signer sees it. ``exit_code`` stays 0: looking is no verdict."""

    release: str
    state: str
    tiles: int
    tiles_root: str
    tiles_dir: Path
    privacy: str | None
    purpose: str | None
    audit: str | None
    tests: dict[str, str]
    flagged: int
    not_tested: tuple[str, ...]
    signed: str
    blocked_by: str
    next: str

    @classmethod
    def of(cls, seen: Reviewed) -> ReviewShown:
        """From what the review returned."""
        manifest, request = seen.seal.manifest, seen.seal.request
        report = None if seen.evidence is None else seen.evidence.report
        return cls(
            release=seen.release.release_id,
            state=seen.progress.state,
            tiles=manifest.tile_count,
            tiles_root=manifest.tiles_root,
            tiles_dir=seen.release.tiles,
            privacy=str(manifest.privacy) if manifest.privacy else None,
            purpose=None if request is None else request.purpose,
            audit=None if report is None else report.verdict.value,
            tests={} if report is None else {t.name: t.status.value for t in report.tests if t.gating},
            flagged=0 if report is None else len(report.flagged),
            not_tested=() if report is None else tuple(report.not_tested),
            signed=seen.progress.signed,
            blocked_by=seen.progress.blocked_by,
            next=seen.progress.next,
        )

    def __str__(self) -> str:
        lines = [
            f"release {self.release}: {self.state}{f', signed {self.signed}' if self.signed else ''}",
            f"  {self.tiles} tiles in {self.tiles_dir}, whole under {self.tiles_root}",
            f"  {self.privacy or 'no differential privacy is claimed'}",
        ]
        if self.purpose:
            lines.append(f"  asked for: {self.purpose}")
        if self.audit:
            lines.append(f"  audit: {self.audit}, {self.flagged} tiles flagged")
            lines += [f"    {status:<8} {name}" for name, status in self.tests.items()]
            lines += [f"    not tested: {text}" for text in self.not_tested]
        lines.append(f"  blocked by: {self.blocked_by or 'nothing'}")
        lines.append(f"  next: {self.next or 'nothing'}")
        return "\n".join(lines)


class Refused(_Result):
    """A signed refusal."""

    release: str
    role: str
    reason: str
    refusal_file: Path

    @classmethod
    def of(cls, refused: RefusedRelease) -> Refused:
        """From what refusing returned."""
        return cls(
            release=refused.release.release_id,
            role=refused.refusal.role,
            reason=refused.refusal.reason,
            refusal_file=refused.release.path / REFUSAL,
        )

    def __str__(self) -> str:
        return (
            f"✓ release {self.release} refused as {self.role}: {self.reason}\n  signed in {self.refusal_file}"
        )


class Withdrawn(_Result):
    """A release that was taken back."""

    release: str
    manifest_digest: str
    role: str
    number: int
    withdrawn: int
    list_file: Path

    @classmethod
    def of(cls, withdrawn: WithdrawnBundle) -> Withdrawn:
        """From what withdrawing returned."""
        return cls(
            release=withdrawn.release_id,
            manifest_digest=withdrawn.manifest_digest,
            role=withdrawn.role,
            number=withdrawn.withdrawals.number,
            withdrawn=len(withdrawn.withdrawals.withdrawn),
            list_file=withdrawn.list_file,
        )

    def __str__(self) -> str:
        return (
            f"✓ release {self.release} withdrawn as {self.role}; the list has number {self.number}, "
            f"and names {self.withdrawn}\n"
            f"  give everyone who holds a bundle: {self.list_file}\n"
            "  they check with  pixcell release verify BUNDLE --withdrawals FILE"
        )


class TakenUp(_Result):
    """Releases that a signer's list took back, now on record at the site."""

    releases: tuple[str, ...]

    def __str__(self) -> str:
        return f"✓ withdrawn by this list, and on record here: {', '.join(self.releases)}"


class ReleaseRow(_Result):
    """One release: how far it has come, what blocks the next step, and what that is."""

    release: str
    created_at: datetime | None
    tiles: int | None
    state: str
    signed: str
    blocked_by: str
    next: str


class Releases(_Result):
    """Every release of a site, oldest first."""

    releases: list[ReleaseRow]

    @classmethod
    def of(cls, workspace: ReleaseWorkspace, now: datetime, release_id: str | None = None) -> Releases:
        """Read the site's releases, or the one asked for."""
        rows = []
        for release in workspace.all_releases() if release_id is None else [workspace.find(release_id)]:
            progress, sealed_at = progress_of(workspace, release, now), release.sealed_at()
            rows.append(
                ReleaseRow(
                    release=release.release_id,
                    created_at=sealed_at,
                    tiles=release.manifest().tile_count if sealed_at else None,
                    state=progress.state,
                    signed=progress.signed,
                    blocked_by=progress.blocked_by,
                    next=progress.next,
                )
            )
        return cls(releases=rows)

    def render(self) -> RenderableType:
        """A table."""
        if not self.releases:
            return "No release is drafted yet: pixcell release draft"
        table = Table("release", "drafted at (UTC)", "tiles", "state", "blocked by", "next")
        for row in self.releases:
            when = f"{row.created_at:%Y-%m-%d %H:%M}" if row.created_at else "?"
            state = f"{row.state} {row.signed}".strip()
            table.add_row(row.release, when, str(row.tiles or "?"), state, Text(row.blocked_by), row.next)
        return table
