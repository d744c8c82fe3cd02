"""What one site remembers between two messages of a masked study. Secrets stand here no longer than they are needed."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field

from pixcell_core.contracts.canonical import Digest, Document
from pixcell_core.contracts.masking import Hex32, RoundAttempt, Share, SignedKeys, Sites, UnmaskReply
from pixcell_core.contracts.study import SiteName

Stage = Literal["idle", "keys", "shares", "holding", "masked", "signed", "opened"]


class HeldShare(Document):
    """The two shares that a site holds of an owner's secrets: of its self-mask seed, and of its mask key."""

    owner: SiteName
    seed: Annotated[Share, Field(repr=False)]
    key: Annotated[Share, Field(repr=False)]


class MaskingState(Document):
    """One site in one study. `opened` is the last round whose sum it helped to open; that round is over for ever.

    Stages, and the secrets that live in each: `keys` (both private keys), `shares` (and the seed, and the share of
    itself), `holding` (mask key, seed, shares of the others), `masked` and `signed` (shares alone), `opened` (none: the
    answer that was given).
    """

    schema_version: Literal["masking-state/v1"] = "masking-state/v1"
    study_digest: Digest
    site: SiteName
    opened: Annotated[int, Field(ge=0)] = 0
    stage: Stage = "idle"
    attempt: RoundAttempt | None = None
    channel_private: Annotated[Hex32 | None, Field(repr=False)] = None
    mask_private: Annotated[Hex32 | None, Field(repr=False)] = None
    seed: Annotated[Hex32 | None, Field(repr=False)] = None
    keys: tuple[SignedKeys, ...] = ()
    keys_transcript: Digest | None = None
    sharers: Sites = ()
    transcript: Digest | None = None
    masked_request: Digest | None = None
    held: tuple[HeldShare, ...] = ()
    survivors: Sites = ()
    answer: UnmaskReply | None = None

    def moved(self, stage: Stage, **changes: object) -> Self:
        """The state of the next stage; what is not changed stays."""
        return self.model_copy(update={"stage": stage, **changes})
