"""Settings of a training run, and the ones PixCell was published with.

Numbers of the published stages: samples 480 M / 120 M / 30 M, about one epoch each.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from pixcell_core.errors import BadInputError

OPTIMIZERS = ("adamw", "came")
SCHEDULES = ("constant", "cosine")
PRECISIONS = ("fp32", "bf16")


def _bad(name: str, value: object, wanted: str) -> BadInputError:
    return BadInputError(
        f"The training setting {name} is {value!r}; it must be {wanted}.",
        hint="Correct the setting and start again.",
        code="bad-training-setting",
    )


@dataclass(frozen=True)
class TrainingSettings:
    """Settings of a training run; all public.

    One optimiser step sees batch_size x accumulate x processes tiles. `learning_rate` is reached after
    `warmup_steps` and then stays, or falls to zero along a cosine until `steps`. `precision` "bf16" runs the
    network under autocast; weights, gradients, optimiser and average stay float32.

    Raises:
        BadInputError: a setting outside its range; it names the value and the range.
    """

    steps: int
    batch_size: int = 32
    learning_rate: float = 1e-4
    weight_decay: float = 0.01
    condition_drop: float = 0.1
    max_grad_norm: float = 1.0
    ema_decay: float = 0.999
    warmup_steps: int = 10
    checkpoint_every: int = 20
    seed: int = 0
    shift_factor: float = 0.0
    scaling_factor: float = 1.0
    optimizer: str = "adamw"
    schedule: str = "constant"
    accumulate: int = 1
    precision: str = "fp32"
    gradient_checkpointing: bool = False
    compile: bool = False

    def __post_init__(self) -> None:
        for name in ("batch_size", "accumulate", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise _bad(name, getattr(self, name), "at least 1")
        for name in ("steps", "warmup_steps", "weight_decay"):
            if not getattr(self, name) >= 0:
                raise _bad(name, getattr(self, name), "at least 0")
        for name in ("learning_rate", "max_grad_norm", "scaling_factor"):
            if not getattr(self, name) > 0:
                raise _bad(name, getattr(self, name), "greater than 0")
        for name, ceiling in (("condition_drop", 1.0), ("ema_decay", 1.0)):
            if not 0 <= getattr(self, name) <= ceiling:
                raise _bad(name, getattr(self, name), "between 0 and 1")
        for name, known in (("optimizer", OPTIMIZERS), ("schedule", SCHEDULES), ("precision", PRECISIONS)):
            if getattr(self, name) not in known:
                raise _bad(name, getattr(self, name), f"one of {', '.join(known)}")

    @classmethod
    def published(cls, resolution: int, optimizer: str = "came", **changes: Any) -> TrainingSettings:
        """The published settings of a stage, per process, with any of them changed by name.

        CAME has no weight decay. AdamW's 0.03 is the base configuration's value. The published runs used 16, 24
        and 32 processes at 256, 512 and 1024; their autocast was fp16, here it is bf16.

        Args:
            resolution: 256, 512 or 1024.
            optimizer: "came" as configured, "adamw" as the paper is said to state.
            changes: settings to replace.
        """
        steps_and_batch = {256: (120_000, 128), 512: (60_000, 64), 1024: (80_000, 12)}
        if resolution not in steps_and_batch:
            raise _bad("resolution", resolution, "one of 256, 512, 1024")
        steps, batch = steps_and_batch[resolution]
        settings = cls(
            steps=steps,
            batch_size=batch,
            learning_rate=2e-5,
            weight_decay=0.0 if optimizer == "came" else 0.03,
            condition_drop=0.1,
            max_grad_norm=0.01,
            ema_decay=0.9999,
            warmup_steps=1000,
            checkpoint_every=2000,
            seed=24,
            shift_factor=0.0609,
            scaling_factor=1.5305,
            optimizer=optimizer,
            precision="bf16",
            gradient_checkpointing=True,
        )
        return replace(settings, **changes)
