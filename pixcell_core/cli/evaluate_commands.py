"""`pixcell model evaluate` and `pixcell model study`: how good synthetic tiles are, and what they are good for."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pixcell_core.cli.contract import FormatOption, OutputFormat, command, emit_note
from pixcell_core.cli.progress import progress
from pixcell_core.errors import BadInputError

if TYPE_CHECKING:
    from pixcell_core.evaluation.feature_set import FeatureSet
    from pixcell_core.evaluation.report import EvaluationReport
    from pixcell_core.evaluation.studies import Study
    from pixcell_core.evaluation.study_report import StudyReport

SET_HELP = "folder of tiles, a feature store, or a .npz/.safetensors of features"
RealOption = Annotated[Path, typer.Option("--real", help=f"Real tiles: a {SET_HELP}.")]
SyntheticOption = Annotated[Path, typer.Option("--synthetic", help=f"Synthetic tiles: a {SET_HELP}.")]
EncoderOption = Annotated[
    str | None,
    typer.Option(
        "--encoder",
        help="Who looks at the tiles: second-eye (the default, trained on photographs), starter (the generator's own), "
        "uni2-h:/folder, dinov2:/folder, or stored (embeddings of feature stores).",
    ),
]
PatientsOption = Annotated[
    Path | None,
    typer.Option(
        "--patients",
        help="Table (.csv, .tsv, .parquet) with the columns file, patient, label, source. Otherwise tiles.csv in each "
        "folder, or else sub-folders, say whose a tile is.",
    ),
]
SyntheticTableOption = Annotated[
    Path | None,
    typer.Option("--synthetic-patients", help="Another table for the synthetic tiles (default: --patients)."),
]
BootstrapOption = Annotated[
    int,
    typer.Option("--bootstrap", min=0, help="Resamples of patients for the intervals; 0 leaves them out."),
]
LevelOption = Annotated[float, typer.Option("--level", help="Confidence of the intervals.")]
SeedOption = Annotated[int, typer.Option("--seed", help="The same seed gives the same numbers.")]
ChartOption = Annotated[
    Path | None, typer.Option("--chart", help="Write a chart of values and intervals here (.svg).")
]
DeviceOption = Annotated[str, typer.Option("--device", help="Where the encoder runs: auto, cpu or cuda.")]
BatchOption = Annotated[int, typer.Option("--batch-size", min=1, help="Tiles embedded at a time.")]


def _sets(
    paths: tuple[Path, Path], looking: tuple[str | None, str, int], tables: tuple[Path | None, Path | None]
) -> tuple[FeatureSet, FeatureSet]:
    """Read both sets with one encoder; say what the reader noted."""
    from pixcell_core.evaluation.set_reader import SetReader

    reader = SetReader(*looking)
    total = sum(reader.tiles_to_look_at(path) for path in paths)
    with progress("looking at tiles", total, unit="tiles") as bar:
        reader.on_tiles = bar.advance
        pair = (
            reader.read(paths[0], "the real set", tables[0]),
            reader.read(paths[1], "the synthetic set", tables[1] or tables[0]),
        )
    for note in reader.notes:
        emit_note(f"note: {note}")
    return pair


def _chart_path(chart: Path | None) -> None:
    """Refuse a chart that could not be written before any work is done."""
    if chart is not None and (chart.suffix.lower() != ".svg" or not chart.parent.is_dir()):
        raise BadInputError(
            f"A chart cannot be written to {chart}; a name ending in .svg in a folder that exists is expected.",
            hint="Give for example --chart report.svg.",
            code="bad-chart",
        )


@command
def evaluate(
    real: RealOption,
    synthetic: SyntheticOption,
    encoder: EncoderOption = None,
    metrics: Annotated[
        str,
        typer.Option(
            "--metrics",
            help="Comma list of frechet, frechet-extrapolated, kernel, kernel-subsets, gaussian-kernel, precision, "
            "recall, density, coverage, similarity; or manifold (four of them), or all.",
        ),
    ] = "frechet,kernel,manifold",
    patients: PatientsOption = None,
    synthetic_patients: SyntheticTableOption = None,
    bootstrap: BootstrapOption = 200,
    level: LevelOption = 0.95,
    neighbours: Annotated[
        int, typer.Option(min=1, help="Neighbours of precision, recall, density, coverage.")
    ] = 5,
    seed: SeedOption = 0,
    chart: ChartOption = None,
    device: DeviceOption = "auto",
    batch_size: BatchOption = 32,
    format: FormatOption = OutputFormat.TEXT,
) -> EvaluationReport:
    """Measure synthetic tiles against real ones: distances, precision and recall, similarity of pairs.

    Every number is named with the encoder whose features it was taken on, and has an interval by resampling patients.
    A Frechet distance of another encoder than Inception is no FID: compare only numbers of one encoder and one count.
    """
    from pixcell_core.evaluation.comparison import EvaluationSettings, evaluate_sets, resamples
    from pixcell_core.evaluation.interval_chart import ChartRow, interval_chart
    from pixcell_core.evaluation.report import metric_names

    _chart_path(chart)
    wanted = metric_names([name.strip() for name in metrics.split(",") if name.strip()])
    pair = _sets((real, synthetic), (encoder, device, batch_size), (patients, synthetic_patients))
    settings = EvaluationSettings(wanted, bootstrap, level, neighbours, seed)
    with progress("resampling patients", resamples(settings, pair[0]), unit="resamples") as bar:
        report = evaluate_sets(*pair, settings, on_draw=bar.advance)
    if chart is not None:
        shares = [
            r for r in report.rows if r.metric in ("precision", "recall", "density", "coverage", "similarity")
        ]
        shown = [ChartRow(r.metric, r.value, r.low, r.high) for r in shares]
        if shown:
            title = f"Real and synthetic tiles (encoder: {report.encoder})"
            top = max([1.0, *(v for r in shown for v in (r.value, r.high or 0.0))])
            chart.write_text(interval_chart(shown, title, axis=(min(0.0, *(r.value for r in shown)), top)))
        else:
            emit_note("note: no chart, it shows precision, recall, density, coverage and similarity only.")
    return report


def _study(
    study: Study,
    pair: tuple[Path, Path],
    tables: tuple[Path | None, Path | None],
    looking: tuple[str | None, str, int],
    settings: dict[str, int | float | bool],
    chart: Path | None,
) -> StudyReport:
    from pixcell_core.evaluation.studies import StudySettings, run_study
    from pixcell_core.evaluation.study_report import StudyReport

    _chart_path(chart)
    sets = _sets(pair, looking, tables)
    chosen = StudySettings(**settings)  # type: ignore[arg-type]
    parts = min(chosen.folds, max(sets[0].patient_count, 2))
    with progress("training classifiers", parts * chosen.repeats, unit="folds") as bar:
        report = StudyReport.of(run_study(study, *sets, chosen, on_fit=bar.advance))
    if chart is not None:
        chart.write_text(report.chart())
    return report


FoldsOption = Annotated[int, typer.Option("--folds", min=2, help="Parts of patients, each held out once.")]
RepeatsOption = Annotated[int, typer.Option("--repeats", min=1, help="Repeats with another split each.")]
IndependentOption = Annotated[
    bool,
    typer.Option(
        "--independent",
        help="You state that no synthetic tile was made from a patient of the real set (another hospital's surrogates).",
    ),
]


class Question(StrEnum):
    """What is asked of synthetic tiles as training data."""

    AUGMENTATION = "augmentation"
    REPLACEMENT = "replacement"


@command
def study(
    question: Annotated[
        Question, typer.Argument(help="augmentation: real + synthetic; replacement: synthetic alone.")
    ],
    real: RealOption,
    synthetic: SyntheticOption,
    encoder: EncoderOption = None,
    patients: PatientsOption = None,
    synthetic_patients: SyntheticTableOption = None,
    folds: FoldsOption = 5,
    repeats: RepeatsOption = 5,
    independent: IndependentOption = False,
    bootstrap: BootstrapOption = 1000,
    level: LevelOption = 0.95,
    seed: SeedOption = 0,
    chart: ChartOption = None,
    device: DeviceOption = "auto",
    batch_size: BatchOption = 32,
    format: FormatOption = OutputFormat.TEXT,
) -> StudyReport:
    """Do synthetic tiles serve as training data, compared with the real ones of the same patients?

    Linear probe and k-NN, tested on real tiles of held-out patients; surrogates of held-out patients never enter
    training. Both sets need labels; the synthetic tiles need the patient each was conditioned on.
    """
    settings = {"folds": folds, "repeats": repeats, "draws": bootstrap, "level": level, "seed": seed}
    return _study(
        question.value,
        (real, synthetic),
        (patients, synthetic_patients),
        (encoder, device, batch_size),
        {**settings, "independent": independent},
        chart,
    )


def register(models: typer.Typer) -> None:
    """Add `evaluate` and `study` to the group `pixcell model`."""
    models.command("evaluate")(evaluate)
    models.command("study")(study)
