"""Where a model runs: the device a person asked for, and what each kind of device likes.

On CUDA: bfloat16 weights, flash attention through torch's scaled dot product, channels-last convolutions, pinned copies
that do not wait; `torch.compile` where asked. On a CPU: float32, where oneDNN fuses bias, activation and residual.
"""

from __future__ import annotations

import os
import re
from typing import Any, TypeVar

import torch
from torch import nn

from pixcell_core.errors import BadInputError

ModelT = TypeVar("ModelT", bound=nn.Module)


def choose_device(asked: str = "auto") -> torch.device:
    """The device for `asked`: auto, cpu, cuda or cuda:N; auto takes a CUDA device where there is one.

    Of several processes started together, each takes the device of its own rank (`LOCAL_RANK`).

    Raises:
        BadInputError: another word, or a CUDA device this machine has not.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if asked == "cpu" or (asked == "auto" and not count):
        return torch.device("cpu")
    found = re.fullmatch(r"(?:cuda|auto)(?::(\d+))?", asked)
    if found is None:
        raise BadInputError(
            f"There is no device {asked!r}.",
            hint="Expected auto, cpu, cuda or cuda:N.",
            code="device-unknown",
        )
    number = int(found.group(1) or os.environ.get("LOCAL_RANK", 0))
    if number >= count:
        raise BadInputError(
            f"The device {asked} is not here: this machine has {count} CUDA devices that can be used.",
            hint="Use --device cpu, or install the CUDA build of torch and its driver.",
            code="device-missing",
        )
    return torch.device("cuda", number)


def sampling_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 on CUDA, float32 on a CPU (where bfloat16 is slower than float32 unless the CPU multiplies it itself)."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def place(model: ModelT, device: torch.device, *, compiled: bool = False) -> ModelT:
    """Put a model on a device in evaluation mode, in the device's own precision and memory format.

    `compiled` wraps its forward with `torch.compile`: minutes for the first call, and a C++ compiler on a CPU.
    """
    placed: Any = model.to(device, sampling_dtype(device)).eval()
    if device.type == "cuda":
        placed = placed.to(memory_format=torch.channels_last)
    if compiled:
        placed.compile()
    return placed  # type: ignore[no-any-return]


def send(tensor: torch.Tensor, device: torch.device, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Copy a tensor to a device without waiting for it: through pinned memory on CUDA."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, dtype, non_blocking=device.type == "cuda")
