"""The rule by which a budget is kept: it holds whatever the later charges are chosen by.

An accountant adds up settings that were fixed beforehand. A site's ledger is not like that: the second study's noise,
rate and steps, and whether there is a second study, may be decided after the first one's model was seen. Adding up the
realised settings then promises too little (Rogers et al. 2016); a filter fixed beforehand does not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from pixcell_core.errors import BadInputError, RefusedError
from pixcell_core.private.closed_form import gaussian_mu
from pixcell_core.private.composition import pld_epsilon, rdp_at_order, rdp_at_orders
from pixcell_core.private.events import GaussianEvent, total_mu_squared
from pixcell_core.private.limits import check_delta

MIXED_SHARE_AFTER_FULL: Final = 0.02
MIXED_SHARE_AFTER_SAMPLED: Final = 0.2
"""Of delta, for sequences of unlike charges. The main class keeps 99.9 and 99 % of the mu it could spend alone."""

_ORDERS: Final = (
    1.25,
    1.5,
    1.75,
    2.0,
    2.5,
    3.0,
    3.5,
    *(float(a) for a in range(4, 65)),
    80.0,
    96.0,
    128.0,
    192.0,
    256.0,
)


class BudgetExceededError(RefusedError):
    """The charges would pass the cap; nothing was drawn and nothing was charged."""

    default_code = "budget-exceeded"


@dataclass(frozen=True)
class BudgetFilter:
    """Admits a sequence of charges only while all of it together is (epsilon, delta)-DP per patient.

    The sequence may be chosen adaptively: each charge's q, sigma, steps, and the stop, by any function of all that was
    released before. Neighbouring cohorts differ in one patient. P and Q are the distributions of the transcript with
    and without the patient; L is the log of their ratio. A transcript is of one of two classes; delta is divided
    between them, and what may follow is settled by the cap and the patient's first charge alone, before anything that
    depends on this patient was released. The mixed class has 2 % of delta where the first charge has q = 1, since
    charges of everybody are all alike to the main class, and 20 % where it has q < 1.

    **The main class, its share delta'. First charge with q = 1: the Gaussian filter** (Smith & Thakurta 2022;
    Koskela, Tobaben & Honkela 2023). While the sum of T / sigma^2 over all charges is at most m = mu^2, where mu solves
    the closed form at (epsilon, delta'). Exact: one mechanism that spends m at once has this epsilon and no less.
    Proof. For v >= 0 let V(v, s) = E[(1 - exp(epsilon - s - Z))+] with Z ~ N(v/2, v): the delta still to come after a
    loss s when v remains. One step of mu_i^2 <= v has a loss N(mu_i^2/2, mu_i^2) under P independent of what follows,
    normal laws add, so E[V(v - mu_i^2, s + L_i)] = V(v, s), and V grows with v. Going back from the last step, no choice
    of the mu_i makes delta larger than V(m, 0), which is the closed form. A patient that moves the sum by less than C,
    and a step with q < 1, are post-processings of the full step (keep it with probability q, else answer from Q), so
    that counting them as q = 1 is safe.

    **The main class, first charge (q, sigma) with q < 1: repetitions.** While all charges are this same (q, sigma) and
    the privacy loss distribution of all steps keeps epsilon at delta'. The only choice is when to stop; stopping is a
    post-processing of the longest run.

    **The mixed class, the rest delta'' of delta: every other transcript.** While its Renyi divergences of ONE order a, a
    function of the cap and the first charge, sum to at most the r with
    r + log((a-1)/a) - (log delta'' + log a)/(a-1) = epsilon (Feldman & Zrnic 2021: with the sum bounded,
    exp((a-1)(L - sum of r_i)) has mean at most 1 under P, so that the whole is (a, r)-Renyi DP; conversion of Canonne,
    Kamath & Steinke 2020).

    Proof that the two add up. Let S be a set of transcripts. Its transcripts in the main class are an event of the run
    that halts rather than leave that class; the others are an event of the run that halts rather than pass r (sums only
    grow, so that such a transcript never passed it). These runs keep (epsilon, delta') and (epsilon, delta''), hence
    P(S) - exp(epsilon) Q(S) <= delta' + delta'' = delta. The same with P and Q exchanged.

    In every case the accountant's own number at delta has to be within the cap too. The cap is part of what is fixed
    beforehand: a cap raised after looking at releases is a new promise, by whoever raises it.

    Attributes:
        epsilon: the cap, per patient.
        delta: at most 1e-5.

    Raises:
        BadInputError: a cap that is not finite and above 0, or a delta that promises too little.
    """

    epsilon: float
    delta: float

    def __post_init__(self) -> None:
        check_delta(self.delta)
        if not (math.isfinite(self.epsilon) and self.epsilon > 0.0):
            raise BadInputError(
                f"A cap of epsilon {self.epsilon:g} per patient is not a finite number above 0.",
                hint="Give the site's cap as epsilon and delta, such as epsilon 8 at delta 1e-5.",
                code="budget-cap",
            )

    def admits(self, events: Sequence[GaussianEvent]) -> bool:
        """Whether all of `events`, oldest first and the new charge last, stay within the cap; no events do."""
        return self._refusal(events) is None

    def require(self, events: Sequence[GaussianEvent], *, spent: Sequence[GaussianEvent] = ()) -> None:
        """Raise unless `events` are admitted.

        Args:
            events: all charges, oldest first, the new ones last.
            spent: those of them that are charged already; named in the message.

        Raises:
            BudgetExceededError: says what would be spent, what is, and which rule refused.
        """
        refusal = self._refusal(events)
        if refusal is not None:
            raise BudgetExceededError(
                f"{refusal} {_said(pld_epsilon(spent, self.delta), self.delta)} is spent already. "
                "Nothing was drawn and nothing was charged.",
                hint="Plan fewer steps or more noise. Only the site's owner can raise the cap.",
            )

    def _refusal(self, events: Sequence[GaussianEvent]) -> str | None:
        """Why the sequence is refused; None where it is admitted."""
        if not events:
            return None
        if not (self._is_main(events) or self.renyi_fits(events)):
            return self._over(events)
        if pld_epsilon(events, self.delta) > self.epsilon:
            return self._over(events)
        return None

    def _is_main(self, events: Sequence[GaussianEvent]) -> bool:
        first = events[0]
        if first.sample_rate == 1.0:
            return total_mu_squared(events) <= self.mu_squared
        if any(
            (e.sample_rate, e.noise_multiplier) != (first.sample_rate, first.noise_multiplier) for e in events
        ):
            return False
        return pld_epsilon(events, self.repetition_delta) <= self.epsilon

    @property
    def repetition_delta(self) -> float:
        """The share of delta for repetitions of one sampled charge."""
        return self.delta * (1.0 - MIXED_SHARE_AFTER_SAMPLED)

    @property
    def mu_squared(self) -> float:
        """The largest sum of T / sigma^2 that is admitted where everybody takes part in every step."""
        return _mu_cap(self.epsilon, self.delta * (1.0 - MIXED_SHARE_AFTER_FULL)) ** 2

    def renyi_fits(self, events: Sequence[GaussianEvent]) -> bool:
        """Whether `events` are within the rule of the mixed class: sufficient for `admits`, and cheap."""
        first = events[0]
        delta = self.delta * (
            MIXED_SHARE_AFTER_FULL if first.sample_rate == 1.0 else MIXED_SHARE_AFTER_SAMPLED
        )
        order = _order(self.epsilon, delta, first.sample_rate, first.noise_multiplier)
        return rdp_at_order(events, order) <= _renyi_budget(self.epsilon, delta, order)

    def _over(self, events: Sequence[GaussianEvent]) -> str:
        after = pld_epsilon(events, self.delta)
        if after > self.epsilon:
            return (
                f"This would bring the site to {_said(after, self.delta)}, over its cap of {self.epsilon:g}."
            )
        return (
            f"The cap of epsilon {self.epsilon:g} per patient at delta {self.delta:g} leaves no room for this: added up "
            f"as if planned beforehand it would be {_said(after, self.delta)}, but later charges may be chosen by what "
            "earlier ones released, and the rule that holds then admits less of unlike charges."
        )


@lru_cache(maxsize=64)
def _mu_cap(epsilon: float, delta: float) -> float:
    return gaussian_mu(epsilon, delta)


@lru_cache(maxsize=256)
def _order(epsilon: float, delta: float, sample_rate: float, noise_multiplier: float) -> float:
    """The order at which the first charge could be repeated most often."""
    one = rdp_at_orders([GaussianEvent(sample_rate, noise_multiplier, 1)], _ORDERS)
    room = [_renyi_budget(epsilon, delta, order) / spent for order, spent in zip(_ORDERS, one, strict=True)]
    return _ORDERS[max(range(len(room)), key=room.__getitem__)]


def _renyi_budget(epsilon: float, delta: float, order: float) -> float:
    """The Renyi divergence of `order` that converts to `epsilon` at `delta` (Canonne, Kamath & Steinke, proposition 12)."""
    return epsilon - math.log1p(-1.0 / order) + (math.log(delta) + math.log(order)) / (order - 1.0)


def _said(value: float, delta: float) -> str:
    # Rounded up: a statement may not promise more than was computed.
    return f"epsilon {math.ceil(value * 100.0) / 100.0:.2f} per patient at delta {delta:g}"
