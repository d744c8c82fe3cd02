"""The command of the human review: `pixcell audit review`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import BaseModel

from pixcell_core.cli.contract import FormatOption, OutputFormat, command, emit_note


class ReviewSigned(BaseModel):
    """What a finished review left: the signed files, and how pairs and decoys were read."""

    decisions: Path
    record: Path
    user: str
    reviewer: str
    items: int
    pairs_same: int
    pairs: int
    decoys_different: int
    decoys_same: int
    decoys: int
    decoy_agreement: float | None
    decoy_interval: tuple[float, float]
    marked: int
    marks: int
    clean_marked: int
    clean: int

    def __str__(self) -> str:
        lines = [f"{self.items} items decided by {self.user} ({self.reviewer})."]
        if self.decoys:
            low, high = self.decoy_interval
            lines.append(
                f"Decoys recognised as different: {self.decoys_different} of {self.decoys}, "
                f"95 % interval {low:.2f} to {high:.2f}; called the same field: {self.decoys_same}."
            )
        else:
            lines.append("There were no decoys: nothing shows how this reader reads innocent pairs.")
        lines.append(f"Nearest pairs called the same field: {self.pairs_same} of {self.pairs}.")
        if self.marks:
            lines.append(
                f"Tiles with a sign of text, ink or a label that were called marked: {self.marked} of {self.marks}; "
                f"of clean ones: {self.clean_marked} of {self.clean}."
            )
        lines += [
            f"Signed: {self.decisions}",
            "Count it into the verdict: pixcell audit decide OUT --decisions FILE --trust REVIEWER.pub",
        ]
        return "\n".join(lines)


def register(audit: typer.Typer) -> None:
    """Add `review` to the group of the audit's commands."""
    audit.command("review")(review)


@command
def review(
    out: Annotated[Path, typer.Argument(help="Folder of a finished audit, with its site/ part.")],
    key: Annotated[Path, typer.Option("--key", help="Your signing key (pixcell key new FILE).")],
    user: Annotated[str, typer.Option("--user", help="Your name, as it is recorded with the decisions.")],
    decisions: Annotated[
        Path | None,
        typer.Option("--decisions", help="Where to write them; site/review-decisions.json when left out."),
    ] = None,
    log: Annotated[
        Path | None,
        typer.Option("--log", help="Folder of your own log: the signature becomes an event of it."),
    ] = None,
    port: Annotated[
        int, typer.Option("--port", min=0, max=65_535, help="Port on 127.0.0.1; a free one when left out.")
    ] = 0,
    idle_minutes: Annotated[
        float, typer.Option("--idle-minutes", min=0.01, max=1440, help="End when nobody asks for so long.")
    ] = 60.0,
    format: FormatOption = OutputFormat.TEXT,
) -> Any:
    """Show the blinded pairs of an audit in your browser, on this machine alone, and sign what you decide.

    Keys: 1 same field, 2 different, 3 cannot tell; of single tiles 1 marked, 2 clean, 3 cannot tell. Arrows go back and
    forth. Each call is kept at once; stop with Ctrl-C and run the command again to go on.
    """
    from pixcell_core.trust.keys import SigningKey
    from privacy_audit.review.serving import serve_review
    from privacy_audit.review.session import ReviewSession

    session = ReviewSession(out, user, SigningKey.load(key), decisions=decisions, log=log)
    try:
        if session.calls:
            emit_note(
                f"{len(session.calls)} calls of an earlier sitting are kept; {session.open} items are open."
            )
        serve_review(
            session,
            port=port,
            idle_s=idle_minutes * 60,
            say=lambda address: emit_note(f"Open in a browser on this machine: {address}"),
        )
    finally:
        session.close()
    record = session.signed
    assert record is not None
    return ReviewSigned(
        decisions=session.decisions_file,
        record=session.record_file,
        user=record.user,
        reviewer=record.reviewer,
        items=len(session.queue.items),
        pairs_same=record.pairs.same,
        pairs=record.pairs.total,
        decoys_different=record.decoys.different,
        decoys_same=record.decoys.same,
        decoys=record.decoys.total,
        decoy_agreement=record.decoy_agreement,
        decoy_interval=record.decoy_interval,
        marked=record.marks.marked if record.marks else 0,
        marks=record.marks.total if record.marks else 0,
        clean_marked=record.clean.marked if record.clean else 0,
        clean=record.clean.total if record.clean else 0,
    )
