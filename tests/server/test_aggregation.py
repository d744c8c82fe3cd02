"""The rules against closed forms and Flower's own, and that order, memory and disk change nothing."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAdam, FedMedian, FedTrimmedAvg

from pixcell_core.contracts.spool import Arrays, flatten
from pixcell_core.contracts.study import AggregationSettings
from pixcell_core.errors import BadInputError
from server.rounds import aggregation
from server.rounds.aggregation import Aggregator, StreamingMean, make_aggregator, trimmed
from server.rounds.server_step import BETA_1, BETA_2, TAU, server_step
from tests.server.consortium import make_study
from tests.server.local_grid import LocalGrid

SIZE = 1003
SITES = tuple(f"s{i}" for i in range(10))
RULES = {
    "mean": {"rule": "mean"},
    "median": {"rule": "median"},
    "trimmed-mean": {"rule": "trimmed-mean", "trim": 0.2},
}


def updates(count: int, size: int = SIZE, seed: int = 0) -> list[np.ndarray[Any, Any]]:
    """Updates of very different sizes, which floating-point sums in another order do not forgive."""
    rng = np.random.default_rng(seed)
    return [
        (rng.standard_normal(size) * 10.0 ** rng.integers(-9, 4)).astype(np.float32) for _ in range(count)
    ]


def taken(rule: str, given: dict[str, np.ndarray[Any, Any]], spill: Path) -> np.ndarray[Any, Any]:
    """The aggregate of updates in the order of `given`."""
    study = make_study(aggregation=RULES[rule], sites=SITES)
    aggregator: Aggregator = make_aggregator(study, SIZE, 1e5, spill)
    for site, update in given.items():
        aggregator.add(site, update)
    found = aggregator.result()
    aggregator.close()
    assert not spill.exists()
    return found


@pytest.mark.parametrize("count", [1, 2, 5, 10])
@pytest.mark.parametrize("rule", RULES)
def test_each_rule_is_its_closed_form(tmp_path: Path, rule: str, count: int) -> None:
    given = updates(count)
    found = taken(rule, {f"s{i:02d}": u for i, u in enumerate(given)}, tmp_path / "spill")
    stack = np.stack(given).astype(np.float64)
    if rule == "mean":
        wanted = stack.mean(axis=0)
    elif rule == "median":
        wanted = np.median(stack, axis=0)
    else:
        cut = count // 5
        wanted = np.sort(stack, axis=0)[cut : count - cut].mean(axis=0)
    np.testing.assert_allclose(found, wanted, rtol=1e-9, atol=1e5 * 2.0**-48)


@pytest.mark.parametrize("rule", RULES)
def test_the_order_of_replies_changes_no_bit(tmp_path: Path, rule: str) -> None:
    given = {f"s{i}": u for i, u in enumerate(updates(5))}
    first = taken(rule, given, tmp_path / "spill")
    for order in itertools.permutations(given):
        again = taken(rule, {site: given[site] for site in order}, tmp_path / "spill")
        assert again.tobytes() == first.tobytes()


def test_a_floating_point_sum_would_depend_on_the_order() -> None:
    """The mutant of the test above: the sum everybody writes first."""
    given = updates(5)
    sums = {
        np.add.reduce([u.astype(np.float64) for u in order]).tobytes()
        for order in itertools.permutations(given)
    }
    assert len(sums) > 1


def test_a_thousand_updates_at_the_bound_do_not_overflow() -> None:
    bound = 3.0
    mean = StreamingMean(2, bound, 1000)
    for number in range(1000):
        mean.add(f"s{number}", np.array([bound, -bound], dtype=np.float32))
    assert mean.result().tolist() == [bound, -bound]


@pytest.mark.parametrize("sites", [1, 2, 3, 8, 9, 1000])
def test_sums_on_the_grid_are_exact(sites: int) -> None:
    """Against integers of any length: every value is a multiple of the step, and no sum loses a bit."""
    rng = np.random.default_rng(sites)
    given = [rng.uniform(-1.0, 1.0, 200).astype(np.float32) for _ in range(sites)]
    mean = StreamingMean(200, 1.0, sites)
    for number, update in enumerate(given):
        mean.add(f"s{number}", update)
    # frexp(1.0) is (0.5, 1): the bound is rounded up to 2.
    step = Fraction(2) ** (1 + max(1, (sites - 1).bit_length()) - 52)
    found = mean.result()
    for column in range(200):
        exact = sum(round(Fraction(float(u[column])) / step) for u in given) * step / sites
        assert found[column] == float(exact)
    with pytest.raises(ValueError, match="more updates"):
        for _ in range(2):
            mean.add("one-more", np.empty(0, dtype=np.float32))


@pytest.mark.parametrize("bound", [1e-300, 1e-30, 1.0, 1e38, 1e300])
def test_any_bound_a_study_may_state_makes_a_grid(bound: float) -> None:
    value = np.float32(min(bound, 1e38) / 2)
    mean = StreamingMean(1, bound, 3)
    mean.add("a", np.array([value], dtype=np.float32))
    assert mean.result()[0] == pytest.approx(float(value), rel=1e-9, abs=bound * 2.0**-50)


def test_blocks_of_any_width_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = {f"s{i}": u for i, u in enumerate(updates(5))}
    whole = {rule: taken(rule, given, tmp_path / "spill") for rule in RULES}
    monkeypatch.setattr(aggregation, "BLOCK_BYTES", 4 * 5 * 7)
    monkeypatch.setattr(aggregation, "BLOCK", 13)
    for rule, wanted in whole.items():
        assert taken(rule, given, tmp_path / "spill").tobytes() == wanted.tobytes()


@pytest.mark.parametrize("rule", RULES)
def test_what_screening_should_have_stopped_is_not_added(tmp_path: Path, rule: str) -> None:
    aggregator = make_aggregator(make_study(aggregation=RULES[rule]), 4, 1.0, tmp_path / "spill")
    with pytest.raises(ValueError, match="nothing"):
        aggregator.result()
    with pytest.raises(ValueError, match="another shape"):
        aggregator.add("east", np.zeros(1, dtype=np.float32))
    aggregator.add("east", np.zeros(4, dtype=np.float32))
    if rule != "mean":
        with pytest.raises(ValueError, match="counts once"):
            aggregator.add("east", np.zeros(4, dtype=np.float32))
    assert aggregator.count == 1


@pytest.mark.parametrize(
    ("trim", "sites", "wanted"), [(0.1, 10, 1), (0.29, 100, 29), (0.2, 4, 0), (0.49, 3, 1), (0.4, 5, 2)]
)
def test_the_share_trimmed(trim: float, sites: int, wanted: int) -> None:
    assert trimmed(trim, sites) == wanted and sites - 2 * wanted >= 1


@pytest.mark.parametrize("rule", ["median", "trimmed-mean"])
def test_one_liar_among_five_moves_a_robust_rule_no_further_than_honest_sites_stand(
    tmp_path: Path, rule: str
) -> None:
    honest = updates(4, seed=3)
    lie = np.full(SIZE, 9e4, dtype=np.float32)
    sites = {f"s{i}": u for i, u in enumerate([*honest, lie])}
    found = taken(rule, sites, tmp_path / "spill")
    stack = np.stack(honest)
    assert (found <= stack.max(axis=0)).all() and (found >= stack.min(axis=0)).all()
    assert (taken("mean", sites, tmp_path / "spill") > stack.max(axis=0)).any()


# Flower's own strategies. They aggregate adapters, ours aggregates updates: from an adapter of zeros they are the same.

RUN = 1


def replies_of(given: list[np.ndarray[Any, Any]]) -> list[Message]:
    """What Flower's strategies take: replies with an array record and a count of examples."""
    LocalGrid({})  # Messages can only be made inside a task.
    made = []
    for node, update in enumerate(given):
        question = Message(RecordDict(), dst_node_id=node + 2, message_type="train")
        content = RecordDict(
            {"arrays": ArrayRecord({"w": Array(update)}), "metrics": MetricRecord({"num-examples": 1})}
        )
        made.append(Message(content, reply_to=question))
    return made


@pytest.mark.parametrize("count", [4, 5, 10])
def test_robust_rules_are_those_of_flower(tmp_path: Path, count: int) -> None:
    given = updates(count, seed=5)
    sites = {f"s{i:02d}": u for i, u in enumerate(given)}
    for rule, strategy in (("median", FedMedian()), ("trimmed-mean", FedTrimmedAvg(beta=0.2))):
        theirs, _ = strategy.aggregate_train(1, replies_of(given))
        assert theirs is not None
        ours = taken(rule, sites, tmp_path / "spill")
        np.testing.assert_allclose(ours, theirs["w"].numpy(), rtol=2e-6, atol=1e-7)


ADAM = AggregationSettings(server_optimizer="adam", server_learning_rate=0.05)


def adam_by_flower(given: list[np.ndarray[Any, Any]], start: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Flower's FedAdam over rounds of one update each, with its bias correction taken out of the learning rate."""
    strategy = FedAdam(eta=1.0, beta_1=BETA_1, beta_2=BETA_2, tau=TAU)
    weights = start.astype(np.float64)
    for number, update in enumerate(given, start=1):
        correction = math.sqrt(1 - BETA_2 ** (number + 1)) / (1 - BETA_1 ** (number + 1))
        strategy.eta = ADAM.server_learning_rate / correction
        strategy.current_arrays = {"w": weights}
        record, _ = strategy.aggregate_train(number, replies_of([weights + update]))
        assert record is not None
        weights = record["w"].numpy()
    return weights


def steps(settings: AggregationSettings, given: list[np.ndarray[Any, Any]], start: Arrays) -> Arrays:
    """Our server over rounds of one update each, its state handed on as the store does."""
    adapter, state = start, None
    for update in given:
        stepped = server_step(settings, adapter, update.astype(np.float64), state)
        adapter, state = stepped.adapter, stepped.state
    return adapter


def test_fedadam_is_flowers_without_its_bias_correction() -> None:
    given = updates(6, seed=7)
    start: Arrays = {"w": np.linspace(-1, 1, SIZE, dtype=np.float32)}
    np.testing.assert_allclose(
        steps(ADAM, given, start)["w"], adam_by_flower(given, start["w"]), rtol=2e-4, atol=2e-6
    )


def test_fedadam_is_the_papers_recursion() -> None:
    given, rate = updates(4, seed=8), ADAM.server_learning_rate
    start: Arrays = {"a": np.zeros((3, 1), dtype=np.float32), "b": np.ones(SIZE - 3, dtype=np.float32)}
    x, m, v = flatten(start).astype(np.float64), np.zeros(SIZE), np.zeros(SIZE)
    for update in given:
        delta = update.astype(np.float64)
        m = BETA_1 * m + (1 - BETA_1) * delta
        v = BETA_2 * v + (1 - BETA_2) * delta**2
        x = x + rate * m / (np.sqrt(v) + TAU)
    np.testing.assert_allclose(flatten(steps(ADAM, given, start)), x, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rate", [1.0, 0.5])
def test_fedavg_adds_the_aggregate_times_the_rate(rate: float) -> None:
    settings = AggregationSettings(server_learning_rate=rate)
    start: Arrays = {"w": np.linspace(-1, 1, SIZE, dtype=np.float32)}
    update = updates(1)[0].astype(np.float64)
    stepped = server_step(settings, start, update, None)
    assert stepped.state is None
    np.testing.assert_array_equal(
        stepped.adapter["w"], (start["w"].astype(np.float64) + rate * update).astype(np.float32)
    )
    assert start["w"][0] == -1.0


Spoil = Callable[[Arrays], Arrays]


@pytest.mark.parametrize(
    "spoil",
    [lambda s: {"m": s["m"]}, lambda s: s | {"t": s["m"]}, lambda s: {"m": s["m"][:-1], "v": s["v"]}],
)
def test_moments_of_another_adapter_are_refused(spoil: Spoil) -> None:
    start: Arrays = {"w": np.zeros(SIZE, dtype=np.float32)}
    state = server_step(ADAM, start, np.ones(SIZE), None).state
    assert state is not None
    with pytest.raises(BadInputError) as refused:
        server_step(ADAM, start, np.ones(SIZE), spoil(state))
    assert refused.value.code == "rounds-broken"
