"""The agent's side of masked rounds: it keeps the state of each study on disk, clips, masks, and wipes.

Every message of the hub may meet another process of the agent, so all that lives between two of them is a file of mode
0600 per study. It is written, flushed and put in place before an answer leaves, the blocks of its predecessor are
overwritten, and a lock keeps two processes from answering at once.
"""

from __future__ import annotations

import contextlib
import fcntl
import math
import os
import stat
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from pixcell_core.contracts.canonical import DocumentT, load_document, parse_document
from pixcell_core.contracts.masking import (
    KEYS,
    SHARES,
    SURVIVORS,
    UNMASK,
    KeysReply,
    KeysRequest,
    MaskingReply,
    SharesReply,
    SharesRequest,
    SurvivorsReply,
    SurvivorsRequest,
    UnmaskReply,
    UnmaskRequest,
)
from pixcell_core.contracts.round import TrainRequest
from pixcell_core.contracts.spool import Arrays, flatten, l2_norm
from pixcell_core.contracts.study import Study
from pixcell_core.errors import BadInputError, PixcellError
from pixcell_core.flower.messages import document_of, pack
from pixcell_core.masking.keys import MaskingRefusedError
from pixcell_core.masking.keystream import Words
from pixcell_core.masking.roster import Roster
from pixcell_core.masking.site import MaskingSite
from pixcell_core.masking.site_state import MaskingState
from pixcell_core.trust.durable import write_whole
from pixcell_core.trust.keys import SigningKey
from site_client.approvals.book import ApprovalBook
from site_client.approvals.site_folder import SiteFolder

MAX_STATE_BYTES = 4 * 1024 * 1024

Question = KeysRequest | SharesRequest | SurvivorsRequest | UnmaskRequest
Reply = TypeVar("Reply", bound=MaskingReply)

_PUBLIC = {
    "not-approved": "this site has not approved the study",
    "approval-denied": "this site denied the study",
    "approval-withdrawn": "this site withdrew its approval",
    "approval-expired": "the approval or the study expired",
    "unknown-study": "the site was not asked about this study first",
}


class SiteMasking:
    """Answers the four masking questions for one site, and masks the update of a round.

    `study_of` gives the study this site was asked about, by its digest, or raises a `PixcellError`.
    """

    def __init__(
        self,
        folder: SiteFolder,
        study_of: Callable[[str], Study],
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._folder, self._study_of, self._clock = folder, study_of, clock
        self._book = ApprovalBook(folder)

    def keys(self, request: KeysRequest) -> KeysReply:
        """Fresh signed keys for an attempt, or a refusal."""
        return self._answer(KeysReply, request, lambda site: site.keys(request), approved=True)

    def shares(self, request: SharesRequest) -> SharesReply:
        """Sealed shares for the peers, or a refusal."""
        return self._answer(SharesReply, request, lambda site: site.shares(request), approved=True)

    def survivors(self, request: SurvivorsRequest) -> SurvivorsReply:
        """A signature over the survivors, or a refusal. A withdrawal takes effect at the next round, not here."""
        return self._answer(SurvivorsReply, request, lambda site: site.survivors(request), approved=False)

    def unmask(self, request: UnmaskRequest) -> UnmaskReply:
        """The shares that open the sum, or a refusal."""
        return self._answer(UnmaskReply, request, lambda site: site.unmask(request), approved=False)

    def accept(self, study: Study, request: TrainRequest) -> bool:
        """To be called before a round is trained: whether its update is to be masked; takes the peers' shares.

        Raises `MaskingRefusedError`, above all where the study masks and the hub asks for a plain update.
        """
        if study.aggregation.masking is None and request.masking is None:
            return False
        if request.masking is None:
            raise MaskingRefusedError(
                "The study masks its updates, and the hub asks for a plain one.",
                hint="Send nothing. Talk to the coordinator: the hub runs another release, or is hostile.",
                code="masking-missing",
            )
        with self._site(study) as site:
            site.accept(request.masking, request.round, request.input_digest)
        return True

    def mask(self, study: Study, request: TrainRequest, update: Arrays) -> Words:
        """The masked update that leaves, uint32 of shape (parameters,); `accept` came before. Once per attempt.

        The hub cannot screen what it cannot see, so the site does: finite, of the announced shapes, within the
        study's norm bound, and every coordinate clipped to the study's bound. Raises `MaskingRefusedError`.
        """
        shapes = {place.name: place.shape for place in request.layout}
        if {name: value.shape for name, value in update.items()} != shapes or request.masking is None:
            raise MaskingRefusedError(
                "The update does not have the tensors that the round announced.",
                hint="Hub and trainer run different releases.",
                code="tensor-shape",
            )
        norm = l2_norm(update)
        if not math.isfinite(norm) or norm > study.update_norm_bound(sum(v.size for v in update.values())):
            finite = math.isfinite(norm)
            raise MaskingRefusedError(
                "The update is longer than the study's public bound."
                if finite
                else "The update holds values that are not finite.",
                hint="The training diverged: a smaller learning rate, or a larger clipping norm.",
                code="norm-bound" if finite else "not-finite",
            )
        with self._site(study) as site:
            return site.mask(request.masking.attempt, flatten(update))

    def _answer(
        self, kind: type[Reply], request: Question, act: Callable[[MaskingSite], Reply], *, approved: bool
    ) -> Reply:
        try:
            study = self._study_of(request.attempt.study_digest)
            if approved:
                self._book.require(study, self._clock())
            with self._site(study) as site:
                return act(site)
        except MaskingRefusedError as error:
            # Its message names sites, rounds and counts of sites: public things.
            return kind(attempt=request.attempt, code=error.code, reason=error.message)
        except PixcellError as error:
            reason = _PUBLIC.get(error.code, "the site refused the question; its own log says why")
            return kind(attempt=request.attempt, code=error.code, reason=reason)

    @contextlib.contextmanager
    def _site(self, study: Study) -> Iterator[MaskingSite]:
        """The state machine of this study, alone on its file."""
        roster = Roster.of(study)
        name = study.digest.removeprefix("sha256:")
        self._folder.masking.mkdir(parents=True, exist_ok=True, mode=0o700)
        path = self._folder.masking / f"{name}.json"
        descriptor = os.open(self._folder.masking / f"{name}.lock", os.O_WRONLY | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield MaskingSite(
                self._folder.identity().site,
                SigningKey.load(self._folder.approval_key),
                roster,
                load_state(path),
                lambda state: save_state(path, state),
            )
        finally:
            os.close(descriptor)


def load_state(path: Path) -> MaskingState | None:
    """What a site remembers of a study; None where it never masked in it.

    Raises `MaskingRefusedError` for a file that is damaged or open to others: a state begun anew would open a round
    a second time.
    """
    if not path.exists() and not path.is_symlink():
        return None
    try:
        if path.is_symlink() or stat.S_IMODE(path.stat().st_mode) & 0o077:
            raise BadInputError("The file is a link, or others may read it.", hint="")
        return load_document(MaskingState, path, MAX_STATE_BYTES)
    except BadInputError as error:
        raise MaskingRefusedError(
            "What this site remembers of masked rounds cannot be used.",
            hint=f"Restore agent/masking/{path.name} from the newest copy, mode 0600; never delete it.",
            code="masking-state-broken",
        ) from error


def save_state(path: Path, state: MaskingState) -> None:
    """Put a state in place, durably and for the owner alone, and overwrite the blocks of the one before."""
    before = path.open("r+b") if path.exists() else None
    try:
        # Nobody signs or compares these bytes; the canonical form would be slow where there are many sites.
        write_whole(path, state.model_dump_json().encode("utf-8"), mode=0o600)
        if before is not None:
            before.write(bytes(os.fstat(before.fileno()).st_size))
            before.flush()
            os.fsync(before.fileno())
    finally:
        if before is not None:
            before.close()


def answer_masking(app: ClientApp, masking: SiteMasking) -> None:
    """Register the four masking questions with the site's app."""

    def answer(
        kind: type[DocumentT], act: Callable[[DocumentT], MaskingReply]
    ) -> Callable[[Message, Context], Message]:
        def answered(message: Message, context: Context) -> Message:
            request = parse_document(kind, document_of(message), name="question")
            return Message(pack(act(request)), reply_to=message)

        return answered

    app.query(KEYS)(answer(KeysRequest, masking.keys))
    app.query(SHARES)(answer(SharesRequest, masking.shares))
    app.query(SURVIVORS)(answer(SurvivorsRequest, masking.survivors))
    app.query(UNMASK)(answer(UnmaskRequest, masking.unmask))
