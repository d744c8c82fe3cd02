"""A masked study in memory: sites with their keys and kept states, and one attempt with faults on demand."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import numpy.typing as npt

from pixcell_core.contracts.canonical import digest, parse_document
from pixcell_core.contracts.masking import MaskedRequest, RoundAttempt, UnmaskRequest
from pixcell_core.contracts.study import (
    AdapterSettings,
    AggregationSettings,
    MaskingSettings,
    SiteKey,
    Study,
)
from pixcell_core.masking.hub import HubAttempt
from pixcell_core.masking.roster import Roster
from pixcell_core.masking.site import MaskingSite
from pixcell_core.masking.site_state import MaskingState
from pixcell_core.trust.keys import SigningKey
from tests.any_study import any_study

INPUT = digest(b"adapter of the round before")
BOUND = 0.25
Flat = npt.NDArray[np.float32]


def make_masked_study(keys: Mapping[str, SigningKey], threshold: int, **changes: Any) -> Study:
    """A small study whose sites mask with the keys given."""
    now = datetime(2026, 1, 1, tzinfo=UTC)
    masking = MaskingSettings(
        threshold=threshold,
        coordinate_bound=BOUND,
        identities=tuple(
            SiteKey(site=s, approval_key=k.verify_key.to_pem().decode()) for s, k in keys.items()
        ),
    )
    settings: dict[str, Any] = {
        "id": "masked",
        "expires_at": now + timedelta(days=3650),
        "adapter": AdapterSettings(rank=2, targets=("block",)),
        "aggregation": AggregationSettings(masking=masking),
        "rounds": 5,
        "sites": tuple(keys),
        "quorum": threshold,
        "round_timeout_s": 5.0,
        "reply_grid_s": 0.0,
    }
    return any_study(**settings | changes)


@dataclass
class Party:
    """One site whose state lives in `kept` as bytes between two messages, as on a disk."""

    name: str
    key: SigningKey
    roster: Roster
    kept: list[bytes] = field(default_factory=list)

    def machine(self) -> MaskingSite:
        """The state machine as a new process would load it."""
        state = parse_document(MaskingState, self.kept[-1]) if self.kept else None
        return MaskingSite(self.name, self.key, self.roster, state, lambda s: self.kept.append(s.to_bytes()))

    @property
    def state(self) -> MaskingState:
        """What is kept now."""
        return parse_document(MaskingState, self.kept[-1])


@dataclass
class Parties:
    """All sites of one study."""

    study: Study
    roster: Roster
    sites: dict[str, Party]
    size: int = 40

    @classmethod
    def make(cls, count: int, threshold: int, size: int = 40, **changes: Any) -> Parties:
        """`count` sites named s00, s01, ..."""
        keys = {f"s{i:02d}": SigningKey.generate() for i in range(count)}
        study = make_masked_study(keys, threshold, **changes)
        roster = Roster.of(study)
        return cls(study, roster, {n: Party(n, k, roster) for n, k in keys.items()}, size)

    def attempt(self, number: int = 1, input_digest: str = INPUT) -> RoundAttempt:
        """A new attempt at a round."""
        return RoundAttempt(
            study_digest=self.study.digest,
            round=number,
            input_digest=input_digest,
            nonce=secrets.token_hex(32),
        )

    def hub(self, number: int = 1) -> HubAttempt:
        """An honest hub at the start of an attempt."""
        return HubAttempt(self.roster, self.attempt(number), self.size)

    def update(self, site: str, number: int = 1) -> Flat:
        """A site's update; some coordinates pass the bound, so that clipping is seen."""
        seed = int.from_bytes(f"{site}{number}".encode(), "big") % 2**32
        flat = np.random.default_rng(seed).normal(0, BOUND / 3, self.size).astype(np.float32)
        flat[:2] = (2 * BOUND, -3 * BOUND)
        return flat

    def plain_sum(self, sites: tuple[str, ...], number: int = 1) -> npt.NDArray[np.float64]:
        """The sum of the clipped updates, in float64."""
        rows = [np.clip(self.update(s, number).astype(np.float64), -BOUND, BOUND) for s in sites]
        return np.sum(rows, axis=0)

    def share(
        self, hub: HubAttempt, gone_first: frozenset[str] = frozenset(), gone: frozenset[str] = frozenset()
    ) -> None:
        """The first two exchanges; sites of `gone_first` send no keys, those of `gone` no shares."""
        for name, party in self.sites.items():
            if name not in gone_first:
                hub.take_keys(name, party.machine().keys(hub.keys_request()))
        request = hub.shares_request()
        for name in sorted(set(hub.keys) - gone):
            hub.take_shares(name, self.sites[name].machine().shares(request))

    def mask(self, hub: HubAttempt, gone: frozenset[str] = frozenset()) -> dict[str, npt.NDArray[np.uint32]]:
        """The masked updates; sites of `gone` do not answer. Returns what the hub saw."""
        seen = {}
        requests: dict[str, MaskedRequest] = {site: hub.masked_request(site) for site in hub.sharers}
        for name, request in requests.items():
            if name in gone:
                continue
            party = self.sites[name]
            party.machine().accept(request, hub.attempt.round, hub.attempt.input_digest)
            seen[name] = party.machine().mask(hub.attempt, self.update(name, hub.attempt.round))
            hub.take_masked(name, seen[name])
        return seen

    def sign(self, hub: HubAttempt, gone: frozenset[str] = frozenset()) -> UnmaskRequest:
        """The survivors' signatures, and the last question."""
        request = hub.survivors_request()
        for name in hub.alive:
            if name not in gone:
                hub.take_signature(name, self.sites[name].machine().survivors(request))
        return hub.unmask_request()

    def reveal(self, hub: HubAttempt, request: UnmaskRequest, gone: frozenset[str] = frozenset()) -> None:
        """The shares of all that signed, but for `gone`."""
        for name in sorted(set(hub.signatures) - gone):
            hub.take_reveal(name, self.sites[name].machine().unmask(request))

    def whole(self, number: int = 1) -> HubAttempt:
        """An undisturbed attempt, ready to be opened."""
        hub = self.hub(number)
        self.share(hub)
        self.mask(hub)
        self.reveal(hub, self.sign(hub))
        return hub
