"""A hub that lies about shares: other sharers, and boxes that are not their senders'."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from pixcell_core.contracts.masking import (
    MaskedRequest,
    SealedShare,
)
from pixcell_core.masking.hub import HubAttempt
from tests.pixcell_core.masking.hostile_hub import VICTIM, refusal, shared
from tests.pixcell_core.masking.parties import Parties

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
