"""The hub's side of one attempt: it relays, adds up, and opens the sum with the shares that enough sites hand out.

Every answer of a site is checked as it comes; a wrong one raises `MaskingRefusedError`, costs its own site the place
and nobody else. `require_*` before the next stage raises where too few are left. Memory: one running sum, whatever the
number of sites.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from pixcell_core.contracts.masking import (
    KeysReply,
    KeysRequest,
    MaskedRequest,
    MaskingReply,
    MaskingSurvivors,
    RevealedShare,
    RoundAttempt,
    SealedShare,
    ShareCommitment,
    SharesReply,
    SharesRequest,
    SignedKeys,
    SurvivorsReply,
    SurvivorsRequest,
    SurvivorsSignature,
    UnmaskReply,
    UnmaskRequest,
)
from pixcell_core.masking.keys import MaskingRefusedError, derive, load_private, public_key, shared_key
from pixcell_core.masking.keystream import Mask, Words, apply_masks
from pixcell_core.masking.roster import (
    Roster,
    commitment_of,
    full_transcript,
    keys_transcript,
    pairwise_purpose,
    self_purpose,
    survivors_message,
)
from pixcell_core.masking.shamir import join, lagrange_at_zero

_SITE_LEFT = "The site runs another release, or left the protocol. Its own log says more."
_AGAIN = "Start the run again: the round is tried anew with fresh keys."


@dataclass(frozen=True)
class OpenedSum:
    """The sum of the survivors' clipped updates, float64 of shape (parameters,), and whose they are."""

    total: npt.NDArray[np.float64]
    sites: tuple[str, ...]


@dataclass
class HubAttempt:
    """What the hub holds of one attempt over `size` parameters. Fields of later stages are empty before them."""

    roster: Roster
    attempt: RoundAttempt
    size: int
    keys: dict[str, SignedKeys] = field(default_factory=dict)
    boxes: dict[str, dict[str, str]] = field(default_factory=dict)
    commitments: dict[str, dict[str, ShareCommitment]] = field(default_factory=dict)
    total: Words = field(default_factory=lambda: np.zeros(0, dtype="<u4"))
    survivors: set[str] = field(default_factory=set)
    signatures: dict[str, str] = field(default_factory=dict)
    unopened: dict[str, set[str]] = field(default_factory=dict)
    seed_shares: dict[str, dict[str, bytes]] = field(default_factory=dict)
    key_shares: dict[str, dict[str, bytes]] = field(default_factory=dict)
    _statement: bytes = b""

    def __post_init__(self) -> None:
        if self.total.size == 0:
            self.total = np.zeros(self.size, dtype="<u4")
        if self.total.shape != (self.size,):
            raise ValueError("the running sum has another length than the update")

    @property
    def sharers(self) -> tuple[str, ...]:
        """Sites whose shares arrived, in the order of their names."""
        return tuple(sorted(self.boxes))

    @property
    def alive(self) -> tuple[str, ...]:
        """Sites whose masked updates are in the sum, in the order of their names."""
        return tuple(sorted(self.survivors))

    @property
    def signed_keys(self) -> tuple[SignedKeys, ...]:
        """All keys, in the order of their sites."""
        return tuple(self.keys[site] for site in sorted(self.keys))

    def keys_request(self) -> KeysRequest:
        """The first question, to every site that is ready."""
        return KeysRequest(attempt=self.attempt)

    def take_keys(self, site: str, reply: KeysReply) -> None:
        """A site's keys, signed by it."""
        self._answered(reply)
        if reply.keys is None or reply.keys.site != site or site in self.keys:
            raise _wrong("the answer holds no keys of this site, or holds them twice")
        self.roster.check_keys(self.attempt, (reply.keys,))
        self.keys[site] = reply.keys

    def shares_request(self) -> SharesRequest:
        """The second question, to every site whose keys arrived. Raises where they are too few."""
        self.roster.require(sorted(self.keys), "sites with keys")
        return SharesRequest(attempt=self.attempt, keys=self.signed_keys)

    def take_shares(self, site: str, reply: SharesReply) -> None:
        """A site's sealed shares for all others, and its commitments to all of them."""
        self._answered(reply)
        boxes = {entry.peer: entry.box for entry in reply.sealed}
        promised = {entry.peer: entry for entry in reply.commitments}
        others = set(self.keys) - {site}
        if (
            site not in self.keys
            or site in self.boxes
            or (set(boxes), len(reply.sealed)) != (others, len(others))
            or (set(promised), len(reply.commitments)) != (set(self.keys), len(self.keys))
        ):
            raise _wrong("the answer does not hold one sealed share and one commitment for each site")
        self.boxes[site], self.commitments[site] = boxes, promised

    def masked_request(self, site: str) -> MaskedRequest:
        """What goes with the round to a site whose shares arrived. Raises where they are too few."""
        self.roster.require(self.sharers, "sites that shared")
        sealed = tuple(
            SealedShare(peer=sender, box=self.boxes[sender][site])
            for sender in self.sharers
            if sender != site
        )
        return MaskedRequest(attempt=self.attempt, sharers=self.sharers, sealed=sealed)

    def take_masked(self, site: str, vector: Words) -> None:
        """Add one masked update, uint32 of shape (parameters,), and forget it."""
        if vector.dtype != np.dtype("<u4") or vector.shape != (self.size,):
            raise _wrong(f"the masked update is {vector.dtype} {vector.shape}, not uint32 ({self.size},)")
        if site not in self.boxes or site in self.survivors:
            raise _wrong("the site did not share, or its masked update is in the sum already")
        np.add(self.total, vector, out=self.total)
        self.survivors.add(site)

    def survivors_request(self) -> SurvivorsRequest:
        """The fourth question, to every survivor. Raises where they are too few."""
        self.roster.require(self.alive, "survivors")
        self._statement = b""
        return SurvivorsRequest(attempt=self.attempt, survivors=self.alive)

    def take_signature(self, site: str, reply: SurvivorsReply) -> None:
        """A survivor's signature over the list of survivors."""
        self._answered(reply)
        if site not in self.survivors or reply.signature is None:
            raise _wrong("the answer holds no signature, or comes from a site that is no survivor")
        signature = SurvivorsSignature(site=site, signature=reply.signature)
        # Its bytes are the same for every survivor, and long where there are many.
        self._statement = self._statement or survivors_message(self.statement())
        self.roster.check_one_survivor(self._statement, signature)
        self.signatures[site] = reply.signature
        self.unopened[site] = set(reply.unopened)

    def unmask_request(self) -> UnmaskRequest:
        """The last question, to every site that signed. It is asked only if the answers can open the sum.

        Raises where too few signed, or where too few of them hold shares of some site: nothing was opened then, and
        the round may be tried again without that site.
        """
        signers = sorted(self.signatures)
        if len(signers) < self.roster.threshold:
            raise MaskingRefusedError(
                f"{len(signers)} sites signed the list of survivors; {self.roster.threshold} are needed.",
                hint=_AGAIN,
                code="too-few-sites",
            )
        for owner in self.sharers:
            holders = [site for site in signers if owner not in self.unopened[site]]
            if len(holders) < self.roster.threshold:
                raise MaskingRefusedError(
                    f"Only {len(holders)} sites could open the shares of {owner}; "
                    f"{self.roster.threshold} are needed.",
                    hint=f"Start the run again; if it repeats, leave {owner} out until it is known why.",
                    code="shares-not-opened",
                )
        return UnmaskRequest(
            attempt=self.attempt,
            survivors=self.alive,
            signatures=tuple(
                SurvivorsSignature(site=site, signature=self.signatures[site]) for site in signers
            ),
        )

    def take_reveal(self, site: str, reply: UnmaskReply) -> None:
        """The shares a site hands out; all are checked against their owners' commitments before one is taken."""
        self._answered(reply)
        if site not in self.signatures:
            raise _wrong("the site did not sign the list of survivors")
        dropped = set(self.sharers) - self.survivors
        seeds = self._checked(site, "seed", reply.seeds, self.survivors)
        keys = self._checked(site, "key", reply.keys, dropped)
        for kept, found in ((self.seed_shares, seeds), (self.key_shares, keys)):
            for owner, share in found.items():
                kept.setdefault(owner, {})[site] = share

    @property
    def can_open(self) -> bool:
        """Whether enough shares of every secret are here."""
        dropped = set(self.sharers) - self.survivors
        needed = self.roster.threshold
        return all(len(self.seed_shares.get(o, {})) >= needed for o in self.survivors) and all(
            len(self.key_shares.get(o, {})) >= needed for o in dropped
        )

    def open(self) -> OpenedSum:
        """The sum without its masks.

        Raises `MaskingRefusedError` where shares are missing (ask the same question again later), or where what comes
        out is no sum of honest updates.
        """
        if not self.can_open:
            raise MaskingRefusedError(
                f"Fewer than {self.roster.threshold} sites handed out what opens the sum.",
                hint="Bring the sites up and start the run again: the same question is asked again.",
                code="unmasking-incomplete",
            )
        transcript = full_transcript(keys_transcript(self.attempt, self.signed_keys), self.sharers)
        weights: dict[tuple[int, ...], tuple[int, ...]] = {}
        masks = []
        for site in self.alive:
            seed = self._secret(self.seed_shares[site], weights, site)
            masks.append(Mask(derive(seed, self_purpose(self.attempt, transcript, site)), subtract=True))
        for site in sorted(set(self.sharers) - self.survivors):
            private = self._secret(self.key_shares[site], weights, site)
            if public_key(private).hex() != self.keys[site].mask_key:
                raise _inconsistent(site)
            loaded = load_private(private)
            for other in self.alive:
                purpose = pairwise_purpose(self.attempt, transcript, site, other)
                secret = shared_key(loaded, bytes.fromhex(self.keys[other].mask_key), purpose)
                # What is left in the sum is what `other` put there: it added where its name comes first.
                masks.append(Mask(secret, subtract=other < site))
        opened = self.total.copy()
        apply_masks(opened, masks)
        return OpenedSum(self.roster.grid.read_sum(opened, len(self.survivors)), self.alive)

    def statement(self) -> MaskingSurvivors:
        """What every survivor signs."""
        transcript = full_transcript(keys_transcript(self.attempt, self.signed_keys), self.sharers)
        return MaskingSurvivors(attempt=self.attempt, transcript=transcript, survivors=self.alive)

    def _checked(
        self, site: str, kind: str, shares: tuple[RevealedShare, ...], owners: set[str]
    ) -> dict[str, bytes]:
        found = {entry.owner: bytes.fromhex(entry.share) for entry in shares}
        wanted = {owner for owner in owners if owner not in self.unopened[site]}
        if len(found) != len(shares) or set(found) != wanted:
            raise _wrong("the answer does not hold the shares that were asked for")
        for owner, share in found.items():
            promise = self.commitments[owner][site]
            if commitment_of(self.attempt, kind, owner, site, share) != getattr(promise, kind):
                raise MaskingRefusedError(
                    f"the share of {owner} is not the one {owner} committed to",
                    hint=_SITE_LEFT,
                    code="wrong-share",
                )
        return found

    def _secret(
        self, shares: Mapping[str, bytes], weights: dict[tuple[int, ...], tuple[int, ...]], owner: str
    ) -> bytes:
        chosen = sorted(shares)[: self.roster.threshold]
        places = tuple(self.roster.places[site] for site in chosen)
        if places not in weights:
            weights[places] = lagrange_at_zero(places)
        try:
            return join({self.roster.places[site]: shares[site] for site in chosen}, weights[places])
        except ValueError as error:
            raise _inconsistent(owner) from error

    def _answered(self, reply: MaskingReply) -> None:
        if reply.attempt != self.attempt:
            raise MaskingRefusedError(
                "the answer is about another attempt", hint=_SITE_LEFT, code="stale-attempt"
            )
        if reply.code != "ok":
            raise MaskingRefusedError(
                reply.reason or "the site refused without a reason", hint="", code=reply.code
            )


def _wrong(why: str) -> MaskingRefusedError:
    return MaskingRefusedError(why, hint=_SITE_LEFT, code="bad-answer")


def _inconsistent(owner: str) -> MaskingRefusedError:
    return MaskingRefusedError(
        f"The shares that {owner} gave the others do not belong together: the sum cannot be opened.",
        hint=f"{owner} left the protocol. The study cannot go on with it: make one without {owner}.",
        code="inconsistent-shares",
    )
