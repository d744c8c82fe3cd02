"""Takes slides into the catalogue and cuts them: each one whole or not at all, every refusal named."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pixcell_core.cli.progress import progress
from pixcell_core.errors import BadInputError, PixcellError, RefusedError
from site_client.catalogue.catalogue import Catalogue, changed_error
from site_client.catalogue.records import SlideRecord
from site_client.catalogue.slide_list import SlideEntry
from site_client.slides.identity import content_digest, locate
from site_client.slides.parallel import default_workers, ordered_map
from site_client.slides.reader import SlideFacts, SlideReader
from site_client.slides.storage import StorageFullError
from site_client.slides.tiling import Tile, TilingPlan, cut_tiles, map_tissue

_NAMED_REFUSALS = 5


@dataclass(frozen=True)
class Inspected:
    """A slide that can be used."""

    digest: str
    facts: SlideFacts
    tissue_mm2: float


@dataclass(frozen=True)
class TileOutcome:
    """What `tile_slides` did; `without_tiles` counts slides that gave no tile under this plan."""

    made: int
    without_tiles: int


@dataclass(frozen=True)
class AddOutcome:
    """What `add_slides` did."""

    added: int
    known: int
    patients: int
    late_patients: int


def inspect_slide(path: Path, assumed_mpp: float | None, digest: str) -> Inspected:
    """Open a slide, read its facts and find its tissue; `digest` is that of its bytes.

    Raises:
        BadInputError: any code of `SlideReader`, or `no-tissue`.
    """
    with SlideReader(path, assumed_mpp=assumed_mpp) as reader:
        tissue = map_tissue(reader)
        area = float(tissue.mask.sum()) * tissue.overview.mpp**2 / 1e6
        return Inspected(digest, reader.facts, area)


def _raise_refusals(refused: Sequence[PixcellError], total: int, done: str) -> None:
    if not refused:
        return
    rest = f" The other {total - len(refused)} of {total} slides were {done}." if total > len(refused) else ""
    first = refused[0]
    if len(refused) == 1:
        raise BadInputError(first.message + rest, hint=first.hint, code=first.code)
    named = "\n".join(f"  - [{e.code}] {e.message}" for e in refused[:_NAMED_REFUSALS])
    more = f"\n  - and {len(refused) - _NAMED_REFUSALS} more" if len(refused) > _NAMED_REFUSALS else ""
    codes = {e.code for e in refused}
    raise BadInputError(
        f"{len(refused)} of {total} slides were refused:\n{named}{more}\n{rest.strip()}".rstrip(),
        hint=f"For the first: {first.hint} Then run the same command again; slides already {done} "
        "are skipped.",
        code=first.code if len(codes) == 1 else "slides-refused",
    )


def add_slides(catalogue: Catalogue, entries: Sequence[SlideEntry], assumed_mpp: float | None) -> AddOutcome:
    """Enter every usable slide, then refuse loudly if any was not usable.

    Raises:
        BadInputError: with the slide's own code, or `slides-refused` when several differ. Good slides
            stay entered.
    """
    added = known = 0
    refused: list[PixcellError] = []

    entered = catalogue.digests()

    def work(entry: SlideEntry) -> Inspected | str | PixcellError:
        """The slide; or only its digest when the catalogue has it; or why it cannot be used."""
        try:
            digest = content_digest(locate(entry.path))
            return digest if digest in entered else inspect_slide(entry.path, assumed_mpp, digest)
        except BadInputError as error:
            return error

    def enter(entry: SlideEntry, found: Inspected | str) -> bool:
        if isinstance(found, str):
            return not catalogue.recognise(entry.path, entry.patient, entry.label, found)
        return catalogue.add_slide(
            entry.path, entry.patient, entry.label, found.digest, found.facts, found.tissue_mm2
        )

    with progress("reading slides", total=len(entries), unit="slides") as bar:
        results = ordered_map(work, entries, default_workers())
        for entry, found in zip(entries, results, strict=True):
            bar.advance()
            if isinstance(found, PixcellError):
                refused.append(found)
                continue
            try:
                new = enter(entry, found)
            except BadInputError as error:
                refused.append(error)
                continue
            added += new
            known += not new
    _raise_refusals(refused, len(entries), "entered")
    split = catalogue.split()
    late = 0 if split is None else len(catalogue.patients()) - split.train - split.holdout
    return AddOutcome(added, known, len(catalogue.patients()), late)


def check_slide(slide: SlideRecord, deep: bool) -> BadInputError | None:
    """What is wrong with a slide of the catalogue now, if anything; `deep` compares every byte's digest."""
    try:
        with SlideReader(slide.path, assumed_mpp=slide.mpp if slide.mpp_assumed else None) as reader:
            if (reader.facts.width, reader.facts.height) != (slide.width, slide.height):
                return changed_error(slide.path)
            if deep and content_digest(reader.source) != slide.sha256:
                return changed_error(slide.path)
    except BadInputError as error:
        return error
    return None


def cut_slide(slide: SlideRecord, plan: TilingPlan) -> list[Tile]:
    """All tiles of a slide of the catalogue under a plan."""
    with SlideReader(slide.path, assumed_mpp=slide.mpp if slide.mpp_assumed else None) as reader:
        return list(cut_tiles(reader, slide.sha256, plan, map_tissue(reader)))


def tile_slides(catalogue: Catalogue, plan: TilingPlan) -> TileOutcome:
    """Cut every slide that was not yet cut under this plan.

    Raises:
        BadInputError: with the slide's own code, or `slides-refused`. Slides that could be cut stay cut.
        RefusedError: code `no-slides` when the catalogue is empty.
    """
    if not catalogue.patients():
        raise RefusedError(
            "The catalogue holds no slide, so there is nothing to cut.",
            hint="Add slides first: `pixcell site data add --site-dir DIR --slides DIR`.",
            code="no-slides",
        )
    waiting = catalogue.untiled(plan.key)
    made = 0
    refused: list[PixcellError] = []

    def work(slide: SlideRecord) -> list[Tile] | PixcellError:
        try:
            return cut_slide(slide, plan)
        except StorageFullError:
            raise
        except BadInputError as error:
            return error

    with progress("cutting tiles", total=len(waiting), unit="slides") as bar:
        for slide, tiles in zip(waiting, ordered_map(work, waiting, default_workers()), strict=True):
            if isinstance(tiles, PixcellError):
                refused.append(tiles)
            else:
                catalogue.record_tiling(slide.id, plan.key, tiles)
                made += len(tiles)
            bar.advance()
    _raise_refusals(refused, len(waiting), "cut")
    return TileOutcome(made, catalogue.without_tiles(plan.key))
