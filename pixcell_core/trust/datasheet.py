"""The datasheet of a bundle: what these tiles are, how they were made, what is promised and what is not.

It follows, byte for byte, from the signed manifest and verdict, so that verification writes it again and compares:
a datasheet that says more than was signed is refused. A new wording is a new function beside this one, never an
edit of it: bundles live longer than programs.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import datetime

from pixcell_core.contracts.release import ReleaseManifest
from pixcell_core.contracts.verdict import Verdict
from pixcell_core.trust.quorum import NamedSignature

AUDIENCE_WORDS = {
    "agreement": "parties to a written agreement",
    "registered": "registered users",
    "public": "anyone",
}

_SPECIAL = re.compile(r"([\\`*_{}\[\]<>#|~&])")

_LIMITS = (
    "Not for diagnosis, and not to be shown to a patient as anybody's tissue.",
    "A model trained on these tiles inherits what the generator cannot draw: rare findings are under-represented.",
    "The audit speaks about the kinds of copy it proved it can see, at the size of this release; attacks improve, "
    "so the verdict ends on the date above and must then be renewed.",
    "Patients of other sites are bounded by those sites' own ledgers, not by this document.",
)


def datasheet(
    manifest: ReleaseManifest,
    verdict: Verdict,
    signatures: Sequence[NamedSignature],
    exported_at: datetime,
) -> bytes:
    """The datasheet as UTF-8 Markdown, version 1."""
    generator, predicate, privacy = manifest.generator, verdict.predicate, manifest.privacy
    lines = [
        f"# Datasheet: {manifest.tile_count} synthetic histopathology tiles of {_plain(manifest.site)}",
        "",
        "**Every image here is synthetic.** It was made by a trained model, shows no patient, and is not for diagnosis.",
        "",
        "## What this is",
        "",
        f"- {manifest.tile_count} tiles of {manifest.width} × {manifest.height} pixels, 8-bit RGB, "
        f"{'PNG' if manifest.tile_format == 'png' else 'JPEG'}; labels, where there are any, stand in `manifest.json`",
        f"- released by {_plain(manifest.site)} for {AUDIENCE_WORDS[predicate.audience]}; sealed "
        f"{_day(manifest.created_at)}, exported {_day(exported_at)}",
        f"- Merkle root of the tiles: `{manifest.tiles_root}`",
    ]
    if manifest.filtered:
        lines.append(f"- {manifest.filtered}")
    lines += [
        "",
        "## How it was made",
        "",
        f"- base model `{generator.base_digest}`",
        f"- adapter {f'`{generator.adapter_digest}`' if generator.adapter_digest else 'none'}",
        f"- study {f'`{manifest.study_digest}`' if manifest.study_digest else 'none'}",
        f"- conditions: policy {_plain(generator.conditioning.policy)}. {_plain(generator.conditioning.promise)}",
        f"- guidance scale {generator.guidance_scale:g}, {generator.num_inference_steps} sampling steps",
        "",
        "## What is promised about privacy",
        "",
    ]
    if privacy is None:
        lines.append(
            "No differential privacy is claimed. The audit below is the only ground of this release."
        )
    else:
        lines += [
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
            f"State of the site's ledger: {f'`{manifest.ledger_head}`' if manifest.ledger_head else 'none'}",
        ]
    lines += ["", "## What the audit said", "", f"- verdict **{predicate.verdict}**"]
    if predicate.exception:
        lines += [
            f"- released by exception: {_plain(predicate.exception.approver)} answers for it",
            f"- reason: {_plain(predicate.exception.reason)}",
        ]
    proven = ", ".join(_plain(kind) for kind in predicate.proven_kinds) or "none"
    lines += [
        f"- kinds of copy this audit proved it can see: {proven}",
        f"- judged by {_plain(predicate.auditor.name)} {_plain(predicate.auditor.version)} under the policy "
        f"`{predicate.auditor.policy_digest}`",
        f"- evidence `{predicate.audit_report_digest}`, for people in `audit/report.html`",
        f"- holds from {_day(predicate.issued_at)} until {_day(predicate.expires_at)}",
        "",
        "Signed by:",
        "",
        *[
            f"- {signature.role}{f', {_plain(signature.name)}' if signature.name else ''}: `{signature.key_id}`"
            for signature in signatures
        ],
        "",
        "## Limits",
        "",
        *[f"- {text}" for text in _LIMITS],
        "",
        "## Licence and use",
        "",
        _plain(manifest.licence),
        "",
        _plain(manifest.usage),
        "",
        "## How to check this bundle",
        "",
        "Offline: `pixcell release verify BUNDLE --trust AUDITOR.pub`. It compares every byte with the signatures, and "
        "this page with what was signed.",
        "",
    ]
    return "\n".join(lines).encode("utf-8")


def _plain(text: str) -> str:
    """Words of others as words: no mark-up of theirs, no line of their own."""
    return _SPECIAL.sub(r"\\\1", " ".join(text.split()))


def _day(moment: datetime) -> str:
    return f"{moment:%Y-%m-%d}"
