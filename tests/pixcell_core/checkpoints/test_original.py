"""Original checkpoints: only tensors are opened, the configuration is read off them, the average chosen by name."""

from __future__ import annotations

import os
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pixcell_core.checkpoints.original import (
    infer_configuration,
    load_original,
    open_original,
    save_original,
)
from pixcell_core.errors import BadInputError
from pixcell_core.models import PixCellTransformer2DModel

State = dict[str, torch.Tensor]
MakeState = Callable[..., State]


def refusal(act: Callable[[], object]) -> BadInputError:
    """The error `act` must raise; every one has advice."""
    with pytest.raises(BadInputError) as refused:
        act()
    assert refused.value.hint
    return refused.value


@pytest.mark.parametrize(("tokens", "size", "scale"), [(1, 32, 0.5), (4, 64, 1.0), (16, 128, 2.0)])
def test_the_published_stages_are_read_off_the_tensors(
    tokens: int, size: int, scale: float, original_state: MakeState, position_table: Callable[..., Any]
) -> None:
    state = original_state(tokens)
    for table in (position_table(16, size // 2, base=size // 2, scale=scale)[None], None):
        given = {k: v for k, v in state.items() if k != "pos_embed"}
        given |= {} if table is None else {"pos_embed": table}
        found = infer_configuration(given, head_dim=8)
        assert (found["sample_size"], found["interpolation_scale"]) == (size, scale)
        assert (found["caption_num_tokens"], found["caption_channels"]) == (tokens, 12)
        assert (found["num_attention_heads"], found["attention_head_dim"], found["num_layers"]) == (2, 8, 2)
        assert (found["in_channels"], found["out_channels"], found["patch_size"]) == (16, 32, 2)
        assert found["cross_attention_dim"] == 16


@pytest.mark.parametrize(
    ("dtype", "scale"),
    [(d, s) for d in (torch.float32, torch.float16) for s in (0.25, 0.5, 1.0, 1.5, 2.0)]
    + [(torch.bfloat16, s) for s in (0.5, 1.0, 2.0)],
)
def test_any_scale_is_read_off_the_latent_table(
    scale: float, dtype: torch.dtype, original_state: MakeState, position_table: Callable[..., Any]
) -> None:
    state = original_state(1)
    state["pos_embed"] = position_table(1152, 4, base=4, scale=scale)[None].to(dtype)
    state["x_embedder.proj.weight"] = torch.zeros(1152, 16, 2, 2)
    found = infer_configuration(state)
    assert (found["interpolation_scale"], found["num_attention_heads"]) == (scale, 16)


def test_what_the_tensors_do_not_settle_is_asked_for(
    original_state: MakeState, position_table: Callable[..., Any]
) -> None:
    state = original_state(1)
    assert "72" in refusal(lambda: infer_configuration(state)).message, "the width 16 is no multiple of 72"
    bare = {k: v for k, v in state.items() if k != "pos_embed"}
    bare["y_embedder.y_embedding"] = torch.zeros(9, 12)
    assert "9 condition tokens" in refusal(lambda: infer_configuration(bare, head_dim=8)).message
    assert infer_configuration(bare, head_dim=8, sample_size=48)["interpolation_scale"] == 0.75
    wrong = refusal(lambda: infer_configuration(state, head_dim=8, sample_size=64))
    assert wrong.code == "checkpoint-wrong-shape" and "(1, 64, 16)" in wrong.message
    state["pos_embed"] = position_table(16, 8, base=8, scale=0.5, phase=1.0)[None]
    assert "latent table" in refusal(lambda: infer_configuration(state, head_dim=8)).message
    for bad in ({"sample_size": 15}, {"interpolation_scale": 0.0}, {"interpolation_scale": float("nan")}):
        assert (
            refusal(lambda bad=bad: infer_configuration(bare, head_dim=8, **bad)).code == "bad-configuration"
        )
    del state["final_layer.linear.weight"]
    assert refusal(lambda: infer_configuration(state, head_dim=8)).code == "checkpoint-missing-keys"


@pytest.mark.parametrize("modern", [True, False])
@pytest.mark.parametrize("tokens", [1, 16])
def test_a_released_file_loads_and_is_written_back_to_the_bit(
    tokens: int, modern: bool, tmp_path: Path, original_state: MakeState
) -> None:
    state = original_state(tokens)
    path = tmp_path / "pixcell_256.ckpt"
    torch.save({"state_dict": state}, path, _use_new_zipfile_serialization=modern)
    model = load_original(path, head_dim=8)
    assert isinstance(model, PixCellTransformer2DModel) and not model.training
    assert torch.equal(model.caption_projection.uncond_embedding, state["y_embedder.y_embedding"])
    save_original(model, tmp_path / "again.ckpt")
    again = torch.load(tmp_path / "again.ckpt", weights_only=True)["state_dict"]
    assert again.keys() == state.keys()
    assert all(torch.equal(again[k], state[k]) for k in state if k != "pos_embed")
    assert torch.allclose(again["pos_embed"], state["pos_embed"], atol=1e-6)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again.ckpt", "pixcell_256.ckpt"]
    half = load_original(path, head_dim=8, dtype=torch.float16)
    assert {p.dtype for p in half.parameters()} == {torch.float16}


def test_training_checkpoints_give_the_average_or_the_plain_weights(
    tmp_path: Path, original_state: MakeState
) -> None:
    plain = original_state(4)
    average = {k: v * 0.5 for k, v in plain.items() if k not in ("pos_embed", "y_pos_embed")}
    del average["y_embedder.y_embedding"]  # an average over parameters alone has no buffers
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(3))])
    path = tmp_path / "epoch_3_step_2000.pth"
    training = {
        "state_dict": plain,
        "state_dict_ema": average,
        "optimizer": optimizer.state_dict(),
        "scheduler": {"last_epoch": 3},
        "epoch": 3,
    }
    torch.save(training, path)
    opened = open_original(path)
    assert (opened.epoch, opened.step) == (3, 2000)
    assert opened.others == ("epoch", "optimizer", "scheduler")
    for ema, bias in ((None, 0.5), (True, 0.5), (False, 1.0)):
        model = load_original(path, ema=ema, head_dim=8)
        assert torch.equal(model.proj_out.bias, plain["final_layer.linear.bias"] * bias)
        assert torch.equal(model.caption_projection.uncond_embedding, plain["y_embedder.y_embedding"])
    torch.save({"state_dict": plain}, path)
    error = refusal(lambda: load_original(path, ema=True, head_dim=8))
    assert "state_dict_ema" in error.message
    torch.save({"state_dict_ema": plain}, path)
    assert refusal(lambda: load_original(path, ema=False, head_dim=8)).code == "checkpoint-missing-keys"


def test_counters_and_random_states_of_numpy_do_not_bar_a_training_checkpoint(
    tmp_path: Path, original_state: MakeState
) -> None:
    path = tmp_path / "epoch_1_step_7.pth"
    state = np.random.RandomState(0).get_state()
    torch.save({"state_dict": original_state(1), "epoch": np.int64(1), "rng_state": state}, path)
    assert open_original(path).others == ("epoch", "rng_state")
    objects = np.array([_Hostile(tmp_path / "ran")], dtype=object)
    torch.save({"state_dict": original_state(1), "extra": objects}, path)
    assert refusal(lambda: open_original(path)).code == "pickle-with-code"
    assert not (tmp_path / "ran").exists()


class _Hostile:
    """Runs a command when a careless reader unpickles it."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, (f"touch {self.mark}",))


@pytest.mark.parametrize("modern", [True, False])
def test_a_pickle_with_code_is_refused_by_name_and_never_run(
    modern: bool, tmp_path: Path, original_state: MakeState
) -> None:
    mark, path = tmp_path / "ran", tmp_path / "pixcell_256.ckpt"
    content = {"state_dict": original_state(1), "extra": _Hostile(mark)}
    torch.save(content, path, _use_new_zipfile_serialization=modern)
    error = refusal(lambda: load_original(path, head_dim=8))
    assert error.code == "pickle-with-code" and "system" in error.message
    path.write_bytes(pickle.dumps(_Hostile(mark), protocol=2))
    refusal(lambda: load_original(path, head_dim=8))
    assert not mark.exists()


def test_the_hostile_file_would_have_run(tmp_path: Path) -> None:
    mark, path = tmp_path / "ran", tmp_path / "hostile.ckpt"
    torch.save({"extra": _Hostile(mark)}, path)
    torch.load(path, weights_only=False)
    assert mark.exists(), "the test above would prove nothing otherwise"


def test_files_that_are_no_checkpoint_are_named(tmp_path: Path, original_state: MakeState) -> None:
    path = tmp_path / "pixcell_256.ckpt"

    def code() -> str | None:
        return refusal(lambda: load_original(path, head_dim=8)).code

    assert code() == "weights-missing"
    torch.save({"state_dict": original_state(1)}, path)
    whole = path.read_bytes()
    for size in (len(whole) - 300, len(whole) // 2, 10, 0):
        path.write_bytes(whole[:size])
        assert code() == "weights-damaged", size
    path.write_bytes(b"not a checkpoint at all")
    assert code() == "weights-damaged"
    for content in ([1, 2], {"weights": 1}, {}, {"state_dict": {"a": 1}}, {"state_dict": {}}):
        torch.save(content, path)
        assert code() == "checkpoint-missing-keys", content
    torch.save({"state_dict": {"fc.weight": torch.zeros(2, 2)}}, path)
    assert "original checkpoint" in refusal(lambda: load_original(path, head_dim=8)).message
    torch.save(original_state(1), path)
    assert load_original(path, head_dim=8).config["num_layers"] == 2, "a bare state dict is fine"
    odd = original_state(1) | {"blocks.1.mlp.fc1.bias": torch.zeros(60)}
    torch.save({"state_dict": odd}, path)
    error = refusal(lambda: load_original(path, head_dim=8))
    assert "(60,)" in error.message and "(64,)" in error.message


@pytest.mark.parametrize("modern", [True, False])
def test_no_flipped_byte_escapes_as_anything_but_a_named_error(
    modern: bool, tmp_path: Path, original_state: MakeState
) -> None:
    path, draw = tmp_path / "pixcell_256.ckpt", random.Random(11)
    torch.save({"state_dict": original_state(1)}, path, _use_new_zipfile_serialization=modern)
    whole = path.read_bytes()
    refused = 0
    for _ in range(80):
        changed = bytearray(whole)
        for _ in range(draw.choice((1, 3))):
            changed[draw.randrange(draw.choice((600, 3000)))] = draw.randrange(256)
        path.write_bytes(changed)
        try:
            load_original(path, head_dim=8)
        except BadInputError:
            refused += 1
    assert refused > 20
