"""The masked sum is the plain sum, whoever drops out and whenever; or the round ends before anything is opened."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pixcell_core.errors import BadInputError
from pixcell_core.masking.fixed_point import FixedPoint
from pixcell_core.masking.keys import MaskingRefusedError
from pixcell_core.masking.saved_attempt import DOCUMENT, TENSORS, drop_attempt, load_attempt, save_attempt
from tests.pixcell_core.masking.parties import BOUND, Parties


def relative(found: np.ndarray, wanted: np.ndarray) -> float:
    """L2 of the difference, relative to the wanted."""
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def test_the_masked_sum_is_the_plain_sum_to_a_millionth() -> None:
    parties = Parties.make(5, 3, size=70_000)
    opened = parties.whole().open()
    assert opened.sites == tuple(parties.sites)
    assert relative(opened.total, parties.plain_sum(opened.sites)) < 1e-6


stages = st.sampled_from(["keys", "shares", "masked", "signature", "reveal", "stays"])


@settings(max_examples=120, deadline=None, derandomize=True)
@given(st.lists(stages, min_size=3, max_size=7), st.data())
def test_whoever_drops_out_the_sum_is_right_or_nothing_is_opened(
    leaves: list[str], data: st.DataObject
) -> None:
    count = len(leaves)
    threshold = data.draw(st.integers(count // 2 + 1, count))
    parties = Parties.make(count, threshold)
    gone = {
        stage: frozenset(name for name, at in zip(parties.sites, leaves, strict=True) if at == stage)
        for stage in ("keys", "shares", "masked", "signature", "reveal")
    }
    left = count
    enough = True
    for stage, needed in (
        ("keys", max(3, threshold)),
        ("shares", max(3, threshold)),
        ("masked", max(3, threshold)),
        ("signature", threshold),
    ):
        left -= len(gone[stage])
        enough = enough and left >= needed
    hub = parties.hub()
    if not enough:
        with pytest.raises(MaskingRefusedError) as refused:
            parties.share(hub, gone["keys"], gone["shares"])
            parties.mask(hub, gone["masked"])
            parties.sign(hub, gone["signature"])
        assert refused.value.code == "too-few-sites"
        assert all(not party.kept or party.state.opened == 0 for party in parties.sites.values())
        return
    parties.share(hub, gone["keys"], gone["shares"])
    parties.mask(hub, gone["masked"])
    parties.sign(hub, gone["signature"])
    request = hub.unmask_request()
    parties.reveal(hub, request, gone["reveal"])
    left -= len(gone["reveal"])
    if left < threshold:
        with pytest.raises(MaskingRefusedError) as refused:
            hub.open()
        assert refused.value.code == "unmasking-incomplete"
        # The very same question, asked once the sites are back, opens the sum after all.
        parties.reveal(hub, request)
    opened = hub.open()
    survivors = tuple(
        n for n, at in zip(parties.sites, leaves, strict=True) if at in ("signature", "reveal", "stays")
    )
    assert opened.sites == survivors
    assert relative(opened.total, parties.plain_sum(survivors)) < 1e-6


def test_a_hub_that_crashed_opens_the_sum_from_what_it_kept(tmp_path: Path) -> None:
    parties = Parties.make(5, 3)
    hub = parties.hub()
    parties.share(hub)
    parties.mask(hub, frozenset({"s01"}))
    request = parties.sign(hub)
    save_attempt(tmp_path, hub)
    # Two sites answered before the hub died; the answers died with it.
    for name in ("s00", "s02"):
        parties.sites[name].machine().unmask(request)
    again = load_attempt(tmp_path, parties.roster)
    assert again is not None and again.unmask_request() == request
    parties.reveal(again, again.unmask_request())
    opened = again.open()
    assert opened.sites == ("s00", "s02", "s03", "s04")
    assert relative(opened.total, parties.plain_sum(opened.sites)) < 1e-6
    assert {p.stat().st_mode & 0o777 for p in tmp_path.iterdir()} == {0o600}
    drop_attempt(tmp_path)
    assert load_attempt(tmp_path, parties.roster) is None


@pytest.mark.parametrize("name", [DOCUMENT, TENSORS])
def test_a_kept_attempt_that_was_altered_is_refused(tmp_path: Path, name: str) -> None:
    parties = Parties.make(3, 2)
    hub = parties.hub()
    parties.share(hub)
    parties.mask(hub)
    parties.sign(hub)
    save_attempt(tmp_path, hub)
    data = bytearray((tmp_path / name).read_bytes())
    at = data.find(b'"survivors":["s00"') + 14 if name == DOCUMENT else len(data) - 1
    data[at] ^= 1
    (tmp_path / name).write_bytes(bytes(data))
    with pytest.raises((BadInputError, MaskingRefusedError)):
        load_attempt(tmp_path, parties.roster)


def test_a_kept_attempt_of_another_study_is_refused(tmp_path: Path) -> None:
    parties, others = Parties.make(3, 2), Parties.make(3, 2)
    hub = parties.hub()
    parties.share(hub)
    parties.mask(hub)
    parties.sign(hub)
    save_attempt(tmp_path, hub)
    with pytest.raises(MaskingRefusedError, match="another study"):
        load_attempt(tmp_path, others.roster)


@given(st.integers(3, 1000), st.floats(1e-6, 1e6))
def test_a_sum_at_the_bound_never_overflows(sites: int, bound: float) -> None:
    grid = FixedPoint(bound, sites)
    assert 2 * sites * grid.levels < 2**31
    flat = np.array([bound, -bound, 3 * bound, 0.0], dtype=np.float32)
    one = np.empty(4, dtype="<u4")
    grid.filler(flat)(0, one)
    total = (one.astype(np.uint64) * sites).astype("<u4")
    read = grid.read_sum(total, sites)
    assert np.allclose(read, [sites * bound, -sites * bound, sites * bound, 0.0], rtol=1e-6)


@given(st.integers(3, 50), st.integers(0, 2**32 - 1))
def test_one_number_is_off_by_half_a_step_at_most(sites: int, seed: int) -> None:
    grid = FixedPoint(BOUND, sites)
    flat = np.random.default_rng(seed).uniform(-BOUND, BOUND, 500).astype(np.float32)
    words = np.empty(500, dtype="<u4")
    grid.filler(flat)(0, words)
    assert np.abs(grid.read_sum(words, 1) - flat).max() <= grid.step / 2 * (1 + 1e-9)


@pytest.mark.parametrize(("sites", "times", "holds"), [(5, 700, True), (5, 2000, False), (100, 35, True)])
def test_the_bound_may_be_so_many_times_the_typical_coordinate(sites: int, times: int, holds: bool) -> None:
    grid = FixedPoint(BOUND, sites)
    rows = np.random.default_rng(3).normal(0, BOUND / times, (sites, 4000)).astype(np.float32)
    total, words = np.zeros(4000, "<u4"), np.empty(4000, "<u4")
    for row in rows:
        grid.filler(row)(0, words)
        total += words
    wanted = np.sum(np.clip(rows.astype(np.float64), -BOUND, BOUND), axis=0)
    assert (relative(grid.read_sum(total, sites), wanted) < 1e-6) is holds


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_an_update_that_is_not_finite_never_leaves(value: float) -> None:
    parties = Parties.make(3, 2)
    hub = parties.hub()
    parties.share(hub)
    party = parties.sites["s00"]
    party.machine().accept(hub.masked_request("s00"), 1, hub.attempt.input_digest)
    flat = np.zeros(parties.size, np.float32)
    flat[7] = value
    with pytest.raises(MaskingRefusedError) as refused:
        party.machine().mask(hub.attempt, flat)
    assert refused.value.code == "not-finite"


def test_a_mask_left_in_the_sum_is_noticed() -> None:
    """The spare bit of the grid: a site that masks wrongly is found by the range of the sum."""
    parties = Parties.make(3, 2)
    hub = parties.hub()
    parties.share(hub)
    parties.mask(hub)
    hub.total += np.random.default_rng(0).integers(0, 2**32, parties.size, dtype=np.uint32)
    parties.reveal(hub, parties.sign(hub))
    with pytest.raises(MaskingRefusedError) as refused:
        hub.open()
    assert refused.value.code == "sum-out-of-range"
