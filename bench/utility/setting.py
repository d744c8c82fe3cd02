"""One run: everything that decides it but the seed."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from pixcell_core.private.accounting import calibrate_noise

DELTA = 1e-5

LATE_TARGETS = ("attn1.to_v", "attn1.to_out.0", "attn2.to_v", "attn2.to_out.0")


@dataclass(frozen=True)
class Setting:
    """A federated private training, in the words of a study.

    Attributes:
        world: which sites: `private` is reported, `public` is where settings are chosen, `real` are real tiles.
        patients: training patients over the three sites together.
        epsilon: per patient, at delta 1e-5, for the released adapter; infinity trains without clipping and noise.
        kind, rank, targets: the adapter; no targets stand for the product's default.
        rounds, steps: federated rounds and private steps in each; every step sees all patients (q = 1).
        tiles, draws: k tiles of a patient and K noise draws of each tile in a unit gradient.
        max_grad_norm: C.
        step_length: learning rate times C: how far a step moves when all clipped gradients point one way. Without
            privacy it is the learning rate itself.
        optimizer: `sgd` (DP-SGD's) or `adam`; `minibatch` is ordinary training, Adam on batches of 32 tiles, with
            as many rows as the private run sees, and needs epsilon infinity.
        stratified: spread the time steps of a unit gradient.
        weight_cap: see `PatientLoss`.
        ema: decay of the average over all steps of a round; 0 keeps the last.
    """

    world: Literal["private", "public", "real"] = "private"
    patients: int = 400
    epsilon: float = 8.0
    kind: Literal["ffa-lora", "lora"] = "ffa-lora"
    rank: int = 4
    targets: tuple[str, ...] = ()
    rounds: int = 4
    steps: int = 2
    tiles: int = 4
    draws: int = 2
    max_grad_norm: float = 2e-3
    step_length: float = 1.0
    optimizer: Literal["sgd", "adam", "minibatch"] = "sgd"
    stratified: bool = True
    weight_cap: float = 1.0
    ema: float = 0.0

    @property
    def private(self) -> bool:
        """Whether the run clips and adds noise."""
        return math.isfinite(self.epsilon)

    @property
    def rows(self) -> int:
        """Rows of one unit gradient."""
        return self.tiles * self.draws

    def noise_multiplier(self) -> float:
        """Sigma that spends exactly `epsilon` over all rounds."""
        return calibrate_noise(1.0, self.rounds * self.steps, self.epsilon, DELTA)

    def but(self, **changes: Any) -> Setting:
        """The same with other values."""
        return replace(self, **changes)

    def key(self) -> dict[str, Any]:
        """As it stands in the record; infinity as text, since JSON has none."""
        return {
            k: str(v) if v == math.inf else list(v) if isinstance(v, tuple) else v
            for k, v in asdict(self).items()
        }
