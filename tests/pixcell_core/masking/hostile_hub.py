"""A hub that lies: what it holds after each exchange, and how it takes the masks off where a site gives its secrets."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest

from pixcell_core.contracts.masking import (
    MaskedRequest,
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
    shared_key,
)
from pixcell_core.masking.keystream import Mask, Words, apply_masks
from pixcell_core.masking.roster import (
    full_transcript,
    keys_transcript,
    pairwise_purpose,
    self_purpose,
)
from pixcell_core.masking.shamir import join
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


def with_keys(parties: Parties) -> HubAttempt:
    """A hub that holds everybody's keys."""
    hub = parties.hub()
    for name, party in parties.sites.items():
        hub.take_keys(name, party.machine().keys(hub.keys_request()))
    return hub


def shared(parties: Parties) -> tuple[HubAttempt, MaskedRequest]:
    """A hub after the second exchange, and what it would honestly send the victim."""
    hub = parties.hub()
    parties.share(hub)
    return hub, hub.masked_request(VICTIM)


def masked(parties: Parties, gone: frozenset[str] = frozenset()) -> tuple[HubAttempt, dict[str, Words]]:
    """A hub after the third exchange, and the masked vectors as it saw them."""
    hub = parties.hub()
    parties.share(hub)
    return hub, parties.mask(hub, gone)


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
