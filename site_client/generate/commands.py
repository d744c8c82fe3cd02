"""`pixcell site generate`: draw surrogate tiles from this site's conditions and a federated adapter."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pixcell_core.cli.contract import FormatOption, OutputFormat, command
from pixcell_core.cli.main import group
from pixcell_core.cli.progress import progress

if TYPE_CHECKING:
    from site_client.generate.surrogates import GenerationRecord


@command
def generate(
    site_dir: Annotated[Path, typer.Option("--site-dir", help="The site's folder.")],
    out: Annotated[Path, typer.Option("--out", help="Folder for the surrogate tiles.")],
    count: Annotated[int, typer.Option("--count", min=1, help="How many tiles to draw.")] = 160,
    adapter: Annotated[
        Path | None, typer.Option("--adapter", help="Federated adapter (safetensors).")
    ] = None,
    base: Annotated[
        Path | None, typer.Option("--base", help="Base transformer folder; the starter's if absent.")
    ] = None,
    study: Annotated[
        Path | None, typer.Option("--study", help="The study the adapter was trained under.")
    ] = None,
    policy: Annotated[
        str | None, typer.Option("--policy", help="blend or own; the study's if absent.")
    ] = None,
    blend_k: Annotated[
        int | None, typer.Option("--blend-k", help="Patients behind each blend; the study's.")
    ] = None,
    guidance_scale: Annotated[float, typer.Option("--guidance-scale", min=1.0)] = 2.0,
    steps: Annotated[int, typer.Option("--steps", min=1, max=1000, help="Sampler steps.")] = 20,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1)] = 32,
    seed: Annotated[
        int | None, typer.Option("--seed", help="Draw the same tiles again; random if absent.")
    ] = None,
    device: Annotated[str, typer.Option("--device", help="cpu or cuda.")] = "cpu",
    threads: Annotated[int, typer.Option("--threads", min=0, help="CPU threads; 0 lets torch choose.")] = 0,
    format: FormatOption = OutputFormat.TEXT,
) -> GenerationRecord:
    """Draw surrogate tiles. Run it again after an interruption: tiles already drawn are kept."""
    from site_client.generate.session import GenerationRequest, run_generation

    request = GenerationRequest(
        site_dir=site_dir,
        out=out,
        count=count,
        adapter=adapter,
        base=base,
        study=study,
        policy=policy,
        blend_k=blend_k,
        guidance_scale=guidance_scale,
        num_inference_steps=steps,
        batch_size=batch_size,
        seed=seed,
        device=device,
        threads=threads,
    )
    with progress("drawing surrogates", total=count, unit="tiles") as bar:
        return run_generation(request, bar.advance)


def register(root: typer.Typer) -> None:
    """Add `pixcell site generate`."""
    group(root, "site").command("generate")(generate)
