"""One site's side of a masked round (Bonawitz et al. 2017, figure 4, with every site paired with every other).

The hub carries all messages and may be hostile. A site answers a question only from the stage before it, once, and
after checking everything the hub says against the signed study and the signatures of its peers:

- keys of peers are signed by the identities the study names, for this very attempt;
- a threshold of survivors signed one and the same list before any share is handed out;
- of one site the share of its seed or that of its mask key is handed out, never both;
- one sum per round, ever: the difference of two sums over nearly the same sites is one site's update.

A state is on disk (`save`) before the answer that follows from it leaves.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from pixcell_core.contracts.masking import (
    SHARE_BYTES,
    KeysReply,
    KeysRequest,
    MaskedRequest,
    MaskingSurvivors,
    RevealedShare,
    RoundAttempt,
    SealedShare,
    ShareCommitment,
    SharesReply,
    SharesRequest,
    SurvivorsReply,
    SurvivorsRequest,
    UnmaskReply,
    UnmaskRequest,
)
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
    commitment_of,
    full_transcript,
    keys_transcript,
    pairwise_purpose,
    self_purpose,
)
from pixcell_core.masking.sealing import seal, unseal
from pixcell_core.masking.shamir import split
from pixcell_core.masking.site_state import HeldShare, MaskingState, Stage
from pixcell_core.trust.keys import SigningKey

Save = Callable[[MaskingState], None]

_START_AGAIN = "The hub starts the round again with new keys; nothing needs to be done here."
_HOSTILE = "An honest hub does not ask this. Keep the agent's log, and talk to the coordinator."


class MaskingSite:
    """The state machine of one site in one study. `save` returns once the state is on disk."""

    def __init__(
        self, site: str, key: SigningKey, roster: Roster, state: MaskingState | None, save: Save
    ) -> None:
        if roster.identities.get(site) != key.verify_key:
            raise MaskingRefusedError(
                f"The study names another key for {site} than this site holds.",
                hint="Do not approve this study: somebody else would mask in your name. Tell the coordinator.",
                code="other-identity",
            )
        self._site, self._key, self._roster, self._store = site, key, roster, save
        self._state = state or MaskingState(study_digest=roster.study_digest, site=site)
        if (self._state.study_digest, self._state.site) != (roster.study_digest, site):
            raise MaskingRefusedError(
                "The kept state is of another study or site.",
                hint="Restore the agent's folder from a copy.",
                code="masking-state-broken",
            )

    @property
    def state(self) -> MaskingState:
        """The state as it was saved last."""
        return self._state

    def keys(self, request: KeysRequest) -> KeysReply:
        """Begin an attempt: two fresh key pairs, the public halves signed. An unopened attempt ends, its secrets go."""
        attempt, state = request.attempt, self._state
        if attempt.study_digest != self._roster.study_digest or attempt.round > self._roster.rounds:
            raise MaskingRefusedError(
                "The attempt is for another study, or for a round that the study does not have.",
                hint=_HOSTILE,
                code="other-study",
            )
        if attempt.round <= state.opened:
            raise MaskingRefusedError(
                f"The sum of round {attempt.round} was opened already: a second one could give an update away.",
                hint="The hub goes on from the attempt it kept, or from a later round.",
                code="already-opened",
            )
        if state.attempt is not None and (
            attempt.round < state.attempt.round or attempt.nonce == state.attempt.nonce
        ):
            raise MaskingRefusedError(
                "The attempt is of an earlier round, or was begun before.",
                hint=_START_AGAIN,
                code="stale-attempt",
            )
        channel, mask = new_private_key(), new_private_key()
        signed = self._roster.sign_keys(self._key, attempt, self._site, public_key(channel), public_key(mask))
        self._save(
            MaskingState(
                study_digest=state.study_digest,
                site=self._site,
                opened=state.opened,
                stage="keys",
                attempt=attempt,
                channel_private=channel.hex(),
                mask_private=mask.hex(),
                keys=(signed,),
            )
        )
        return KeysReply(attempt=attempt, keys=signed)

    def shares(self, request: SharesRequest) -> SharesReply:
        """Check all keys, draw the seed of the self mask, and share both secrets among all sites of the attempt."""
        state = self._at("keys", request.attempt)
        names = [entry.site for entry in request.keys]
        self._roster.require(names, "sites with keys")
        if names != sorted(names) or state.keys[0] not in request.keys:
            raise MaskingRefusedError(
                "The list of keys is not in order, or this site's own key is not in it as it was sent.",
                hint=_HOSTILE,
                code="keys-altered",
            )
        self._roster.check_keys(request.attempt, request.keys)
        for kind in ("channel_key", "mask_key"):
            if len({getattr(entry, kind) for entry in request.keys}) != len(names):
                raise MaskingRefusedError(
                    "Two sites came with the same key.", hint=_HOSTILE, code="keys-altered"
                )
        transcript = keys_transcript(request.attempt, request.keys)
        seed, threshold = os.urandom(32), self._roster.threshold
        channel = load_private(_secret(state.channel_private))
        places = {name: self._roster.places[name] for name in names}
        of_seed = split(seed, threshold, list(places.values()))
        of_key = split(_secret(state.mask_private), threshold, list(places.values()))
        sealed, commitments = [], []
        for entry in request.keys:
            pair = (of_seed[places[entry.site]], of_key[places[entry.site]])
            commitments.append(
                ShareCommitment(
                    peer=entry.site,
                    seed=commitment_of(request.attempt, "seed", self._site, entry.site, pair[0]),
                    key=commitment_of(request.attempt, "key", self._site, entry.site, pair[1]),
                )
            )
            if entry.site != self._site:
                purpose = channel_purpose(request.attempt, transcript, self._site, entry.site)
                secret = shared_key(channel, bytes.fromhex(entry.channel_key), purpose)
                sealed.append(SealedShare(peer=entry.site, box=seal(secret, b"".join(pair), purpose)))
        mine = places[self._site]
        self._save(
            state.moved(
                "shares",
                seed=seed.hex(),
                keys=request.keys,
                keys_transcript=transcript,
                held=(HeldShare(owner=self._site, seed=of_seed[mine].hex(), key=of_key[mine].hex()),),
            )
        )
        return SharesReply(attempt=request.attempt, sealed=tuple(sealed), commitments=tuple(commitments))

    def accept(self, request: MaskedRequest, round_number: int, input_digest: str) -> None:
        """Take the shares of the others, before the round is trained. The very same request may come again.

        A box that does not open is left out and named later: no share of its sender is held here.
        """
        attempt, asked = request.attempt, request.digest
        if (attempt.round, attempt.input_digest) != (round_number, input_digest):
            raise MaskingRefusedError(
                "The masking is for another round or another adapter than the one to train.",
                hint=_HOSTILE,
                code="other-round",
            )
        if self._state.stage == "holding" and self._state.masked_request == asked:
            return
        state = self._at("shares", attempt)
        self._roster.require(request.sharers, "sites that shared")
        peers = {entry.site: entry for entry in state.keys}
        senders = [entry.peer for entry in request.sealed]
        if (
            self._site not in request.sharers
            or not set(request.sharers) <= set(peers)
            or len(set(senders)) != len(senders)
            or not set(senders) <= set(request.sharers) - {self._site}
        ):
            raise MaskingRefusedError(
                "The sites that shared are not those whose keys came, or this site is not among them.",
                hint=_HOSTILE,
                code="sharers-altered",
            )
        assert state.keys_transcript is not None
        held, channel = list(state.held), load_private(_secret(state.channel_private))
        for entry in request.sealed:
            purpose = channel_purpose(attempt, state.keys_transcript, entry.peer, self._site)
            secret = shared_key(channel, bytes.fromhex(peers[entry.peer].channel_key), purpose)
            pair = unseal(secret, entry.box, purpose)
            if pair is not None and pair[0] <= 1 and pair[SHARE_BYTES] <= 1:
                held.append(
                    HeldShare(owner=entry.peer, seed=pair[:SHARE_BYTES].hex(), key=pair[SHARE_BYTES:].hex())
                )
        self._save(
            state.moved(
                "holding",
                channel_private=None,
                sharers=request.sharers,
                transcript=full_transcript(state.keys_transcript, request.sharers),
                masked_request=asked,
                held=tuple(held),
            )
        )

    def mask(self, attempt: RoundAttempt, flat: npt.NDArray[np.float32]) -> Words:
        """The update (one row, float32), clipped to the bound, in fixed point, under all its masks. Once per attempt.

        The secrets leave the disk first: after a crash in between, this site drops out of the attempt.
        """
        state = self._at("holding", attempt)
        transcript, mask_private = state.transcript or "", load_private(_secret(state.mask_private))
        masks = [Mask(derive(_secret(state.seed), self_purpose(attempt, transcript, self._site)))]
        for entry in state.keys:
            if entry.site in state.sharers and entry.site != self._site:
                purpose = pairwise_purpose(attempt, transcript, self._site, entry.site)
                secret = shared_key(mask_private, bytes.fromhex(entry.mask_key), purpose)
                masks.append(Mask(secret, subtract=self._site > entry.site))
        self._save(state.moved("masked", mask_private=None, seed=None))
        vector = np.empty(flat.size, dtype="<u4")
        apply_masks(vector, masks, self._roster.grid.filler(flat))
        return vector

    def survivors(self, request: SurvivorsRequest) -> SurvivorsReply:
        """Sign whose updates the hub says it holds. One list per attempt; the same list gets the same signature."""
        again = self._state.stage == "signed" and request.survivors == self._state.survivors
        state = self._at("signed" if again else "masked", request.attempt)
        self._roster.require(request.survivors, "survivors")
        if self._site not in request.survivors or not set(request.survivors) <= set(state.sharers):
            raise MaskingRefusedError(
                "The survivors are not among the sites that shared, or this site is not one of them.",
                hint=_HOSTILE,
                code="survivors-altered",
            )
        if not again:
            self._save(state.moved("signed", survivors=request.survivors))
        signature = self._roster.sign_survivors(self._key, self._statement())
        held = {entry.owner for entry in state.held}
        unopened = tuple(site for site in state.sharers if site not in held)
        return SurvivorsReply(attempt=request.attempt, signature=signature, unopened=unopened)

    def unmask(self, request: UnmaskRequest) -> UnmaskReply:
        """Hand out what opens the sum of the signed survivors, once in this round; the same question, the same answer."""
        if self._state.stage == "opened":
            state = self._at("opened", request.attempt)
            if state.answer is not None and request.survivors == state.survivors:
                return state.answer
            raise MaskingRefusedError(
                "The sum of this round was opened for another list of survivors.",
                hint=_HOSTILE,
                code="already-opened",
            )
        state = self._at("signed", request.attempt)
        if request.survivors != state.survivors:
            raise MaskingRefusedError(
                "These are not the survivors that this site signed.", hint=_HOSTILE, code="other-survivors"
            )
        self._roster.check_survivors(self._statement(), request.signatures)
        alive = set(state.survivors)
        answer = UnmaskReply(
            attempt=request.attempt,
            seeds=tuple(RevealedShare(owner=h.owner, share=h.seed) for h in state.held if h.owner in alive),
            keys=tuple(RevealedShare(owner=h.owner, share=h.key) for h in state.held if h.owner not in alive),
        )
        self._save(state.moved("opened", opened=request.attempt.round, held=(), keys=(), answer=answer))
        return answer

    def _statement(self) -> MaskingSurvivors:
        state = self._state
        assert state.attempt is not None and state.transcript is not None
        return MaskingSurvivors(attempt=state.attempt, transcript=state.transcript, survivors=state.survivors)

    def _at(self, stage: Stage, attempt: RoundAttempt) -> MaskingState:
        """The state, if it is at `stage` of exactly this attempt."""
        if self._state.attempt != attempt:
            raise MaskingRefusedError(
                "The question is about another attempt than the one begun last.",
                hint=_START_AGAIN,
                code="stale-attempt",
            )
        if self._state.stage != stage:
            raise MaskingRefusedError(
                f"The question comes at the wrong time: this site is at '{self._state.stage}', not '{stage}'.",
                hint=_START_AGAIN,
                code="out-of-order",
            )
        return self._state

    def _save(self, state: MaskingState) -> None:
        self._store(state)
        self._state = state


def _secret(text: str | None) -> bytes:
    if text is None:
        raise MaskingRefusedError(
            "A secret of this attempt was wiped already.", hint=_START_AGAIN, code="out-of-order"
        )
    return bytes.fromhex(text)
