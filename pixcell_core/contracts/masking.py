"""What hub and sites say to each other so that the hub learns a sum of updates and no single one.

Five exchanges make one attempt at a round: keys, shares, masked updates, survivors, unmasking. Every document names its
attempt in full: study, round, input adapter, and a number the hub draws anew for each attempt. What one site says to
another (keys, shares, the list of survivors) passes through the hub and is signed or sealed; the hub's own words are
not, and a site acts on none of them without a check.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, StringConstraints

from pixcell_core.contracts.canonical import Digest, Document
from pixcell_core.contracts.study import SiteName

KEYS = "masking_keys"
"""Name of the query by which the hub asks a site for the fresh keys of an attempt."""

SHARES = "masking_shares"
"""Name of the query that brings a site the keys of its peers and takes its sealed shares back."""

SURVIVORS = "masking_survivors"
"""Name of the query that asks a site to sign whose updates the sum is of."""

UNMASK = "masking_unmask"
"""Name of the query that asks a site for the shares which open the sum."""

MIN_COHORT = 3
"""Fewest updates in a sum: of a sum of two each of the two sites can compute the other's."""

KEYS_TYPE = "application/vnd.pixcell.masking-keys+json"
SURVIVORS_TYPE = "application/vnd.pixcell.masking-survivors+json"
"""Payload types that stand before what is signed, so that no signature is ever taken for another."""

SHARE_BYTES = 66
"""Bytes of one Shamir share over the prime 2^521 - 1."""

MAX_SITES = 1000

Hex32 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
"""32 bytes in hexadecimal."""

Share = Annotated[str, StringConstraints(pattern=r"^0[01][0-9a-f]{130}$")]
"""One Shamir share in hexadecimal, big-endian."""

Signature = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9+/]{86}==$")]
"""An Ed25519 signature in base64."""

Box = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9+/]{214}==$")]
"""Two shares sealed by AES-256-GCM, in base64: 12 bytes of nonce, 132 of ciphertext, 16 of tag."""

Refusal = Annotated[str, StringConstraints(pattern=r"^[a-z0-9-]{1,60}$")]
Why = Annotated[str, StringConstraints(max_length=500)]


def _ascending(sites: tuple[str, ...]) -> tuple[str, ...]:
    """One order for one set, so that two lists of the same sites have the same digest."""
    if any(a >= b for a, b in pairwise(sites)):
        raise ValueError("sites stand in ascending order, each once")
    return sites


Sites = Annotated[tuple[SiteName, ...], Field(max_length=MAX_SITES), AfterValidator(_ascending)]
"""A set of sites: ascending names, none twice."""


class RoundAttempt(Document):
    """One attempt at one masked round; stands in every key derivation, tag and signature of it."""

    study_digest: Digest
    round: Annotated[int, Field(ge=1, le=1_000_000)]
    input_digest: Digest
    nonce: Hex32


class MaskingKeys(Document):
    """What a site signs with its approval key: its two fresh X25519 public keys, for one attempt."""

    schema_version: Literal["masking-keys/v1"] = "masking-keys/v1"
    attempt: RoundAttempt
    site: SiteName
    channel_key: Hex32
    mask_key: Hex32


class SignedKeys(Document):
    """A site's keys as they travel: the attempt is that of the message, the signature is over `MaskingKeys`."""

    site: SiteName
    channel_key: Hex32
    mask_key: Hex32
    signature: Signature


class MaskingSurvivors(Document):
    """What a site signs before anything is opened: the attempt, the transcript of keys and sharers, the survivors."""

    schema_version: Literal["masking-survivors/v1"] = "masking-survivors/v1"
    attempt: RoundAttempt
    transcript: Digest
    survivors: Sites


class SealedShare(Document):
    """One site's shares for another, sealed. `peer` is the receiver on the way up and the sender on the way down."""

    peer: SiteName
    box: Box


class ShareCommitment(Document):
    """SHA-256 of the two shares one receiver got: the hub tells a wrong share from a right one when they come back."""

    peer: SiteName
    seed: Hex32
    key: Hex32


class RevealedShare(Document):
    """One share that a site hands out: of `owner`'s self-mask seed, or of `owner`'s mask key."""

    owner: SiteName
    share: Share


class SurvivorsSignature(Document):
    """One site's signature over `MaskingSurvivors`."""

    site: SiteName
    signature: Signature


class MaskingReply(Document):
    """Common to all answers of a site: the attempt, and where it refuses, why. Public constants only."""

    attempt: RoundAttempt
    code: Refusal = "ok"
    reason: Why = ""


class KeysRequest(Document):
    """Hub to site: make keys for this attempt. An attempt that was not opened yet ends."""

    schema_version: Literal["masking-keys-request/v1"] = "masking-keys-request/v1"
    attempt: RoundAttempt


class KeysReply(MaskingReply):
    """Site to hub: its signed keys."""

    schema_version: Literal["masking-keys-reply/v1"] = "masking-keys-reply/v1"
    keys: SignedKeys | None = None


class SharesRequest(Document):
    """Hub to site: the signed keys of everybody in the attempt, in the order of their names."""

    schema_version: Literal["masking-shares-request/v1"] = "masking-shares-request/v1"
    attempt: RoundAttempt
    keys: Annotated[tuple[SignedKeys, ...], Field(max_length=MAX_SITES)]


class SharesReply(MaskingReply):
    """Site to hub: its secrets' shares, one sealed box for every other site, and a commitment to each."""

    schema_version: Literal["masking-shares-reply/v1"] = "masking-shares-reply/v1"
    sealed: Annotated[tuple[SealedShare, ...], Field(max_length=MAX_SITES)] = ()
    commitments: Annotated[tuple[ShareCommitment, ...], Field(max_length=MAX_SITES)] = ()


class MaskedRequest(Document):
    """Hub to site, with the round: who shared secrets, and the boxes addressed to this site."""

    schema_version: Literal["masked-request/v1"] = "masked-request/v1"
    attempt: RoundAttempt
    sharers: Sites
    sealed: Annotated[tuple[SealedShare, ...], Field(max_length=MAX_SITES)]


class SurvivorsRequest(Document):
    """Hub to site: these are the sites whose masked updates arrived; sign that you heard so."""

    schema_version: Literal["masking-survivors-request/v1"] = "masking-survivors-request/v1"
    attempt: RoundAttempt
    survivors: Sites


class SurvivorsReply(MaskingReply):
    """Site to hub: its signature, and the sharers of whom it holds no share, since their box did not open."""

    schema_version: Literal["masking-survivors-reply/v1"] = "masking-survivors-reply/v1"
    signature: Signature | None = None
    unopened: Sites = ()


class UnmaskRequest(Document):
    """Hub to site: enough signatures over one list of survivors; hand out what opens their sum."""

    schema_version: Literal["masking-unmask-request/v1"] = "masking-unmask-request/v1"
    attempt: RoundAttempt
    survivors: Sites
    signatures: Annotated[tuple[SurvivorsSignature, ...], Field(max_length=MAX_SITES)]


class UnmaskReply(MaskingReply):
    """Site to hub: for every survivor a share of its seed, for every site that dropped out a share of its mask key."""

    schema_version: Literal["masking-unmask-reply/v1"] = "masking-unmask-reply/v1"
    seeds: Annotated[tuple[RevealedShare, ...], Field(max_length=MAX_SITES)] = ()
    keys: Annotated[tuple[RevealedShare, ...], Field(max_length=MAX_SITES)] = ()
