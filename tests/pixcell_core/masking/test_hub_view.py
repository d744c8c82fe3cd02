"""What an honest or a curious hub sees: uniform words, wiped secrets, nothing that two attempts share."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from pixcell_core.masking.keystream import Words, apply_masks
from tests.pixcell_core.masking.hostile_hub import VICTIM, is_the_update, masked, peel, secret_of
from tests.pixcell_core.masking.parties import BOUND, Parties


def evenness(words: Words) -> float:
    """p-value of the bytes of a vector being uniform (chi-square over 256 values)."""
    return float(stats.chisquare(np.bincount(words.view(np.uint8), minlength=256)).pvalue)


@pytest.mark.parametrize("value", [0.0, BOUND, -BOUND / 3])
def test_a_masked_vector_is_uniform_whatever_the_update_is(
    value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """False alarm: one in a thousand million. The mutant adds no masks."""
    parties = Parties.make(3, 2, size=50_000)
    flat = np.full(parties.size, value, np.float32)

    def view() -> Words:
        hub = parties.hub()
        parties.share(hub)
        site = parties.sites[VICTIM].machine()
        site.accept(hub.masked_request(VICTIM), 1, hub.attempt.input_digest)
        return site.mask(hub.attempt, flat)

    one, two = view(), view()
    # Two maskings of one update are as far apart as two of different ones.
    assert min(evenness(one), evenness(two), evenness(one - two)) > 1e-9
    monkeypatch.setattr(
        "pixcell_core.masking.site.apply_masks", lambda v, masks, fill: apply_masks(v, [], fill)
    )
    assert evenness(view()) < 1e-9


def test_a_late_vector_of_a_site_that_dropped_out_stays_uniform_under_its_own_mask(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The hub says the victim dropped out, though it holds the vector; the sites then hand out its mask key."""

    def view(parties: Parties) -> Words:
        hub = parties.hub()
        parties.share(hub)
        seen = parties.mask(hub, frozenset())
        hub.survivors.discard(VICTIM)
        hub.total -= seen[VICTIM]
        parties.reveal(hub, parties.sign(hub))
        assert np.allclose(hub.open().total, parties.plain_sum(hub.alive), atol=1e-6)
        shares = {name: share.hex() for name, share in hub.key_shares[VICTIM].items()}
        return peel(hub, seen[VICTIM], hub.signed_keys, None, secret_of(parties, shares))

    parties = Parties.make(4, 3, size=50_000)
    found = view(parties)
    assert evenness(found) > 1e-9 and not is_the_update(parties, found)

    mutant = Parties.make(4, 3, size=500)
    real: Callable[..., None] = apply_masks
    monkeypatch.setattr(
        "pixcell_core.masking.site.apply_masks", lambda v, masks, fill: real(v, masks[1:], fill)
    )
    hub = mutant.hub()
    mutant.share(hub)
    seen = mutant.mask(hub)
    private = bytes.fromhex(masked_key(mutant))
    assert is_the_update(mutant, peel(hub, seen[VICTIM], hub.signed_keys, None, private))


def masked_key(parties: Parties) -> str:
    """The victim's mask key as it was kept before it was wiped."""
    return next(text for state in reversed(parties.sites[VICTIM].kept) if (text := key_in(state)))


def key_in(state: bytes) -> str:
    """The mask key in a kept state; empty where it was wiped."""
    return json.loads(state)["mask_private"] or ""


def test_secrets_are_wiped_at_the_stage_that_is_past_them() -> None:
    parties = Parties.make(3, 2)
    parties.whole()
    kept = {}
    for data in parties.sites[VICTIM].kept:
        party = replace(parties.sites[VICTIM], kept=[data])
        state = party.state
        kept[state.stage] = {
            name for name in ("channel_private", "mask_private", "seed", "held") if getattr(state, name)
        }
    assert kept == {
        "keys": {"channel_private", "mask_private"},
        "shares": {"channel_private", "mask_private", "seed", "held"},
        "holding": {"mask_private", "seed", "held"},
        "masked": {"held"},
        "signed": {"held"},
        "opened": set(),
    }


def test_no_secret_is_in_the_text_form_of_a_state() -> None:
    parties = Parties.make(3, 2)
    hub = parties.hub()
    parties.share(hub)
    state = parties.sites[VICTIM].state
    for secret in (
        state.channel_private,
        state.mask_private,
        state.seed,
        state.held[0].seed,
        state.held[0].key,
    ):
        assert secret is not None and secret not in repr(state) and secret not in str(state)


def test_masks_of_two_attempts_share_nothing_though_the_update_is_the_same() -> None:
    parties = Parties.make(3, 2)
    (_, one), (_, two) = masked(parties), masked(parties)
    assert all(np.count_nonzero(one[name] == two[name]) <= 1 for name in one)
