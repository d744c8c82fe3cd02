"""In which precision a training runs, and how much memory it uses."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext

import torch


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
