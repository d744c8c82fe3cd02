"""How often an innocent release fails for its near copies: no more often than the policy says, at any size."""

from __future__ import annotations

from math import comb

import numpy as np
import pytest

from privacy_audit.copies import Conformal, Nulls, near_copies
from privacy_audit.intervals import excess_over_null
from privacy_audit.policy import CopyPolicy, load_policy
from privacy_audit.result import Status

CORE = load_policy("core").copies
RELEASES = 400


def enumerated(hits: int, trials: int, allowed: int, null: int) -> float:
    """The same by counting orders: of all ways to mix trials among null scores, those with enough trials on top."""
    ways = sum(
        comb(above + allowed - 1, above) * comb(trials - above + null - allowed, trials - above)
        for above in range(hits, trials + 1)
    )
    return ways / comb(trials + null, trials)


@pytest.mark.parametrize(
    ("hits", "trials", "allowed", "null"), [(1, 5, 1, 4), (3, 9, 2, 7), (5, 20, 3, 20), (2, 6, 6, 6)]
)
def test_excess_is_the_law_of_ranks(hits: int, trials: int, allowed: int, null: int) -> None:
    assert excess_over_null(hits, trials, allowed, null) == pytest.approx(
        enumerated(hits, trials, allowed, null)
    )


def test_excess_without_hits_is_certain_and_without_a_threshold_impossible() -> None:
    assert excess_over_null(0, 10, 1, 10) == 1.0 == excess_over_null(0, 10, 0, 10)
    with pytest.raises(ValueError, match="does not exist"):
        excess_over_null(1, 10, 0, 10)


def failures(released: int, null: int, policy: CopyPolicy, *, leaks: int = 0, exact: bool = True) -> float:
    """Share of releases that fail; scores of innocent tiles and of the holdout are of one distribution."""
    rng = np.random.default_rng([released, null, leaks])
    failed = 0
    for _ in range(RELEASES):
        scores, holdout = rng.uniform(0, 0.5, released), rng.uniform(0, 0.5, null)
        scores[:leaks] = 0.6
        nulls = Nulls((("holdout tiles", Conformal(holdout)),))
        failed += near_copies(scores, nulls, policy, unrecognisable=0.0).result.status is Status.FAIL
    return failed / RELEASES


@pytest.mark.parametrize(
    ("released", "null", "most"),
    [(1000, 1000, 0.02), (3000, 3000, 0.09), (10_000, 3000, 0.08), (10_000, 9000, 0.03)],
)
def test_an_innocent_release_seldom_fails(released: int, null: int, most: float) -> None:
    assert failures(released, null, CORE.for_sizes(released, null)) <= most


def test_at_the_p_of_small_releases_a_large_innocent_one_would_fail_by_a_coin() -> None:
    assert failures(10_000, 3000, CORE.for_sizes(10_000, 3000).model_copy(update={"flag_p": 0.001})) > 0.25


def test_a_binomial_would_cry_wolf() -> None:
    """What the law of ranks mends: five flags of 1,000 against 1,000 are not rare, and a binomial calls them so."""
    from scipy.stats import binom

    assert binom.sf(4, 1000, 1 / 1001) < 0.005 < 0.03 < excess_over_null(5, 1000, 1, 1000)


@pytest.mark.parametrize(("released", "null", "leaks"), [(1000, 1000, 10), (10_000, 3000, 30)])
def test_leaks_beyond_the_limit_fail_all_the_same(released: int, null: int, leaks: int) -> None:
    assert failures(released, null, CORE.for_sizes(released, null), leaks=leaks) == 1.0


def test_the_report_says_how_likely_chance_alone_exceeds_the_limit() -> None:
    rng = np.random.default_rng(1)
    nulls = Nulls((("holdout tiles", Conformal(rng.uniform(0, 0.5, 3000))),))
    scores = rng.uniform(0, 0.4, 10_000)
    scores[:40] = 0.6
    result = near_copies(scores, nulls, CORE.for_sizes(10_000, 3000), unrecognisable=0.0).result
    # Of 11 or more above the largest of 3,000: (10,000/13,000)^11, nearly.
    assert result.details["chance_over_limit"] == pytest.approx((10 / 13) ** 11, rel=0.02)
    assert "of exceeding the limit of 0.10%" in result.why
