"""Commands on a site's slides: `pixcell site data synthesise | add | check | tile | split | show`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pixcell_core.cli.contract import FormatOption, OutputFormat, command
from pixcell_core.cli.main import group
from site_client.slides.results import (
    AddResult,
    CheckResult,
    ShowResult,
    SplitResult,
    SynthesisResult,
    TileResult,
)

SiteDir = Annotated[Path, typer.Option("--site-dir", help="The site's folder (catalogue, slides, features).")]
TileSize = Annotated[int, typer.Option("--tile-size", help="Tile edge in pixels.")]
Mpp = Annotated[float, typer.Option("--mpp", help="Microns per pixel of the tiles; 0.5 is 20x.")]
MinTissue = Annotated[
    float, typer.Option("--min-tissue", min=0.01, max=1.0, help="Least share of tissue in a tile.")
]


def register(root: typer.Typer) -> None:
    """Add the `site data` commands to `root`."""
    data = group(root, "site", "data")
    data.command("synthesise")(synthesise)
    data.command("add")(add)
    data.command("check")(check)
    data.command("tile")(tile)
    data.command("split")(split)
    data.command("show")(show)


@command
def synthesise(
    site_dir: SiteDir,
    patients: Annotated[int, typer.Option("--patients", help="How many patients, one slide each.")] = 120,
    seed: Annotated[int, typer.Option("--seed", help="Decides every pixel of the cohort.")] = 0,
    size: Annotated[
        int, typer.Option("--size", help="Edge of a slide in pixels at 0.5 microns per pixel.")
    ] = 1024,
    site_seed: Annotated[
        int | None, typer.Option("--site-seed", help="Decides dyes and scanner; the seed when not given.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Where to write; SITE_DIR/slides when not given.")
    ] = None,
    format: FormatOption = OutputFormat.TEXT,
) -> SynthesisResult:
    """Write procedural H&E slides and their slides.csv, for demonstrations and tests. No person's tissue."""
    from site_client.slides.synthesise import SynthesisRecipe
    from site_client.slides.synthesise import synthesise as write

    recipe = SynthesisRecipe(patients, seed, seed if site_seed is None else site_seed, size)
    done = write(recipe, (out or site_dir / "slides").absolute())
    return SynthesisResult(
        folder=done.folder, slides=done.slides, written=done.written, seconds=round(done.seconds, 2)
    )


@command
def add(
    site_dir: SiteDir,
    slides: Annotated[Path, typer.Option("--slides", help="Folder of the slides.")],
    csv: Annotated[
        Path | None,
        typer.Option("--csv", help="List of slides (file, patient, optional label); SLIDES/slides.csv."),
    ] = None,
    assume_mpp: Annotated[
        float | None,
        typer.Option("--assume-mpp", min=0.05, max=20.0, help="Microns per pixel of slides that name none."),
    ] = None,
    format: FormatOption = OutputFormat.TEXT,
) -> AddResult:
    """Enter slides into the site's catalogue: open each, find its tissue, digest its bytes."""
    from pixcell_core.errors import BadInputError
    from site_client.catalogue import Catalogue
    from site_client.catalogue.intake import add_slides
    from site_client.catalogue.slide_list import read_slide_list

    if not slides.is_dir():
        raise BadInputError(
            f"The folder of slides {slides} does not exist.", hint="Check --slides.", code="slides-missing"
        )
    entries = read_slide_list(csv or slides / "slides.csv", slides)
    with Catalogue(site_dir, create=True) as catalogue:
        done = add_slides(catalogue, entries, assume_mpp)
    return AddResult(
        added=done.added, known=done.known, patients=done.patients, late_patients=done.late_patients
    )


@command
def check(
    site_dir: SiteDir,
    deep: Annotated[
        bool, typer.Option("--deep", help="Also compare every byte with the catalogue's digest.")
    ] = False,
    format: FormatOption = OutputFormat.TEXT,
) -> CheckResult:
    """Open every slide of the catalogue again and say which ones changed, broke or went missing."""
    from pixcell_core.cli.progress import progress
    from site_client.catalogue import Catalogue
    from site_client.catalogue.intake import check_slide
    from site_client.slides.parallel import default_workers, ordered_map
    from site_client.slides.results import SlideProblem

    problems = []
    formats: dict[str, int] = {}
    with Catalogue(site_dir) as catalogue:
        everything = catalogue.slides()
        with progress("checking slides", total=len(everything), unit="slides") as bar:
            results = ordered_map(lambda s: check_slide(s, deep), everything, default_workers())
            for slide, error in zip(everything, results, strict=True):
                formats[slide.vendor] = formats.get(slide.vendor, 0) + 1
                if error is not None:
                    problems.append(SlideProblem(code=error.code, message=error.message, hint=error.hint))
                bar.advance()
    return CheckResult(slides=len(everything), deep=deep, formats=formats, problems=problems)


@command
def tile(
    site_dir: SiteDir,
    tile_size: TileSize = 128,
    mpp: Mpp = 0.5,
    min_tissue: MinTissue = 0.5,
    format: FormatOption = OutputFormat.TEXT,
) -> TileResult:
    """Cut every slide that is not yet cut this way: tissue mask, grid, quality of each tile."""
    from site_client.catalogue import Catalogue
    from site_client.catalogue.intake import tile_slides
    from site_client.slides.tiling import TilingPlan

    plan = TilingPlan(tile_size, mpp, min_tissue)
    with Catalogue(site_dir) as catalogue:
        done = tile_slides(catalogue, plan)
        total = catalogue.tile_counts().get(plan.key, 0)
    return TileResult(
        made=done.made, total=total, without_tiles=done.without_tiles, tile_size=tile_size, mpp=mpp
    )


@command
def split(
    site_dir: SiteDir,
    holdout_fraction: Annotated[
        float, typer.Option("--holdout-fraction", help="Share of patients kept unseen for the audit.")
    ] = 0.5,
    seed: Annotated[
        int | None,
        typer.Option(
            "--seed", help="Repeatable draw, for demonstrations; otherwise the system's randomness."
        ),
    ] = None,
    format: FormatOption = OutputFormat.TEXT,
) -> SplitResult:
    """Draw patients into train and holdout, once, before anything is trained."""
    from site_client.catalogue import Catalogue
    from site_client.catalogue.split import SplitSeed

    chosen = SplitSeed.from_operating_system() if seed is None else SplitSeed.given(seed)
    with Catalogue(site_dir) as catalogue:
        done = catalogue.draw_split(holdout_fraction, chosen)
    return SplitResult(
        train=done.train, holdout=done.holdout, seed_source=done.seed_source, drawn_at=done.drawn_at
    )


@command
def show(
    site_dir: SiteDir,
    sheet: Annotated[
        Path | None, typer.Option("--sheet", help="Also draw masks and tiles into this PNG.")
    ] = None,
    limit: Annotated[int, typer.Option("--limit", min=1, help="Most slides on the sheet.")] = 24,
    tile_size: TileSize = 128,
    mpp: Mpp = 0.5,
    min_tissue: MinTissue = 0.5,
    format: FormatOption = OutputFormat.TEXT,
) -> ShowResult:
    """Summarise the catalogue; with --sheet, draw what was found on the slides."""
    from pixcell_core.errors import BadInputError
    from site_client.catalogue import Catalogue
    from site_client.slides.tiling import TilingPlan

    if sheet is not None and (sheet.suffix.lower() != ".png" or sheet.is_dir()):
        raise BadInputError(
            f"The sheet is a PNG picture; {sheet} does not name one.",
            hint="Give --sheet with a file name that ends in .png.",
            code="bad-sheet",
        )
    with Catalogue(site_dir) as catalogue:
        slides = catalogue.slides()
        drawn = catalogue.split()
        if sheet is not None:
            from site_client.slides.contact_sheet import SheetSlide, draw_sheet

            plan = TilingPlan(tile_size, mpp, min_tissue)
            chosen = [
                SheetSlide(
                    s.path, s.public_name, s.mpp if s.mpp_assumed else None, catalogue.tiles(plan.key, s.id)
                )
                for s in slides[:limit]
            ]
            draw_sheet(chosen, plan, sheet.absolute())
        vendors: dict[str, int] = {}
        for s in slides:
            vendors[s.vendor] = vendors.get(s.vendor, 0) + 1
        return ShowResult(
            patients=len(catalogue.patients()),
            slides=len(slides),
            tissue_mm2=round(sum(s.tissue_mm2 for s in slides), 2),
            vendors=vendors,
            assumed_mpp=sum(s.mpp_assumed for s in slides),
            labels=len({s.label for s in slides if s.label}),
            tiles=catalogue.tile_counts(),
            train=drawn.train if drawn else None,
            holdout=drawn.holdout if drawn else None,
            split_drawn_at=drawn.drawn_at if drawn else None,
            split_seed_source=drawn.seed_source if drawn else None,
            sheet=sheet,
        )
