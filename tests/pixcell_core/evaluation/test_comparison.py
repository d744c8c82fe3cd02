"""A whole comparison: names carry the encoder, intervals hold the value, warnings say what limits it, seeds repeat."""

from __future__ import annotations

from dataclasses import replace
from xml.etree import ElementTree

import numpy as np
import pytest

from pixcell_core.errors import BadInputError
from pixcell_core.evaluation.comparison import EvaluationSettings, evaluate_sets, resamples
from pixcell_core.evaluation.feature_set import FeatureSet
from pixcell_core.evaluation.frechet import frechet_distance
from pixcell_core.evaluation.interval_chart import ChartRow, interval_chart
from pixcell_core.evaluation.kernel import kernel_distance, subset_kernel_distance
from pixcell_core.evaluation.manifold import manifold_scores
from pixcell_core.evaluation.report import METRICS, EvaluationReport, metric_names, metric_title

ALL = EvaluationSettings(tuple(METRICS), draws=60, seed=1)


def cohort(patients: int = 14, tiles: int = 12, seed: int = 0) -> FeatureSet:
    rng = np.random.default_rng(seed)
    names = [f"p{i}" for i in range(patients) for _ in range(tiles)]
    place = np.repeat(rng.normal(size=(patients, 6)), tiles, axis=0)
    return FeatureSet("real", place + rng.normal(size=(len(names), 6)) + 1, "eye", patients=tuple(names))


def made_from(real: FeatureSet, noise: float = 0.4) -> FeatureSet:
    moved = real.features + np.random.default_rng(5).normal(size=real.features.shape) * noise
    return replace(real, name="synthetic", features=moved)


def test_every_metric_is_measured_with_direction_and_interval() -> None:
    real = cohort()
    drawn: list[int] = []
    report = evaluate_sets(real, made_from(real), ALL, on_draw=lambda: drawn.append(1))
    assert len(drawn) == resamples(ALL, real) == 240
    found = {row.metric: row for row in report.rows}
    assert list(found) == list(METRICS)
    assert found["frechet"].value == frechet_distance(real.features, made_from(real).features).value
    assert found["kernel"].value == pytest.approx(
        kernel_distance(real.features, made_from(real).features), rel=1e-9
    )
    subsets = subset_kernel_distance(real.features, made_from(real).features, subset_size=84, seed=1)
    assert found["kernel-subsets"].value == subsets.value and found["kernel-subsets"].low is None
    assert "no confidence interval" in found["kernel-subsets"].notes[0]
    scores = manifold_scores(real.features, made_from(real).features)
    assert all(
        found[n].value == pytest.approx(getattr(scores, n)) for n in ("precision", "recall", "coverage")
    )
    for name, row in found.items():
        assert row.direction == METRICS[name] and row.real_rows == row.synthetic_rows == 168
        if name not in ("frechet-extrapolated", "kernel-subsets"):
            assert row.low is not None and row.high is not None and row.low <= row.value <= row.high
    assert found["similarity"].value > 0.9 and "mismatched pairs" in found["similarity"].notes[0]
    about = found["similarity"].details
    assert about["gap_low"] < about["gap"] == pytest.approx(found["similarity"].value - about["mismatched"])
    parts = found["frechet"].details
    assert parts["mean_part"] + parts["covariance_part"] == pytest.approx(found["frechet"].value)
    assert report == evaluate_sets(real, made_from(real), ALL)
    assert report != evaluate_sets(real, made_from(real), replace(ALL, seed=2))


def test_patient_intervals_are_wider_than_those_of_tiles() -> None:
    real, other = cohort(), cohort(seed=3).with_columns(patients=[f"q{i // 12}" for i in range(168)])
    chosen = EvaluationSettings(("frechet", "kernel"), draws=150)

    def widths(a: FeatureSet, b: FeatureSet) -> list[float]:
        return [(r.high or 0) - (r.low or 0) for r in evaluate_sets(a, b, chosen).rows]

    tiles = [
        s.with_columns(patients=[f"{s.name}{seed}-{i}" for i in range(168)])
        for seed, s in enumerate((real, other))
    ]
    assert all(p > 1.5 * t for p, t in zip(widths(real, other), widths(*tiles), strict=True))


def test_intervals_hold_the_expected_value_about_as_often_as_their_level_says() -> None:
    """Fresh cohorts of one population, real and synthetic patients drawn anew each time."""
    chosen = EvaluationSettings(("frechet", "kernel", "recall"), draws=60)
    rows = []
    for seed in range(60):
        made = cohort(30, 5, 1000 + seed).with_columns(patients=[f"q{i // 5}" for i in range(150)])
        made = replace(made, features=made.features * 0.8)
        rows.append(evaluate_sets(cohort(30, 5, seed), made, chosen).rows)
    for metric in zip(*rows, strict=True):
        expected = np.mean([row.value for row in metric])
        held = np.mean([(row.low or 0) <= expected <= (row.high or 0) for row in metric])
        assert held > 0.82, f"{metric[0].name}: {held}"


def test_nothing_is_called_fid_unless_inception_looked() -> None:
    real = cohort()
    text = " ".join(row.name for row in evaluate_sets(real, made_from(real), replace(ALL, draws=0)).rows)
    assert "FID" not in text and "KID" not in text and text.count("(encoder: eye)") == len(METRICS)
    assert metric_title("frechet", "inception-v3") == "FID (Inception)"
    assert metric_title("frechet", "uni2-h") == "Frechet distance (encoder: uni2-h)"


def test_limits_are_said() -> None:
    real = replace(cohort(4, 12), file_kinds=("JPEG",))
    made = FeatureSet("synthetic", made_from(real).features[:30], "eye", file_kinds=("PNG",))
    report = evaluate_sets(real, made, EvaluationSettings(draws=40))
    said = " ".join(report.warnings)
    own = [replace(s, encoder="starter") for s in (real, made)]
    assert "measure with another encoder too" in evaluate_sets(*own, EvaluationSettings(draws=0)).warnings[0]
    assert "real is JPEG, synthetic is PNG" in said and "4 patients" in said
    assert "understates" in said and "48 real and 30 synthetic" in said
    assert any("under 10 rows per feature" in w for w in report.rows[0].warnings)
    unknown = evaluate_sets(real.with_columns(patients=[""] * 48), made, EvaluationSettings(draws=40))
    assert unknown.draws == 0 and all(row.low is None for row in unknown.rows)
    assert "no interval is given" in " ".join(unknown.warnings)
    many = replace(cohort(20), file_kinds=("PNG",))
    assert not evaluate_sets(many, made_from(many), EvaluationSettings(draws=20)).warnings
    perfect = evaluate_sets(many, made_from(many, 0.01), EvaluationSettings(("coverage",), draws=20)).rows[0]
    assert perfect.value == perfect.high == 1.0 and "reaches 0 or 1" in perfect.warnings[0]


def test_metrics_by_name_and_what_cannot_be_compared() -> None:
    assert metric_names(["manifold", "precision", "frechet"]) == (*metric_names(["manifold"]), "frechet")
    assert metric_names(["all"]) == tuple(METRICS)
    with pytest.raises(BadInputError) as refused:
        metric_names(["frechett"])
    assert refused.value.code == "no-such-metric" and refused.value.hint == "Did you mean frechet?"
    real = cohort()
    for other, code in (
        (replace(real, encoder="starter"), "encoders-differ"),
        (cohort(2, 2), "bad-neighbours"),
    ):
        with pytest.raises(BadInputError) as refused:
            evaluate_sets(real, other)
        assert refused.value.code == code
    narrow = replace(real, features=real.features[:, :3])
    with pytest.raises(BadInputError, match=r"width 6 \(eye\), real of width 3"):
        evaluate_sets(real, narrow)


def test_the_report_reads_as_a_table_and_as_json() -> None:
    from rich.console import Console

    real = cohort()
    report = evaluate_sets(real, made_from(real), EvaluationSettings(draws=20))
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(report.render())
    text = console.export_text()
    assert (
        "14 patients" in text
        and "lower" in text
        and "168 real and 168 synthetic tiles" in text
        and " .. " in text
        and "! Frechet" not in text
    )
    assert EvaluationReport.model_validate_json(report.model_dump_json()) == report


def test_the_chart_places_values_escapes_text_and_needs_a_row() -> None:
    svg = interval_chart(
        [ChartRow("a < b", 0.5, 0.25, 0.75), ChartRow("c", 2.0)], "t & u", axis=(0.0, 1.0), mark=0.5
    )
    assert 'cx="475.0"' in svg and 'x1="387.5" x2="562.5"' in svg and "a &lt; b" in svg and "t &amp; u" in svg
    assert 'cx="650.0"' in svg, "a value off the axis stays at its end"
    assert ElementTree.fromstring(svg).tag.endswith("svg")
    assert svg.count('class="interval"') == 1 and "<script" not in svg
    assert "nan" not in interval_chart([ChartRow("one", 3.0)], "a single value")
    with pytest.raises(BadInputError, match="none was given"):
        interval_chart([], "nothing")
