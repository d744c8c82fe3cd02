"""Sealing a draft: tiles become numbered PNG files without metadata, named one by one in a manifest."""

from __future__ import annotations

import csv
import io
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from pixcell_core.contracts.canonical import canonical_bytes, digest
from pixcell_core.contracts.release import (
    GenerationRecord,
    PrivacyStatement,
    ReleasedTile,
    ReleaseManifest,
    TileFormat,
    tile_name,
    tiles_root,
)
from pixcell_core.errors import PixcellError, RefusedError
from pixcell_core.trust.bundle_files import MANIFEST, README, SHEET
from pixcell_core.trust.durable import sync_folder, write_whole
from pixcell_core.trust.tile_jpeg import decode_named, encode_as
from pixcell_core.trust.tile_png import pixel_digest
from site_client.generate.policy_names import PRIVATE, VOTE_PURPOSE
from site_client.release.sheet import SHEET_TILES, Terms, readme, sample_sheet
from site_client.release.source_tiles import TABLE, SourceTile, read_source
from site_client.release.workspace import ORIGINS, ReleaseFolder, ReleaseWorkspace, release_id_of

if TYPE_CHECKING:
    from collections.abc import Iterator


COVERS_MODEL = "the weights released by training on this site's patients, over every recorded round and study"
COVERS_CONDITIONS = (
    "the conditions and labels of these tiles, composed with the weights and with every other vote recorded as one "
    "number:"
)
NOT_COVERED_WHEN_VOTED = (
    "other tiles of this site whose conditions are not private (policies own and blend)",
    "statistics released without noise, and patients who are also at another site",
    "patients of other sites whose training is in the adapter: each site's own ledger bounds that",
    "which tiles were left out after an audit, and what the audit found: it looks at private tiles",
    "what the site chose without looking at a patient: how many tiles, their size, the sampler's settings",
)
"""What the one number for model and conditions says nothing about."""


@dataclass(frozen=True)
class LedgerFacts:
    """What the site's ledger says at the time of sealing."""

    privacy: PrivacyStatement | None
    head: str | None


@dataclass(frozen=True)
class _Encoded:
    """One tile in the form that leaves, not yet numbered; `source_digest` is of the pixels before, which JPEG changes."""

    source: SourceTile
    file: Path
    file_digest: str
    pixel_digest: str
    source_digest: str


def seal_draft(
    workspace: ReleaseWorkspace,
    tiles: Path,
    *,
    now: datetime,
    site: str | None = None,
    terms: Terms | None = None,
    record_file: Path | None = None,
    tile_format: TileFormat = "png",
    on_tile: Callable[[], None] = lambda: None,
) -> ReleaseFolder:
    """Re-encode every tile, number them by their pixels' digests, and seal a manifest over the result.

    PNG keeps the pixels as they are; JPEG changes them, and what is audited and released is the changed ones.

    The order of the numbers follows digests, so that neither names nor places of the source files show.
    Nothing is left behind when it fails.
    """
    workspace.require()
    source = read_source(tiles, record_file)
    site_name = workspace.site_name(site)
    generator = source.record.generator()
    facts = ledger_facts(workspace.site_dir, source.record)
    terms = terms or Terms()
    site_key = workspace.site_key()
    workspace.releases.mkdir(parents=True, exist_ok=True)
    with drafting_folder(workspace.releases) as scratch:
        encoded, (height, width) = _encode_all(source.decode(), scratch, tile_format, on_tile)
        # After decoding: a picture that shows real tiles is refused by that name first.
        require_recorded(source.record, encoded)
        encoded.sort(key=lambda tile: (tile.pixel_digest, tile.file.name))
        folder = scratch / "sealed"
        (folder / "tiles").mkdir(parents=True)
        released: list[ReleasedTile] = []
        for number, tile in enumerate(encoded, start=1):
            name = tile_name(number, tile_format)
            tile.file.rename(folder / "tiles" / name)
            released.append(
                ReleasedTile(
                    name=name,
                    file_digest=tile.file_digest,
                    pixel_digest=tile.pixel_digest,
                    label=tile.source.label,
                )
            )
        sheet = sheet_of(folder / "tiles", released)
        words = readme(
            site_name, generator, facts.privacy, terms, tiles=len(released), width=width, height=height
        )
        manifest = ReleaseManifest(
            site=site_name,
            site_key_id=site_key.key_id,
            study_digest=source.record.study_digest,
            generator=generator,
            privacy=facts.privacy,
            ledger_head=facts.head,
            created_at=now.astimezone(UTC).replace(microsecond=0),
            width=width,
            height=height,
            tile_count=len(released),
            tiles_root=tiles_root(tile.file_digest for tile in released),
            tiles=tuple(released),
            sample_sheet_digest=digest(sheet),
            readme_digest=digest(words),
            licence=terms.licence,
            usage=terms.usage,
            contact=terms.contact,
        )
        write_whole(folder / SHEET, sheet)
        write_whole(folder / README, words)
        write_whole(folder / MANIFEST, manifest.to_bytes())
        write_whole(folder / ORIGINS, _origins(encoded, tiles, tile_format), mode=0o600)
        if any(tile.source.label or tile.source.condition for tile in encoded):
            write_whole(folder / "tiles" / TABLE, _audit_table(encoded, tile_format))
        release = ReleaseFolder(workspace.releases / release_id_of(manifest))
        if release.path.exists():
            # The same tiles sealed twice within one second are the same release.
            return release
        # The event first: a crash in between leaves a line about nothing, and never a folder that no line is about.
        workspace.log().append(
            "release.sealed",
            {
                "release": release.release_id,
                "manifest": manifest.digest,
                "tiles": manifest.tile_count,
                "tiles_root": manifest.tiles_root,
                "study": manifest.study_digest,
            },
            now=now,
        )
        folder.rename(release.path)
        sync_folder(workspace.releases)
    return release


def ledger_facts(site_dir: Path, record: GenerationRecord) -> LedgerFacts:
    """The privacy statement and head of the site's ledger; a broken ledger refuses the draft.

    The statement counts everything the ledger charged, training and votes alike, composed as one number, so it bounds
    this study's part from above. It covers the conditions only where the policy is `private` and this very study
    charged for them.

    Raises:
        RefusedError: the tiles say `private`, and the ledger never charged this study for conditions.
    """
    from pixcell_core.private.ledger_record import ReserveRecord
    from site_client.ledger.site import ledger_folder, ledger_public_key
    from site_client.ledger.view import read_ledger

    view = read_ledger(ledger_folder(site_dir), ledger_public_key(site_dir)).require_whole()
    charges = [r for r in view.records if isinstance(r, ReserveRecord)]
    voted = record.conditioning_policy == PRIVATE
    if voted and not any(r.purpose == VOTE_PURPOSE and r.study == record.study_digest for r in charges):
        raise RefusedError(
            "These tiles name the policy private, but this site's ledger holds no charge for the conditions of their "
            "study.",
            hint="Draw them with `pixcell site generate --study STUDY.json` at the site that asked its patients.",
            code="conditions-not-charged",
        )
    head = view.head.hash if view.head else None
    cap = view.cap
    if cap is None or not charges:
        return LedgerFacts(None, head)
    spent = view.epsilon(cap.delta)
    if not np.isfinite(spent.value):
        return LedgerFacts(None, head)
    mechanisms = ["patients' votes"] * any(r.purpose == VOTE_PURPOSE for r in charges)
    mechanisms = ["DP-SGD"] * any(r.purpose != VOTE_PURPOSE for r in charges) + mechanisms
    conditions = record.conditioning_promise
    statement = PrivacyStatement(
        epsilon=spent.value,
        delta=spent.delta,
        unit="patient",
        mechanism=f"{' and '.join(mechanisms)} with Gaussian noise, neighbouring cohorts by {spent.adjacency}"[
            :200
        ],
        accountant=spent.accountant,
        covers=(COVERS_MODEL, f"{COVERS_CONDITIONS} {conditions}") if voted else (spent.covers,),
        does_not_cover=NOT_COVERED_WHEN_VOTED
        if voted
        else (
            spent.does_not_cover,
            f"the conditions and labels of these tiles (policy {record.conditioning_policy}): {conditions}",
        ),
    )
    return LedgerFacts(statement, head)


def require_recorded(record: GenerationRecord, tiles: Sequence[_Encoded]) -> None:
    """Refuse any other tiles than exactly those of the generator's record, pixel by pixel.

    Of others nobody could say which policy steered them, and of fewer nobody could say who left which out. Where the
    policy is `private` the labels must be the record's too: one typed into a table beside the tiles would leave under a
    promise that does not hold for it.
    """
    known, voted = record.labels, record.conditioning_policy == PRIVATE
    names = Counter(tile.source.path.name for tile in tiles)
    unnamed = [name for name, count in names.items() if name not in known or count > 1]
    if unnamed:
        raise RefusedError(
            f"{len(unnamed)} tiles (first: {unnamed[0]}) are not named in the record of this folder, or are here twice, "
            "so no conditioning policy can be stated for them.",
            hint="Draft from the folder as `pixcell site generate` wrote it; other tiles are another release.",
            code="tile-not-in-record",
        )
    missing = [name for name in known if name not in names]
    if missing:
        raise RefusedError(
            f"{len(missing)} of the {len(known)} tiles that were generated are missing (first: {missing[0]}).",
            hint="Draft all of them. What an audit flags leaves by `pixcell release withhold`, which says so.",
            code="tiles-missing",
        )
    _require_pixels(record, tiles)
    odd = [tile for tile in tiles if voted and tile.source.label != known[tile.source.path.name]]
    if odd:
        raise RefusedError(
            f"{len(odd)} tiles (first: {odd[0].source.path.name}) have another label than the private votes gave them.",
            hint="Draft from the folder as `pixcell site generate` wrote it, without a table of labels.",
            code="labels-not-voted",
        )


def _require_pixels(record: GenerationRecord, tiles: Sequence[_Encoded]) -> None:
    drawn = record.pixel_digests
    if drawn is None:
        raise RefusedError(
            "The record of this folder names no pixels: an earlier version wrote it.",
            hint="Run `pixcell site generate` on this folder once more: it keeps the tiles and writes the record anew.",
            code="pixels-not-recorded",
        )
    changed = [tile for tile in tiles if drawn.get(tile.source.path.name) != tile.source_digest]
    if changed:
        raise RefusedError(
            f"{len(changed)} tiles (first: {changed[0].source.path.name}) are not the pixels that were generated.",
            hint="Draft from the folder as `pixcell site generate` wrote it.",
            code="source-tile-changed",
        )


T = TypeVar("T")


def _encode_all(
    tiles: Iterator[tuple[SourceTile, np.ndarray[tuple[int, ...], np.dtype[np.uint8]]]],
    scratch: Path,
    form: TileFormat,
    on_tile: Callable[[], None],
) -> tuple[list[_Encoded], tuple[int, int]]:
    encoded: list[_Encoded] = []
    size = (0, 0)
    for number, (source, pixels) in enumerate(tiles):
        data = encode_as(pixels, form)
        shipped = decode_named(data, f"tile.{form}")
        if shipped.shape != pixels.shape or (form == "png" and not np.array_equal(shipped, pixels)):
            raise PixcellError("A tile did not survive encoding.", hint="Report this: it is a fault of ours.")
        path = scratch / f"{number:06d}.{form}"
        _write(path, data)
        encoded.append(_Encoded(source, path, digest(data), pixel_digest(shipped), pixel_digest(pixels)))
        size = (pixels.shape[0], pixels.shape[1])
        on_tile()
    return encoded, size


def _write(path: Path, data: bytes) -> None:
    try:
        path.write_bytes(data)
    except OSError as error:
        raise PixcellError(
            f"Cannot write tiles: {error.strerror or error}.",
            hint="Free space on the site's disk and draft again; nothing half-written is left.",
            code="write-failed",
        ) from error


def sheet_of(folder: Path, tiles: list[ReleasedTile]) -> bytes:
    """The sample sheet of a draft: evenly spread tiles of its folder."""
    step = max(1, len(tiles) / SHEET_TILES)
    shown = [tiles[int(position * step)] for position in range(min(SHEET_TILES, len(tiles)))]
    return sample_sheet([decode_named((folder / tile.name).read_bytes(), tile.name) for tile in shown])


def _audit_table(encoded: list[_Encoded], form: TileFormat) -> bytes:
    """The new names with labels and conditions, for the audit alone: export takes only what the manifest names."""
    out = io.StringIO(newline="")
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(("file", "label", "condition"))
    for number, tile in enumerate(encoded, start=1):
        writer.writerow((tile_name(number, form), tile.source.label or "", tile.source.condition))
    return out.getvalue().encode("utf-8")


def _origins(encoded: list[_Encoded], folder: Path, form: TileFormat) -> bytes:
    """Which source file became which tile: for the site alone, so that a flagged tile can be traced."""
    named = {
        tile_name(number, form): tile.source.path.relative_to(folder).as_posix()
        for number, tile in enumerate(encoded, start=1)
    }
    return canonical_bytes(named)


@contextmanager
def drafting_folder(folder: Path) -> Iterator[Path]:
    """A folder beside the releases for a draft in the making; what still stands in it afterwards is removed."""
    path = Path(tempfile.mkdtemp(prefix=".draft-", dir=folder))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
