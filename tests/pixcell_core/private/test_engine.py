"""The engine: equal to Opacus' per-sample gradients, bounded per patient, honest about empty samples and dead weights."""

from __future__ import annotations

import copy
import dataclasses
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import hypothesis
import hypothesis.extra.numpy as npst
import hypothesis.strategies as st
import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn

from pixcell_core.errors import BadInputError, RefusedError
from pixcell_core.private.clipping import GradientSum, UnitGradient, clip_scale, global_norm
from pixcell_core.private.engine import private_step, run_private_steps
from pixcell_core.private.noise import SystemNoiseSource, UnsafeFixedKeySource, gaussian_like
from pixcell_core.private.parameters import LocalStepTrace, PrivacyParameters, PrivateRoundReport
from pixcell_core.private.patient_gradients import PatientGradientEngine
from pixcell_core.private.sampling import EveryPatient, PoissonSampler, sampler_for
from pixcell_core.private.signal import parameters_without_signal

RAGGED = (3, 1, 5, 2, 8, 4)
PARAMS = PrivacyParameters(
    noise_multiplier=1.0,
    max_grad_norm=0.02,
    sample_rate=1.0,
    steps=3,
    expected_patients=6.0,
    tiles_per_patient=8,
    noise_draws=1,
)
Loss = Callable[[nn.Module, tuple[Tensor, ...]], Tensor]


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def sgd(model: nn.Module, rate: float = 1.0) -> torch.optim.SGD:
    return torch.optim.SGD(trainable(model), lr=rate)


def opacus_sum(model: nn.Module, loss: Loss, cohort: Any, bound: float) -> tuple[list[Tensor], list[float]]:
    """The oracle: all rows in one batch, per-sample gradients by hooks, rows averaged to patients, clipped, summed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from opacus.grad_sample import GradSampleModule

        wrapped = GradSampleModule(model, loss_reduction="sum")
        owner = torch.cat(
            [torch.full((cohort.tiles[p][0].shape[0],), i) for i, p in enumerate(cohort.patients)]
        )
        rows = tuple(torch.cat([cohort.tiles[p][j] for p in cohort.patients]) for j in range(4))
        loss(wrapped, rows).sum().backward()  # type: ignore[no-untyped-call]
    samples = [p.grad_sample.to(torch.float64) for p in trainable(model)]  # type: ignore[attr-defined]
    total = [torch.zeros_like(p, dtype=torch.float64) for p in trainable(model)]
    norms = []
    for patient in range(len(cohort.patients)):
        mean = [s[owner == patient].mean(0) for s in samples]
        norm = math.sqrt(sum(float(m.pow(2).sum()) for m in mean))
        norms.append(norm)
        for t, m in zip(total, mean, strict=True):
            t.add_(m * min(1.0, bound / norm))
    return total, norms


@pytest.mark.parametrize("counts", [RAGGED, (1,), (4, 4, 4)])
@pytest.mark.parametrize("rows_per_backward", [None, 2])
def test_equals_opacus_per_sample_gradients_aggregated_to_patients(
    transformer: nn.Module,
    per_row_loss: Loss,
    cohort_of: Callable[..., Any],
    counts: Sequence[int],
    rows_per_backward: int | None,
) -> None:
    cohort = cohort_of(counts)
    for p in trainable(transformer):
        torch.nn.init.normal_(p, std=0.05, generator=torch.Generator().manual_seed(1))
    engine = PatientGradientEngine(transformer, per_row_loss, PARAMS, rows_per_backward=rows_per_backward)
    found = engine.clipped_sum(cohort, cohort.patients, torch.Generator().manual_seed(0))
    expected, norms = opacus_sum(copy.deepcopy(transformer), per_row_loss, cohort, PARAMS.max_grad_norm)
    assert found.norms == pytest.approx(norms, rel=1e-5)
    assert min(norms) < PARAMS.max_grad_norm * 10 and max(norms) > PARAMS.max_grad_norm, (
        "clipping must matter"
    )
    for f, e in zip(found.tensors, expected, strict=True):
        assert float((f - e).abs().max()) < 1e-6
    assert global_norm(expected) > 1e-3


def test_noise_draws_repeat_rows_and_average(
    transformer: nn.Module, per_row_loss: Loss, cohort_of: Callable[..., Any]
) -> None:
    cohort = cohort_of(RAGGED)
    seen: list[int] = []

    def counted(model: nn.Module, rows: tuple[Tensor, ...]) -> Tensor:
        seen.append(rows[0].shape[0])
        return per_row_loss(model, rows)

    once = PatientGradientEngine(transformer, counted, PARAMS)
    thrice = PatientGradientEngine(transformer, counted, dataclasses.replace(PARAMS, noise_draws=3))
    rows = cohort.tiles["p000"]
    first, second = once.unit_gradient(rows), thrice.unit_gradient(rows)
    assert seen == [3, 9]
    assert second.norm == pytest.approx(first.norm, rel=1e-5)


finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
vectors = npst.arrays(np.float32, st.integers(1, 12), elements=finite)


@hypothesis.given(
    parts=st.lists(vectors, min_size=1, max_size=4), bound=st.floats(1e-6, 1e6, allow_subnormal=False)
)
@hypothesis.settings(max_examples=300, deadline=None)
def test_no_patient_ever_adds_more_than_c(parts: list[npt.NDArray[np.float32]], bound: float) -> None:
    tensors = [torch.from_numpy(p) for p in parts]
    total = GradientSum([torch.zeros_like(t, dtype=torch.float64) for t in tensors])
    total.add(UnitGradient(tensors, 0.0, global_norm(tensors)), bound)
    contribution = np.concatenate([t.numpy().astype(np.longdouble) for t in total.tensors])
    assert np.sqrt((contribution**2).sum()) <= bound
    if global_norm(tensors) <= bound * 0.999:
        assert all(torch.equal(t, g.double()) for t, g in zip(total.tensors, tensors, strict=True))


def test_the_property_would_catch_a_clip_in_float32_without_margin() -> None:
    generator = torch.Generator().manual_seed(0)
    passed = 0
    for _ in range(200):
        g = torch.randn(1000, generator=generator)
        clipped = g * (1.0 / g.norm())
        passed += float(clipped.double().norm()) > 1.0
    assert passed > 0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_adds_zero(bad: float) -> None:
    tensors = [torch.tensor([1.0, bad])]
    total = GradientSum([torch.zeros(2, dtype=torch.float64)])
    total.add(UnitGradient(tensors, 0.0, global_norm(tensors)), 1.0)
    assert torch.equal(total.tensors[0], torch.zeros(2, dtype=torch.float64))
    assert total.discarded == 1 and total.losses == []


def test_clip_scale_leaves_short_gradients_alone_and_survives_zero() -> None:
    assert clip_scale(0.0, 1.0) == 1.0
    assert clip_scale(0.5, 1.0) == 1.0
    assert clip_scale(4.0, 1.0) == pytest.approx(0.25, rel=2e-5)


def run(
    model: nn.Module, loss: Loss, cohort: Any, params: PrivacyParameters, **kwargs: Any
) -> PrivateRoundReport:
    given: dict[str, Any] = {
        "noise_source": UnsafeFixedKeySource(),
        "sampler": EveryPatient(),
        "reserve": lambda step: None,
        **kwargs,
    }
    optimizer = given.pop("optimizer", None) or sgd(model)
    return run_private_steps(model, loss, cohort, params, optimizer, **given)


class NoHeads:
    """A sampling source whose coins never fall below q."""

    def uniform(self, count: int) -> npt.NDArray[np.float64]:
        return np.full(count, 0.999)

    def gaussian(self, count: int) -> npt.NDArray[np.float64]:
        raise AssertionError("sampling draws no noise")


def test_an_empty_poisson_sample_noises_steps_and_charges(
    transformer: nn.Module, per_row_loss: Loss, cohort_of: Callable[..., Any]
) -> None:
    params = dataclasses.replace(PARAMS, sample_rate=0.5, steps=2)
    charged: list[int] = []
    traces: list[LocalStepTrace] = []
    before = [p.detach().clone() for p in trainable(transformer)]
    run(
        transformer,
        per_row_loss,
        cohort_of(RAGGED),
        params,
        sampler=PoissonSampler(0.5, NoHeads()),
        reserve=charged.append,
        on_step=traces.append,
    )
    assert charged == [0, 1]
    assert [t.patients_sampled for t in traces] == [0, 0] and math.isnan(traces[0].mean_loss)
    expected_source = UnsafeFixedKeySource()
    expected = [b.clone() for b in before]
    for _ in range(2):
        for e in expected:
            noise = gaussian_like(expected_source, e, params.noise_standard_deviation)
            e.sub_((noise / params.expected_patients).to(torch.float32))
    for p, e in zip(trainable(transformer), expected, strict=True):
        assert torch.equal(p.detach(), e)


def test_the_released_update_is_sum_plus_noise_over_the_public_constant(
    transformer: nn.Module, per_row_loss: Loss, cohort_of: Callable[..., Any]
) -> None:
    cohort = cohort_of(RAGGED)
    params = dataclasses.replace(PARAMS, expected_patients=11.0)
    engine = PatientGradientEngine(transformer, per_row_loss, params)
    total = engine.clipped_sum(cohort, cohort.patients, torch.Generator().manual_seed(0))
    before = [p.detach().clone() for p in engine.trainable]
    private_step(
        engine,
        cohort,
        cohort.patients,
        sgd(transformer),
        UnsafeFixedKeySource(),
        torch.Generator().manual_seed(0),
    )
    source = UnsafeFixedKeySource()
    for p, b, s in zip(engine.trainable, before, total.tensors, strict=True):
        noise = torch.from_numpy(source.gaussian(s.numel()).reshape(s.shape)) * 1.0 * 0.02
        assert torch.allclose(p.detach(), b - ((s + noise) / 11.0).float(), rtol=0, atol=1e-7)


def test_every_step_is_charged_before_its_noise_is_drawn(
    transformer: nn.Module, per_row_loss: Loss, cohort_of: Callable[..., Any]
) -> None:
    events: list[str] = []

    class Watched(UnsafeFixedKeySource):
        def gaussian(self, count: int) -> npt.NDArray[np.float64]:
            events.append("noise")
            return super().gaussian(count)

    run(
        transformer,
        per_row_loss,
        cohort_of((2, 2)),
        PARAMS,
        noise_source=Watched(),
        reserve=lambda step: events.append(f"charge {step}"),
    )
    draws = len(trainable(transformer))
    assert events == [e for step in range(3) for e in [f"charge {step}"] + ["noise"] * draws]


def test_a_refused_charge_stops_before_any_noise(
    transformer: nn.Module, per_row_loss: Loss, cohort_of: Callable[..., Any]
) -> None:
    def refuse(step: int) -> None:
        raise RefusedError("The cap is reached.", hint="Stop.")

    before = [p.detach().clone() for p in trainable(transformer)]
    with pytest.raises(RefusedError):
        run(transformer, per_row_loss, cohort_of((2,)), PARAMS, noise_source=NoHeads(), reserve=refuse)
    assert all(torch.equal(p, b) for p, b in zip(trainable(transformer), before, strict=True))


def test_one_condition_token_refuses_the_query_and_key_of_cross_attention(
    transformer_with: Callable[[Sequence[str]], nn.Module],
    per_row_loss: Loss,
    cohort_of: Callable[..., Any],
) -> None:
    model = transformer_with(["attn2.to_q", "attn2.to_k", "attn2.to_v"])
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RefusedError, match=r"attn2\.to_q.*attn2\.to_k") as caught:
        run(model, per_row_loss, cohort_of(RAGGED), PARAMS, reserve=lambda step: pytest.fail("charged"))
    assert caught.value.code == "no-signal" and "to_v" not in caught.value.message
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def test_two_condition_tokens_give_them_signal(
    transformer_with: Callable[[Sequence[str]], nn.Module],
    per_row_loss: Loss,
    cohort_of: Callable[..., Any],
) -> None:
    model = transformer_with(["attn2.to_q", "attn2.to_k", "attn2.to_v"])
    rows = cohort_of(RAGGED, tokens=2).tiles["p000"]
    assert parameters_without_signal(model, per_row_loss, rows) == []


def test_running_statistics_are_refused(cohort_of: Callable[..., Any]) -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))

    def loss(module: nn.Module, rows: tuple[Tensor, ...]) -> Tensor:
        return (module(rows[0]) - rows[2]).pow(2).flatten(1).mean(1)

    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(RefusedError, match="running_mean") as caught:
        run(model, loss, cohort_of(RAGGED), PARAMS, reserve=lambda step: pytest.fail("charged"))
    assert caught.value.code == "running-statistics"
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert run(model.eval(), loss, cohort_of(RAGGED), PARAMS).steps == 3


def test_what_does_not_fit_together_is_refused(
    transformer: nn.Module, per_row_loss: Loss, cohort_of: Callable[..., Any]
) -> None:
    cohort = cohort_of(RAGGED)
    with pytest.raises(BadInputError, match="sampler"):
        run(transformer, per_row_loss, cohort, PARAMS, sampler=PoissonSampler(0.5, SystemNoiseSource()))
    with pytest.raises(BadInputError, match="optimiser"):
        optimizer = torch.optim.SGD(trainable(transformer)[:1], lr=1.0)
        run(transformer, per_row_loss, cohort, PARAMS, optimizer=optimizer)
    with pytest.raises(BadInputError, match="no patient"):
        run(transformer, per_row_loss, cohort_of(()), PARAMS)
    with pytest.raises(BadInputError, match="per row"):
        run(transformer, lambda m, r: per_row_loss(m, r).mean(), cohort, PARAMS)
    with pytest.raises(BadInputError, match="No patient has a tile"):
        run(transformer, per_row_loss, cohort_of((0, 0)), PARAMS)
    frozen = copy.deepcopy(transformer).requires_grad_(False)
    with pytest.raises(BadInputError, match="no trainable"):
        run(frozen, per_row_loss, cohort, PARAMS, optimizer=sgd(transformer))


@pytest.mark.parametrize(
    "wrong",
    [
        {"noise_multiplier": 0.0},
        {"noise_multiplier": math.nan},
        {"max_grad_norm": -1.0},
        {"sample_rate": 0.0},
        {"sample_rate": 1.5},
        {"steps": 0},
        {"expected_patients": 0.0},
        {"tiles_per_patient": 0},
        {"noise_draws": 0},
    ],
)
def test_settings_without_meaning_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(BadInputError, match=next(iter(wrong))):
        dataclasses.replace(PARAMS, **wrong)


def test_the_report_carries_settings_alone(
    transformer: nn.Module, per_row_loss: Loss, cohort_of: Callable[..., Any]
) -> None:
    """What leaves is the same for two cohorts of differing size and content."""
    few = run(copy.deepcopy(transformer), per_row_loss, cohort_of((2,)), PARAMS)
    many = run(copy.deepcopy(transformer), per_row_loss, cohort_of(RAGGED, seed=5), PARAMS)
    assert few == many
    assert {f.name for f in dataclasses.fields(few)}.isdisjoint(
        f.name for f in dataclasses.fields(LocalStepTrace)
    )


def test_poisson_sampling_draws_each_patient_with_probability_q() -> None:
    patients = [f"p{i}" for i in range(2000)]
    sampler = PoissonSampler(0.3, UnsafeFixedKeySource())
    counts = [len(sampler.sample(patients)) for _ in range(20)]
    assert abs(np.mean(counts) - 600) < 5 * math.sqrt(2000 * 0.3 * 0.7 / 20)
    assert len(set(counts)) > 5
    assert isinstance(sampler_for(1.0, UnsafeFixedKeySource()), EveryPatient)
    with pytest.raises(BadInputError):
        PoissonSampler(0.0, UnsafeFixedKeySource())


def test_private_training_learns_where_signal_is_strong() -> None:
    """Mean estimation with little noise moves to the mean: sign, divisor and optimiser are joined the right way."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)

    class Cohort:
        patients: Sequence[str] = [str(i) for i in range(100)]

        def rows(self, patient: str, k: int, rng: torch.Generator) -> tuple[Tensor, ...]:
            return (torch.ones(1, 1),)

    def loss(module: nn.Module, rows: tuple[Tensor, ...]) -> Tensor:
        return (module(rows[0]) - 2.0).pow(2).mean(1)

    params = PrivacyParameters(1.0, 1.0, 1.0, 60, 100.0, 1, 1)
    run(model, loss, Cohort(), params, optimizer=sgd(model, 0.1))
    assert float(model.weight.detach()) == pytest.approx(2.0, abs=0.2)
