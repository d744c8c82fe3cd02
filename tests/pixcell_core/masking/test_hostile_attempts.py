"""A hub that asks again: a round is opened once, an attempt ends, no stage is skipped or repeated."""

from __future__ import annotations

import numpy as np

from pixcell_core.contracts.canonical import digest
from pixcell_core.contracts.masking import (
    KeysRequest,
    MaskedRequest,
    RoundAttempt,
    SharesRequest,
    SurvivorsRequest,
    UnmaskRequest,
)
from tests.pixcell_core.masking.hostile_hub import (
    VICTIM,
    is_the_update,
    masked,
    refusal,
    signatures,
    with_keys,
)
from tests.pixcell_core.masking.parties import BOUND, Parties


def attempt_of(parties: Parties, **changes: object) -> RoundAttempt:
    """An attempt with something else in it."""
    return parties.attempt().model_copy(update=changes)


def test_other_studies_and_rounds_beyond_the_end_are_refused() -> None:
    parties = Parties.make(3, 2)
    site = parties.sites[VICTIM].machine()
    for changes in ({"study_digest": digest(b"another")}, {"round": parties.study.rounds + 1}):
        request = KeysRequest(attempt=attempt_of(parties, **changes))
        assert refusal(lambda request=request: site.keys(request)) == "other-study"


def test_an_earlier_round_the_same_attempt_and_an_opened_round_are_refused() -> None:
    parties = Parties.make(3, 2)
    hub = parties.hub(2)
    site = parties.sites[VICTIM]
    site.machine().keys(hub.keys_request())
    assert refusal(lambda: site.machine().keys(hub.keys_request())) == "stale-attempt"
    assert refusal(lambda: site.machine().keys(parties.hub(1).keys_request())) == "stale-attempt"
    parties.whole(3).open()
    assert refusal(lambda: site.machine().keys(parties.hub(3).keys_request())) == "already-opened"
    assert refusal(lambda: site.machine().keys(parties.hub(2).keys_request())) == "already-opened"
    # Another input adapter does not make it another round.
    other = KeysRequest(attempt=parties.attempt(3, digest(b"another adapter")))
    assert refusal(lambda: site.machine().keys(other)) == "already-opened"
    site.machine().keys(parties.hub(4).keys_request())


def test_two_sums_of_one_round_are_refused_and_would_otherwise_give_the_update_away() -> None:
    """The same updates are summed twice, the second time without the victim."""
    parties = Parties.make(4, 3)
    everybody = parties.whole().open()
    again = parties.hub()
    assert refusal(lambda: parties.share(again)) == "already-opened"

    for party in parties.sites.values():
        # The check taken out: a site that forgot what it opened.
        party.kept.append(party.state.model_copy(update={"opened": 0}).to_bytes())
    without = parties.hub()
    parties.share(without)
    parties.mask(without, frozenset({VICTIM}))
    parties.reveal(without, parties.sign(without))
    found = everybody.total - without.open().total
    assert np.allclose(found, np.clip(parties.update(VICTIM), -BOUND, BOUND), atol=1e-6)


def test_two_attempts_of_one_round_cannot_both_be_opened() -> None:
    """The hub opens one attempt with just enough sites, and turns the rest to a second attempt of the same round."""
    parties = Parties.make(5, 3)
    hub, _ = masked(parties)
    request = signatures(parties, hub, tuple(parties.sites), ["s00", "s01", "s02"])
    for name in ("s00", "s01", "s02"):
        parties.sites[name].machine().unmask(request)
    again = parties.hub()
    for name in ("s03", "s04"):
        again.take_keys(name, parties.sites[name].machine().keys(again.keys_request()))
    for name in ("s00", "s01", "s02"):
        assert (
            refusal(lambda name=name: parties.sites[name].machine().keys(again.keys_request()))
            == "already-opened"
        )
    # An honest hub stops here; a hostile one asks all the same, with the keys it has.
    few = SharesRequest(attempt=again.attempt, keys=again.signed_keys)
    assert refusal(lambda: parties.sites["s03"].machine().shares(few)) == "too-few-sites"
    padded = SharesRequest(attempt=again.attempt, keys=(hub.keys["s00"], *again.signed_keys))
    assert refusal(lambda: parties.sites["s03"].machine().shares(padded)) == "keys-not-signed"
    # Nor does the first attempt serve it any longer: these sites left it.
    assert refusal(lambda: parties.sites["s03"].machine().unmask(request)) == "stale-attempt"


def test_every_question_of_an_ended_attempt_is_refused() -> None:
    parties = Parties.make(3, 2)
    old = parties.hub()
    parties.share(old)
    parties.mask(old)
    request = parties.sign(old)
    asked = (old.shares_request(), old.masked_request(VICTIM), old.survivors_request())
    parties.sites[VICTIM].machine().keys(parties.hub().keys_request())
    site = parties.sites[VICTIM].machine()
    assert refusal(lambda: site.shares(asked[0])) == "stale-attempt"
    assert refusal(lambda: site.accept(asked[1], 1, old.attempt.input_digest)) == "stale-attempt"
    assert refusal(lambda: site.mask(old.attempt, parties.update(VICTIM))) == "stale-attempt"
    assert refusal(lambda: site.survivors(asked[2])) == "stale-attempt"
    assert refusal(lambda: site.unmask(request)) == "stale-attempt"


def test_no_stage_is_skipped_or_repeated() -> None:
    parties = Parties.make(3, 2)
    hub = with_keys(parties)
    site = parties.sites[VICTIM]
    flat = parties.update(VICTIM)
    nobody = MaskedRequest(attempt=hub.attempt, sharers=tuple(parties.sites), sealed=())
    survivors = SurvivorsRequest(attempt=hub.attempt, survivors=tuple(parties.sites))
    unmask = UnmaskRequest(attempt=hub.attempt, survivors=tuple(parties.sites), signatures=())
    early = {
        "accept": lambda: site.machine().accept(nobody, 1, hub.attempt.input_digest),
        "mask": lambda: site.machine().mask(hub.attempt, flat),
        "survivors": lambda: site.machine().survivors(survivors),
        "unmask": lambda: site.machine().unmask(unmask),
    }
    for act in early.values():
        assert refusal(act) == "out-of-order"
    request = hub.shares_request()
    for name in parties.sites:
        hub.take_shares(name, parties.sites[name].machine().shares(request))
    assert refusal(lambda: site.machine().shares(request)) == "out-of-order"
    for name in ("mask", "survivors", "unmask"):
        assert refusal(early[name]) == "out-of-order"
    parties.mask(hub)
    assert (
        refusal(lambda: site.machine().accept(hub.masked_request(VICTIM), 1, hub.attempt.input_digest))
        == "out-of-order"
    )
    assert refusal(early["unmask"]) == "out-of-order"


def test_two_masked_vectors_of_one_attempt_are_refused_and_would_otherwise_give_a_difference() -> None:
    parties = Parties.make(3, 2)
    hub = parties.hub()
    parties.share(hub)
    site = parties.sites[VICTIM]
    site.machine().accept(hub.masked_request(VICTIM), 1, hub.attempt.input_digest)
    before = site.kept[-1]
    first = site.machine().mask(hub.attempt, parties.update(VICTIM))
    assert (
        refusal(lambda: site.machine().mask(hub.attempt, np.zeros(parties.size, np.float32)))
        == "out-of-order"
    )
    # The check taken out: the state before the first masking put back.
    site.kept.append(before)
    second = site.machine().mask(hub.attempt, np.zeros(parties.size, np.float32))
    assert is_the_update(parties, first - second)


def test_a_round_other_than_the_masked_one_is_refused() -> None:
    parties = Parties.make(3, 2)
    hub = parties.hub()
    parties.share(hub)
    site = parties.sites[VICTIM].machine()
    request = hub.masked_request(VICTIM)
    assert refusal(lambda: site.accept(request, 2, hub.attempt.input_digest)) == "other-round"
    assert refusal(lambda: site.accept(request, 1, digest(b"another adapter"))) == "other-round"
