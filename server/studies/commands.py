"""Commands of studies: `pixcell study create`, `pixcell study show`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import BaseModel

from pixcell_core.cli.contract import FormatOption, OutputFormat, command
from pixcell_core.cli.main import group
from pixcell_core.errors import BadInputError
from server.pretraining.options import BaseFromOption

DirOption = Annotated[Path, typer.Option("--dir", help="The coordinator's folder.")]
DEFAULT_TARGETS = "attn1.to_q,attn1.to_k,attn1.to_v,attn1.to_out.0,attn2.to_v,attn2.to_out.0"


class StudyShown(BaseModel):
    """A study, its digest, and the file to send to the sites where one was asked for."""

    digest: str
    file: Path | None = None
    study: dict[str, Any]

    def __str__(self) -> str:
        s = self.study
        return (
            f"Study {s['id']}\ndigest: {self.digest}\n"
            + (f"file: {self.file}\n" if self.file else "")
            + f"sites: {', '.join(s['sites'])} (quorum {s['quorum']})\n"
            f"{s['rounds']} rounds x {s['steps_per_round']} steps, q = {s['sample_rate']}, sigma = "
            f"{s['noise_multiplier']}, C = {s['max_grad_norm']}\n"
            f"cap per site: epsilon {s['epsilon_cap']} per patient at delta {s['delta']}, neighbouring cohorts: "
            f"{s['adjacency']}; {_covered(s['conditioning'])}\n"
            "Read the digest to every site: what they approve must show the same."
        )


def _covered(conditioning: dict[str, Any]) -> str:
    """What the study's cap says about conditions."""
    if conditioning["mode"] != "private":
        return f"it covers the adapter, not surrogates' conditions ({conditioning['mode']})"
    votes = conditioning["votes"]
    return (
        f"it covers the adapter and the private conditions ({votes['iterations']} rounds of patients' votes, "
        f"sigma = {votes['noise_multiplier']})"
    )


def register(root: typer.Typer) -> None:
    """Add the commands to `root`."""
    study = group(root, "study")

    @study.command("create")
    @command
    def create(
        folder: DirOption,
        study_id: Annotated[
            str, typer.Option("--id", help="Short name: lower-case letters, digits, hyphens.")
        ],
        base: Annotated[
            Path | None, typer.Option(help="Folder of the base transformer the study starts from.")
        ] = None,
        base_from: BaseFromOption = None,
        sites: Annotated[
            str | None, typer.Option(help="Comma-separated names of the enrolled sites.")
        ] = None,
        settings: Annotated[Path | None, typer.Option(help="YAML file with settings of the study.")] = None,
        rounds: Annotated[int | None, typer.Option(help="Rounds of training.")] = None,
        steps: Annotated[int | None, typer.Option(help="Private steps per round (T).")] = None,
        sample_rate: Annotated[
            float | None, typer.Option(help="q: chance of a patient to take part in a step; 1 means all.")
        ] = None,
        sigma: Annotated[float | None, typer.Option(help="Noise multiplier, in units of C.")] = None,
        clip: Annotated[float | None, typer.Option(help="C: largest gradient norm of one patient.")] = None,
        delta: Annotated[float | None, typer.Option(help="delta of the privacy statement.")] = None,
        epsilon_cap: Annotated[
            float | None, typer.Option(help="Cap per site: epsilon, unit patient.")
        ] = None,
        expected_patients: Annotated[
            int | None, typer.Option(help="Public divisor; a setting, not a count.")
        ] = None,
        tiles_per_patient: Annotated[
            int | None, typer.Option(help="Tiles drawn per patient and step.")
        ] = None,
        noise_draws: Annotated[int | None, typer.Option(help="Diffusion noise draws per tile.")] = None,
        learning_rate: Annotated[float | None, typer.Option(help="Step size.")] = None,
        optimizer: Annotated[str | None, typer.Option(help="sgd or adam.")] = None,
        ema_decay: Annotated[
            float | None, typer.Option(help="Average the adapter over a round's steps, after the noise.")
        ] = None,
        adapter: Annotated[
            str | None, typer.Option(help="ffa-lora (A frozen, B trained) or lora (both trained).")
        ] = None,
        rank: Annotated[int | None, typer.Option(help="Rank of the adapter.")] = None,
        targets: Annotated[
            str | None, typer.Option(help="Comma-separated modules that get an adapter.")
        ] = None,
        conditioning: Annotated[
            str | None,
            typer.Option(help="What may steer surrogates: own, blend, or private (by patients' votes)."),
        ] = None,
        blend_k: Annotated[int | None, typer.Option(help="Patients behind each blend, at least 3.")] = None,
        votes_noise: Annotated[
            float | None, typer.Option(help="Private conditions: noise multiplier of the votes.")
        ] = None,
        votes_iterations: Annotated[
            int | None, typer.Option(help="Private conditions: rounds of voting; each is charged.")
        ] = None,
        labels: Annotated[
            str | None, typer.Option(help="Private conditions: comma-separated public names of the classes.")
        ] = None,
        candidates_digest: Annotated[
            str | None, typer.Option(help="Private conditions: what `pixcell site candidates make` printed.")
        ] = None,
        tile_size: Annotated[int | None, typer.Option(help="Tile edge in pixels.")] = None,
        mpp: Annotated[float | None, typer.Option(help="Microns per pixel.")] = None,
        quorum: Annotated[int | None, typer.Option(help="Fewest sites a round may count.")] = None,
        round_timeout: Annotated[
            float | None, typer.Option(help="Seconds a round waits for stragglers.")
        ] = None,
        reply_grid: Annotated[
            float | None, typer.Option(help="Replies leave at multiples of so many seconds.")
        ] = None,
        days: Annotated[int, typer.Option(help="Days until the study expires.")] = 30,
        out: Annotated[
            Path | None, typer.Option(help="Also write the study here, to send to the sites.")
        ] = None,
        format: FormatOption = OutputFormat.TEXT,
    ) -> StudyShown:
        """Write a study from settings (flags win over the YAML file)."""
        from server.layout import ServerLayout
        from server.pretraining.phase import base_for_study

        base = base_for_study(ServerLayout(folder.absolute()).check(), base, base_from)
        given = {
            "rounds": rounds,
            "steps_per_round": steps,
            "sample_rate": sample_rate,
            "ema_decay": ema_decay,
            "reply_grid_s": reply_grid,
            "noise_multiplier": sigma,
            "max_grad_norm": clip,
            "delta": delta,
            "epsilon_cap": epsilon_cap,
            "expected_patients": expected_patients,
            "tiles_per_patient": tiles_per_patient,
            "noise_draws": noise_draws,
            "learning_rate": learning_rate,
            "optimizer": optimizer,
            "tile_size": tile_size,
            "mpp": mpp,
            "quorum": quorum,
            "round_timeout_s": round_timeout,
            "sites": [s.strip() for s in sites.split(",") if s.strip()] if sites else None,
        }
        adapted = {"kind": adapter, "rank": rank, "targets": targets.split(",") if targets else None}
        votes = {
            "noise_multiplier": votes_noise,
            "iterations": votes_iterations,
            "labels": [name.strip() for name in labels.split(",") if name.strip()] if labels else None,
            "candidates_digest": candidates_digest,
        }
        conditions = {"mode": conditioning, "k": blend_k, "votes": _given(votes) or None}
        return _create(folder, study_id, base, settings, given, adapted, _given(conditions), days, out)

    @study.command("show")
    @command
    def show(
        study_id: Annotated[str, typer.Argument(help="Id of the study.")],
        folder: DirOption,
        format: FormatOption = OutputFormat.TEXT,
    ) -> StudyShown:
        """Show a study and its digest."""
        from server.layout import ServerLayout
        from server.studies.book import StudyBook

        layout = ServerLayout(folder.absolute()).check()
        found = StudyBook(layout.registry()).get(study_id)
        return StudyShown(digest=found.digest, study=found.model_dump(mode="json"))


def _given(values: dict[str, Any]) -> dict[str, Any]:
    """Those that were given."""
    return {name: value for name, value in values.items() if value is not None}


def _create(
    folder: Path,
    study_id: str,
    base: Path | None,
    settings: Path | None,
    given: dict[str, Any],
    adapter: dict[str, Any],
    conditions: dict[str, Any],
    days: int,
    out: Path | None,
) -> StudyShown:
    from datetime import UTC, datetime, timedelta

    from pixcell_core.contracts.artifacts import base_digest, installed_code_digest
    from server.enrolment.sites import SiteBook
    from server.layout import ServerLayout
    from server.studies.book import StudyBook, make_study, read_settings

    layout = ServerLayout(folder.absolute()).check()
    now = datetime.now(UTC).replace(microsecond=0)
    values: dict[str, Any] = {"created_at": now, "expires_at": now + timedelta(days=days)}
    values |= read_settings(settings) if settings else {}
    values |= _given(given) | {"id": study_id}
    chosen = {"targets": DEFAULT_TARGETS.split(",")} | dict(values.get("adapter", {}))
    values["adapter"] = chosen | _given(adapter)
    if conditions:
        before = dict(values.get("conditioning", {}))
        votes = {**dict(before.get("votes") or {}), **conditions.pop("votes", {})}
        values["conditioning"] = before | conditions | ({"votes": votes} if votes else {})
    if base is not None:
        values["base_digest"] = base_digest(base)
    if "base_digest" not in values:
        raise BadInputError(
            "The study names no base model.", hint="Give --base FOLDER or --base-from JOB.", code="no-base"
        )
    values.setdefault("code_digest", installed_code_digest())
    values.setdefault("sites", SiteBook(layout.registry()).names())
    values.setdefault("quorum", len(values["sites"]))
    made = make_study(values)
    for site in made.sites:
        SiteBook(layout.registry()).get(site)
    if base is not None:
        from pixcell_core.contracts.atomic import write_atomically
        from pixcell_core.contracts.spool import arrays_to_bytes
        from server.layout import START_ADAPTER
        from server.studies.start import start_adapter

        data = arrays_to_bytes(start_adapter(base, made.adapter))
        place = layout.run(made.id) / START_ADAPTER
        write_atomically(place, data)
    StudyBook(layout.registry()).add(made)
    if out is not None:
        out.write_bytes(made.to_bytes())
    return StudyShown(digest=made.digest, file=out, study=made.model_dump(mode="json"))
