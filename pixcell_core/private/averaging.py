"""Averages of what a private training has released: they cost no privacy, and noise averages out in them.

Every iterate of DP-SGD is a function of released sums, so any function of the iterates is post-processing. Weighting
them by age keeps the signal that moves and damps the noise that does not (Polyak & Juditsky 1992; for diffusion models
De et al. 2022, "Unlocking high-accuracy differentially private image classification through scale", section 3).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from pixcell_core.errors import BadInputError


class AdapterAverage:
    """A running average over the parameters' values after each step, in float64.

    After n steps the value of step i has the weight decay^(n - i), normalised to sum 1, so that the start has none:
    decay 0 is the last step, decay 1 the plain mean of all steps, between them an exponential moving average.

    Args:
        parameters: what is averaged; read by `update`, written by `write`.
        decay: between 0 and 1.

    Raises:
        BadInputError: the decay is not in [0, 1].
    """

    def __init__(self, parameters: Sequence[nn.Parameter], decay: float) -> None:
        if not 0.0 <= decay <= 1.0:
            raise BadInputError(
                f"A decay of {decay} gives no average.",
                hint="Give 0 for the last step alone, such as 0.9 for the last ten, 1 for the mean of all steps.",
                code="average-decay",
            )
        self.decay, self.steps = decay, 0
        self._parameters = list(parameters)
        self._weight = 0.0
        self._means = [torch.zeros_like(p, dtype=torch.float64) for p in self._parameters]

    @torch.no_grad()
    def update(self) -> None:
        """Take the parameters' present values in; call it after every optimiser step."""
        self.steps += 1
        self._weight = self.decay * self._weight + 1.0
        for mean, parameter in zip(self._means, self._parameters, strict=True):
            mean.lerp_(parameter.to(torch.float64), 1.0 / self._weight)

    @torch.no_grad()
    def write(self) -> None:
        """Write the average into the parameters; before the first step there is none and they stay as they are."""
        if self.steps == 0:
            return
        for mean, parameter in zip(self._means, self._parameters, strict=True):
            parameter.copy_(mean)
