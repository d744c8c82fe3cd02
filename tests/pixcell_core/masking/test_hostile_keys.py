"""A hub that lies about keys: another's, its own, old, weak or missing ones are refused by every site.

An attack that can succeed is tried twice: against the real site, which refuses, and against a site whose one check is
taken out, where it ends with the victim's update in the hub's hands. So the tests can see.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from pixcell_core.contracts.masking import (
    MaskedRequest,
    SharesRequest,
    SignedKeys,
)
from pixcell_core.masking.keys import (
    load_private,
    new_private_key,
    public_key,
    shared_key,
)
from pixcell_core.masking.roster import (
    Roster,
    channel_purpose,
    keys_transcript,
)
from pixcell_core.masking.sealing import unseal
from pixcell_core.masking.site import MaskingSite
from pixcell_core.trust.keys import SigningKey
from tests.pixcell_core.masking.hostile_hub import VICTIM, is_the_update, peel, refusal, secret_of, with_keys
from tests.pixcell_core.masking.parties import Parties


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
