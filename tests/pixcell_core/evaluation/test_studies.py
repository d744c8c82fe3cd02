"""The two studies: no leak from held-out patients, the gains and losses planted in the data, intervals, named errors."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score

from pixcell_core.errors import BadInputError, RefusedError
from pixcell_core.evaluation import studies
from pixcell_core.evaluation.feature_set import FeatureSet
from pixcell_core.evaluation.studies import Study, StudyResult, StudySettings, run_study
from pixcell_core.evaluation.study_report import StudyReport

FAST = StudySettings(folds=4, repeats=2, draws=200)


def tissue(patients: int, tiles: int, signal: float, seed: int, *, private: float = 0.0) -> FeatureSet:
    """Half of the patients tumour, half normal; `signal` tells tissue apart, `private` tells patients apart."""
    rng = np.random.default_rng(seed)
    names = [f"p{i}" for i in range(patients) for _ in range(tiles)]
    labels = ["tumour" if int(n[1:]) % 2 else "normal" for n in names]
    place = {n: rng.normal(size=10) * private for n in sorted(set(names))}
    features = np.stack([place[n] for n in names]) + rng.normal(size=(len(names), 10))
    features[:, 0] += np.where(np.array(labels) == "tumour", signal, -signal)
    return FeatureSet("tiles", features, "eye", patients=tuple(names), labels=tuple(labels))


def surrogates(real: FeatureSet, noise: float = 0.05) -> FeatureSet:
    """One per real tile, hardly moved."""
    moved = real.features + np.random.default_rng(9).normal(size=real.features.shape) * noise
    return replace(real, name="surrogates", features=moved)


def difference(result: StudyResult, classifier: str) -> float:
    return next(d.difference for d in result.differences if d.classifier == classifier)


def test_surrogates_of_held_out_patients_never_enter_training() -> None:
    """Features know the patient and nothing of tissue: whoever trains on held-out patients' surrogates looks clever."""
    real = tissue(16, 8, 0.0, 0, private=6.0)
    honest = run_study("augmentation", real, surrogates(real), FAST)
    assert abs(difference(honest, "k-NN")) < 0.12
    # Mutant: the link to the patient is cut by renaming, and the person wrongly states independence.
    renamed = surrogates(real).with_columns(patients=["x" + p for p in real.patients])
    leaking = run_study("augmentation", real, renamed, replace(FAST, independent=True))
    assert difference(leaking, "k-NN") > 0.3
    with pytest.raises(RefusedError) as refused:
        run_study("augmentation", real, renamed, FAST)
    assert refused.value.code == "synthetic-patients-unknown" and "none of the 16" in refused.value.message


def test_training_rows_are_exactly_those_of_other_patients(monkeypatch: pytest.MonkeyPatch) -> None:
    real = tissue(6, 3, 1.0, 1)
    made = surrogates(real)
    owner = {tuple(row): p for s in (real, made) for row, p in zip(s.features, s.patients, strict=True)}
    seen = []

    def spy(features, target, tested, chosen):  # type: ignore[no-untyped-def]
        trained, held = {owner[tuple(r)] for r in features}, {owner[tuple(r)] for r in tested}
        seen.append((len(features), len(tested)))
        assert not trained & held and trained | held == {f"p{i}" for i in range(6)}
        return np.zeros((2, len(tested)), dtype=np.int64)

    monkeypatch.setattr(studies, "_predict", spy)
    run_study("replacement", real, made, StudySettings(folds=3, repeats=1, draws=0))
    assert len(seen) == 6 and {a + b for a, b in seen} == {18}


@pytest.mark.parametrize("column", ["patients", "labels"])
def test_synthetic_rows_of_unknown_origin_are_refused_unless_stated(column: str) -> None:
    real = tissue(8, 4, 2.0, 2)
    unknown = surrogates(real).with_columns(**{column: ["", *getattr(real, column)[1:]]})
    with pytest.raises((RefusedError, BadInputError)) as refused:
        run_study("augmentation", real, unknown, FAST)
    assert (
        refused.value.code == {"patients": "synthetic-patients-unknown", "labels": "labels-missing"}[column]
    )
    if column == "patients":
        stated = run_study("augmentation", real, unknown, replace(FAST, independent=True))
        assert any("stated, not checked" in w for w in stated.warnings)


def test_more_patients_of_another_hospital_help_and_wrong_labels_do_not() -> None:
    real = tissue(6, 4, 0.8, 3)
    foreign = tissue(60, 8, 0.8, 4).with_columns(patients=[f"q{i}" for i in range(480)])
    chosen = replace(FAST, independent=True, repeats=3)
    helped = run_study("augmentation", real, foreign, chosen)
    assert difference(helped, "linear probe") > 0.03
    assert any("always trained on" in w for w in helped.warnings)
    wrong = foreign.with_columns(labels=["normal" if x == "tumour" else "tumour" for x in foreign.labels])
    hurt = run_study("augmentation", real, wrong, chosen)
    assert difference(hurt, "linear probe") < -0.3
    worse = next(d for d in hurt.differences if d.classifier == "linear probe").interval
    assert worse is not None and worse.high < 0 and StudyReport.of(hurt).findings[0].endswith("worse")


def test_replacement_by_faithful_surrogates_costs_little_and_by_noise_all() -> None:
    real = tissue(20, 6, 1.5, 5)
    kept = run_study("replacement", real, surrogates(real), FAST)
    assert [s.trained_on for s in kept.scores] == ["real", "synthetic"] * 2
    assert all(abs(d.difference) < 0.03 for d in kept.differences)
    assert "undecided" in StudyReport.of(kept).findings[0]
    noise = replace(real, features=np.random.default_rng(6).normal(size=real.features.shape))
    lost = run_study("replacement", real, noise, FAST)
    assert all(d.difference < -0.25 for d in lost.differences)


@pytest.mark.parametrize("study", ["augmentation", "replacement"])
def test_seeds_repeat_and_scores_equal_sklearns(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    real = tissue(10, 5, 0.7, 7)
    made = surrogates(real, 0.5)
    first = run_study(study, real, made, FAST)
    assert first == run_study(study, real, made, FAST)
    assert first.scores != run_study(study, real, made, replace(FAST, seed=5)).scores
    guess = np.random.default_rng(8).integers(0, 2, len(real))
    order = {tuple(row): i for i, row in enumerate(real.features)}
    monkeypatch.setattr(
        studies, "_predict", lambda f, t, tested, c: np.tile(guess[[order[tuple(r)] for r in tested]], (2, 1))
    )
    wanted = balanced_accuracy_score([x == "tumour" for x in real.labels], guess)
    scored = run_study(study, real, made, FAST)
    assert all(s.score == pytest.approx(wanted) and len(s.per_repeat) == 2 for s in scored.scores)
    assert all(
        d.difference == 0 and d.interval and d.interval.low == d.interval.high == 0
        for d in scored.differences
    )


def test_limits_are_said_and_what_cannot_be_studied_is_named() -> None:
    real = tissue(6, 4, 1.0, 10)
    odd = surrogates(real).with_columns(labels=["necrosis", *real.labels[1:]])
    said = run_study("augmentation", real, odd, replace(FAST, draws=0))
    assert any("1 synthetic rows carry labels" in w for w in said.warnings)
    assert any("6 patients" in w for w in said.warnings) and any(
        "generator itself" in w for w in said.warnings
    )
    assert all(s.interval is None for s in said.scores)
    rare = real.with_columns(labels=["rare" if p == "p0" else "common" for p in real.patients])
    some = run_study("augmentation", rare, rare, FAST)
    assert any("resamples of patients miss a label" in w for w in some.warnings)
    assert any("label 'rare' has one patient only" in w for w in some.warnings)
    kept = some.scores[0].interval
    assert kept is not None and 100 <= kept.draws < 180, "a third of the resamples miss that patient"
    each = real.with_columns(labels=[f"label {p}" for p in real.patients])
    none = run_study("augmentation", each, each, FAST)
    assert none.scores[0].interval is None and any("no interval: most" in w for w in none.warnings)
    cases = (
        ("stacking", real, real, FAST, "no-such-study"),
        ("augmentation", real.with_columns(patients=[""] * 24), real, FAST, "patients-missing"),
        ("augmentation", real.with_columns(patients=["p"] * 24), real, FAST, "too-few-groups"),
        ("augmentation", real.with_columns(labels=["t"] * 24), real, FAST, "too-few-groups"),
        ("augmentation", real.with_columns(labels=[""] * 24), real, FAST, "labels-missing"),
        ("augmentation", real, replace(real, encoder="other"), FAST, "encoders-differ"),
        ("augmentation", real, replace(real, features=real.features[:, :4]), FAST, "widths-differ"),
        ("augmentation", real, real, replace(FAST, folds=1), "bad-setting"),
        ("augmentation", real, real, replace(FAST, repeats=0), "bad-setting"),
    )
    for study, first, second, chosen, code in cases:
        with pytest.raises(BadInputError) as refused:
            run_study(study, first, second, chosen)  # type: ignore[arg-type]
        assert refused.value.code == code


def test_the_report_is_read_by_people_and_programs() -> None:
    from rich.console import Console

    real = tissue(10, 4, 1.0, 11)
    report = StudyReport.of(run_study("augmentation", real, surrogates(real), FAST))
    console = Console(width=140, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(report.render())
    text = console.export_text()
    assert (
        "features of encoder: eye" in text
        and "real + synthetic - real" in text
        and "! surrogates of held" in text
    )
    assert report.chart().count('class="interval"') == 2 and "stroke-dasharray" in report.chart()
    assert StudyReport.model_validate_json(report.model_dump_json()).findings == report.findings
