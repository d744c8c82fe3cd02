"""The datasheet of a bundle, second wording: what a hospital's lawyer and a receiving researcher ask, in their order.

What it is, from how many patients, how it was made, what is promised, what was tested and with what power, what was not
tested, until when it holds and how it can be taken back, what it may and must not be used for. All of it follows, byte
for byte, from the signed manifest, the verdict, and the report whose digest the verdict holds.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import datetime

from pixcell_core.contracts.audit_facts import AuditFacts
from pixcell_core.contracts.release import ReleaseManifest
from pixcell_core.contracts.seen_text import without_unseen
from pixcell_core.contracts.verdict import Verdict
from pixcell_core.trust.datasheet import AUDIENCE_WORDS
from pixcell_core.trust.quorum import NamedSignature

_SPECIAL = re.compile(r"([\\`*_{}\[\]<>#|~&])")
_LONGEST = 600

_INTENDED = {
    "agreement": "Use by the parties to a written agreement with the releasing site, within that agreement.",
    "registered": "Use by people who registered with the releasing site, under the terms they accepted there.",
    "public": "Use by anyone, under the licence below.",
}
_FORBIDDEN = (
    "Diagnosis, treatment, triage or any other decision about a person.",
    "Showing a tile as anybody's tissue, or mixing tiles with real ones without saying which is which.",
    "Any attempt to find out whose slides the generator learned from, to link tiles to a person, or to test whether a "
    "person was among the patients, other than an audit that the releasing site agreed to.",
    "Use after the day on which the verdict ends, or after a withdrawal.",
    "Passing tiles on without this datasheet and the verdict, or to others than the audience above.",
)
_LIMITS = (
    "A model trained on these tiles inherits what the generator cannot draw: rare findings are under-represented.",
    "The audit speaks about the kinds of copy it proved it can see, at the size of this release; attacks improve, so the "
    "verdict ends and must then be renewed.",
    "Patients of other sites are bounded by those sites' own ledgers, not by this document.",
    "Numbers of patients and real tiles are given in bands, so that nobody can be counted out.",
)


def full_datasheet(
    manifest: ReleaseManifest,
    verdict: Verdict,
    signatures: Sequence[NamedSignature],
    exported_at: datetime,
    facts: AuditFacts,
) -> bytes:
    """The datasheet as UTF-8 Markdown, version 2."""
    parts = (
        _what(manifest, verdict, exported_at),
        _made(manifest, facts),
        _promised(manifest),
        _tested(verdict, facts),
        _untested(facts),
        _until(manifest, verdict, signatures),
        _use(manifest, verdict),
    )
    return ("\n".join(line for part in parts for line in part) + "\n").encode("utf-8")


def _what(manifest: ReleaseManifest, verdict: Verdict, exported_at: datetime) -> list[str]:
    labelled = sum(tile.label is not None for tile in manifest.tiles)
    lines = [
        f"# Datasheet: {manifest.tile_count} synthetic histopathology tiles of {_plain(manifest.site)}",
        "",
        "**Every image here is synthetic.** It was made by a trained model, shows no patient, and is not for diagnosis.",
        "",
        "## What this is",
        "",
        f"- {manifest.tile_count} tiles of {manifest.width} × {manifest.height} pixels, 8-bit RGB, "
        f"{'PNG' if manifest.tile_format == 'png' else 'JPEG'}",
        f"- {labelled} of them carry a label, which stands in `manifest.json`",
        f"- released by {_plain(manifest.site)} for {AUDIENCE_WORDS[verdict.predicate.audience]}",
        f"- sealed {_day(manifest.created_at)}, exported {_day(exported_at)}",
        f"- Merkle root of the tiles: `{manifest.tiles_root}`",
        f"- digest of the manifest, by which a withdrawal names this release: `{manifest.digest}`",
    ]
    return lines + ([f"- {manifest.filtered}"] if manifest.filtered else [])


def _made(manifest: ReleaseManifest, facts: AuditFacts) -> list[str]:
    generator, train, holdout = manifest.generator, facts.subjects.train, facts.subjects.holdout
    return [
        "",
        "## From whom and how it was made",
        "",
        f"- the training set of {_plain(manifest.site)}, which the audit searched for copies of: {_plain(train.tiles)} real "
        f"tiles of {_plain(train.patients)} patients",
        f"- kept out of training, for the audit to compare with: {_plain(holdout.tiles)} real tiles of "
        f"{_plain(holdout.patients)} further patients",
        f"- base model `{generator.base_digest}`",
        f"- adapter {f'`{generator.adapter_digest}`' if generator.adapter_digest else 'none'}",
        f"- study {f'`{manifest.study_digest}`' if manifest.study_digest else 'none'}",
        f"- conditions: policy {_plain(generator.conditioning.policy)}. {_plain(generator.conditioning.promise)}",
        f"- guidance scale {generator.guidance_scale:g}, {generator.num_inference_steps} sampling steps",
    ]


def _promised(manifest: ReleaseManifest) -> list[str]:
    lines, privacy = ["", "## What is promised about privacy", ""], manifest.privacy
    if privacy is None:
        return [
            *lines,
            "No differential privacy is claimed. The audit below is the only ground of this release.",
        ]
    head = f"`{manifest.ledger_head}`" if manifest.ledger_head else "none"
    return [
        *lines,
        f"Epsilon {privacy.epsilon:.3g} per {privacy.unit} at delta {privacy.delta:.1g}, by "
        f"{_plain(privacy.accountant)}: {_plain(privacy.mechanism)}.",
        "",
        "This number covers:",
        "",
        *[f"- {_plain(text)}" for text in privacy.covers],
        "",
        "It does **not** cover:",
        "",
        *[f"- {_plain(text)}" for text in privacy.does_not_cover],
        "",
        f"State of the site's ledger: {head}",
    ]


def _tested(verdict: Verdict, facts: AuditFacts) -> list[str]:
    predicate = verdict.predicate
    lines = ["", "## What was tested, and with what power", "", f"- verdict **{predicate.verdict}**"]
    if predicate.exception:
        lines += [
            f"- released by exception: {_plain(predicate.exception.approver)} answers for it",
            f"- reason: {_plain(predicate.exception.reason)}",
        ]
    lines += [f"- {_plain(facts.summary)}", "", "Each test that counts, with what it claims:", ""]
    lines += [
        f"- {_plain(test.name)}: **{_plain(test.status)}**. {_plain(test.claim)}"
        for test in facts.tests
        if test.gating and test.tested
    ]
    power = [found for test in facts.tests for found in test.detections]
    lines += ["", "Copies were planted in the same run, to show what it can see:", ""]
    lines += [
        f"- {_plain(found.words)}: {found.found} of {found.planted} found, sensitivity at least {found.lower:.2f} "
        "(95 %, one-sided)"
        for found in power
    ] or ["- the report gives no numbers of planted copies"]
    proven = ", ".join(_plain(kind) for kind in predicate.proven_kinds) or "none"
    code = f", code `{predicate.auditor.code_digest}`" if predicate.auditor.code_digest else ""
    return [
        *lines,
        f"- kinds of copy this audit proved it can see: {proven}",
        "",
        f"Judged by {_plain(predicate.auditor.name)} {_plain(predicate.auditor.version)}{code}, under the policy "
        f"`{predicate.auditor.policy_digest}`. Evidence `{predicate.audit_report_digest}`; for people in "
        "`audit/report.html`.",
    ]


def _untested(facts: AuditFacts) -> list[str]:
    missing = dict.fromkeys(_plain(text) for text in facts.not_tested)
    blind = dict.fromkeys(
        _plain(test.cannot_show) for test in facts.tests if test.gating and test.tested and test.cannot_show
    )
    return [
        "",
        "## What was not tested",
        "",
        *([f"- {text}" for text in missing] or ["- the report names nothing that was left out"]),
        "",
        "What the tests that were run cannot show:",
        "",
        *([f"- {text}" for text in blind] or ["- the report does not say"]),
    ]


def _until(manifest: ReleaseManifest, verdict: Verdict, signatures: Sequence[NamedSignature]) -> list[str]:
    predicate = verdict.predicate
    contact = _plain(manifest.contact) if manifest.contact else f"the releasing site, {_plain(manifest.site)}"
    return [
        "",
        "## Until when it holds, and how it can be taken back",
        "",
        f"- holds from {_day(predicate.issued_at)} until {_day(predicate.expires_at)}",
        "- the site, and each signer below, can withdraw it at any time by a signed list that names the manifest's digest",
        f"- questions, and the newest list of withdrawals: {contact}",
        "- check it before each new use: `pixcell release verify BUNDLE --withdrawals LIST`",
        "",
        "Signed by:",
        "",
        *[
            f"- {signature.role}{f', {_plain(signature.name)}' if signature.name else ''}: `{signature.key_id}`"
            for signature in signatures
        ],
    ]


def _use(manifest: ReleaseManifest, verdict: Verdict) -> list[str]:
    return [
        *("", "## Licence", "", _plain(manifest.licence)),
        *("", "## Intended use", "", _plain(manifest.usage), "", _INTENDED[verdict.predicate.audience]),
        *("", "## Forbidden use", "", *[f"- {text}" for text in _FORBIDDEN]),
        *("", "## Limits", "", *[f"- {text}" for text in _LIMITS]),
        *("", "## How to check this bundle", ""),
        "Offline: `pixcell release verify BUNDLE --trust AUDITOR.pub`. It compares every byte with the signatures, and "
        "this page with what was signed.",
    ]


def _plain(text: str) -> str:
    """Words of others as words: no mark-up of theirs, no line of their own, nothing unseen, of a bearable length."""
    seen = without_unseen(" ".join(text.split()))
    return _SPECIAL.sub(r"\\\1", seen if len(seen) <= _LONGEST else seen[: _LONGEST - 1] + "…")


def _day(moment: datetime) -> str:
    return f"{moment:%Y-%m-%d}"
