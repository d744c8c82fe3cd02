"""Offline commands anyone may run: `release verify`, `key new|show`, and those of the logs and of `private`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pixcell_core.cli import log_commands, private_commands
from pixcell_core.cli.contract import FormatOption, OutputFormat, command
from pixcell_core.cli.main import group


def register(root: typer.Typer) -> None:
    """Add the `log`, `release verify`, `key` and `private` commands to the root command."""
    log_commands.register(root)
    group(root, "release").command("verify")(verify_release)
    keys = group(root, "key")
    keys.command("new")(new_key)
    keys.command("show")(show_key)
    private_commands.register(root)


@command
def verify_release(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="A bundle: its folder or .zip file.")],
    trust: Annotated[
        list[Path] | None,
        typer.Option("--trust", help="Public key file of an auditor you trust (repeatable)."),
    ] = None,
    threshold: Annotated[
        int, typer.Option("--threshold", min=1, help="How many trusted signatures the verdict needs.")
    ] = 1,
    format: FormatOption = OutputFormat.TEXT,
) -> object:
    """Check a bundle offline: any changed byte fails, and the first thing wrong is named."""
    from datetime import UTC, datetime

    from pixcell_core.cli.contract import emit_note
    from pixcell_core.cli.progress import progress
    from pixcell_core.cli.trust_results import BundleVerified, checks_text
    from pixcell_core.errors import BadInputError, PixcellError
    from pixcell_core.trust.bundle import BundleVerifier
    from pixcell_core.trust.bundle_files import open_bundle
    from pixcell_core.trust.keys import VerifyKey

    if threshold > 1 and not trust:
        raise BadInputError(
            "A threshold counts trusted signatures, and no key was given.", hint="Add --trust KEYFILE."
        )
    keys = [VerifyKey.load(path) for path in trust] if trust else None
    with open_bundle(bundle) as files:
        verifier = BundleVerifier(files, trusted_keys=keys, threshold=threshold, now=datetime.now(UTC))
        try:
            with progress("checking tiles", unit="tiles") as bar:
                report = verifier.run(on_tile=bar.advance)
        except PixcellError:
            emit_note(checks_text(verifier.checks))
            raise
    return BundleVerified(**report.model_dump())


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
