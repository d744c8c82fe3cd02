"""Offline commands anyone may run: `log verify|show|head`, `release verify`, `key new|show`, and `private`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pixcell_core.cli import private_commands, release_verify_command
from pixcell_core.cli.contract import FormatOption, OutputFormat, command
from pixcell_core.cli.main import group

FolderArgument = Annotated[
    Path, typer.Argument(metavar="DIR", help="Folder of the log (log.jsonl, log.pub).")
]


def register(root: typer.Typer) -> None:
    """Add the `log`, `release verify`, `key` and `private` commands to the root command."""
    app = group(root, "log")
    app.command("verify")(verify)
    app.command("show")(show)
    app.command("head")(head)
    release_verify_command.register(root)
    keys = group(root, "key")
    keys.command("new")(new_key)
    keys.command("show")(show_key)
    private_commands.register(root)


@command
def verify(
    folder: FolderArgument,
    key: Annotated[
        list[Path] | None,
        typer.Option("--key", help="Public key file the log must be signed with (repeatable)."),
    ] = None,
    head: Annotated[
        list[Path] | None, typer.Option("--head", help="Head of this log seen earlier (repeatable).")
    ] = None,
    format: FormatOption = OutputFormat.TEXT,
) -> object:
    """Check every event, the Merkle tree and the signatures of a log; exit 1 names the first wrong line."""
    from pixcell_core.cli.trust_results import LogVerified
    from pixcell_core.trust.dsse import Envelope
    from pixcell_core.trust.keys import VerifyKey
    from pixcell_core.trust.log import verify_log

    keys = [VerifyKey.load(path) for path in key] if key else None
    heads = [Envelope.load(path) for path in head or ()]
    report = verify_log(folder, trusted_keys=keys, earlier_heads=heads)
    return LogVerified(**report.model_dump())


@command
def show(
    folder: FolderArgument,
    last: Annotated[int, typer.Option("--last", min=1, help="How many of the newest events to show.")] = 20,
    format: FormatOption = OutputFormat.TEXT,
) -> object:
    """Show the newest events of a log, after checking all of it."""
    from pixcell_core.cli.trust_results import LogShown
    from pixcell_core.trust.log import read_entries, verify_log

    report = verify_log(folder)
    return LogShown(total=report.entries, events=read_entries(folder)[-last:])


@command
def head(
    folder: FolderArgument,
    out: Annotated[Path | None, typer.Option("--out", help="Write the signed head to this file.")] = None,
    format: FormatOption = OutputFormat.TEXT,
) -> object:
    """Give the newest signed head, which others keep so that this log's past cannot be rewritten."""
    from pixcell_core.cli.trust_results import LogHead
    from pixcell_core.errors import BadInputError
    from pixcell_core.trust.log import newest_head, verify_log

    report = verify_log(folder)
    envelope = newest_head(folder)
    if envelope is None or report.root is None:
        raise BadInputError(
            "The log is empty: it has no head yet.", hint="Give the folder of a log with events."
        )
    if out is not None:
        from pixcell_core.trust.durable import write_whole

        write_whole(out, envelope.to_bytes())
    return LogHead(tree_size=report.entries, root=report.root, key_id=report.key_id, head=envelope)


@command
def new_key(
    path: Annotated[Path, typer.Argument(metavar="FILE", help="Where to write the private key.")],
    format: FormatOption = OutputFormat.TEXT,
) -> object:
    """Make a signing key: FILE (private, readable by you alone) and FILE.pub (give that to others)."""
    from pixcell_core.cli.trust_results import KeyShown
    from pixcell_core.trust.keys import SigningKey

    key = SigningKey.generate()
    key.save(path)
    public = path.with_name(path.name + ".pub")
    key.verify_key.save(public)
    return KeyShown(key_id=key.key_id, public_key=public)


@command
def show_key(
    path: Annotated[Path, typer.Argument(metavar="FILE.pub", help="A public key file.")],
    format: FormatOption = OutputFormat.TEXT,
) -> object:
    """Show a public key's identity, to compare it with its owner aloud or on paper."""
    from pixcell_core.cli.trust_results import KeyShown
    from pixcell_core.trust.keys import VerifyKey

    return KeyShown(key_id=VerifyKey.load(path).key_id, public_key=path)
