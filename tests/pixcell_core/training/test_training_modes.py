"""Precision, checkpointing, compiling, divergence, the journal, sample sheets, and the average that leaves buffers alone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from pixcell_core.errors import BadInputError, PixcellError
from pixcell_core.models import PixCellTransformer2DModel
from pixcell_core.training import ema as ema_module
from pixcell_core.training.ema import Ema
from pixcell_core.training.journal import Journal
from pixcell_core.training.precision import autocast_for, memory_in_use, pick_precision
from pixcell_core.training.sample_sheet import SampleSheet, grid, latent_preview, sampling_draw
from pixcell_core.training.settings import TrainingSettings
from pixcell_core.training.trainer import Trainer
from tests.pixcell_core.training.process_runs import tiles, transformer

SETTINGS = TrainingSettings(steps=4, batch_size=4, learning_rate=1e-3, warmup_steps=1, seed=3)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    torch.set_num_threads(1)
    yield
    torch.compiler.reset()


def trained(settings: TrainingSettings) -> dict[str, torch.Tensor]:
    model = transformer()
    Trainer(model, tiles(4), settings).run(None)
    return dict(model.state_dict())


def test_gradient_checkpointing_changes_nothing_but_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    plain = trained(SETTINGS)
    original = torch.utils.checkpoint.checkpoint

    def counted(*args: object, **kwargs: object) -> object:
        calls.append(1)
        return original(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(torch.utils.checkpoint, "checkpoint", counted)
    saved = trained(replace(SETTINGS, gradient_checkpointing=True))
    assert len(calls) == 2 * SETTINGS.steps, "every block of every step"
    assert all(torch.equal(plain[k], saved[k]) for k in plain)


def test_bf16_keeps_float32_masters_and_computes_in_bf16() -> None:
    model, seen = transformer(), set()
    trainer = Trainer(model, tiles(4), replace(SETTINGS, precision="bf16"))
    layer = model.transformer_blocks[0].attn1.to_v
    handle = layer.register_forward_hook(lambda module, args, output: seen.add(output.dtype))
    trainer.train_step()
    handle.remove()
    assert seen == {torch.bfloat16}
    kept = [*model.parameters(), *trainer.ema.shadow.values()]
    kept += [p.grad for p in model.parameters() if p.grad is not None]
    kept += [
        v for state in trainer.optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)
    ]
    assert {tensor.dtype for tensor in kept} == {torch.float32}


def test_bf16_goes_nearly_the_same_way_as_fp32() -> None:
    rough, fine = (Trainer(transformer(), tiles(4), replace(SETTINGS, precision=p)) for p in ("bf16", "fp32"))
    for _ in range(4):
        one, other = rough.train_step(), fine.train_step()
        assert one == pytest.approx(other, rel=0.02) and one != other


def test_compiling_is_asked_for_and_keeps_the_names(monkeypatch: pytest.MonkeyPatch) -> None:
    # The eager backend: the graph is captured as for any other, without a C++ compiler's minute.
    right = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self: right(self, backend="eager"))
    plain, compiled = trained(SETTINGS), trained(replace(SETTINGS, compile=True))
    assert plain.keys() == compiled.keys()
    assert max((plain[k] - compiled[k]).abs().max().item() for k in plain if "to_k.bias" not in k) < 1e-5


def test_precisions_by_name() -> None:
    assert pick_precision("auto", torch.device("cpu")) == "fp32"
    assert pick_precision("auto", torch.device("cuda")) == "bf16"
    assert pick_precision("fp32", torch.device("cuda")) == "fp32"
    with autocast_for("fp32", torch.device("cpu")):
        assert not torch.is_autocast_enabled("cpu")
    assert memory_in_use(torch.device("cpu")) > 10_000_000


def test_a_training_that_diverges_is_stopped_before_it_spoils_the_weights() -> None:
    model = transformer()
    trainer = Trainer(model, tiles(4), SETTINGS)
    trainer.train_step()
    before = {k: v.clone() for k, v in trainer.ema.shadow.items()}
    with torch.no_grad():
        model.proj_out.bias.fill_(float("inf"))
    with pytest.raises(PixcellError) as stopped:
        trainer.train_step()
    assert stopped.value.code == "training-diverged" and "step 2" in stopped.value.message
    assert all(torch.equal(before[k], v) for k, v in trainer.ema.shadow.items()) and trainer.step == 1


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"optimizer": "came"}, "optimizer adamw there, came here"),
        ({"seed": 9}, "seed 3 there, 9 here"),
        ({"batch_size": 2}, "tiles per step 4 there, 2 here"),
        ({"schedule": "cosine"}, "schedule constant there, cosine here"),
    ],
)
def test_a_checkpoint_of_a_run_with_other_settings_is_refused_by_name(
    tmp_path: Path, change: dict[str, object], says: str
) -> None:
    Trainer(transformer(), tiles(4), SETTINGS).save(tmp_path / "c.pt")
    with pytest.raises(BadInputError) as refused:
        Trainer(transformer(), tiles(4), replace(SETTINGS, **change)).resume(tmp_path / "c.pt")  # type: ignore[arg-type]
    assert refused.value.code == "checkpoint-differs" and says in refused.value.message
    same = replace(SETTINGS, batch_size=2, accumulate=2)
    assert Trainer(transformer(), tiles(4), same).resume(tmp_path / "c.pt"), "the same step in two parts"


def test_the_null_stands_in_for_all_tokens_of_a_tile_together() -> None:
    model, seen = transformer(tokens=4), []
    trainer = Trainer(model, tiles(4, tokens=4), replace(SETTINGS, batch_size=64, condition_drop=0.5))
    handle = model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["encoder_hidden_states"]), with_kwargs=True
    )
    trainer.train_step()
    handle.remove()
    null = model.caption_projection.uncond_embedding
    tokens_at_null = (seen[0] == null).all(-1).sum(1)
    assert set(tokens_at_null.tolist()) == {0, 4}
    assert 16 < (tokens_at_null == 4).sum() < 48


def test_mutant_an_average_over_buffers_too_moves_the_null_condition(monkeypatch: pytest.MonkeyPatch) -> None:
    """The null of the model and of its average differ after a stage change; only parameters may be averaged."""

    def null_after(update: object) -> float:
        model = transformer()
        ema = Ema(model, 0.5)
        monkeypatch.setattr(ema_module.Ema, "copy_to", update)
        with torch.no_grad():
            model.caption_projection.uncond_embedding.add_(1.0)
        kept = model.caption_projection.uncond_embedding.clone()
        ema.update(model)
        ema.copy_to(model)
        return (model.caption_projection.uncond_embedding - kept).abs().max().item()

    right = Ema.copy_to
    start = transformer().caption_projection.uncond_embedding.clone()

    def with_buffers(self: Ema, model: PixCellTransformer2DModel) -> None:
        right(self, model)
        model.caption_projection.uncond_embedding.lerp_(start, 0.5)

    assert null_after(right) == 0.0
    assert null_after(with_buffers) > 0.4
    assert not any("uncond" in name or "pos_embed.pos" in name for name in Ema(transformer(), 0.5).shadow)


def test_an_average_of_another_model_is_refused() -> None:
    other = Ema(nn.Linear(3, 2), 0.9)
    with pytest.raises(ValueError, match="another model"):
        Ema(transformer(), 0.9).load_state_dict(other.state_dict())


def test_the_journal_says_what_each_step_did_and_drops_what_comes_again(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "deep" / "metrics.jsonl")
    Trainer(transformer(), tiles(4), SETTINGS, journal=journal).run(None)
    rows = journal.rows()
    assert [row["step"] for row in rows] == [1, 2, 3, 4] and [row["epoch"] for row in rows] == [1, 2, 3, 4]
    for row in rows:
        assert row["loss"] == pytest.approx(row["noise_error"] + row["variance_bound"])
        assert row["noise_error"] > 0 and row["grad_norm"] > 0 and row["learning_rate"] == 1e-3
        assert row["images_per_second"] > 0 and row["memory_bytes"] > 1e7
    with journal.path.open("a") as handle:
        handle.write('{"step": 5, "loss": 1.0}\n{"step": 6, "lo')
    journal.reopen(2)
    assert [json.loads(line)["step"] for line in journal.path.read_text().splitlines()] == [1, 2]


def test_the_noise_error_is_that_of_the_prediction() -> None:
    """A network that answers zero errs by the mean square of the noise itself."""
    model = transformer()
    nn.init.zeros_(model.proj_out.weight)
    nn.init.zeros_(model.proj_out.bias)
    trainer = Trainer(model, tiles(4), replace(SETTINGS, batch_size=64))
    assert trainer.advance().noise_error == pytest.approx(1.0, abs=0.03)


def test_sheets_show_the_average_every_few_steps_and_change_nothing(tmp_path: Path) -> None:
    plain, drawn, seen = transformer(), transformer(), []

    def draw(model: PixCellTransformer2DModel) -> torch.Tensor:
        assert not model.training and not torch.is_grad_enabled()
        seen.append({k: v.clone() for k, v in model.named_parameters()})
        torch.rand(3)  # a drawing may use the global generator as it likes
        return torch.zeros(5, 3, 4, 6)

    Trainer(plain, tiles(4), SETTINGS).run(None)
    trainer = Trainer(drawn, tiles(4), SETTINGS, sheet=SampleSheet(tmp_path / "s", 2, draw))
    trainer.run(None)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), drawn.parameters(), strict=True))
    assert sorted(p.name for p in (tmp_path / "s").iterdir()) == ["sheet-00000002.png", "sheet-00000004.png"]
    assert all(torch.equal(v, trainer.ema.shadow[k]) for k, v in seen[-1].items())
    with Image.open(tmp_path / "s" / "sheet-00000004.png") as sheet:
        assert sheet.size == (3 * 6, 2 * 4)


def test_a_grid_holds_each_image_at_its_place() -> None:
    images = torch.stack([torch.full((3, 2, 2), v) for v in (-1.0, 0.0, 1.0)])
    sheet = grid(images)
    assert sheet.shape == (4, 4, 3) and sheet.dtype == np.uint8
    assert sheet[0, 0, 0] == 0 and sheet[0, 2, 0] == 128 and (sheet[2:, :2] == 255).all()


@pytest.mark.parametrize("tokens", [1, 4])
def test_samples_are_the_same_each_time_and_need_no_autoencoder(tokens: int) -> None:
    model = transformer(tokens).eval()
    condition = tiles(3, tokens).embedding
    with torch.no_grad():
        one, again = (sampling_draw(condition, seed=4, num_inference_steps=3)(model) for _ in range(2))
        other = sampling_draw(condition, seed=5, num_inference_steps=3)(model)
        raw = sampling_draw(condition, seed=4, num_inference_steps=3, decode=lambda z: z)(model)
    assert one.shape == (3, 3, 8, 8) and one.abs().max() <= 1
    assert torch.equal(one, again) and not torch.equal(one, other)
    assert raw.shape == (3, 16, 8, 8) and torch.equal(latent_preview(raw), one)
