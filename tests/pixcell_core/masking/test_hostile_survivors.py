"""A hub that lies about survivors: two lists, too short ones, signatures that count for another list."""

from __future__ import annotations

import pytest

from pixcell_core.contracts.masking import (
    MaskedRequest,
    MaskingSurvivors,
    SealedShare,
    SharesRequest,
    SurvivorsRequest,
    SurvivorsSignature,
    UnmaskRequest,
)
from pixcell_core.masking.roster import (
    Roster,
)
from tests.pixcell_core.masking.hostile_hub import (
    VICTIM,
    is_the_update,
    masked,
    peel,
    refusal,
    secret_of,
    signatures,
    with_keys,
)
from tests.pixcell_core.masking.parties import Parties


@pytest.mark.parametrize(
    ("survivors", "code"),
    [
        (("s00", "s01"), "too-few-sites"),
        (("s00", "s01", "s02"), "too-few-sites"),
        (("s01", "s02", "s03", "s04"), "survivors-altered"),
        (("s00", "s01", "s02", "zz"), "unknown-site"),
    ],
)
def test_survivors_that_are_too_few_or_none_are_not_signed(survivors: tuple[str, ...], code: str) -> None:
    parties = Parties.make(5, 4)
    hub, _ = masked(parties)
    request = SurvivorsRequest(attempt=hub.attempt, survivors=survivors)
    assert refusal(lambda: parties.sites[VICTIM].machine().survivors(request)) == code


def test_a_sum_of_two_is_refused_even_where_the_threshold_is_two() -> None:
    parties = Parties.make(3, 2)
    hub, _ = masked(parties)
    request = SurvivorsRequest(attempt=hub.attempt, survivors=("s00", "s01"))
    assert refusal(lambda: parties.sites[VICTIM].machine().survivors(request)) == "too-few-sites"


def test_survivors_that_shared_nothing_are_not_signed() -> None:
    parties = Parties.make(5, 3)
    hub = parties.hub()
    parties.share(hub, gone=frozenset({"s04"}))
    parties.mask(hub)
    request = SurvivorsRequest(attempt=hub.attempt, survivors=("s00", "s01", "s04"))
    assert refusal(lambda: parties.sites[VICTIM].machine().survivors(request)) == "survivors-altered"


def test_one_list_is_signed_and_no_second_one() -> None:
    parties = Parties.make(5, 3)
    hub, _ = masked(parties)
    site = parties.sites[VICTIM]
    first = site.machine().survivors(hub.survivors_request())
    assert site.machine().survivors(hub.survivors_request()) == first
    other = SurvivorsRequest(attempt=hub.attempt, survivors=("s00", "s01", "s02", "s03"))
    assert refusal(lambda: site.machine().survivors(other)) == "out-of-order"


def test_split_views_of_the_survivors_open_nothing_and_would_otherwise_give_both_secrets(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Half of the sites hear that the victim survived, half that it dropped out: the hub wants both of its secrets."""
    parties = Parties.make(6, 4)
    hub, seen = masked(parties)
    everybody, without = tuple(parties.sites), tuple(parties.sites)[1:]
    one = signatures(parties, hub, everybody, ["s00", "s01", "s02", "s03"])
    # Two sites are left for the other list.
    other = signatures(parties, hub, without, ["s04", "s05"])
    assert refusal(lambda: parties.sites["s04"].machine().unmask(other)) == "survivors-not-signed"
    mixed = other.model_copy(update={"signatures": (*one.signatures[1:], *other.signatures)})
    assert refusal(lambda: parties.sites["s04"].machine().unmask(mixed)) == "survivors-not-signed"
    doubled = other.model_copy(update={"signatures": (*other.signatures, *other.signatures)})
    assert refusal(lambda: parties.sites["s05"].machine().unmask(doubled)) == "survivors-not-signed"
    outsider = other.model_copy(update={"signatures": (one.signatures[0], *other.signatures)})
    assert refusal(lambda: parties.sites["s05"].machine().unmask(outsider)) == "survivors-not-signed"
    # A list this site did not sign, though enough others did.
    assert refusal(lambda: parties.sites["s04"].machine().unmask(one)) == "other-survivors"

    # The checks taken out: no consistency among the sites, and one list of each kind answered after another.
    monkeypatch.setattr(Roster, "check_survivors", lambda *_: None)
    seeds, keys = {}, {}
    for name, party in parties.sites.items():
        signed = party.state
        statement = signed.moved("signed", survivors=everybody)
        party.kept.append(statement.to_bytes())
        answer = party.machine().unmask(
            UnmaskRequest(attempt=hub.attempt, survivors=everybody, signatures=())
        )
        seeds[name] = next(entry.share for entry in answer.seeds if entry.owner == VICTIM)
        party.kept.append(signed.moved("signed", survivors=without).to_bytes())
        answer = party.machine().unmask(UnmaskRequest(attempt=hub.attempt, survivors=without, signatures=()))
        keys[name] = next(entry.share for entry in answer.keys if entry.owner == VICTIM)
    seed, private = secret_of(parties, seeds), secret_of(parties, keys)
    assert not is_the_update(parties, peel(hub, seen[VICTIM], hub.signed_keys, seed, None))
    assert not is_the_update(parties, peel(hub, seen[VICTIM], hub.signed_keys, None, private))
    assert is_the_update(parties, peel(hub, seen[VICTIM], hub.signed_keys, seed, private))


@pytest.mark.parametrize(("colluding", "succeeds"), [(0, False), (1, True)])
def test_the_limit_is_twice_the_threshold_minus_the_sites(colluding: int, succeeds: bool) -> None:
    """5 sites, threshold 3: with one site on its side the hub opens two lists, with none it cannot. The page says so."""
    parties = Parties.make(5, 3)
    hub, seen = masked(parties)
    everybody, without = tuple(parties.sites), tuple(parties.sites)[1:]
    traitor = parties.sites["s04"]
    one_side, other_side = ["s00", "s01"], ["s02", "s03"]
    requests = {}
    for survivors, honest in ((everybody, one_side), (without, other_side)):
        body = MaskingSurvivors(
            attempt=hub.attempt, transcript=hub.statement().transcript, survivors=survivors
        )
        request = signatures(parties, hub, survivors, honest)
        bought = SurvivorsSignature(site="s04", signature=parties.roster.sign_survivors(traitor.key, body))
        extra = (bought,) if colluding else ()
        requests[survivors] = request.model_copy(update={"signatures": (*request.signatures, *extra)})
    if not succeeds:
        assert (
            refusal(lambda: parties.sites["s00"].machine().unmask(requests[everybody]))
            == "survivors-not-signed"
        )
        assert (
            refusal(lambda: parties.sites["s02"].machine().unmask(requests[without]))
            == "survivors-not-signed"
        )
        return
    held = next(h for h in traitor.state.held if h.owner == VICTIM)
    seeds, keys = {"s04": held.seed}, {"s04": held.key}
    for name in one_side:
        answer = parties.sites[name].machine().unmask(requests[everybody])
        seeds[name] = next(entry.share for entry in answer.seeds if entry.owner == VICTIM)
    for name in other_side:
        answer = parties.sites[name].machine().unmask(requests[without])
        keys[name] = next(entry.share for entry in answer.keys if entry.owner == VICTIM)
    found = peel(hub, seen[VICTIM], hub.signed_keys, secret_of(parties, seeds), secret_of(parties, keys))
    assert is_the_update(parties, found)


def test_with_a_higher_threshold_one_colluding_site_is_not_enough() -> None:
    """5 sites, threshold 4: two lists need 8 signatures; 4 honest sites and one traitor who signs twice give 6."""
    parties = Parties.make(5, 4)
    hub, _ = masked(parties)
    everybody, without = tuple(parties.sites), tuple(parties.sites)[1:]
    one = signatures(parties, hub, everybody, ["s00", "s01", "s02", "s04"])
    parties.sites["s00"].machine().unmask(one)
    body = MaskingSurvivors(attempt=hub.attempt, transcript=hub.statement().transcript, survivors=without)
    bought = SurvivorsSignature(
        site="s04", signature=parties.roster.sign_survivors(parties.sites["s04"].key, body)
    )
    other = signatures(parties, hub, without, ["s03"])
    other = other.model_copy(update={"signatures": (*other.signatures, bought)})
    assert refusal(lambda: parties.sites["s03"].machine().unmask(other)) == "survivors-not-signed"


def test_a_second_opening_with_another_list_is_refused_and_the_same_question_is_answered_alike() -> None:
    parties = Parties.make(5, 3)
    hub, _ = masked(parties)
    request = parties.sign(hub)
    site = parties.sites[VICTIM]
    answer = site.machine().unmask(request)
    assert site.machine().unmask(request) == answer
    assert not set(e.owner for e in answer.seeds) & set(e.owner for e in answer.keys)
    for other in (("s00", "s01", "s02", "s03"), ("s00", "s01", "s02")):
        assert (
            refusal(
                lambda other=other: site.machine().unmask(request.model_copy(update={"survivors": other}))
            )
            == "already-opened"
        )
    assert (
        refusal(
            lambda: site.machine().survivors(
                SurvivorsRequest(attempt=hub.attempt, survivors=("s00", "s01", "s02"))
            )
        )
        == "out-of-order"
    )


def test_signatures_of_another_attempt_do_not_open_this_one() -> None:
    parties = Parties.make(3, 2)
    old, _ = masked(parties)
    stale = parties.sign(old)
    hub, _ = masked(parties)
    request = signatures(parties, hub, tuple(parties.sites), [VICTIM])
    replayed = request.model_copy(update={"signatures": (*request.signatures, *stale.signatures[1:])})
    assert refusal(lambda: parties.sites[VICTIM].machine().unmask(replayed)) == "survivors-not-signed"


def test_split_views_of_the_keys_end_in_boxes_that_do_not_open() -> None:
    """Two sites hear of different lists of keys; both lists are rightly signed."""
    parties = Parties.make(5, 3)
    hub = with_keys(parties)
    small = SharesRequest(attempt=hub.attempt, keys=hub.signed_keys[:4])
    large = hub.shares_request()
    reply = parties.sites["s01"].machine().shares(small)
    parties.sites[VICTIM].machine().shares(large)
    box = next(entry.box for entry in reply.sealed if entry.peer == VICTIM)
    request = MaskedRequest(
        attempt=hub.attempt, sharers=tuple(parties.sites), sealed=(SealedShare(peer="s01", box=box),)
    )
    parties.sites[VICTIM].machine().accept(request, 1, hub.attempt.input_digest)
    assert [held.owner for held in parties.sites[VICTIM].state.held] == [VICTIM]


def test_split_views_of_the_sharers_end_in_signatures_that_do_not_count() -> None:
    parties = Parties.make(5, 3)
    hub = parties.hub()
    parties.share(hub)
    for name, party in parties.sites.items():
        request = hub.masked_request(name)
        if name in ("s01", "s02"):
            sealed = tuple(entry for entry in request.sealed if entry.peer != "s04")
            request = request.model_copy(update={"sharers": hub.sharers[:4], "sealed": sealed})
        party.machine().accept(request, 1, hub.attempt.input_digest)
        party.machine().mask(hub.attempt, parties.update(name))
    request = signatures(parties, hub, ("s00", "s01", "s02", "s03"), ["s00", "s01", "s02"])
    assert refusal(lambda: parties.sites[VICTIM].machine().unmask(request)) == "survivors-not-signed"
