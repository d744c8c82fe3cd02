"""`pixcell site generate` draws surrogate tiles; `pixcell site candidates make` embeds public tiles to be voted for."""

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
        str | None, typer.Option("--policy", help="own, blend or private; the study's if absent, else blend.")
    ] = None,
    blend_k: Annotated[
        int | None, typer.Option("--blend-k", help="Patients behind each blend; the study's.")
    ] = None,
    candidates: Annotated[
        Path | None,
        typer.Option("--candidates", help="Policy private: the public embeddings the study names."),
    ] = None,
    variation: Annotated[
        str,
        typer.Option(
            "--variation", help="Policy private: how winners become new candidates: interpolation or model."
        ),
    ] = "interpolation",
    encoder: Annotated[
        str, typer.Option("--encoder", help="Encoder of --variation model: a name, or name:/path.")
    ] = "starter",
    guidance_scale: Annotated[
        float, typer.Option("--guidance-scale", min=1.0, help="How strictly a tile follows its condition.")
    ] = 2.0,
    steps: Annotated[int, typer.Option("--steps", min=1, max=1000, help="Sampler steps.")] = 20,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Tiles drawn at once.")] = 32,
    seed: Annotated[
        int | None, typer.Option("--seed", help="Draw the same tiles again; random if absent.")
    ] = None,
    device: Annotated[str, typer.Option("--device", help="cpu or cuda.")] = "cpu",
    threads: Annotated[int, typer.Option("--threads", min=0, help="CPU threads; 0 lets torch choose.")] = 0,
    format: FormatOption = OutputFormat.TEXT,
) -> GenerationRecord:
    """Draw surrogate tiles. Run it again after an interruption: tiles already drawn are kept.

    The policy says what steers a tile: own (one private tile) and blend (the mean of k patients' tiles) make no
    differential-privacy claim for the conditions; private asks the patients to vote on public candidates, under the
    study's approval and the site's budget, and uses the same answer again whenever the command is repeated.
    """
    from site_client.generate.request import GenerationRequest
    from site_client.generate.session import run_generation

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
        candidates=candidates,
        variation=variation,
        encoder=encoder,
    )
    with progress("drawing surrogates", total=count, unit="tiles") as bar:
        return run_generation(request, bar.advance)


def register(root: typer.Typer) -> None:
    """Add `pixcell site generate` and `pixcell site candidates`."""
    from site_client.generate import candidate_commands

    group(root, "site").command("generate")(generate)
    candidate_commands.register(root)
