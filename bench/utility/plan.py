"""Which runs answer which question: one factor at a time around the recommended setting, the goal with most seeds.

Runs stand in the order of their importance, so that a bench that is cut short has answered the first questions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from utility.setting import Setting

RECOMMENDED = Setting(
    patients=400,
    epsilon=8.0,
    rank=4,
    rounds=4,
    steps=2,
    tiles=4,
    draws=1,
    max_grad_norm=1e-3,
    step_length=3.0,
)
"""Chosen on the public sites."""

ORDINARY = RECOMMENDED.but(epsilon=math.inf, optimizer="minibatch", step_length=1e-2)
"""The strongest training without privacy that was found with as many rows: Adam on batches of 32 tiles."""

UNCLIPPED_RATE = 800.0
"""Learning rate of the same recipe without clipping and noise, chosen on the public sites like the step length."""

LENGTHS = {
    (100, 8.0): 0.7,
    (100, 4.0): 0.4,
    (100, 1.0): 0.12,
    (400, 4.0): 1.5,
    (400, 1.0): 0.5,
    (1600, 1.0): 2.0,
}
"""Step lengths for more noise than the recommended setting has, by patients and epsilon: the noise moves the weights
about as far as it does there. They follow from public settings alone, as does the factor for the rank below."""

LOOKED_AT = 2
"""Seeds of the main rows whose surrogates are drawn and judged."""


@dataclass(frozen=True)
class Run:
    """One run: `group` is the question, `look` whether surrogates are drawn as well."""

    group: str
    setting: Setting
    seed: int
    look: bool = False


def without_privacy(setting: Setting) -> Setting:
    """The same recipe without clipping and noise."""
    return setting.but(epsilon=math.inf, step_length=UNCLIPPED_RATE)


def full_plan() -> list[Run]:
    """All runs, the most important first."""
    runs: list[Run] = []

    def ask(group: str, setting: Setting, seeds: range, look: int = 0) -> None:
        runs.extend(Run(group, setting, seed, seed < look) for seed in seeds)

    base, small = RECOMMENDED, RECOMMENDED.but(patients=100, step_length=LENGTHS[100, 8.0])
    goal = [range(seed, seed + 1) for seed in range(5)]
    for one in goal[:3]:
        ask("epsilon", base, one, LOOKED_AT)
        ask("epsilon", without_privacy(base), one, LOOKED_AT)
        ask("ordinary training", ORDINARY, one, 1)
    ask("epsilon", small, range(3), 1)
    ask("epsilon", without_privacy(small), range(3), 1)
    for rank in (1, 8):
        ask("rank", small.but(rank=rank, step_length=_rescaled(small, rank / small.rank)), range(3))
    ask("FFA or plain", small.but(kind="lora", step_length=_rescaled(small, 2.0)), range(3))
    for seeds in (range(1), range(1, 2)):
        for epsilon in (4.0, 1.0):
            ask("epsilon", base.but(epsilon=epsilon, step_length=LENGTHS[400, epsilon]), seeds, 1)
            ask("epsilon", small.but(epsilon=epsilon, step_length=LENGTHS[100, epsilon]), seeds, 1)
    for one in goal[3:]:
        ask("epsilon", base, one)
        ask("epsilon", without_privacy(base), one)
    large = base.but(patients=1600)
    ask("epsilon", large, range(1), 1)
    ask("epsilon", without_privacy(large), range(1), 1)
    for draws in (1, 8):
        ask("noise draws of one tile", small.but(tiles=1, draws=draws), range(3))
    for bound in (0.008, 0.1):
        ask("clipping bound", small.but(max_grad_norm=bound), range(2))
    ask("noise draws of four tiles", base.but(draws=2, step_length=4.0), range(2))
    ask("noise draws of one tile", small.but(tiles=1, draws=32), range(1))
    plain = small.but(kind="lora")
    for setting in (plain, *(small.but(rank=rank) for rank in (1, 8))):
        ask("rank and kind", without_privacy(setting), range(2))
    ask("epsilon", large.but(epsilon=1.0, step_length=LENGTHS[1600, 1.0]), range(1), 1)
    for rank in (1, 8):
        ask("rank", base.but(rank=rank, step_length=_rescaled(base, rank / base.rank)), range(2))
    for epsilon in (4.0, 1.0):
        ask("epsilon", base.but(epsilon=epsilon, step_length=LENGTHS[400, epsilon]), range(2, 3))
    return runs


def _rescaled(setting: Setting, numbers: float) -> float:
    """The step length for `numbers` times as many trained numbers: the noise vector keeps its length."""
    return round(setting.step_length / math.sqrt(numbers), 3)


def real_plan() -> list[Run]:
    """The real tiles: nine training patients in three sites, so few that privacy must leave nothing."""
    base = RECOMMENDED.but(world="real", patients=9)
    private = [base.but(epsilon=e, step_length=length) for e, length in ((8.0, 0.07), (1.0, 0.01))]
    ordinary = ORDINARY.but(world="real", patients=9)
    settings = [*private, without_privacy(base).but(step_length=300.0), ordinary]
    return [Run("real tiles", setting, seed) for seed in range(3) for setting in settings]


def quick_plan() -> list[Run]:
    """Two runs of a minute that walk the same code; their figures say nothing."""
    tiny = RECOMMENDED.but(world="public", patients=12, rounds=1, steps=2, tiles=2)
    return [Run("quick", tiny, 0, look=True), Run("quick", without_privacy(tiny), 0)]
