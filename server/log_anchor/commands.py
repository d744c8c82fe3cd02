"""Commands of the coordinator about logs: `pixcell log anchor`, `anchors`, `restart`, `acts`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from pydantic import BaseModel

from pixcell_core.cli.confirm import confirm
from pixcell_core.cli.contract import FormatOption, OutputFormat, command
from pixcell_core.cli.main import group

if TYPE_CHECKING:
    from server.layout import ServerLayout
    from server.log_anchor.act_log import ActsCopied
    from server.log_anchor.anchors import Anchored

DirOption = Annotated[Path, typer.Option("--dir", help="The coordinator's folder.")]


class AnchoredShown(BaseModel):
    """A party's newest anchored head."""

    party: str
    tree_size: int
    root: str
    log_key: str
    event: int
    time: str


class AnchorList(BaseModel):
    """The newest anchored head of every party, and the key their receipts are checked with."""

    coordinator_key: str
    public_key: Path
    heads: list[AnchoredShown]

    def __str__(self) -> str:
        lines = [f"This log's key, to compare aloud: {self.coordinator_key}", f"  {self.public_key}"]
        lines += [
            f"{h.party}: {h.tree_size} events, anchored {h.time} as event {h.event}" for h in self.heads
        ]
        return "\n".join(lines if self.heads else [*lines, "no party has offered a head"])


class Restarted(BaseModel):
    """A party that begins a new log."""

    party: str
    ended_at: int
    root: str

    def __str__(self) -> str:
        return (
            f"{self.party} begins a new log; the old one ends here at {self.ended_at} events, root {self.root}.\n"
            "There: remove anchor.json from the log's folder, then `pixcell log offer` as at the first time."
        )


def register(root: typer.Typer) -> None:
    """Add the commands to `root`."""
    log = group(root, "log")

    @log.command("anchor")
    @command
    def anchor(
        offer: Annotated[Path, typer.Argument(metavar="OFFER", help="A party's `pixcell log offer` file.")],
        folder: DirOption,
        out: Annotated[Path | None, typer.Option("--out", help="Also write the receipt here.")] = None,
        format: FormatOption = OutputFormat.TEXT,
    ) -> Anchored:
        """Anchor a party's head in this log, if the party's log only grew; writes the receipt. A fork exits 1."""
        from pixcell_core.trust.dsse import Envelope
        from pixcell_core.trust.durable import write_whole
        from server.log_anchor.anchors import AnchorBook

        done = AnchorBook(_layout(folder)).anchor(Envelope.load(offer))
        if out is not None:
            write_whole(out, done.receipt.read_bytes())
            done = done.model_copy(update={"receipt": out})
        return done

    @log.command("anchors")
    @command
    def anchors(folder: DirOption, format: FormatOption = OutputFormat.TEXT) -> AnchorList:
        """List the newest anchored head of every party, after checking this log."""
        from pixcell_core.trust.log import KEY_FILE
        from server.log_anchor.act_log import CoordinatorLog
        from server.log_anchor.anchors import AnchorBook

        layout = _layout(folder)
        log = CoordinatorLog(layout)
        log.verify()
        heads = [
            AnchoredShown(
                party=one.party,
                tree_size=one.head.tree_size,
                root=one.head.root,
                log_key=one.log_key.key_id,
                event=one.index,
                time=one.time,
            )
            for one in AnchorBook(layout).all().values()
        ]
        return AnchorList(
            coordinator_key=log.verify_key.key_id, public_key=log.folder / KEY_FILE, heads=heads
        )

    @log.command("restart")
    @command
    def restart(
        party: Annotated[str, typer.Argument(help="The party whose log cannot go on.")],
        folder: DirOption,
        reason: Annotated[str, typer.Option("--reason", help="What the party said; kept in this log.")],
        yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
        format: FormatOption = OutputFormat.TEXT,
    ) -> Restarted:
        """Let a party begin a new log after it explained why the old one is lost. The old head stays on record."""
        from server.log_anchor.anchors import AnchorBook

        book = AnchorBook(_layout(folder))
        if not yes:
            confirm(
                f"Let {party} begin a new log? Its past can then be checked no further than its old head.",
                otherwise="nothing was changed",
            )
        last = book.restart(party, reason)
        return Restarted(party=party, ended_at=last.head.tree_size, root=last.head.root)

    @log.command("acts")
    @command
    def acts(folder: DirOption, format: FormatOption = OutputFormat.TEXT) -> ActsCopied:
        """Copy the registry's acts into this log and compare the two; exit 1 where a logged act is gone."""
        from server.log_anchor.act_log import CoordinatorLog

        return CoordinatorLog(_layout(folder)).copy_acts()


def _layout(folder: Path) -> ServerLayout:
    from server.layout import ServerLayout

    return ServerLayout(folder.absolute()).check()
