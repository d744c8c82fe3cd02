"""Who masks with whom, as the signed study says: identities, places in the sharing, threshold and grid.

Nothing here is the hub's to choose. Signatures of one attempt are made and checked here, too.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pixcell_core.contracts.canonical import digest
from pixcell_core.contracts.masking import (
    KEYS_TYPE,
    MIN_COHORT,
    SURVIVORS_TYPE,
    MaskingKeys,
    MaskingSurvivors,
    RoundAttempt,
    SignedKeys,
    SurvivorsSignature,
)
from pixcell_core.contracts.study import Study
from pixcell_core.masking.fixed_point import FixedPoint
from pixcell_core.masking.keys import MaskingRefusedError
from pixcell_core.trust.dsse import pre_authentication_encoding
from pixcell_core.trust.keys import SigningKey, VerifyKey

_HOSTILE = "The hub or a peer left the protocol. Stop, and compare the study's identities by telephone."


@dataclass(frozen=True)
class Roster:
    """The sites of a masked study. `places` are their points in the sharing: 1, 2, ... in the order of names."""

    study_digest: str
    rounds: int
    threshold: int
    grid: FixedPoint
    identities: dict[str, VerifyKey]
    places: dict[str, int]

    @classmethod
    def of(cls, study: Study) -> Roster:
        """Raises `MaskingRefusedError` where the study has no masking, or a threshold of half of its sites or less."""
        masking = study.aggregation.masking
        if masking is None:
            raise MaskingRefusedError(
                f"Study {study.id} does not mask its updates.",
                hint="The hub asks for what the study does not say. Tell the coordinator.",
                code="not-masked",
            )
        # The study's own validation says the same; whoever hands out shares does not lean on it.
        if 2 * masking.threshold <= len(masking.identities):
            raise MaskingRefusedError(
                f"A threshold of {masking.threshold} of {len(masking.identities)} sites lets a hub open two sums.",
                hint="Make a study whose threshold is more than half of its sites.",
                code="threshold-too-low",
            )
        keys = {
            entry.site: VerifyKey.from_pem(entry.approval_key.encode("ascii"), name=f"key of {entry.site}")
            for entry in masking.identities
        }
        return cls(
            study_digest=study.digest,
            rounds=study.rounds,
            threshold=masking.threshold,
            grid=FixedPoint(masking.coordinate_bound, len(keys)),
            identities=keys,
            places={site: place for place, site in enumerate(sorted(keys), start=1)},
        )

    @property
    def fewest(self) -> int:
        """Fewest sites at every stage: the threshold, and never fewer than three."""
        return max(self.threshold, MIN_COHORT)

    def require(self, sites: Sequence[str], what: str) -> None:
        """Raises `MaskingRefusedError` unless `sites` are different sites of the study, and enough of them."""
        if len(set(sites)) != len(sites) or not set(sites) <= set(self.identities):
            raise MaskingRefusedError(
                f"The list of {what} names a site twice, or one that the study does not name.",
                hint=_HOSTILE,
                code="unknown-site",
            )
        if len(sites) < self.fewest:
            raise MaskingRefusedError(
                f"{len(sites)} sites are left ({what}); at least {self.fewest} are needed.",
                hint="Bring more sites up. A sum of fewer sites would tell too much about each.",
                code="too-few-sites",
            )

    def sign_keys(
        self, key: SigningKey, attempt: RoundAttempt, site: str, channel_key: bytes, mask_key: bytes
    ) -> SignedKeys:
        """A site's fresh public keys under its approval key, for this attempt alone."""
        body = MaskingKeys(attempt=attempt, site=site, channel_key=channel_key.hex(), mask_key=mask_key.hex())
        return SignedKeys(
            site=site,
            channel_key=body.channel_key,
            mask_key=body.mask_key,
            signature=_sign(key, pre_authentication_encoding(KEYS_TYPE, body.to_bytes())),
        )

    def check_keys(self, attempt: RoundAttempt, keys: Iterable[SignedKeys]) -> None:
        """Raises `MaskingRefusedError` unless every key is signed by the site it names, for this attempt."""
        for entry in keys:
            body = MaskingKeys(
                attempt=attempt, site=entry.site, channel_key=entry.channel_key, mask_key=entry.mask_key
            )
            message = pre_authentication_encoding(KEYS_TYPE, body.to_bytes())
            if not self._signed(entry.site, entry.signature, message):
                raise MaskingRefusedError(
                    f"The keys that came for {entry.site} are not signed by {entry.site}.",
                    hint=_HOSTILE,
                    code="keys-not-signed",
                )

    def sign_survivors(self, key: SigningKey, body: MaskingSurvivors) -> str:
        """A site's signature over the survivors it was told of."""
        return _sign(key, survivors_message(body))

    def check_survivors(self, body: MaskingSurvivors, signatures: Sequence[SurvivorsSignature]) -> None:
        """Raises `MaskingRefusedError` unless a threshold of different survivors signed exactly `body`."""
        signers, message = [entry.site for entry in signatures], survivors_message(body)
        if len(set(signers)) != len(signers) or not set(signers) <= set(body.survivors):
            raise MaskingRefusedError(
                "A signature stands twice, or is of a site that is no survivor.",
                hint=_HOSTILE,
                code="survivors-not-signed",
            )
        for entry in signatures:
            self.check_one_survivor(message, entry)
        if len(signers) < self.threshold:
            raise MaskingRefusedError(
                f"{len(signers)} sites signed this list of survivors; {self.threshold} are needed.",
                hint=_HOSTILE,
                code="survivors-not-signed",
            )

    def check_one_survivor(self, message: bytes, entry: SurvivorsSignature) -> None:
        """Raises `MaskingRefusedError` unless the site the signature names signed exactly `message`."""
        if not self._signed(entry.site, entry.signature, message):
            raise MaskingRefusedError(
                f"{entry.site} did not sign this list of survivors.",
                hint=_HOSTILE,
                code="survivors-not-signed",
            )

    def _signed(self, site: str, signature: str, message: bytes) -> bool:
        identity = self.identities.get(site)
        try:
            raw = base64.b64decode(signature, validate=True)
        except binascii.Error:
            return False
        return identity is not None and identity.verify(raw, message)


def survivors_message(body: MaskingSurvivors) -> bytes:
    """The bytes that a survivor signs."""
    return pre_authentication_encoding(SURVIVORS_TYPE, body.to_bytes())


def keys_transcript(attempt: RoundAttempt, keys: Sequence[SignedKeys]) -> str:
    """The digest of an attempt and of all keys in it, with their signatures."""
    return digest(
        {"attempt": attempt.model_dump(mode="json"), "keys": [k.model_dump(mode="json") for k in keys]}
    )


def full_transcript(of_keys: str, sharers: Sequence[str]) -> str:
    """The digest of the keys' transcript and of the sites that shared: two views of either give masks that differ."""
    return digest({"keys": of_keys, "sharers": list(sharers)})


def pairwise_purpose(attempt: RoundAttempt, transcript: str, one: str, other: str) -> list[str | int]:
    """What the mask between two sites is bound to; the same from both ends."""
    return ["pairwise-mask", *_context(attempt), transcript, *sorted((one, other))]


def self_purpose(attempt: RoundAttempt, transcript: str, site: str) -> list[str | int]:
    """What a site's own mask is bound to."""
    return ["self-mask", *_context(attempt), transcript, site]


def channel_purpose(attempt: RoundAttempt, of_keys: str, sender: str, receiver: str) -> list[str | int]:
    """What a sealed box is bound to, as key and as header: transcript, direction, and both ends."""
    return ["share", *_context(attempt), of_keys, sender, receiver]


def commitment_of(attempt: RoundAttempt, kind: str, owner: str, receiver: str, share: bytes) -> str:
    """SHA-256 over a share and all that it belongs to, in hexadecimal; hides the share, which is uniform."""
    text = ["share-commitment", *_context(attempt), kind, owner, receiver, share.hex()]
    return digest(text).removeprefix("sha256:")


def _context(attempt: RoundAttempt) -> list[str | int]:
    return [attempt.study_digest, attempt.round, attempt.input_digest, attempt.nonce]


def _sign(key: SigningKey, message: bytes) -> str:
    return base64.b64encode(key.sign(message)).decode("ascii")
