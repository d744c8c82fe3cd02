"""`pixcell site budget show|verify|export`: what this site's patients have been used for."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from pydantic import BaseModel, ConfigDict

from pixcell_core.cli.contract import FormatOption, OutputFormat, command
from pixcell_core.cli.main import group

if TYPE_CHECKING:
    from rich.console import RenderableType

    from site_client.ledger.view import LedgerView

SiteDirOption = Annotated[Path, typer.Option("--site-dir", help="The site's folder.")]

_BAR_WIDTH = 30


class _Result(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class RoundSpending(_Result):
    """What one round of a study charged."""

    study: str
    round: int
    purpose: str
    sample_rate: float
    noise_multiplier: float
    max_grad_norm: float
    steps_charged: int


class BudgetStatement(_Result):
    """What is spent, with everything that has to be read beside it."""

    site: str | None
    unit: str
    adjacency: str
    accountant: str
    epsilon_spent: float
    epsilon_cap: float | None
    delta: float
    covers: str
    does_not_cover: str
    rounds: list[RoundSpending]
    records: int
    head: str | None
    verified: bool

    def render(self) -> RenderableType:
        """A table of rounds under the statement and a bar of spent against cap."""
        from rich.console import Group
        from rich.table import Table

        spent = _rounded_up(self.epsilon_spent)
        lines = [f"Privacy budget of {self.site or 'this site'}"]
        if self.epsilon_cap is None:
            lines.append(
                f"epsilon {spent} per {self.unit} at delta {self.delta:g}; no ledger yet, nothing was charged"
            )
        else:
            lines.append(
                f"{_bar(self.epsilon_spent / self.epsilon_cap)} epsilon {spent} of {self.epsilon_cap:g}"
            )
            lines.append(f"per {self.unit}: all slides and tiles of one {self.unit}, at delta {self.delta:g}")
        lines.append(f"neighbouring cohorts: {self.adjacency}; accountant: {self.accountant}")
        lines.append(f"covers {self.covers}")
        lines.append(f"does not cover {self.does_not_cover}")
        if not self.rounds:
            return Group(*lines)
        table = Table("study", "round", "purpose", "sample rate", "noise multiplier", "C", "steps charged")
        for r in self.rounds:
            cells = (r.round, r.purpose, r.sample_rate, r.noise_multiplier, r.max_grad_norm, r.steps_charged)
            table.add_row(r.study, *(f"{c:g}" if isinstance(c, float) else str(c) for c in cells))
        return Group(*lines, table, f"{self.records} records, head {self.head}")


class BudgetVerification(_Result):
    """Whether every record is whole, chained and signed; names the first one that is not."""

    ok: bool
    records: int
    first_bad: int | None
    reason: str
    key_id: str | None
    key_source: Literal["site", "ledger"]
    head: str | None

    @property
    def exit_code(self) -> int:
        """1 when the ledger is broken."""
        return 0 if self.ok else 1

    def __str__(self) -> str:
        if not self.ok:
            return (
                f"BROKEN at record {self.first_bad}: {self.reason}\n{self.records} records before it verify. "
                "Restore the ledger folder from a backup; do not delete it."
            )
        if not self.records:
            return "ok: no ledger yet, nothing was charged"
        said = f"ok: {self.records} records, all chained and signed by {self.key_id}\nhead {self.head}"
        if self.key_source == "ledger":
            said += "\nThe key is the one the ledger names itself: keys/ledger.key.pub is missing. Compare its id."
        return said


class BudgetExport(_Result):
    """The ledger in a form for others: every signed line, and their sum. It never held a patient.

    Each of `lines` is ``{"hash", "key_id", "record", "signature"}``; its canonical JSON is the line of the ledger,
    so that anyone with the public key can verify the chain.
    """

    schema_version: Literal["budget-export/v1"] = "budget-export/v1"
    statement: BudgetStatement
    public_key: str | None
    lines: list[dict[str, Any]]


def register(root: typer.Typer) -> None:
    """Add `site budget show|verify|export`."""
    budget = group(root, "site", "budget")
    budget.command("show")(show)
    budget.command("verify")(verify)
    budget.command("export")(export)


@command
def show(site_dir: SiteDirOption, format: FormatOption = OutputFormat.TEXT) -> BudgetStatement:
    """Show what was spent: epsilon with its unit, delta, cap, and what it does not cover."""
    return _statement(_read(site_dir).require_whole())


@command
def verify(site_dir: SiteDirOption, format: FormatOption = OutputFormat.TEXT) -> BudgetVerification:
    """Check every record's hash, chain and signature; exit 1 and name the first bad one."""
    from site_client.ledger.site import ledger_public_key

    view = _read(site_dir)
    return BudgetVerification(
        ok=view.check.ok,
        records=view.check.records,
        first_bad=view.check.first_bad,
        reason=view.check.reason,
        key_id=view.key.key_id if view.key else None,
        key_source="site" if ledger_public_key(site_dir) else "ledger",
        head=_head_text(view),
    )


@command
def export(
    site_dir: SiteDirOption,
    out: Annotated[Path | None, typer.Option("--out", help="Write the export to this new file.")] = None,
    format: FormatOption = OutputFormat.TEXT,
) -> BudgetExport | str:
    """Export the records and their sum for a coordinator, an auditor or a regulator."""
    import json

    from site_client.ledger.journal import read_lines
    from site_client.ledger.site import ledger_folder

    view = _read(site_dir).require_whole()
    lines, _ = read_lines(ledger_folder(site_dir))
    exported = BudgetExport(
        statement=_statement(view),
        public_key=view.key.to_pem().decode("ascii") if view.key else None,
        lines=[json.loads(line) for line in lines[: len(view.records)]],
    )
    text = exported.model_dump_json(indent=2)
    if out is not None:
        _write_new(out, text + "\n")
    if format is OutputFormat.JSON:
        return exported
    return text if out is None else f"Exported {len(exported.lines)} records to {out}."


def _read(site_dir: Path) -> LedgerView:
    from pixcell_core.errors import BadInputError
    from site_client.ledger.site import ledger_folder, ledger_public_key
    from site_client.ledger.view import read_ledger

    if not site_dir.is_dir():
        raise BadInputError(
            f"There is no site folder at {site_dir}.",
            hint="Give the folder that `pixcell site enroll` made.",
            code="no-site-folder",
        )
    return read_ledger(ledger_folder(site_dir), ledger_public_key(site_dir))


def _statement(view: LedgerView) -> BudgetStatement:
    from pixcell_core.private.accounting import LARGEST_DELTA

    cap = view.cap
    spent = view.epsilon(cap.delta if cap else LARGEST_DELTA)
    return BudgetStatement(
        site=view.site,
        unit=spent.unit,
        adjacency=spent.adjacency,
        accountant=spent.accountant,
        epsilon_spent=spent.value,
        epsilon_cap=cap.epsilon if cap else None,
        delta=spent.delta,
        covers=spent.covers,
        does_not_cover=spent.does_not_cover,
        rounds=_rounds(view),
        records=len(view.records),
        head=_head_text(view),
        verified=view.check.ok,
    )


def _rounds(view: LedgerView) -> list[RoundSpending]:
    from site_client.ledger.record import ReserveRecord

    steps: dict[tuple[Any, ...], int] = {}
    for r in view.records:
        if isinstance(r, ReserveRecord):
            key = (r.study, r.round, r.purpose, r.sample_rate, r.noise_multiplier, r.max_grad_norm)
            steps[key] = steps.get(key, 0) + r.steps
    names = ("study", "round", "purpose", "sample_rate", "noise_multiplier", "max_grad_norm")
    return [RoundSpending(**dict(zip(names, key, strict=True)), steps_charged=n) for key, n in steps.items()]


def _head_text(view: LedgerView) -> str | None:
    return f"{view.head.sequence} {view.head.hash}" if view.head else None


def _rounded_up(value: float) -> str:
    import math

    return f"{math.ceil(value * 100.0) / 100.0:.2f}"


def _bar(share: float) -> str:
    filled = min(_BAR_WIDTH, max(0, round(share * _BAR_WIDTH)))
    return "█" * filled + "░" * (_BAR_WIDTH - filled)


def _write_new(path: Path, text: str) -> None:
    from pixcell_core.errors import BadInputError

    try:
        with path.open("x", encoding="utf-8") as stream:
            stream.write(text)
    except FileExistsError as error:
        raise BadInputError(
            f"{path} exists already.",
            hint="Give a new file name; exports are not written over.",
            code="file-exists",
        ) from error
    except OSError as error:
        raise BadInputError(
            f"Cannot write {path}: {error.strerror or error}.", hint="Check the folder and its permissions."
        ) from error
