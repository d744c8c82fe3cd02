"""Where a training runs and in which precision: the device by name, autocast, memory in use."""

from __future__ import annotations

import os
import sys
from contextlib import AbstractContextManager, nullcontext

import torch

from pixcell_core.errors import BadInputError


def pick_device(name: str) -> torch.device:
    """The device called `name`: auto, cpu or cuda; under several processes each takes its own GPU.

    Raises:
        BadInputError: an unknown name, or cuda where there is none.
    """
    if name not in {"auto", "cpu", "cuda"}:
        raise BadInputError(
            f"There is no device called {name!r}.", hint="Give auto, cpu or cuda.", code="unknown-device"
        )
    here = torch.cuda.is_available()
    if name == "cuda" and not here:
        raise BadInputError(
            "--device cuda was asked for, but torch sees no GPU on this machine.",
            hint="Use --device cpu, or install the CUDA build of torch and its driver.",
            code="no-cuda",
        )
    if name == "cpu" or not here:
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


def pick_precision(name: str, device: torch.device) -> str:
    """`auto` is bf16 on a GPU and fp32 elsewhere; any other name is kept."""
    if name != "auto":
        return name
    return "bf16" if device.type == "cuda" else "fp32"


def autocast_for(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """Autocast to bfloat16, or nothing; parameters stay float32 either way."""
    if precision == "bf16":
        return torch.autocast(device.type, torch.bfloat16)
    return nullcontext()


def memory_in_use(device: torch.device) -> int:
    """Peak bytes: allocated on the GPU so far, or the resident set of this process."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)
