"""`pixcell site budget show|verify|export|correct-clock`: what this site's patients have been used for."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from pydantic import BaseModel, ConfigDict

from pixcell_core.cli.contract import FormatOption, OutputFormat, command
from pixcell_core.cli.main import group

if TYPE_CHECKING:
    from pixcell_core.trust.dsse import Envelope
    from pixcell_core.trust.keys import VerifyKey
    from site_client.ledger.export import BudgetExport
    from site_client.ledger.statement import BudgetStatement
    from site_client.ledger.view import LedgerView

SiteDirOption = Annotated[Path, typer.Option("--site-dir", help="The site's folder.")]


class BudgetVerification(BaseModel):
    """Whether every record is whole, chained and signed; names the first one that is not.

    `remembered` counts the heads kept outside of the ledger that it was held against, `compared` says whether it was
    held against an earlier export.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    ok: bool
    records: int
    first_bad: int | None
    reason: str
    key_id: str | None
    key_source: Literal["site", "ledger", "given"]
    head: str | None
    remembered: int
    compared: bool

    @property
    def exit_code(self) -> int:
        """1 when the ledger is broken."""
        return 0 if self.ok else 1

    def __str__(self) -> str:
        if not self.ok:
            return (
                f"BROKEN at record {self.first_bad}: {self.reason}\n{self.records} records verify by themselves. "
                "Restore the newest backup of the ledger folder; do not delete it."
            )
        if not self.records:
            return "ok: no ledger yet, nothing was charged"
        said = f"ok: {self.records} records, all chained and signed by {self.key_id}\nhead {self.head}"
        if self.remembered:
            said += f"\nIt holds all {self.remembered} heads that were remembered outside of it."
        if self.compared:
            said += "\nIt holds every record of the earlier export, unchanged."
        if self.key_source == "ledger":
            said += (
                "\nThe key is the one the ledger names itself: no other was given (keys/ledger.key.pub of the site). "
                "Compare its id with the site's."
            )
        return said


class ClockCorrection(BaseModel):
    """What was recorded about the clock."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    corrected: bool
    last_record_at: str
    head: str

    def __str__(self) -> str:
        if not self.corrected:
            return f"The clock is not behind the ledger (its last record is of {self.last_record_at}); nothing was recorded."
        return f"Recorded: the clock was wrong before. The ledger goes on from {self.last_record_at}.\nhead {self.head}"


def register(root: typer.Typer) -> None:
    """Add `site budget show|verify|export|correct-clock`."""
    budget = group(root, "site", "budget")
    budget.command("show")(show)
    budget.command("verify")(verify)
    budget.command("export")(export)
    budget.command("correct-clock")(correct_clock)


@command
def show(
    site_dir: SiteDirOption,
    study: Annotated[
        Path | None,
        typer.Option("--study", help="A study file: what its next round would cost here, and the answer."),
    ] = None,
    format: FormatOption = OutputFormat.TEXT,
) -> BudgetStatement:
    """Show what was spent: epsilon with its unit, delta, cap, and what it does not cover."""
    from site_client.ledger.forecast import forecast_of
    from site_client.ledger.statement import statement_of

    view = _read(site_dir).require_whole()
    if study is None:
        return statement_of(view)
    from pixcell_core.contracts.canonical import load_document
    from pixcell_core.contracts.study import Study

    return statement_of(view, forecast_of(view, load_document(Study, study, max_bytes=1 << 20)))


@command
def verify(
    site_dir: Annotated[Path | None, typer.Option("--site-dir", help="The site's folder.")] = None,
    export: Annotated[
        Path | None,
        typer.Option(
            "--export", help="Verify this export instead of a site's folder; works anywhere, offline."
        ),
    ] = None,
    against: Annotated[
        Path | None,
        typer.Option(
            "--against", help="An earlier export: every record of it must still be there, unchanged."
        ),
    ] = None,
    key: Annotated[
        Path | None,
        typer.Option("--key", help="The site's public ledger key, got from the site by another way."),
    ] = None,
    format: FormatOption = OutputFormat.TEXT,
) -> BudgetVerification:
    """Check every record's hash, chain and signature; exit 1 and name the first bad one.

    A site's ledger is also held against the heads that were remembered outside of its folder, so that a ledger put
    back to an earlier day is found.
    """
    from pixcell_core.errors import BadInputError
    from pixcell_core.trust.keys import VerifyKey
    from site_client.ledger.export import BudgetExport, first_forgotten, first_rewritten, verify_export
    from site_client.ledger.site import ledger_public_key, remembered_heads

    if (site_dir is None) == (export is None):
        raise BadInputError(
            "Give either a site's folder or an export to verify.",
            hint="pixcell site budget verify --site-dir SITE, or --export EXPORT.json",
            code="one-of-two",
        )
    given = VerifyKey.load(key) if key is not None else None
    if site_dir is not None:
        view = _read(site_dir, given)
        heads = remembered_heads(site_dir)
        known = given or ledger_public_key(site_dir)
    else:
        assert export is not None
        view, heads, known = verify_export(BudgetExport.load(export), given), (), given
    problem = (view.check.first_bad, view.check.reason) if not view.check.ok else first_forgotten(view, heads)
    if problem is None and against is not None:
        earlier = verify_export(BudgetExport.load(against), given)
        if not earlier.check.ok:
            raise BadInputError(
                f"{against.name} is itself broken at record {earlier.check.first_bad}: {earlier.check.reason}.",
                hint="Hold the ledger against an export that verifies.",
                code="export-broken",
            )
        problem = first_rewritten(view, earlier)
    return BudgetVerification(
        ok=problem is None,
        records=view.check.records,
        first_bad=problem[0] if problem else None,
        reason=problem[1] if problem else "",
        key_id=view.key.key_id if view.key else None,
        key_source="given" if given else "site" if known else "ledger",
        head=f"{view.head.sequence} {view.head.hash}" if view.head else None,
        remembered=len(heads),
        compared=against is not None,
    )


@command
def export(
    site_dir: SiteDirOption,
    out: Annotated[Path | None, typer.Option("--out", help="Write the export to this new file.")] = None,
    format: FormatOption = OutputFormat.TEXT,
) -> BudgetExport | str:
    """Export the records and their sum for a coordinator, an auditor or a regulator."""
    from site_client.ledger.export import export_of
    from site_client.ledger.site import ledger_folder

    view = _read(site_dir).require_whole()
    exported = export_of(ledger_folder(site_dir), view, _certificate(site_dir, view))
    text = exported.model_dump_json(indent=2)
    if out is not None:
        _write_new(out, text + "\n")
    if format is OutputFormat.JSON:
        return exported
    return text if out is None else f"Exported {len(exported.lines)} records to {out}."


def _certificate(site_dir: Path, view: LedgerView) -> Envelope | None:
    """That the site's kit stands behind the ledger's key; None at a site without one, or before the first charge."""
    from datetime import UTC, datetime

    from pixcell_core.trust.dsse import Envelope
    from pixcell_core.trust.keys import SigningKey
    from pixcell_core.trust.vouched_keys import vouch
    from site_client.approvals.site_folder import SiteFolder

    folder = SiteFolder(site_dir)
    if view.key is None or view.site is None or not folder.kit.is_file():
        return None
    approval_key = SigningKey.load(folder.approval_key)
    return vouch(
        Envelope.load(folder.kit), view.site, view.key, approval_key, now=datetime.now(UTC), purpose="ledger"
    )


@command
def correct_clock(
    site_dir: SiteDirOption,
    yes: Annotated[bool, typer.Option("--yes", help="Answer the question with yes.")] = False,
    format: FormatOption = OutputFormat.TEXT,
) -> ClockCorrection:
    """Record that the clock was wrong when the last record was written, and is right now.

    A ledger refuses charges while the clock is behind its last record. Where that record's time was the mistake, this
    goes on from now; the correction itself stands in the ledger for everybody to see.
    """
    from pixcell_core.errors import BadInputError
    from site_client.ledger.site import open_site_ledger

    before = _read(site_dir).require_whole()
    if before.head is None:
        raise BadInputError(
            "This site has no privacy ledger yet, so there is no time to correct.",
            hint="Nothing has to be done.",
            code="no-ledger",
        )
    question = "Is the clock of this machine right now? The correction cannot be taken back."
    if not yes and not _asked(question):
        raise BadInputError("Not confirmed; nothing was recorded.", hint="Give --yes.", code="not-confirmed")
    with open_site_ledger(site_dir, correct_clock=True) as ledger:
        records, head = ledger.records, ledger.head
    new = records[len(before.records) :]
    return ClockCorrection(
        corrected=any(getattr(record, "reason", "") == "clock-corrected" for record in new),
        last_record_at=records[-1].time,
        head=f"{head.sequence} {head.hash}",
    )


def _read(site_dir: Path, key: VerifyKey | None = None) -> LedgerView:
    from pixcell_core.errors import BadInputError
    from site_client.ledger.site import ledger_folder, ledger_public_key
    from site_client.ledger.view import read_ledger

    if not site_dir.is_dir():
        raise BadInputError(
            f"There is no site folder at {site_dir}.",
            hint="Give the folder that `pixcell site enroll` made.",
            code="no-site-folder",
        )
    return read_ledger(ledger_folder(site_dir), key or ledger_public_key(site_dir))


def _asked(question: str) -> bool:
    import sys

    return sys.stdin.isatty() and typer.confirm(question)


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
