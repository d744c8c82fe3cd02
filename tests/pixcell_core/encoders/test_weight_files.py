"""Hostile and damaged weight files: each refused by name, and nothing in them run."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from pixcell_core.encoders.weight_files import read_tensors
from pixcell_core.errors import BadInputError


class RunsCode:
    """Unpickling it makes a folder; the folder's absence shows that nothing was run."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.trace),)


@pytest.mark.parametrize("wrapped", ["torch", "plain"])
def test_a_pickle_with_code_is_refused_and_not_run(wrapped: str, tmp_path: Path) -> None:
    trace, path = tmp_path / "was-run", tmp_path / "pytorch_model.bin"
    content = {"weight": torch.zeros(2), "extra": RunsCode(trace)}
    if wrapped == "torch":
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content["extra"], protocol=2))
    with pytest.raises(BadInputError, match=r"asks for \w+\.mkdir, and only tensors") as refused:
        read_tensors(path)
    assert refused.value.code == "pickle-with-code"
    assert not trace.exists()


def test_a_truncated_safetensors_file_says_how_many_bytes_it_should_have(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(1000), "b": torch.zeros(10)}, path)
    whole = path.read_bytes()
    assert set(read_tensors(path)) == {"a", "b"}
    path.write_bytes(whole[:-100])
    with pytest.raises(BadInputError) as refused:
        read_tensors(path)
    assert refused.value.code == "weights-truncated"
    assert f"{len(whole) - 100} of the {len(whole)} bytes" in refused.value.message
    for junk in (b"", b"\x00" * 4, whole[:30], b"\xff" * 64, b"<html>not a model</html>"):
        path.write_bytes(junk)
        with pytest.raises(BadInputError) as refused:
            read_tensors(path)
        assert refused.value.code in {"weights-damaged", "weights-truncated"}


def test_a_truncated_pickle_is_damaged(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.zeros(1000)}, path)
    whole = path.read_bytes()
    for junk in (whole[: len(whole) // 2], b"", b"<html>not a model</html>", whole[:-30]):
        path.write_bytes(junk)
        with pytest.raises(BadInputError) as refused:
            read_tensors(path)
        assert refused.value.code == "weights-damaged", junk[:20]


@pytest.mark.parametrize("ending", [".safetensors", ".bin"])
def test_nan_in_the_weights_is_named_by_its_tensor(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"model{ending}"
    state = {"fine": torch.ones(3), "blocks.3.weight": torch.tensor([1.0, float("nan")])}
    if ending == ".bin":
        torch.save(state, path)
    else:
        save_file(state, path)
    with pytest.raises(BadInputError, match=r"blocks\.3\.weight") as refused:
        read_tensors(path)
    assert refused.value.code == "weights-not-finite"


def test_a_state_dict_inside_a_checkpoint_is_found_and_anything_else_is_not(tmp_path: Path) -> None:
    path = tmp_path / "x.ckpt"
    torch.save({"state_dict": {"a": torch.ones(2)}, "epoch": 3}, path)
    assert torch.equal(read_tensors(path)["a"], torch.ones(2))
    for content in ({"epoch": 3}, [torch.ones(2)], 7):
        torch.save(content, path)
        with pytest.raises(BadInputError, match="expected tensors by name") as refused:
            read_tensors(path)
        assert refused.value.code == "weights-unknown"


def test_no_file_and_an_unknown_ending(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="no file") as missing:
        read_tensors(tmp_path / "nothing.bin")
    assert missing.value.code == "weights-missing"
    (tmp_path / "model.h5").write_bytes(b"x")
    with pytest.raises(BadInputError, match=r"ending '\.h5'"):
        read_tensors(tmp_path / "model.h5")
