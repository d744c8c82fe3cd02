"""Commands of studies: `pixcell study create|invite|show`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from pydantic import BaseModel

from pixcell_core.cli.contract import FormatOption, OutputFormat, command
from pixcell_core.cli.main import group
from pixcell_core.errors import BadInputError
from server.pretraining.options import BaseFromOption

DirOption = Annotated[Path, typer.Option("--dir", help="The coordinator's folder.")]
StudyArgument = Annotated[str, typer.Argument(help="Id of the study.")]


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
        straggler_rule: Annotated[
            str | None, typer.Option(help="deadline, or grace: only so long after the quorum answered.")
        ] = None,
        straggler_grace: Annotated[
            float | None, typer.Option(help="Seconds of grace after the quorum (implies grace).")
        ] = None,
        rule: Annotated[
            str | None, typer.Option(help="How replies become one: mean, trimmed-mean or median.")
        ] = None,
        trim: Annotated[
            float | None, typer.Option(help="Share the trimmed mean leaves out at either end.")
        ] = None,
        proximal_mu: Annotated[
            float | None, typer.Option(help="FedProx: pull of a site's steps to the round's start.")
        ] = None,
        server_optimizer: Annotated[
            str | None, typer.Option(help="sgd (FedAvg) or adam (FedAdam) at the server.")
        ] = None,
        server_learning_rate: Annotated[
            float | None, typer.Option(help="Step size of the server; 1 with sgd is FedAvg.")
        ] = None,
        masking: Annotated[
            bool, typer.Option("--masking", help="Secure aggregation: the hub sees sums alone.")
        ] = False,
        threshold: Annotated[
            int | None, typer.Option(help="With --masking: fewest sites whose sum may be opened.")
        ] = None,
        coordinate_bound: Annotated[
            float | None, typer.Option(help="With --masking: largest value of a coordinate that is sent.")
        ] = None,
        reply_grid: Annotated[
            float | None, typer.Option(help="Replies leave at multiples of so many seconds.")
        ] = None,
        days: Annotated[int, typer.Option(help="Days until the study expires.")] = 30,
        out: Annotated[
            Path | None, typer.Option(help="Also write the study here, to send to the sites.")
        ] = None,
        format: FormatOption = OutputFormat.TEXT,
    ) -> BaseModel:
        """Write a study from settings (flags win over the YAML file)."""
        from server.layout import ServerLayout
        from server.pretraining.phase import base_for_study
        from server.studies.creation import Wanted, create_study, given
        from server.studies.overview import StudyShown

        values = {
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
            "straggler_rule": straggler_rule or ("grace" if straggler_grace is not None else None),
            "straggler_grace_s": straggler_grace,
            "sites": [s.strip() for s in sites.split(",") if s.strip()] if sites else None,
        }
        adapted = {"kind": adapter, "rank": rank, "targets": targets.split(",") if targets else None}
        votes = {
            "noise_multiplier": votes_noise,
            "iterations": votes_iterations,
            "labels": [name.strip() for name in labels.split(",") if name.strip()] if labels else None,
            "candidates_digest": candidates_digest,
        }
        conditions = {"mode": conditioning, "k": blend_k, "votes": given(votes) or None}
        aggregation = {
            "rule": rule,
            "trim": trim,
            "proximal_mu": proximal_mu,
            "server_optimizer": server_optimizer,
            "server_learning_rate": server_learning_rate,
        }
        masks = given({"threshold": threshold, "coordinate_bound": coordinate_bound})
        if masks and not masking:
            raise BadInputError(
                "--threshold and --coordinate-bound are settings of secure aggregation.",
                hint="Add --masking, or leave them out.",
                code="needs-masking",
            )
        layout = ServerLayout(folder.absolute()).check()
        wanted = Wanted(
            study_id,
            base_for_study(layout, base, base_from),
            settings,
            given(values),
            given(adapted),
            given(conditions),
            given(aggregation),
            masks if masking else None,
            days,
        )
        made = create_study(layout, wanted)
        if out is not None:
            out.write_bytes(made.to_bytes())
        return StudyShown(digest=made.digest, file=out, study=made.model_dump(mode="json"))

    @study.command("show")
    @command
    def show(
        study_id: StudyArgument, folder: DirOption, format: FormatOption = OutputFormat.TEXT
    ) -> BaseModel:
        """Show a study: digest, participants, approvals seen and their end, and the epsilon it plans per site."""
        from server.layout import ServerLayout
        from server.studies.book import StudyBook
        from server.studies.overview import show_study

        layout = ServerLayout(folder.absolute()).check()
        found = StudyBook(layout.registry()).get(study_id)
        return show_study(layout, found)

    @study.command("invite")
    @command
    def invite(
        study_id: StudyArgument,
        folder: DirOption,
        out: Annotated[Path, typer.Option("--out", help="Folder for the invitations, one folder per site.")],
        format: FormatOption = OutputFormat.TEXT,
    ) -> BaseModel:
        """Write an invitation per site: the study file, and a letter with what it asks and what to compare."""
        from server.enrolment.sites import SiteBook
        from server.layout import ServerLayout
        from server.studies.book import StudyBook
        from server.studies.invitation import write_invitations
        from server.studies.overview import plan_of

        layout = ServerLayout(folder.absolute()).check()
        found = StudyBook(layout.registry()).get(study_id)
        book = SiteBook(layout.registry())
        enrolled = {site: book.get(site) for site in found.sites}
        return write_invitations(found, enrolled, plan_of(found), out.absolute())
