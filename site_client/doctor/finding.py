"""What one check found, and the report of all of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    from rich.console import RenderableType

Status = Literal["ok", "warn", "fail", "skip"]
HIDDEN = "shown at the site only"


class Finding(BaseModel):
    """One check: its name, how it ended, what was found, what to do.

    `skip` means that the question could not be asked, and `found` says why: it is never a silent ok. A `private`
    finding tells of slides or patients: it stays at the site.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[str, Field(pattern=r"^[a-z0-9-]{1,40}$")]
    status: Status
    found: str
    remedy: str = ""
    private: bool = False
    details: tuple[str, ...] = ()


class DoctorReport(BaseModel):
    """Every finding, in the order asked. Exit 1 where one failed."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    site: str
    checks: tuple[Finding, ...]
    ok: int
    warn: int
    fail: int
    skip: int

    @classmethod
    def of(cls, site: str, checks: tuple[Finding, ...], *, shareable: bool = False) -> DoctorReport:
        """The report; a shareable one keeps the outcome of private findings and nothing else of them."""
        if shareable:
            hide = {"found": HIDDEN, "remedy": "", "details": ()}
            checks = tuple(c.model_copy(update=hide) if c.private else c for c in checks)
        count = {status: sum(c.status == status for c in checks) for status in ("ok", "warn", "fail", "skip")}
        return cls(site=site, checks=checks, **count)

    @property
    def exit_code(self) -> int:
        """1 where a check failed."""
        return 1 if self.fail else 0

    def render(self) -> RenderableType:
        """A table, worst first; then the counts."""
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table("check", "", "found", "what to do")
        order = {"fail": 0, "warn": 1, "skip": 2, "ok": 3}
        for c in sorted(self.checks, key=lambda c: order[c.status]):
            found = c.found + "".join(f"\n  {line}" for line in c.details)
            table.add_row(c.name, c.status, Text(found), Text(c.remedy))
        return Group(
            table, f"{self.site}: {self.ok} ok, {self.warn} warnings, {self.fail} failed, {self.skip} skipped"
        )
