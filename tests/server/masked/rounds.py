"""One masked round, its sum compared with the plain one, and replies written anew."""

from __future__ import annotations

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message

from pixcell_core.contracts.round import ARRAYS, CONTROL, DOCUMENT, FLAT
from server.rounds.masked import MaskedAbort, MaskedSum
from site_client.agent.masking import load_state
from tests.server.masked_consortium import MaskedConsortium


def collect(c: MaskedConsortium, number: int = 1, **settings: float) -> MaskedSum | MaskedAbort:
    """One round of all sites."""
    return c.exchange(**settings).collect(number, c.adapter, c.input_digest, list(c.sites))


def check(
    c: MaskedConsortium, found: MaskedSum | MaskedAbort, sites: list[str], number: int = 1
) -> MaskedSum:
    """The sum, which is that of exactly `sites`, to a millionth."""
    assert isinstance(found, MaskedSum), found
    assert list(found.sites) == sites
    wanted = c.plain(sites, number)
    assert np.linalg.norm(found.total - wanted) < 1e-6 * np.linalg.norm(wanted)
    return found


def kind_of(message: Message) -> str:
    """The stage of a question."""
    return message.metadata.message_type.removeprefix("query.masking_")


def rounds_opened(c: MaskedConsortium) -> list[int]:
    """The last opened round at each site."""
    states = [load_state(next(folder.masking.glob("*.json"))) for folder in c.sites.values()]
    return [state.opened for state in states if state is not None]


def rewrite(reply: Message, document: bytes | None = None, tensor: np.ndarray | None = None) -> list[Message]:
    """The reply with another document or another tensor."""
    if document is not None:
        reply.content[CONTROL] = ConfigRecord({DOCUMENT: document.decode()})
    if tensor is not None:
        reply.content[ARRAYS] = ArrayRecord({FLAT: Array(tensor)})
    return [reply]


STAGES = ("keys", "shares", "train", "survivors", "unmask")
