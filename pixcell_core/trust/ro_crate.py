"""The bundle as a research object: `ro-crate-metadata.json` in the form of RO-Crate 1.1 (JSON-LD).

Specification: www.researchobject.org/ro-crate/1.1/ (sections "Root Data Entity", "Data Entities", "Provenance of
Entities"). Like the datasheet it follows byte for byte from what was signed, and verification writes it again.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any

from pixcell_core.contracts.canonical import canonical_bytes
from pixcell_core.contracts.release import ReleaseManifest
from pixcell_core.contracts.verdict import Verdict

CONTEXT = "https://w3id.org/ro/crate/1.1/context"
CONFORMS_TO = "https://w3id.org/ro/crate/1.1"
METADATA = "ro-crate-metadata.json"

_FORMS = {"tiles/": "", "dicom/": "DICOM", "c2pa/": "PNG with content credentials"}
_FORMATS = {
    ".json": "application/json",
    ".html": "text/html",
    ".md": "text/markdown",
    ".txt": "text/plain",
    ".png": "image/png",
    ".pub": "application/x-pem-file",
}
_ABOUT = {
    "README.txt": "What lies in the bundle and how to check it",
    "datasheet.md": "Datasheet: what, how made, privacy statement, verdict, limits, licence",
    "datasheet.html": "The same datasheet as a page that stands alone",
    "manifest.json": "Every tile by digest, sealed before the audit",
    "verdict.dsse.json": "Signed verdict: an in-toto statement in a DSSE envelope",
    "request.dsse.json": "What the site asked the signers for, signed",
    "bundle.dsse.json": "The site's signed list of all files",
    "signers.json": "Who may sign, and how many must",
    "audit/report.html": "The audit for people",
    "audit/report.json": "The audit for programs",
    "sample-sheet.png": "Some of the tiles on one page",
}


def ro_crate(
    manifest: ReleaseManifest, verdict: Verdict, names: Iterable[str], exported_at: datetime
) -> bytes:
    """The metadata file for a bundle that holds `names`, as canonical JSON. Tiles stand as folders, not one by one."""
    present = [name for name in names if name != METADATA]
    files = sorted(name for name in present if not name.startswith(tuple(_FORMS)))
    folders = [form for form in _FORMS if form == "tiles/" or any(name.startswith(form) for name in present)]
    parts = [*folders, *files]
    generator, predicate = manifest.generator, verdict.predicate
    models = [generator.base_digest] + [generator.adapter_digest] * (generator.adapter_digest is not None)
    day = exported_at.astimezone(UTC).replace(microsecond=0).isoformat()
    graph: list[dict[str, Any]] = [
        {
            "@id": METADATA,
            "@type": "CreativeWork",
            "about": {"@id": "./"},
            "conformsTo": {"@id": CONFORMS_TO},
        },
        {
            "@id": "./",
            "@type": "Dataset",
            "name": f"Synthetic histopathology tiles of {manifest.site}",
            "description": f"{manifest.tile_count} synthetic tiles made by a trained model. They show no patient and "
            f"are not for diagnosis. Audit verdict: {predicate.verdict}.",
            "datePublished": day,
            "expires": predicate.expires_at.astimezone(UTC).isoformat(),
            "identifier": manifest.digest,
            "license": {"@id": "#licence"},
            "usageInfo": manifest.usage,
            "publisher": {"@id": f"#site-{manifest.site}"},
            "hasPart": [{"@id": part} for part in parts],
        },
        {
            "@id": "#licence",
            "@type": "CreativeWork",
            "name": "Terms of these tiles",
            "description": manifest.licence,
        },
        {"@id": f"#site-{manifest.site}", "@type": "Organization", "name": manifest.site},
        {
            "@id": "#making",
            "@type": "CreateAction",
            "name": "Drawing the tiles",
            "endTime": manifest.created_at.astimezone(UTC).isoformat(),
            "agent": {"@id": f"#site-{manifest.site}"},
            "instrument": [{"@id": f"#model-{model}"} for model in models],
            "result": {"@id": "tiles/"},
            "description": f"{generator.conditioning.policy}: {generator.conditioning.promise}",
        },
        {
            "@id": "#audit",
            "@type": "AssessAction",
            "name": f"Privacy audit: {predicate.verdict}",
            "object": {"@id": "tiles/"},
            "instrument": {"@id": "#auditor"},
            "result": {"@id": "verdict.dsse.json"},
            "endTime": predicate.issued_at.astimezone(UTC).isoformat(),
        },
        {
            "@id": "#auditor",
            "@type": "SoftwareApplication",
            "name": predicate.auditor.name,
            "version": predicate.auditor.version,
        },
    ]
    graph += [
        {
            "@id": f"#model-{model}",
            "@type": "SoftwareApplication",
            "name": "adapter" if number else "base model",
            "identifier": model,
        }
        for number, model in enumerate(models)
    ]
    graph += [_folder(folder, manifest) for folder in folders]
    graph += [_file(name) for name in files]
    return canonical_bytes({"@context": CONTEXT, "@graph": graph})


def _folder(folder: str, manifest: ReleaseManifest) -> dict[str, Any]:
    form = _FORMS[folder] or manifest.tile_format.upper()
    return {
        "@id": folder,
        "@type": "Dataset",
        "name": f"The tiles ({form})",
        "description": f"{manifest.tile_count} files, Merkle root {manifest.tiles_root}",
        "additionalType": manifest.digital_source_type,
    }


def _file(name: str) -> dict[str, Any]:
    suffix = name[name.rindex(".") :]
    about = _ABOUT.get(
        name, "A signer's public key" if name.startswith("keys/") else "A signer's certificate"
    )
    return {"@id": name, "@type": "File", "name": about, "encodingFormat": _FORMATS[suffix]}
