"""The device a person asked for: auto, cpu, cuda or cuda:N."""

from __future__ import annotations

import re

import torch

from pixcell_core.errors import BadInputError


def choose_device(asked: str = "auto") -> torch.device:
    """The torch device for `asked`; auto takes the first CUDA device where there is one.

    Raises:
        BadInputError: another word, or a CUDA device this machine has not.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if asked == "auto":
        return torch.device("cuda" if count else "cpu")
    if asked == "cpu":
        return torch.device("cpu")
    found = re.fullmatch(r"cuda(?::(\d+))?", asked)
    if found is None:
        raise BadInputError(
            f"There is no device {asked!r}.",
            hint="Expected auto, cpu, cuda or cuda:N.",
            code="device-unknown",
        )
    if int(found.group(1) or 0) >= count:
        raise BadInputError(
            f"The device {asked} is not here: this machine has {count} CUDA devices that can be used.",
            hint="Use --device cpu, or look at the driver with nvidia-smi.",
            code="device-missing",
        )
    return torch.device(asked)
