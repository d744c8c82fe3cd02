"""Does sampling protect as the accountant is told? Many small games of one patient in or out, through the real step.

In every game a cohort of one patient, or of none, takes T private steps; the patient's gradient points one way, and
where nobody is drawn the released sum must be noise alone. The accountant claims that no test on what was released
tells the two cohorts apart with a true-positive rate more than delta(0) above its false-positive rate, where
delta(0) is the mechanism's total variation. Measured is that advantage for one test whose threshold comes from practice
games that do not count, with exact binomial bounds (Clopper & Pearson 1934). It sees what gradient canaries at q = 1
cannot: a sampler that draws more often than it says, and whatever stands in for an empty sample (a made-up record in
its place moves the sum by up to C the other way, so that one patient moves it by 2C).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from scipy.special import betaincinv
from torch import Tensor, nn

from pixcell_core.errors import BadInputError
from pixcell_core.private.accounting import UNIT
from pixcell_core.private.composition import quiet_library
from pixcell_core.private.engine import private_step
from pixcell_core.private.events import GaussianEvent
from pixcell_core.private.noise import NoiseSource
from pixcell_core.private.parameters import PrivacyParameters
from pixcell_core.private.patient_gradients import PatientGradientEngine
from pixcell_core.private.sampling import PatientSampler, PoissonSampler

_LENGTH = 10.0
_WIDTH = 4


@dataclass(frozen=True)
class SamplingFinding:
    """What the games measured.

    Attributes:
        games: played, half with the patient and half without.
        claimed_advantage: delta(0) by the accountant: the most that true minus false positives may be.
        measured_advantage: true minus false positives of the fixed test.
        advantage_lower_bound: of the true advantage, one-sided at `alpha`.
        alpha: the chance to reject a mechanism that is exactly as claimed; fixed beforehand.
    """

    games: int
    claimed_advantage: float
    measured_advantage: float
    advantage_lower_bound: float
    alpha: float

    @property
    def consistent(self) -> bool:
        """False when one patient was seen more clearly than the accountant allows."""
        return self.advantage_lower_bound <= self.claimed_advantage

    def __str__(self) -> str:
        verdict = "consistent with" if self.consistent else "CONTRADICTS"
        return (
            f"{self.games} sampling games: one {UNIT} is told apart with an advantage of at least "
            f"{self.advantage_lower_bound:.2f} (alpha {self.alpha:g}, one-sided), {verdict} the claimed "
            f"{self.claimed_advantage:.2f} (total variation, delta at epsilon 0); covers sampling and empty samples"
        )


def check_sampling(
    sample_rate: float,
    noise_multiplier: float,
    steps: int,
    *,
    noise_source: NoiseSource,
    games: int = 1000,
    max_grad_norm: float = 1.0,
    alpha: float = 0.001,
    sampler_for: Callable[[float, NoiseSource], PatientSampler] = PoissonSampler,
) -> SamplingFinding:
    """Play the games and compare their outcome with the accountant's total variation.

    Args:
        sample_rate: q.
        noise_multiplier: sigma.
        steps: T of each game.
        noise_source: the source in use, for coins and noise.
        games: that count, half with the patient, half without; a quarter as many are played for practice.
        max_grad_norm: C.
        alpha: of the test.
        sampler_for: makes the sampler in use.

    Raises:
        BadInputError: too few games, or an alpha that makes no test.
    """
    if games < 20 or not 0.0 < alpha < 0.5:
        raise BadInputError(
            f"{games} games and alpha {alpha:g} make no test.",
            hint="Play at least 20 games, at an alpha such as 0.001.",
            code="canary-settings",
        )
    settings = PrivacyParameters(noise_multiplier, max_grad_norm, sample_rate, steps, 1.0, 1, 1)
    model = nn.Linear(_WIDTH, 1, bias=False)
    engine = PatientGradientEngine(model, _pull(max_grad_norm), settings)
    sampler = sampler_for(sample_rate, noise_source)
    recorder, cohort, rng = _Keeper(list(model.parameters())), _One(), torch.Generator()

    def score(present: bool) -> float:
        along = 0.0
        for _ in range(steps):
            drawn = sampler.sample(cohort.patients if present else [])
            private_step(engine, cohort, drawn, recorder, noise_source, rng)
            along += recorder.along
        return along

    each, practice = games // 2, max(10, games // 8)
    threshold, sign = _rule([score(True) for _ in range(practice)], [score(False) for _ in range(practice)])
    true_positives = sum(sign * score(True) > threshold for _ in range(each))
    false_positives = sum(sign * score(False) > threshold for _ in range(each))
    # Each rate's bound takes half of alpha.
    low = _binomial_bound(true_positives, each, alpha / 2.0)
    high = 1.0 - _binomial_bound(each - false_positives, each, alpha / 2.0)
    return SamplingFinding(
        games=2 * each,
        claimed_advantage=total_variation([GaussianEvent(sample_rate, noise_multiplier, steps)]),
        measured_advantage=(true_positives - false_positives) / each,
        advantage_lower_bound=low - high,
        alpha=alpha,
    )


def total_variation(events: Sequence[GaussianEvent]) -> float:
    """Return delta at epsilon 0 of all events together, an upper bound, by privacy loss distributions."""
    with quiet_library() as library:
        from dp_accounting.pld import PLDAccountant

        account = PLDAccountant(library.NeighboringRelation.ADD_OR_REMOVE_ONE, 1e-3)
        for event in events:
            sampled = library.PoissonSampledDpEvent(
                event.sample_rate, library.GaussianDpEvent(event.noise_multiplier)
            )
            account.compose(library.SelfComposedDpEvent(sampled, event.steps))
        return float(account.get_delta(0.0))


def _rule(inside: Sequence[float], outside: Sequence[float]) -> tuple[float, float]:
    """The test: sign times score above a threshold half way between the two groups' means."""
    present, absent = sum(inside) / len(inside), sum(outside) / len(outside)
    sign = 1.0 if present >= absent else -1.0
    return sign * (present + absent) / 2.0, sign


class _One:
    """A cohort of one patient with one row."""

    patients: Sequence[str] = ["one"]

    def rows(self, patient: str, k: int, rng: torch.Generator) -> tuple[Tensor, ...]:
        row = torch.zeros(1, _WIDTH)
        row[0, 0] = 1.0
        return (row,)


class _Keeper(torch.optim.Optimizer):
    """An optimiser that keeps the released number along the patient's direction and moves nothing."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__(parameters, {})
        self.along = 0.0

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        (parameter,) = self.param_groups[0]["params"]
        self.along = float(parameter.grad[0, 0])


def _pull(max_grad_norm: float) -> Callable[[nn.Module, tuple[Tensor, ...]], Tensor]:
    def loss(module: nn.Module, rows: tuple[Tensor, ...]) -> Tensor:
        answers: Tensor = module(rows[0])
        return _LENGTH * max_grad_norm * answers[:, 0]

    return loss


def _binomial_bound(successes: int, trials: int, alpha: float) -> float:
    """One-sided lower bound of a binomial rate (Clopper & Pearson 1934)."""
    if successes == 0:
        return 0.0
    return float(betaincinv(successes, trials - successes + 1, alpha))
