"""`pixcell release verify BUNDLE`: what a recipient runs, offline, with nothing but the bundle and what they know."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pixcell_core.cli.contract import FormatOption, OutputFormat, command
from pixcell_core.cli.main import group


def register(root: typer.Typer) -> None:
    """Add `release verify` to the root command."""
    group(root, "release").command("verify")(verify_release)


@command
def verify_release(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="A bundle: its folder or .zip file.")],
    trust: Annotated[
        list[Path] | None,
        typer.Option(
            "--trust",
            help="Public key file of an auditor you trust (repeatable); one at least must have signed as an auditor.",
        ),
    ] = None,
    threshold: Annotated[
        int,
        typer.Option(
            "--threshold", min=1, help="How many of the keys you trust must have signed the verdict."
        ),
    ] = 1,
    signers: Annotated[
        str | None,
        typer.Option("--signers", help="Who must have signed: the site's signers' document, or its digest."),
    ] = None,
    ca: Annotated[
        Path | None,
        typer.Option("--ca", help="A consortium's authority; each auditor then needs its certificate."),
    ] = None,
    revocations: Annotated[
        list[Path] | None,
        typer.Option("--revocations", help="The consortium's list of revoked certificates (repeatable)."),
    ] = None,
    withdrawals: Annotated[
        list[Path] | None,
        typer.Option("--withdrawals", help="A signer's list of releases that were taken back (repeatable)."),
    ] = None,
    auditing_code: Annotated[
        list[str] | None,
        typer.Option(
            "--auditing-code",
            metavar="DIGEST",
            help="Auditing code whose judgement counts (repeatable): a digest, or `installed` for the code here.",
        ),
    ] = None,
    format: FormatOption = OutputFormat.TEXT,
) -> object:
    """Check a bundle offline: any changed byte fails, and the first thing wrong is named."""
    from datetime import UTC, datetime

    from pixcell_core.cli.contract import emit_note
    from pixcell_core.cli.progress import progress
    from pixcell_core.cli.trust_results import BundleVerified, checks_text
    from pixcell_core.contracts.canonical import load_document, read_bounded
    from pixcell_core.contracts.gate import Signers
    from pixcell_core.errors import BadInputError, PixcellError
    from pixcell_core.trust.bundle import BundleVerifier, Known
    from pixcell_core.trust.bundle_files import open_bundle
    from pixcell_core.trust.certificates import read_authority
    from pixcell_core.trust.dsse import Envelope
    from pixcell_core.trust.keys import VerifyKey

    if threshold > 1 and not trust:
        raise BadInputError(
            "A threshold counts trusted signatures, and no key was given.", hint="Add --trust KEYFILE."
        )
    keys = [VerifyKey.load(path) for path in trust] if trust else None
    pinned = signers
    if signers is not None and not signers.startswith("sha256:"):
        pinned = load_document(Signers, Path(signers)).digest
    known = Known(
        signers_digest=pinned,
        ca=None if ca is None else read_authority(read_bounded(ca, 65_536), ca.name),
        revocations=tuple(Envelope.load(path) for path in revocations or ()),
        withdrawals=tuple(Envelope.load(path) for path in withdrawals or ()),
        auditing_code=tuple(_code(word) for word in auditing_code or ()),
    )
    with open_bundle(bundle) as files:
        verifier = BundleVerifier(
            files, trusted_keys=keys, threshold=threshold, now=datetime.now(UTC), known=known
        )
        try:
            with progress("checking tiles", unit="tiles") as bar:
                report = verifier.run(on_tile=bar.advance)
        except PixcellError:
            emit_note(checks_text(verifier.checks))
            raise
    return BundleVerified(**report.model_dump())


def _code(word: str) -> str:
    from pydantic import TypeAdapter, ValidationError

    from pixcell_core.contracts.artifacts import AUDITING_CODE, code_digest
    from pixcell_core.contracts.canonical import Digest
    from pixcell_core.errors import BadInputError

    if word == "installed":
        return code_digest(AUDITING_CODE)
    try:
        return TypeAdapter(Digest).validate_python(word)
    except ValidationError as error:
        raise BadInputError(
            f"{word!r} is no digest of code.",
            hint="Give sha256: and 64 hexadecimal digits, as `pixcell audit code` prints them, or `installed`.",
            code="bad-code-digest",
        ) from error
