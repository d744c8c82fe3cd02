"""Shows a site the studies it decided about: all of them in a table, or one whole."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from site_client.approvals.book import ApprovalBook, Standing
from site_client.approvals.site_folder import SiteFolder

if TYPE_CHECKING:
    from rich.console import RenderableType


class StudyLine(BaseModel):
    """One study, and what this site's newest decision about it means now."""

    study: str
    digest: str
    standing: str
    epsilon_cap: float | None
    unit: str
    delta: float
    decision: int | None
    expires_at: datetime
    app_digest: str | None


class StudiesShown(BaseModel):
    """Every study this site decided about."""

    studies: tuple[StudyLine, ...]

    def render(self) -> RenderableType:
        """A table."""
        from rich.table import Table

        if not self.studies:
            return "This site decided about no study yet."
        table = Table("study", "digest", "standing", "epsilon cap", "expires")
        for s in self.studies:
            cap = "-" if s.epsilon_cap is None else f"{s.epsilon_cap:g} per {s.unit} at delta {s.delta:g}"
            table.add_row(s.study, s.digest[7:19], s.standing, cap, f"{s.expires_at:%Y-%m-%d %H:%M}")
        return table


class StudyShown(BaseModel):
    """One study in full."""

    line: StudyLine
    study: dict[str, Any]

    def __str__(self) -> str:
        rows = "\n".join(f"  {name}: {value}" for name, value in self.study.items())
        return f"{self.line.study} ({self.line.standing})\ndigest: {self.line.digest}\n{rows}"


def list_studies(folder: SiteFolder, now: datetime | None = None) -> StudiesShown:
    """All of them."""
    return StudiesShown(
        studies=tuple(_line(s) for s in ApprovalBook(folder).studies(now or datetime.now(UTC)))
    )


def show_study(folder: SiteFolder, name: str, now: datetime | None = None) -> StudyShown:
    """One, by its id or the beginning of its digest. Raises `BadInputError`."""
    book = ApprovalBook(folder)
    study = book.find(name)
    return StudyShown(line=_line(book.standing(study, now)), study=study.model_dump(mode="json"))


def _line(standing: Standing) -> StudyLine:
    study, approval = standing.study, standing.approval
    return StudyLine(
        study=study.id,
        digest=study.digest,
        standing="approved" if standing.valid else standing.code,
        epsilon_cap=approval.epsilon_cap if approval else None,
        unit=study.unit,
        delta=study.delta,
        decision=approval.sequence if approval else None,
        expires_at=approval.expires_at if approval else study.expires_at,
        app_digest=study.app_digest,
    )
