"""Offline commands anyone may run: `release verify`, `key new|show`, and those of the logs and of `private`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pixcell_core.cli import log_commands, private_commands, release_verify_command
from pixcell_core.cli.contract import FormatOption, OutputFormat, command
from pixcell_core.cli.main import group


def register(root: typer.Typer) -> None:
    """Add the `log`, `release verify`, `key` and `private` commands to the root command."""
    log_commands.register(root)
    release_verify_command.register(root)
    keys = group(root, "key")
    keys.command("new")(new_key)
    keys.command("show")(show_key)
    private_commands.register(root)


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
