"""All ways to a patient's gradient agree: the loop, shared passes, Opacus' hooks, checkpointing, half precision."""

from __future__ import annotations

import copy
import dataclasses
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pixcell_core.diffusion import training_loss
from pixcell_core.errors import BadInputError
from pixcell_core.models import PixCellTransformer2DModel
from pixcell_core.private import joint_gradients
from pixcell_core.private.clipping import CLIP_MARGIN, global_norm
from pixcell_core.private.engine import run_private_steps
from pixcell_core.private.joint_gradients import JointGradients, rows_stay_apart
from pixcell_core.private.noise import UnsafeFixedKeySource
from pixcell_core.private.parameters import PrivacyParameters
from pixcell_core.private.patient_gradients import PatientGradientEngine
from pixcell_core.private.sampling import EveryPatient
from pixcell_core.private.signal import probing
from pixcell_core.training.adapters import AdapterKind, attach_lora

RAGGED = (3, 1, 5, 2, 0, 8, 4, 1, 1, 2)
KINDS: tuple[AdapterKind, ...] = ("ffa-lora", "lora")
SETTINGS = PrivacyParameters(
    noise_multiplier=1.0,
    max_grad_norm=0.02,
    sample_rate=1.0,
    steps=2,
    expected_patients=6.0,
    tiles_per_patient=8,
    noise_draws=1,
)


def pixcell(kind: AdapterKind, tokens: int = 1, seed: int = 1) -> PixCellTransformer2DModel:
    """The platform's own transformer with an adapter away from its start."""
    torch.manual_seed(seed)
    model = PixCellTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=16,
        sample_size=8,
        caption_channels=12,
        caption_num_tokens=tokens,
    )
    attach_lora(model, kind=kind, rank=2, seed=seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)
    return model.eval()


@dataclasses.dataclass
class Patients:
    """Rows of latents, conditions, noise and time steps."""

    tiles: dict[str, tuple[Tensor, ...]]

    @property
    def patients(self) -> Sequence[str]:
        return list(self.tiles)

    def rows(self, patient: str, k: int, rng: torch.Generator) -> tuple[Tensor, ...]:
        return tuple(t[:k] for t in self.tiles[patient])

    def without(self, patient: str) -> Patients:
        return Patients({name: rows for name, rows in self.tiles.items() if name != patient})


def patients(counts: Sequence[int] = RAGGED, tokens: int = 1, seed: int = 0) -> Patients:
    g = torch.Generator().manual_seed(seed)
    tiles: dict[str, tuple[Tensor, ...]] = {}
    for index, n in enumerate(counts):
        latents, noise = (torch.randn(n, 4, 8, 8, generator=g) for _ in range(2))
        condition = torch.randn(n, tokens, 12, generator=g)
        tiles[f"p{index}"] = (latents, condition, noise, torch.randint(0, 1000, (n,), generator=g))
    return Patients(tiles)


def denoising(model: nn.Module, rows: tuple[Tensor, ...]) -> Tensor:
    latents, condition, noise, timestep = rows
    return training_loss(model, latents, condition, timestep=timestep, noise=noise)


class DrawnNoise:
    """A loss that draws its noise and time steps as training does, and keeps what it drew."""

    def __init__(self) -> None:
        self.seen: list[tuple[Tensor, ...]] = []

    def __call__(self, model: nn.Module, rows: tuple[Tensor, ...]) -> Tensor:
        noise, timestep = torch.randn_like(rows[2]), torch.randint(0, 1000, rows[3].shape)
        self.seen.append((rows[0], rows[1], noise, timestep))
        return denoising(model, self.seen[-1])


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def opacus_rows(model: nn.Module, rows: tuple[Tensor, ...]) -> list[Tensor]:
    """Per-row gradients by Opacus' hooks, one tensor (rows, ...) per trained parameter, float64."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from opacus.grad_sample import GradSampleModule

        wrapped = GradSampleModule(model.train(), loss_reduction="sum")
        denoising(wrapped, rows).sum().backward()  # type: ignore[no-untyped-call]
    return [p.grad_sample.to(torch.float64) for p in trainable(model)]  # type: ignore[attr-defined]


def clipped(samples: list[Tensor], owner: Tensor, bound: float) -> tuple[list[Tensor], list[float]]:
    total, norms = [torch.zeros_like(s[0]) for s in samples], []
    for patient in owner.unique():
        mean = [s[owner == patient].mean(0) for s in samples]
        norms.append(math.sqrt(sum(float(m.pow(2).sum()) for m in mean)))
        for t, m in zip(total, mean, strict=True):
            t.add_(m * min(1.0, bound / norms[-1]))
    return total, norms


def far(left: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    return max(float((a.double() - b.double()).abs().max()) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("joint", [False, True], ids=["loop", "joint"])
@pytest.mark.parametrize(("draws", "tokens", "at_once"), [(1, 1, None), (3, 1, None), (3, 4, 2), (2, 1, 5)])
def test_every_engine_equals_opacus_with_ragged_patients_and_drawn_noise(
    kind: AdapterKind, joint: bool, draws: int, tokens: int, at_once: int | None
) -> None:
    model, cohort, loss = pixcell(kind, tokens), patients(tokens=tokens), DrawnNoise()
    oracle = copy.deepcopy(model)
    settings = dataclasses.replace(SETTINGS, noise_draws=draws, tiles_per_patient=4)
    engine = PatientGradientEngine(model, loss, settings, rows_per_backward=at_once, joint=joint)
    torch.manual_seed(3)
    found = engine.clipped_sum(cohort, cohort.patients, torch.Generator())
    rows = tuple(torch.cat(parts) for parts in zip(*loss.seen, strict=True))
    # Rows in the order the engine took them: whose they are is read off the latents, not off the engine.
    tiles = [(i, tile) for i, p in enumerate(cohort.patients) for tile in cohort.tiles[p][0][:4]]
    owner = torch.tensor([next(i for i, tile in tiles if torch.equal(tile, row)) for row in rows[0]])
    assert torch.bincount(owner).tolist() == [min(n, 4) * draws for n in RAGGED], "k tiles x K draws each"
    expected, norms = clipped(opacus_rows(oracle, rows), owner, settings.max_grad_norm)
    assert far(found.tensors, expected) < 1e-6 and global_norm(expected) > 1e-3
    assert sorted(found.norms) == pytest.approx(sorted(norms), rel=1e-5)
    assert max(norms) > settings.max_grad_norm, "clipping must matter"
    assert found.discarded == 1
    wrong, _ = clipped(opacus_rows(copy.deepcopy(model), rows), owner.flip(0), settings.max_grad_norm)
    assert far(found.tensors, wrong) > 1e-5, "mutant: rows given to other patients"


def test_the_comparison_breaks_when_shared_passes_credit_the_wrong_patient(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, cohort = pixcell("ffa-lora"), patients()
    loop = PatientGradientEngine(model, denoising, SETTINGS)
    shared = PatientGradientEngine(model, denoising, SETTINGS, joint=True)
    exact = loop.clipped_sum(cohort, cohort.patients, torch.Generator()).tensors
    assert far(shared.clipped_sum(cohort, cohort.patients, torch.Generator()).tensors, exact) < 1e-8
    honest = JointGradients.rows_belong_to
    monkeypatch.setattr(JointGradients, "rows_belong_to", lambda self, owner: honest(self, owner.roll(1)))
    assert far(shared.clipped_sum(cohort, cohort.patients, torch.Generator()).tensors, exact) > 1e-5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("joint", [False, True], ids=["loop", "joint"])
def test_gradient_checkpointing_changes_nothing(kind: AdapterKind, joint: bool) -> None:
    model, cohort = pixcell(kind), patients()
    engine = PatientGradientEngine(model, denoising, SETTINGS, joint=joint)
    plain = engine.clipped_sum(cohort, cohort.patients, torch.Generator())
    model.enable_gradient_checkpointing()
    passes = 0
    block: Any = model.transformer_blocks[0]

    def count(*_: Any) -> None:
        nonlocal passes
        passes += 1

    handle = block.ff.register_forward_hook(count)
    recomputed = engine.clipped_sum(cohort, cohort.patients, torch.Generator())
    handle.remove()
    groups = len(list(engine._groups(cohort, cohort.patients, torch.Generator(), engine.empty_sum())))
    assert passes == 2 * groups, "each block ran forward, and again on the way back"
    assert far(recomputed.tensors, plain.tensors) < 1e-9
    assert recomputed.norms == pytest.approx(plain.norms, rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_is_near_and_what_is_clipped_is_float32(kind: AdapterKind) -> None:
    model, cohort = pixcell(kind), patients()
    rows = cohort.tiles["p2"]
    exact = PatientGradientEngine(model, denoising, SETTINGS).unit_gradient(rows)
    half_engine = PatientGradientEngine(model, denoising, SETTINGS, precision="bfloat16", rows_per_backward=2)
    seen: list[torch.dtype] = []
    watched: Any = model.transformer_blocks[0]
    handle = watched.ff.register_forward_hook(lambda m, i, o: seen.append(o.dtype))
    half = half_engine.unit_gradient(rows)
    handle.remove()
    assert seen == [torch.bfloat16] * 3 and {t.dtype for t in half.tensors} == {torch.float32}
    differ = global_norm([a - b for a, b in zip(half.tensors, exact.tensors, strict=True)])
    assert 0.0 < differ < 0.05 * exact.norm, "bfloat16 keeps eight bits"
    assert half.norm == pytest.approx(global_norm(half.tensors), rel=1e-12)
    total = half_engine.clipped_sum(cohort, cohort.patients, torch.Generator())
    assert {t.dtype for t in total.tensors} == {torch.float64}
    coarse = [t.bfloat16() for t in half.tensors]
    assert abs(global_norm(coarse) - half.norm) > 1e-7 * half.norm, "mutant: gradients kept in half precision"


def test_trained_parameters_in_half_precision_are_refused() -> None:
    model = pixcell("ffa-lora")
    for parameter in trainable(model):
        parameter.data = parameter.data.bfloat16()
    with pytest.raises(BadInputError) as refused:
        PatientGradientEngine(model, denoising, SETTINGS)
    assert refused.value.code == "trainable-precision"


def test_a_row_that_is_not_a_number_costs_its_own_patient_alone() -> None:
    model, cohort = pixcell("ffa-lora"), patients()
    cohort.tiles["p3"][0][1] = math.nan
    engine = PatientGradientEngine(model, denoising, SETTINGS, joint=True)
    total = engine.clipped_sum(cohort, cohort.patients, torch.Generator())
    others = cohort.without("p3")
    expected = engine.clipped_sum(others, others.patients, torch.Generator())
    assert total.discarded == 2 and len(total.norms) == len(RAGGED) - 2
    assert far(total.tensors, expected.tensors) < 1e-7


def test_one_patient_more_moves_the_others_by_less_than_the_margin() -> None:
    """Sensitivity C holds to the last digit: the newcomer's share plus what it changes in others' rounding."""
    cohort, model = patients([2, 1, 3] * 12), pixcell("ffa-lora")
    settings = dataclasses.replace(SETTINGS, max_grad_norm=1e-4)
    engine = PatientGradientEngine(model, denoising, settings, joint=True)
    whole = engine.clipped_sum(cohort, cohort.patients, torch.Generator())
    worst, side_effect = 0.0, 0.0
    for patient in ("p0", "p7", "p20", "p35"):
        fewer = cohort.without(patient)
        rest = engine.clipped_sum(fewer, fewer.patients, torch.Generator())
        moved = [a - b for a, b in zip(whole.tensors, rest.tensors, strict=True)]
        own = engine.empty_sum()
        own.add(engine.unit_gradient(cohort.tiles[patient]), settings.max_grad_norm)
        worst = max(worst, global_norm(moved))
        side_effect = max(side_effect, global_norm([a - b for a, b in zip(moved, own.tensors, strict=True)]))
    assert worst <= settings.max_grad_norm
    assert side_effect < 0.5 * (1.0 - CLIP_MARGIN) * settings.max_grad_norm


class _Mixing(nn.Module):
    """Answers every row with something of all rows."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) - self.linear(x).mean(0, keepdim=True)


class _Pooled(nn.Module):
    """Puts all rows through one call that has a single output."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.reshape(1, -1, 6))[0]


class _Twice(nn.Module):
    """Uses one layer two times, with tokens and without."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(torch.tanh(self.linear(x[:, None])))[:, 0]


def squared(model: nn.Module, rows: tuple[Tensor, ...]) -> Tensor:
    return model(rows[0]).pow(2).sum(1)


@pytest.mark.parametrize(
    ("model", "apart"),
    [
        (nn.Linear(6, 3, bias=False), True),
        (_Twice(), True),
        (nn.Linear(6, 3), False),
        (nn.Sequential(nn.Linear(6, 6, bias=False), nn.LayerNorm(6)), False),
        (
            nn.Sequential(
                nn.Linear(6, 3, bias=False), nn.BatchNorm1d(3, affine=False, track_running_stats=False)
            ),
            False,
        ),
        (_Mixing(), False),
        (_Pooled(), False),
    ],
    ids=["linear", "used twice", "bias", "norm weights", "batch norm", "mean over rows", "one output"],
)
def test_only_models_whose_rows_stay_apart_share_passes(model: nn.Module, apart: bool) -> None:
    with probing(model, (torch.zeros(1, 6),), count=4) as rows:
        assert rows_stay_apart(model, squared, trainable(model), rows) == apart


@pytest.mark.parametrize("kind", KINDS)
def test_the_platforms_transformer_may_share_passes(kind: AdapterKind) -> None:
    model = pixcell(kind)
    before = [p.detach().clone() for p in model.parameters()]
    with probing(model, patients((1,)).tiles["p0"], count=3) as rows:
        assert rows_stay_apart(model, denoising, trainable(model), rows)
    assert all(torch.equal(a, b) and b.grad is None for a, b in zip(before, model.parameters(), strict=True))


def test_a_trial_that_looked_at_the_sum_alone_would_be_fooled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutant: without other rows put in, a model that mixes rows passes, for the parts still add up."""
    model = _Mixing()
    monkeypatch.setattr(joint_gradients, "_replaced", lambda tensor, kept: tensor)
    with probing(model, (torch.zeros(1, 6),), count=4) as rows:
        assert rows_stay_apart(model, squared, trainable(model), rows)


class _Untouched(torch.optim.SGD):
    """Keeps the released updates of all steps, moves nothing."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__(parameters, lr=0.0)
        self.released: list[list[Tensor]] = []

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.released.append([p.grad.clone() for g in self.param_groups for p in g["params"]])


def released(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch, loss: Callable[..., Tensor] = denoising, **how: Any
) -> tuple[list[list[Tensor]], int]:
    """The updates of a run, and in how many groups of patients joint passes ran."""
    groups = 0
    honest = JointGradients.watching

    def counted(self: JointGradients, number: int, device: torch.device) -> Any:
        nonlocal groups
        groups += number > 2 or number == 1
        return honest(self, number, device)

    monkeypatch.setattr(JointGradients, "watching", counted)
    recorder, cohort = _Untouched(trainable(model)), patients()
    run_private_steps(
        model,
        loss,
        cohort,
        SETTINGS,
        recorder,
        noise_source=UnsafeFixedKeySource(),
        sampler=EveryPatient(),
        reserve=lambda step: None,
        **how,
    )
    return recorder.released, groups


def test_a_run_shares_passes_on_its_own_where_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    model = pixcell("ffa-lora")
    chosen, shared = released(model, monkeypatch)
    looped, none = released(model, monkeypatch, joint=False)
    half, none_in_half = released(model, monkeypatch, precision="bfloat16")
    assert shared > 0 and none == 0 and none_in_half == 0
    for a, b, c in zip(chosen, looped, half, strict=True):
        assert far(a, b) < 1e-8
        assert 0.0 < far(a, c) < 0.02
    model.proj_out.weight.requires_grad_(True)
    model.proj_out.bias.requires_grad_(True)
    assert released(model, monkeypatch)[1] == 0, (
        "a bias cannot be taken apart: the loop is used, nothing fails"
    )
