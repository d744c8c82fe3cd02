"""A hub that lies at every stage learns no single update; and without the check it lies past, it would.

Each attack is tried twice where it can succeed: against the real site, which refuses, and against a site whose one
check is taken out, where the attack ends with the victim's update in the hub's hands. So the tests can see.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from pixcell_core.contracts.canonical import digest
from pixcell_core.contracts.masking import (
    KeysRequest,
    MaskedRequest,
    MaskingSurvivors,
    RoundAttempt,
    SealedShare,
    SharesRequest,
    SignedKeys,
    SurvivorsRequest,
    SurvivorsSignature,
    UnmaskRequest,
)
from pixcell_core.errors import PixcellError
from pixcell_core.masking.hub import HubAttempt
from pixcell_core.masking.keys import (
    MaskingRefusedError,
    derive,
    load_private,
    new_private_key,
    public_key,
    shared_key,
)
from pixcell_core.masking.keystream import Mask, Words, apply_masks
from pixcell_core.masking.roster import (
    Roster,
    channel_purpose,
    full_transcript,
    keys_transcript,
    pairwise_purpose,
    self_purpose,
)
from pixcell_core.masking.sealing import unseal
from pixcell_core.masking.shamir import join
from pixcell_core.masking.site import MaskingSite
from pixcell_core.trust.keys import SigningKey
from tests.pixcell_core.masking.parties import BOUND, Parties

VICTIM = "s00"


def refusal(act: Callable[[], object]) -> str:
    """The code with which the site says no."""
    with pytest.raises(MaskingRefusedError) as found:
        act()
    assert found.value.hint
    return found.value.code


def peel(
    hub: HubAttempt, vector: Words, keys: Sequence[SignedKeys], seed: bytes | None, private: bytes | None
) -> Words:
    """The victim's vector without the masks that its secrets give."""
    sharers = [entry.site for entry in keys]
    transcript = full_transcript(keys_transcript(hub.attempt, keys), sharers)
    masks = []
    if seed is not None:
        masks.append(Mask(derive(seed, self_purpose(hub.attempt, transcript, VICTIM)), subtract=True))
    for entry in keys:
        if private is not None and entry.site != VICTIM:
            purpose = pairwise_purpose(hub.attempt, transcript, VICTIM, entry.site)
            secret = shared_key(load_private(private), bytes.fromhex(entry.mask_key), purpose)
            masks.append(Mask(secret, subtract=entry.site > VICTIM))
    peeled = vector.copy()
    apply_masks(peeled, masks)
    return peeled


def is_the_update(parties: Parties, peeled: Words) -> bool:
    """Whether the hub now holds the victim's clipped update."""
    wanted = np.clip(parties.update(VICTIM), -BOUND, BOUND)
    try:
        return bool(np.allclose(parties.roster.grid.read_sum(peeled, 1), wanted, atol=1e-6))
    except PixcellError:
        return False


def secret_of(parties: Parties, shares: dict[str, str]) -> bytes:
    """A secret from shares by site."""
    chosen = sorted(shares)[: parties.roster.threshold]
    return join({parties.roster.places[site]: bytes.fromhex(shares[site]) for site in chosen})


# --- keys ---------------------------------------------------------------------------------------------------------


def test_a_hub_in_the_middle_is_refused_and_would_otherwise_read_the_update(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The hub puts keys of its own in the place of every peer's."""
    parties = Parties.make(4, 3)
    hub = parties.hub()
    victim = parties.sites[VICTIM].machine()
    own = victim.keys(hub.keys_request()).keys
    assert own is not None
    forger = SigningKey.generate()
    private = {name: new_private_key() for name in parties.sites if name != VICTIM}
    forged = [own] + [
        parties.roster.sign_keys(forger, hub.attempt, name, public_key(key), public_key(key))
        for name, key in private.items()
    ]
    request = SharesRequest(attempt=hub.attempt, keys=tuple(forged))
    # Two keys of one site may be equal, those of two sites may not: this list is good but for its signatures.
    assert refusal(lambda: victim.shares(request)) == "keys-not-signed"
    assert parties.sites[VICTIM].state.stage == "keys"

    monkeypatch.setattr(Roster, "check_keys", lambda *_: None)
    reply = victim.shares(request)
    transcript = keys_transcript(hub.attempt, forged)
    shares: dict[str, tuple[str, str]] = {}
    for entry in reply.sealed:
        purpose = channel_purpose(hub.attempt, transcript, VICTIM, entry.peer)
        key = shared_key(load_private(private[entry.peer]), bytes.fromhex(own.channel_key), purpose)
        pair = unseal(key, entry.box, purpose)
        assert pair is not None
        shares[entry.peer] = (pair[:66].hex(), pair[66:].hex())
    victim.accept(
        MaskedRequest(attempt=hub.attempt, sharers=tuple(parties.sites), sealed=()),
        1,
        hub.attempt.input_digest,
    )
    vector = victim.mask(hub.attempt, parties.update(VICTIM))
    seed = secret_of(parties, {site: pair[0] for site, pair in shares.items()})
    mask_key = secret_of(parties, {site: pair[1] for site, pair in shares.items()})
    assert not is_the_update(parties, vector)
    assert is_the_update(parties, peel(hub, vector, forged, seed, mask_key))


def with_keys(parties: Parties) -> HubAttempt:
    """A hub that holds everybody's keys."""
    hub = parties.hub()
    for name, party in parties.sites.items():
        hub.take_keys(name, party.machine().keys(hub.keys_request()))
    return hub


def swapped(keys: dict[str, SignedKeys]) -> list[SignedKeys]:
    """The keys of two peers exchanged."""
    one, two = keys["s01"], keys["s02"]
    rest = [k for k in keys.values() if k.site not in ("s01", "s02")]
    return [
        *rest,
        two.model_copy(update={"site": "s01"}),
        one.model_copy(update={"site": "s02"}),
    ]


KEY_LIES: dict[str, tuple[str, Callable[[dict[str, SignedKeys]], list[SignedKeys]]]] = {
    "two peers exchanged": ("keys-not-signed", swapped),
    "one key replaced": (
        "keys-not-signed",
        lambda k: [
            *[v for n, v in k.items() if n != "s03"],
            k["s03"].model_copy(update={"mask_key": "ab" * 32}),
        ],
    ),
    "own key left out": ("keys-altered", lambda k: [v for n, v in k.items() if n != VICTIM]),
    "own key altered": (
        "keys-altered",
        lambda k: [
            k[VICTIM].model_copy(update={"mask_key": "ab" * 32}),
            *[v for n, v in k.items() if n != VICTIM],
        ],
    ),
    "a peer twice": ("unknown-site", lambda k: [*k.values(), k["s03"]]),
    "a site that the study does not name": (
        "unknown-site",
        lambda k: [*k.values(), k["s03"].model_copy(update={"site": "zz"})],
    ),
    "below the threshold": ("too-few-sites", lambda k: [k[VICTIM], k["s01"], k["s02"]]),
}


@pytest.mark.parametrize("lie", KEY_LIES)
def test_other_keys_than_the_peers_signed_are_refused(lie: str) -> None:
    parties = Parties.make(5, 4)
    hub = with_keys(parties)
    code, change = KEY_LIES[lie]
    keys = tuple(sorted(change(hub.keys), key=lambda entry: entry.site))
    request = SharesRequest(attempt=hub.attempt, keys=keys)
    assert refusal(lambda: parties.sites[VICTIM].machine().shares(request)) == code


def test_keys_out_of_order_are_refused() -> None:
    parties = Parties.make(3, 2)
    hub = with_keys(parties)
    request = SharesRequest(attempt=hub.attempt, keys=tuple(reversed(hub.signed_keys)))
    assert refusal(lambda: parties.sites[VICTIM].machine().shares(request)) == "keys-altered"


def test_keys_of_an_earlier_attempt_or_round_are_refused() -> None:
    """A replay: the signature is a peer's own, for another attempt."""
    parties = Parties.make(3, 2)
    old = with_keys(parties)
    for new in (parties.hub(1), parties.hub(2)):
        own = parties.sites[VICTIM].machine().keys(new.keys_request()).keys
        assert own is not None
        request = SharesRequest(attempt=new.attempt, keys=(own, old.keys["s01"], old.keys["s02"]))
        assert (
            refusal(lambda request=request: parties.sites[VICTIM].machine().shares(request))
            == "keys-not-signed"
        )


def test_a_peer_that_signs_a_weak_key_or_anothers_key_is_refused() -> None:
    parties = Parties.make(3, 2)
    hub = with_keys(parties)
    for channel, mask, code in (
        (bytes(32), public_key(new_private_key()), "weak-key"),
        (public_key(new_private_key()), bytes.fromhex(hub.keys["s01"].mask_key), "keys-altered"),
    ):
        weak = parties.roster.sign_keys(parties.sites["s02"].key, hub.attempt, "s02", channel, mask)
        request = SharesRequest(attempt=hub.attempt, keys=(hub.keys[VICTIM], hub.keys["s01"], weak))
        assert refusal(lambda request=request: parties.sites[VICTIM].machine().shares(request)) == code


def test_a_study_with_another_key_for_this_site_is_refused() -> None:
    parties = Parties.make(3, 2)
    assert (
        refusal(lambda: MaskingSite(VICTIM, SigningKey.generate(), parties.roster, None, lambda state: None))
        == "other-identity"
    )


def test_a_threshold_of_half_of_the_sites_is_refused_by_the_site() -> None:
    parties = Parties.make(4, 3)
    masking = parties.study.aggregation.masking
    assert masking is not None
    weak = parties.study.aggregation.model_copy(
        update={"masking": masking.model_copy(update={"threshold": 2})}
    )
    assert (
        refusal(lambda: Roster.of(parties.study.model_copy(update={"aggregation": weak})))
        == "threshold-too-low"
    )


# --- attempts and rounds --------------------------------------------------------------------------------------------


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


# --- shares ---------------------------------------------------------------------------------------------------------


def shared(parties: Parties) -> tuple[HubAttempt, MaskedRequest]:
    """A hub after the second exchange, and what it would honestly send the victim."""
    hub = parties.hub()
    parties.share(hub)
    return hub, hub.masked_request(VICTIM)


SHARER_LIES: dict[str, tuple[str, Callable[[MaskedRequest], dict[str, object]]]] = {
    "the site itself is not among them": ("sharers-altered", lambda r: {"sharers": r.sharers[1:]}),
    "one that sent no keys": ("unknown-site", lambda r: {"sharers": (*r.sharers, "zz")}),
    "below the threshold": ("too-few-sites", lambda r: {"sharers": r.sharers[:3], "sealed": r.sealed[:2]}),
    "a box twice": ("sharers-altered", lambda r: {"sealed": (*r.sealed, r.sealed[0])}),
    "a box of nobody": (
        "sharers-altered",
        lambda r: {"sealed": (r.sealed[0].model_copy(update={"peer": VICTIM}), *r.sealed[1:])},
    ),
}


@pytest.mark.parametrize("lie", SHARER_LIES)
def test_other_sharers_than_those_with_keys_are_refused(lie: str) -> None:
    parties = Parties.make(5, 4)
    hub, honest = shared(parties)
    code, change = SHARER_LIES[lie]
    site = parties.sites[VICTIM].machine()
    request = honest.model_copy(update=change(honest))
    assert refusal(lambda: site.accept(request, 1, hub.attempt.input_digest)) == code


def flipped(box: SealedShare) -> SealedShare:
    """One bit of the box changed."""
    return box.model_copy(
        update={"box": ("B" if box.box[80] != "B" else "C").join((box.box[:80], box.box[81:]))}
    )


BOX_LIES: dict[str, Callable[[HubAttempt, MaskedRequest], tuple[SealedShare, ...]]] = {
    "altered": lambda hub, r: (flipped(r.sealed[0]), *r.sealed[1:]),
    "left out": lambda hub, r: r.sealed[1:],
    "of another receiver": lambda hub, r: (
        SealedShare(peer="s01", box=hub.boxes["s01"]["s02"]),
        *r.sealed[1:],
    ),
    "of another sender": lambda hub, r: (
        SealedShare(peer="s01", box=hub.boxes["s02"][VICTIM]),
        *r.sealed[1:],
    ),
    "sent back to its sender": lambda hub, r: (
        SealedShare(peer="s01", box=hub.boxes[VICTIM]["s01"]),
        *r.sealed[1:],
    ),
}


@pytest.mark.parametrize("lie", BOX_LIES)
def test_a_box_that_is_not_its_senders_is_not_taken_and_its_share_never_given_out(lie: str) -> None:
    parties = Parties.make(4, 3)
    hub, honest = shared(parties)
    request = honest.model_copy(update={"sealed": BOX_LIES[lie](hub, honest)})
    site = parties.sites[VICTIM]
    site.machine().accept(request, 1, hub.attempt.input_digest)
    assert [held.owner for held in site.state.held] == ["s00", "s02", "s03"]
    for name in hub.sharers:
        party = parties.sites[name]
        if name != VICTIM:
            party.machine().accept(hub.masked_request(name), 1, hub.attempt.input_digest)
        hub.take_masked(name, party.machine().mask(hub.attempt, parties.update(name)))
    signed = {name: parties.sites[name].machine().survivors(hub.survivors_request()) for name in hub.sharers}
    assert signed[VICTIM].unopened == ("s01",)
    for name, reply in signed.items():
        hub.take_signature(name, reply)
    answer = site.machine().unmask(hub.unmask_request())
    assert [entry.owner for entry in answer.seeds] == ["s00", "s02", "s03"]
    parties.reveal(hub, hub.unmask_request())
    assert np.allclose(hub.open().total, parties.plain_sum(tuple(parties.sites)), atol=1e-6)


def test_a_box_of_an_earlier_attempt_is_not_taken() -> None:
    parties = Parties.make(3, 2)
    old, _ = shared(parties)
    hub, honest = shared(parties)
    box = SealedShare(peer="s01", box=old.boxes["s01"][VICTIM])
    request = honest.model_copy(update={"sealed": (box, *honest.sealed[1:])})
    parties.sites[VICTIM].machine().accept(request, 1, hub.attempt.input_digest)
    assert [held.owner for held in parties.sites[VICTIM].state.held] == ["s00", "s02"]


# --- survivors and opening ------------------------------------------------------------------------------------------


def masked(parties: Parties, gone: frozenset[str] = frozenset()) -> tuple[HubAttempt, dict[str, Words]]:
    """A hub after the third exchange, and the masked vectors as it saw them."""
    hub = parties.hub()
    parties.share(hub)
    return hub, parties.mask(hub, gone)


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


def signatures(
    parties: Parties, hub: HubAttempt, survivors: tuple[str, ...], signers: Sequence[str]
) -> UnmaskRequest:
    """The signers are told of `survivors` and sign; the last question with their signatures."""
    request = SurvivorsRequest(attempt=hub.attempt, survivors=survivors)
    signed = []
    for name in signers:
        reply = parties.sites[name].machine().survivors(request)
        assert reply.signature is not None
        signed.append(SurvivorsSignature(site=name, signature=reply.signature))
    return UnmaskRequest(attempt=hub.attempt, survivors=survivors, signatures=tuple(signed))


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


# --- what the hub sees ----------------------------------------------------------------------------------------------


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
