"""The auditor's commands: `pixcell audit run | report | verify | decide | code`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pixcell_core.cli.contract import FormatOption, OutputFormat, command, emit_note
from pixcell_core.cli.main import group
from privacy_audit.audit_summary import AuditSummary, InstalledCode
from privacy_audit.policy_commands import PolicyOption
from privacy_audit.policy_commands import register as register_policy
from privacy_audit.review.commands import register as register_review

if TYPE_CHECKING:
    from pixcell_core.trust.log import EventLog
    from privacy_audit.ledger_export import LedgerTrust


def register(root: typer.Typer) -> None:
    """Add the auditor's commands to the root command."""
    audit = group(root, "audit")
    audit.command("run")(run)
    audit.command("report")(report)
    audit.command("verify")(verify)
    audit.command("decide")(decide)
    audit.command("code")(code)
    register_review(audit)
    register_policy(root)


File = Path | None
KeyOption = Annotated[
    Path | None,
    typer.Option("--key", help="Your signing key: the outcome also becomes an event of your own log."),
]
LogOption = Annotated[
    Path | None,
    typer.Option("--log", help="That log; without it the one of your folder, else KEY.log beside the key."),
]


@command
def run(
    train: Annotated[Path, typer.Option("--train", help="Training tiles: feature store or image folder.")],
    holdout: Annotated[Path, typer.Option("--holdout", help="Tiles of patients kept out of training.")],
    synthetic: Annotated[Path, typer.Option("--synthetic", help="The tiles that would be released.")],
    out: Annotated[Path, typer.Option("--out", help="Where report.json, report.html and site/ are written.")],
    policy: PolicyOption = None,
    seed: Annotated[
        int | None,
        typer.Option(
            "--seed",
            min=0,
            max=2**31 - 1,
            help="Another seed than follows from tiles and policy; the gate takes no other.",
        ),
    ] = None,
    filtered_from: Annotated[
        Path | None,
        typer.Option("--filtered-from", help="First audit, after which `release withhold` left tiles out."),
    ] = None,
    patients: Annotated[
        File, typer.Option("--patients", help="CSV file,patient where sub-folders are no patients.")
    ] = None,
    embeddings: Annotated[
        File,
        typer.Option(
            "--embeddings", help="npz or safetensors, keyed train/PATH, holdout/PATH, synthetic/PATH."
        ),
    ] = None,
    conditions: Annotated[
        File, typer.Option("--conditions", help="CSV or Parquet surrogate,tile: which tiles steered which.")
    ] = None,
    base_twins: Annotated[
        File,
        typer.Option(
            "--base-twins", help="What the base drew from the same seeds and conditions: a second null."
        ),
    ] = None,
    origins: Annotated[
        File,
        typer.Option("--origins", help="origins.json of a release: the names its tiles were drawn under."),
    ] = None,
    generator: Annotated[
        File, typer.Option("--generator", help="Transformer folder that drew the tiles.")
    ] = None,
    base: Annotated[File, typer.Option("--base", help="Public transformer it was fine-tuned from.")] = None,
    adapter: Annotated[
        File, typer.Option("--adapter", help="LoRA, if the generator is base + adapter.")
    ] = None,
    encoder: Annotated[
        str,
        typer.Option(
            "--encoder", help="The generator's own tile encoder, as `pixcell model encoders` names it."
        ),
    ] = "starter",
    autoencoder: Annotated[
        str, typer.Option("--autoencoder", help="The generator's own autoencoder.")
    ] = "starter",
    device: Annotated[
        str, typer.Option("--device", help="Where tiles are compared and weights attacked: auto, cpu, cuda.")
    ] = "auto",
    ledger_export: Annotated[
        File, typer.Option("--ledger-export", help="What `pixcell site budget export` wrote.")
    ] = None,
    ledger_key: Annotated[
        File,
        typer.Option("--ledger-key", help="The site's public ledger key, which that must be signed with."),
    ] = None,
    ledger_ca: Annotated[
        File,
        typer.Option(
            "--ledger-ca", help="Or the consortium's authority: the site's kit must vouch for that key."
        ),
    ] = None,
    revocations: Annotated[
        list[Path] | None,
        typer.Option("--revocations", help="The consortium's list of revoked certificates (repeatable)."),
    ] = None,
    canary_report: Annotated[
        File, typer.Option("--canary-report", help="JSON of `pixcell private audit` or `private canaries`.")
    ] = None,
    require_signed: Annotated[
        list[Path] | None,
        typer.Option("--require-signed", help="Public key that must have signed the policy (repeatable)."),
    ] = None,
    require_signatures: Annotated[
        int | None,
        typer.Option("--require-signatures", help="How many of those keys must have; all when absent."),
    ] = None,
    policy_signature: Annotated[
        File, typer.Option("--policy-signature", help="The policy's envelope; POLICY.dsse when absent.")
    ] = None,
    key: KeyOption = None,
    log: LogOption = None,
    format: FormatOption = OutputFormat.TEXT,
) -> AuditSummary:
    """May these tiles leave? Exit 0 for PASS and REVIEW, 1 for FAIL and INVALID.

    Writes OUT/report.json and OUT/report.html (numbers and hashes, made to be shared) and OUT/site/ (real tiles and
    distances, never to be exported). Within a site's folder the run is an event of the site's log.
    """
    from pixcell_core.cli.threads import wait_asleep

    wait_asleep()  # before anything imports torch
    from pixcell_core.trust.keys import VerifyKey
    from privacy_audit.battery import Extras
    from privacy_audit.ledger_export import sealed_manifest
    from privacy_audit.policy import load_policy
    from privacy_audit.policy_signature import require_signed as demand_signature
    from privacy_audit.run import AuditRequest, run_audit

    loaded = load_policy(policy)
    if require_signed or require_signatures is not None or policy_signature is not None:
        keys = [VerifyKey.load(path) for path in require_signed or ()]
        demand_signature(loaded, policy, *keys, needed=require_signatures, signature=policy_signature)
    logs = _logs(key, log, (synthetic, train, holdout, out))
    extras = Extras(
        conditions=conditions,
        weights=_weights(generator, base, adapter, encoder, autoencoder, device),
        ledger_export=ledger_export,
        ledger_trust=_ledger_trust(ledger_key, ledger_ca, revocations or ()),
        manifest=None if ledger_export is None else sealed_manifest(synthetic),
        canary_report=canary_report,
        embeddings=embeddings,
        base_twins=base_twins,
        origins=origins,
    )
    request = AuditRequest(
        train,
        holdout,
        synthetic,
        out,
        loaded,
        seed,
        filtered_from,
        extras=extras,
        patients=patients,
        device=device,
    )
    found = run_audit(request)
    _note(logs, out, found)
    return AuditSummary.of(out, found)


@command
def report(
    out: Annotated[Path, typer.Argument(help="Folder of a finished audit.")],
    format: FormatOption = OutputFormat.TEXT,
) -> AuditSummary:
    """Write report.html again from report.json and show the summary."""
    from privacy_audit.run import write_report
    from privacy_audit.verify import load_report

    found = load_report(out)
    write_report(out, found)
    return AuditSummary.of(out, found)


@command
def verify(
    out: Annotated[Path, typer.Argument(help="Folder of a finished audit.")],
    synthetic: Annotated[
        Path | None,
        typer.Option("--synthetic", help="Also compare the released tiles with the report's digests."),
    ] = None,
    format: FormatOption = OutputFormat.TEXT,
) -> Any:
    """Compute the verdict again from the evidence and compare; exit 1 when anything differs."""
    from privacy_audit.verify import verify_audit

    return verify_audit(out, synthetic)


@command
def decide(
    out: Annotated[Path, typer.Argument(help="Folder of a finished audit, with its site/ part.")],
    decisions: Annotated[
        Path, typer.Option("--decisions", help="Signed decisions about site/review-queue.json.")
    ],
    trust: Annotated[Path, typer.Option("--trust", help="Public key of the reviewer.")],
    key: KeyOption = None,
    log: LogOption = None,
    format: FormatOption = OutputFormat.TEXT,
) -> AuditSummary:
    """Count a reviewer's decisions into the verdict. A confirmed copy is FAIL; exit as `audit run`."""
    from datetime import UTC, datetime

    from pixcell_core.contracts import digest
    from pixcell_core.trust.dsse import Envelope
    from pixcell_core.trust.keys import VerifyKey
    from privacy_audit.deciding import decide as judge_again
    from privacy_audit.run import write_decided

    logs, envelope = _logs(key, log, (out,)), Envelope.load(decisions)
    decided = judge_again(out, envelope, VerifyKey.load(trust), datetime.now(UTC))
    write_decided(out, decided)
    _note(logs, out, decided.report, digest(envelope.to_bytes()))
    return AuditSummary.of(out, decided.report)


@command
def code(format: FormatOption = OutputFormat.TEXT) -> InstalledCode:
    """Name the auditing code that is installed here, by digest: what a verdict signed here says of itself."""
    from pixcell_core.contracts.artifacts import AUDITING_CODE, code_digest
    from privacy_audit.report import tool

    return InstalledCode(
        digest=code_digest(AUDITING_CODE), version=tool(eye="none").version, covers=AUDITING_CODE
    )


def _ledger_trust(key: Path | None, ca: Path | None, revocations: Sequence[Path]) -> LedgerTrust:
    from datetime import UTC, datetime

    from pixcell_core.contracts import read_bounded
    from pixcell_core.errors import BadInputError
    from pixcell_core.trust.certificates import read_authority
    from pixcell_core.trust.dsse import Envelope
    from pixcell_core.trust.keys import VerifyKey
    from privacy_audit.ledger_export import LedgerTrust

    if revocations and ca is None:
        raise BadInputError(
            "A revocation list was given, and no authority whose certificates it takes back.",
            hint="Give --ledger-ca CA.crt too.",
            code="nothing-to-revoke",
        )
    return LedgerTrust(
        key=None if key is None else VerifyKey.load(key),
        ca=None if ca is None else read_authority(read_bounded(ca, 65_536), ca.name),
        revocations=tuple(Envelope.load(path) for path in revocations),
        now=datetime.now(UTC),
    )


def _logs(key: Path | None, log: Path | None, paths: tuple[Path, ...]) -> tuple[EventLog | None, ...]:
    """The logs an audit becomes an event of; opened before it runs, so that none is run that cannot be recorded."""
    from pixcell_core.errors import BadInputError
    from pixcell_core.trust.party_log import log_of_site_around, own_log

    if key is None and log is not None:
        raise BadInputError(
            "A log is written with its owner's key, and none was given.",
            hint="Give --key KEY beside --log DIR.",
            code="log-without-key",
        )
    own = None if key is None else own_log(key, log)
    try:
        site = log_of_site_around(paths)
    except BadInputError as error:
        if own is None:
            raise
        emit_note(f"note: the site's log is not written: {error.message}")
        site = None
    return site, own


def _note(logs: tuple[EventLog | None, ...], out: Path, found: Any, decisions: str | None = None) -> None:
    from pixcell_core.contracts.canonical import file_digest
    from privacy_audit.log_event import AuditEvent
    from privacy_audit.report import REPORT

    AuditEvent.of(found, file_digest(out / REPORT), decisions).append_to(*logs)


def _weights(
    generator: Path | None,
    base: Path | None,
    adapter: Path | None,
    encoder: str,
    autoencoder: str,
    device: str,
) -> Any:
    from pixcell_core.errors import BadInputError
    from privacy_audit.membership_inputs import WeightsRequest

    if generator is None and base is None and adapter is None:
        return None
    if base is None or (generator is None and adapter is None):
        raise BadInputError(
            "Attacks on the weights need the generator and the base it was fine-tuned from.",
            hint="Give --generator DIR --base DIR, or --base DIR --adapter FILE.",
            code="weights-incomplete",
        )
    return WeightsRequest(generator or base, base, adapter, encoder, autoencoder, device)
