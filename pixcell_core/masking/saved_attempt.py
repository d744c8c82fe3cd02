"""An attempt on the hub's disk, from the moment before any site is asked to open its sum.

Once a site handed out its shares it never does so for another list, so a hub that lost the masked sum would have lost
the round. The tensors are written first, then the document that names their digest: what is there is whole.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from pixcell_core.contracts.canonical import Digest, Document, digest, load_document, read_bounded
from pixcell_core.contracts.masking import (
    MAX_SITES,
    RoundAttempt,
    ShareCommitment,
    SignedKeys,
    Sites,
    SurvivorsSignature,
)
from pixcell_core.contracts.study import SiteName
from pixcell_core.errors import BadInputError
from pixcell_core.masking.hub import HubAttempt
from pixcell_core.masking.keys import MaskingRefusedError
from pixcell_core.masking.roster import Roster
from pixcell_core.trust.durable import write_whole

DOCUMENT = "attempt.json"
TENSORS = "attempt.safetensors"
MAX_TENSOR_BYTES = 640 * 1024 * 1024


class UnopenedBy(Document):
    """The sharers whose box one site could not open."""

    site: SiteName
    owners: Sites


class SavedAttempt(Document):
    """The attempt without its tensors: `total` (uint32) and `commitments` (uint8, sharers x sites x 2 x 32)."""

    schema_version: Literal["masked-attempt/v1"] = "masked-attempt/v1"
    attempt: RoundAttempt
    size: Annotated[int, Field(ge=1, le=1 << 27)]
    keys: Annotated[tuple[SignedKeys, ...], Field(max_length=MAX_SITES)]
    sharers: Sites
    survivors: Sites
    signatures: Annotated[tuple[SurvivorsSignature, ...], Field(max_length=MAX_SITES)]
    unopened: Annotated[tuple[UnopenedBy, ...], Field(max_length=MAX_SITES)]
    tensors_digest: Digest


def save_attempt(folder: Path, hub: HubAttempt) -> None:
    """Write an attempt whose survivors signed. It is on disk when this returns."""
    from safetensors.numpy import save

    sites = sorted(hub.keys)
    promised = b"".join(
        bytes.fromhex(hub.commitments[owner][site].seed) + bytes.fromhex(hub.commitments[owner][site].key)
        for owner in hub.sharers
        for site in sites
    )
    commitments = np.frombuffer(promised, dtype=np.uint8).reshape(len(hub.sharers), len(sites), 2, 32)
    data = save({"total": hub.total, "commitments": np.ascontiguousarray(commitments)})
    document = SavedAttempt(
        attempt=hub.attempt,
        size=hub.size,
        keys=hub.signed_keys,
        sharers=hub.sharers,
        survivors=hub.alive,
        signatures=tuple(
            SurvivorsSignature(site=site, signature=hub.signatures[site]) for site in sorted(hub.signatures)
        ),
        unopened=tuple(
            UnopenedBy(site=site, owners=tuple(sorted(owners)))
            for site, owners in sorted(hub.unopened.items())
        ),
        tensors_digest=digest(data),
    )
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    drop_attempt(folder)
    write_whole(folder / TENSORS, data, mode=0o600)
    write_whole(folder / DOCUMENT, document.to_bytes(), mode=0o600)


def load_attempt(folder: Path, roster: Roster) -> HubAttempt | None:
    """The attempt that was saved; None where there is none.

    Raises `BadInputError` where it is damaged, `MaskingRefusedError` where it is another study's or its signatures are
    not those of the study's sites.
    """
    if not (folder / DOCUMENT).exists():
        return None
    saved = load_document(SavedAttempt, folder / DOCUMENT)
    if saved.attempt.study_digest != roster.study_digest:
        raise MaskingRefusedError(
            "The kept attempt is of another study.",
            hint="A changed study is a new study: give it a new --id.",
            code="other-study",
        )
    data = read_bounded(folder / TENSORS, MAX_TENSOR_BYTES)
    if digest(data) != saved.tensors_digest:
        raise _broken()
    total, promised = _tensors(data, saved)
    roster.check_keys(saved.attempt, saved.keys)
    hub = HubAttempt(roster, saved.attempt, saved.size, total=total)
    hub.keys = {entry.site: entry for entry in saved.keys}
    sites = sorted(hub.keys)
    for owner, row in zip(saved.sharers, promised, strict=True):
        hub.boxes[owner] = {}
        hub.commitments[owner] = {
            site: ShareCommitment(peer=site, seed=pair[0].tobytes().hex(), key=pair[1].tobytes().hex())
            for site, pair in zip(sites, row, strict=True)
        }
    hub.survivors = set(saved.survivors)
    roster.check_survivors(hub.statement(), saved.signatures)
    hub.signatures = {entry.site: entry.signature for entry in saved.signatures}
    hub.unopened = {entry.site: set(entry.owners) for entry in saved.unopened}
    if set(hub.unopened) != set(hub.signatures):
        raise _broken()
    return hub


def drop_attempt(folder: Path) -> None:
    """Forget the attempt: its round is committed, or it is replaced. The document goes first."""
    for name in (DOCUMENT, TENSORS):
        (folder / name).unlink(missing_ok=True)


def _tensors(data: bytes, saved: SavedAttempt) -> tuple[np.ndarray, np.ndarray]:
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        loaded = load(data)
        total, promised = loaded["total"], loaded["commitments"]
    except (SafetensorError, KeyError, ValueError, TypeError) as error:
        raise _broken() from error
    shape = (len(saved.sharers), len(saved.keys), 2, 32)
    if (total.dtype, total.shape, promised.dtype, promised.shape) != (
        np.dtype("<u4"),
        (saved.size,),
        np.dtype(np.uint8),
        shape,
    ):
        raise _broken()
    return total.copy(), promised


def _broken() -> BadInputError:
    return BadInputError(
        "The kept attempt of a masked round was altered or damaged.",
        hint="Restore the run's folder from a copy: the sites open the sum of this round for no other attempt.",
        code="masked-attempt-broken",
    )
