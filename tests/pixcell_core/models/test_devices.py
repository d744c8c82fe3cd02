"""The device a person names is the device they get, or one clear error."""

from __future__ import annotations

import pytest
import torch

from pixcell_core.errors import BadInputError
from pixcell_core.models import PixCellTransformer2DModel
from pixcell_core.models.devices import choose_device, place, sampling_dtype, send


def test_names_of_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == torch.device("cpu")
    for name in ("cuda", "cuda:0"):
        with pytest.raises(BadInputError, match="0 CUDA devices"):
            choose_device(name)
    for name in ("gpu", "cuda:x", "CPU", ""):
        with pytest.raises(BadInputError, match="no device"):
            choose_device(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("auto") == torch.device("cuda", 0)
    assert choose_device("cuda:1") == torch.device("cuda", 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert choose_device("auto") == choose_device("cuda") == torch.device("cuda", 1)
    assert choose_device("cuda:0") == torch.device("cuda", 0)
    with pytest.raises(BadInputError, match="2 CUDA devices"):
        choose_device("cuda:2")


def test_a_model_is_placed_in_the_precision_of_its_device() -> None:
    model = PixCellTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, num_layers=1, cross_attention_dim=16, sample_size=8
    )
    device = choose_device("auto")
    placed = place(model.train(), device)
    assert placed is model
    assert not placed.training
    assert placed.dtype == sampling_dtype(device)
    assert sampling_dtype(torch.device("cuda")) == torch.bfloat16
    sent = send(torch.ones(2, dtype=torch.float64), device, torch.float32)
    assert sent.dtype == torch.float32
    assert sent.device.type == device.type
    assert sent.sum() == 2
