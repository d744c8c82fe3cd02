"""What the release commands return: typed results with a text form for people."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

from pydantic import BaseModel, ConfigDict
from rich.console import RenderableType
from rich.table import Table

from pixcell_core.trust.bundle_files import SHEET
from site_client.release.export import ExportedBundle
from site_client.release.signing import SignedVerdict
from site_client.release.workspace import ORIGINS, ReleaseFolder, ReleaseWorkspace


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
            expires_at=predicate.expires_at,
        )

    def __str__(self) -> str:
        lines = [
            f"✓ release {self.release}: {self.verdict} on {self.tiles} tiles, {self.signatures} signature(s)",
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


class ReleaseRow(_Result):
    """One release: how far it has come, and what comes next."""

    release: str
    created_at: datetime | None
    tiles: int | None
    state: str
    next: str


class Releases(_Result):
    """Every release of a site, oldest first."""

    releases: list[ReleaseRow]

    @classmethod
    def of(cls, workspace: ReleaseWorkspace) -> Releases:
        """Read the site's releases."""
        following = {
            "damaged": "draft again: its manifest was changed",
            "sealed": "audit its tiles, then sign",
            "signed": "export",
            "exported": "",
        }
        rows = []
        for release in workspace.all_releases():
            state, sealed_at = workspace.state(release), release.sealed_at()
            rows.append(
                ReleaseRow(
                    release=release.release_id,
                    created_at=sealed_at,
                    tiles=release.manifest().tile_count if sealed_at else None,
                    state=state,
                    next=following[state],
                )
            )
        return cls(releases=rows)

    def render(self) -> RenderableType:
        """A table."""
        if not self.releases:
            return "No release is sealed yet: pixcell release draft"
        table = Table("release", "sealed at (UTC)", "tiles", "state", "next")
        for row in self.releases:
            when = f"{row.created_at:%Y-%m-%d %H:%M}" if row.created_at else "?"
            table.add_row(row.release, when, str(row.tiles or "?"), row.state, row.next)
        return table
