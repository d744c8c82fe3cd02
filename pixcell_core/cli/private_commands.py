"""`pixcell private`: planning a study with a privacy promise before any patient is looked at, and its audits."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pixcell_core.cli import private_audit_commands
from pixcell_core.cli.contract import FormatOption, OutputFormat, command
from pixcell_core.cli.main import group
from pixcell_core.errors import BadInputError

if TYPE_CHECKING:
    from pixcell_core.contracts.study import Study
    from pixcell_core.private.adapter_size import AdapterSize
    from pixcell_core.private.events import GaussianEvent
    from pixcell_core.private.planning import PlanRequest

PLAN_HELP = """Plan a private study: how much noise a promise needs, and whether the cohort is large enough for it.

Example: pixcell private plan --patients 200 --rounds 5 --steps 10 --epsilon 8 --delta 1e-5 --out plan.svg

The promise is per patient: all slides and tiles of one person. Nothing private is read; every number follows from
public settings. A written study is planned with --study STUDY.json --patients N: what it will cost each patient of a
site, training and private conditions as one number.
"""


@command
def plan(
    patients: Annotated[
        int, typer.Option("--patients", help="N: patients of one site, of the smallest if they differ.")
    ],
    study: Annotated[
        Path | None,
        typer.Option("--study", help="A written study; its settings take the place of those below."),
    ] = None,
    rounds: Annotated[int | None, typer.Option("--rounds", help="Federated rounds.")] = None,
    steps: Annotated[int | None, typer.Option("--steps", help="T: private steps in each round.")] = None,
    sample_rate: Annotated[
        float | None,
        typer.Option("--sample-rate", help="q: chance of a patient to take part in a step; 1 means all."),
    ] = None,
    epsilon: Annotated[
        float | None, typer.Option("--epsilon", help="Target per patient, everything together.")
    ] = None,
    delta: Annotated[
        float | None,
        typer.Option("--delta", help="Chance that the statement fails; at most 1e-5 and 1/(10 N)."),
    ] = None,
    sites: Annotated[
        int | None, typer.Option("--sites", help="Sites alike, whose updates are averaged.")
    ] = None,
    expected_patients: Annotated[
        float | None,
        typer.Option("--expected-patients", help="Public divisor of the noisy sum; q N if absent."),
    ] = None,
    max_grad_norm: Annotated[
        float | None, typer.Option("--max-grad-norm", help="C: bound on what one patient adds to a step.")
    ] = None,
    kind: Annotated[str | None, typer.Option("--kind", help="Adapter: ffa-lora (default) or lora.")] = None,
    rank: Annotated[int | None, typer.Option("--rank", help="Rank of the adapter; 4 if absent.")] = None,
    targets: Annotated[
        str | None,
        typer.Option("--targets", help="Endings of the adapted layers' names, separated by commas."),
    ] = None,
    base: Annotated[
        Path | None,
        typer.Option("--base", help="Transformer folder to count from; the shipped starter if absent."),
    ] = None,
    trainable_parameters: Annotated[
        int | None,
        typer.Option("--trainable-parameters", help="Number of trained parameters, instead of counting."),
    ] = None,
    consensus: Annotated[
        float | None,
        typer.Option("--consensus", help="How far patients' gradients agree, 0 to 1; 0.5 if absent."),
    ] = None,
    already_spent: Annotated[
        Path | None,
        typer.Option("--already-spent", help="Export of `pixcell site budget export`: it counts too."),
    ] = None,
    cohort: Annotated[
        str | None,
        typer.Option("--cohort", help="Only charges to this cohort, and to all patients, of that export."),
    ] = None,
    votes_noise: Annotated[
        float | None,
        typer.Option("--votes-noise", help="Noise multiplier of the votes for private conditions."),
    ] = None,
    votes_iterations: Annotated[
        int | None,
        typer.Option("--votes-iterations", help="Rounds of voting; 2 if absent and votes are planned."),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Write the curves to this new SVG file.")] = None,
    format: FormatOption = OutputFormat.TEXT,
) -> Any:
    """Plan a private study (the group shows PLAN_HELP)."""
    from pixcell_core.private.plan_curve import plan_curve
    from pixcell_core.private.plan_result import plan_result
    from pixcell_core.private.planning import PlanRequest, plan_training, request_for_study
    from pixcell_core.private.spent_before import spent_before
    from pixcell_core.private.usefulness import DEFAULT_CONSENSUS

    if out is not None:
        _require_new(out)
    named = {
        "rounds": rounds,
        "steps": steps,
        "sample_rate": sample_rate,
        "epsilon": epsilon,
        "delta": delta,
        "sites": sites,
        "expected_patients": expected_patients,
        "max_grad_norm": max_grad_norm,
    }
    spent = [] if already_spent is None else spent_before(already_spent, cohort)
    agreement = DEFAULT_CONSENSUS if consensus is None else consensus
    written = (
        None
        if study is None
        else _read_study(
            study,
            {
                **named,
                "votes_noise": votes_noise,
                "votes_iterations": votes_iterations,
                "kind": kind,
                "rank": rank,
                "targets": targets,
            },
        )
    )
    size = _size(written, base, kind, rank, targets) if trainable_parameters is None else None
    parameters = size.parameters if size is not None else (trainable_parameters or 0)
    request: PlanRequest
    if written is not None:
        request = request_for_study(
            written, patients=patients, parameters=parameters, consensus=agreement, already_spent=spent
        )
    else:
        request = PlanRequest(
            patients=patients,
            parameters=parameters,
            consensus=agreement,
            already_spent=tuple(spent),
            votes=_votes(votes_noise, votes_iterations),
            **_complete(named),
        )
    planned = plan_training(request)
    if out is not None:
        _write_new(out, plan_curve(planned))
    return plan_result(
        planned,
        adapter=size,
        source=base.name if base else "the shipped starter",
        study=written.id if written else None,
        curve=str(out) if out else None,
    )


def _complete(named: dict[str, Any]) -> dict[str, Any]:
    """The settings of a plan without a study: what has to be said must be there, the rest takes its default."""
    absent = [f"--{name}" for name in ("rounds", "steps", "epsilon", "delta") if named[name] is None]
    if absent:
        raise BadInputError(
            f"A plan needs {', '.join(absent)}, or a written study.",
            hint="For example: --rounds 5 --steps 10 --epsilon 8 --delta 1e-5, or --study STUDY.json.",
            code="plan-incomplete",
        )
    given = {name: value for name, value in named.items() if value is not None}
    return {"sample_rate": 1.0, "sites": 1, "max_grad_norm": 1.0, **given}


def _read_study(path: Path, options: dict[str, Any]) -> Study:
    from pixcell_core.contracts.canonical import load_document
    from pixcell_core.contracts.study import Study

    said = sorted("--" + name.replace("_", "-") for name, value in options.items() if value is not None)
    if said:
        raise BadInputError(
            f"{', '.join(said)} cannot be given beside --study: the study fixes it.",
            hint="Leave it out, or plan without --study.",
            code="plan-twice",
        )
    return load_document(Study, path)


def _size(
    study: Study | None, base: Path | None, kind: str | None, rank: int | None, targets: str | None
) -> AdapterSize:
    import pixcell_core
    from pixcell_core.private.adapter_size import PLANNED_TARGETS, adapter_size

    # By path: importing the starter would load torch for a header.
    folder = base or Path(pixcell_core.__file__).parent / "starter" / "weights" / "transformer"
    if study is not None:
        adapter = study.adapter
        return adapter_size(folder, kind=adapter.kind, rank=adapter.rank, targets=adapter.targets)
    names = PLANNED_TARGETS if targets is None else tuple(t.strip() for t in targets.split(",") if t.strip())
    chosen: Any = "ffa-lora" if kind is None else kind
    return adapter_size(folder, kind=chosen, rank=4 if rank is None else rank, targets=names)


def _votes(noise: float | None, iterations: int | None) -> GaussianEvent | None:
    from pixcell_core.private.events import GaussianEvent

    if noise is None:
        if iterations is not None:
            raise BadInputError(
                "--votes-iterations needs --votes-noise.",
                hint="Give both, or neither.",
                code="plan-incomplete",
            )
        return None
    return GaussianEvent(1.0, noise, 2 if iterations is None else iterations)


def _require_new(path: Path) -> None:
    """Refuse before the work what cannot be written after it."""
    if path.exists():
        raise BadInputError(
            f"{path} exists already.",
            hint="Give a new file name; nothing is written over.",
            code="file-exists",
        )
    if not path.parent.is_dir():
        raise BadInputError(
            f"Cannot write {path}: there is no folder {path.parent}.",
            hint="Make it first.",
            code="cannot-write",
        )


def _write_new(path: Path, text: str) -> None:
    try:
        with path.open("x", encoding="utf-8") as stream:
            stream.write(text)
    except OSError as error:
        raise BadInputError(
            f"Cannot write {path}: {error.strerror or error}.",
            hint="Check the folder and its permissions.",
            code="cannot-write",
        ) from error


def register(root: typer.Typer) -> None:
    """Add `pixcell private plan` and the audits of the mechanism."""
    private = group(root, "private")
    private.command("plan", help=PLAN_HELP)(plan)
    private_audit_commands.register(private)
