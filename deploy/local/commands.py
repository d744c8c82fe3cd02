"""`pixcell demo`: three hospitals on this machine, from slides to audited releases."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pixcell_core.cli.contract import FormatOption, OutputFormat, command

if TYPE_CHECKING:
    from deploy.local.summary import DemoSummary


@command
def demo(
    out: Annotated[
        Path, typer.Option("--out", help="Folder for everything; run again to go on after a stop.")
    ],
    sites: Annotated[int, typer.Option("--sites", help="Hospitals; the last of several is dishonest.")] = 3,
    patients: Annotated[
        int, typer.Option("--patients", help="Patients per hospital; half are held out.")
    ] = 120,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Federated rounds.")] = 3,
    epsilon: Annotated[float, typer.Option("--epsilon", help="Budget per patient for the training.")] = 8.0,
    tile_size: Annotated[int, typer.Option("--tile-size", help="Pixels per tile side: 128 or 256.")] = 128,
    slide_size: Annotated[int, typer.Option("--slide-size", help="Pixels per drawn slide's side.")] = 1024,
    surrogates: Annotated[
        int, typer.Option("--surrogates", min=1, help="Surrogate tiles per hospital.")
    ] = 160,
    tiles_per_patient: Annotated[int, typer.Option("--tiles-per-patient", min=1)] = 20,
    honest: Annotated[bool, typer.Option("--honest", help="Let nobody cheat.")] = False,
    slides: Annotated[
        Path | None, typer.Option("--slides", help="Run on a folder of real slides instead.")
    ] = None,
    slides_csv: Annotated[
        Path | None, typer.Option("--slides-csv", help="Their list, if not in the folder.")
    ] = None,
    mpp: Annotated[float, typer.Option("--mpp", help="Microns per pixel of the tiles.")] = 0.5,
    assume_mpp: Annotated[
        float | None, typer.Option("--assume-mpp", help="For slides that name none.")
    ] = None,
    conditioning: Annotated[
        str,
        typer.Option(
            "--conditioning",
            help="What steers the surrogates: blend (no DP claim), own, or private (by votes).",
        ),
    ] = "blend",
    policy: Annotated[
        str | None,
        typer.Option(
            "--policy", help="Audit policy: core, rehearsal, or a file; else the demonstration's own."
        ),
    ] = None,
    base_twins: Annotated[
        bool, typer.Option("--base-twins", help="Draw every tile again with the base alone, for the audit.")
    ] = False,
    seed: Annotated[int, typer.Option("--seed", help="Decides slides, splits and sampling.")] = 7,
    format: FormatOption = OutputFormat.TEXT,
) -> DemoSummary:
    """Three hospitals on this machine: slides in, an audited and signed release out.

    Everything is real but the patients: slides that OpenSlide reads, Flower processes over TLS, patient-level
    differential privacy with a ledger, an audit that proves what it can see, and a gate. One hospital cheats.
    """
    from deploy.local.demo import run_demo
    from deploy.local.plan import DemoPlan

    return run_demo(
        DemoPlan(
            out=out.absolute(),
            sites=sites,
            patients=patients,
            slide_size=slide_size,
            rounds=rounds,
            epsilon=epsilon,
            tile_size=tile_size,
            mpp=mpp,
            tiles_per_patient=tiles_per_patient,
            surrogates=surrogates,
            planted=min(12, surrogates // 4),
            dishonest=not honest,
            slides=slides.absolute() if slides else None,
            slides_csv=slides_csv.absolute() if slides_csv else None,
            assume_mpp=assume_mpp,
            conditioning=conditioning,
            **({"policy": policy} if policy else {}),
            base_twins=base_twins,
            seed=seed,
        )
    )


def register(root: typer.Typer) -> None:
    """Add `pixcell demo`."""
    root.command("demo")(demo)
