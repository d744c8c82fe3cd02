"""The Flower ClientApp installed at the site: the only app its executor ever runs, whatever the hub sends."""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from pixcell_core.contracts.canonical import parse_document
from pixcell_core.contracts.round import ARRAYS, FLAT, PREPARE, PrepareReply, PrepareRequest, TrainRequest
from pixcell_core.contracts.spool import MAX_ARRAY_BYTES, Arrays, SpoolError, unflatten
from pixcell_core.flower.messages import decode_array, document_of, pack, pack_words
from site_client.agent.app_gate import NOT_APPROVED, PUBLIC_REASON, AppRefusedError
from site_client.agent.handlers import Agent, AgentSettings
from site_client.agent.masking import answer_masking
from site_client.approvals.site_folder import SiteFolder

SITE_VARIABLE = "PIXCELL_SITE_DIR"
GRACE_VARIABLE = "PIXCELL_TRAINER_GRACE_S"


def create_client_app(agent: Agent) -> ClientApp:
    """The app for one site: ready, a round, and the questions of masked rounds; every other message is an error."""
    made = ClientApp()

    @made.query(PREPARE)
    def prepare(message: Message, context: Context) -> Message:
        reply = agent.prepare(parse_document(PrepareRequest, document_of(message), name="question"))
        return Message(pack(reply), reply_to=message)

    @made.train()
    def train(message: Message, context: Context) -> Message:
        request = parse_document(TrainRequest, document_of(message), name="round")
        reply, update = agent.train(request, arrays_of(message, request))
        content = pack_words(reply, update) if isinstance(update, np.ndarray) else pack(reply, update)
        return Message(content, reply_to=message)

    answer_masking(made, agent.masking)
    return made


def create_refusing_app() -> ClientApp:
    """The app for a task whose bundle no approval names: it says so to the hub's question, and fails at all else."""
    made = ClientApp()

    @made.query(PREPARE)
    def prepare(message: Message, context: Context) -> Message:
        asked = parse_document(PrepareRequest, document_of(message), name="question")
        reply = PrepareReply(study_digest=asked.study_digest, code=NOT_APPROVED, reason=PUBLIC_REASON)
        return Message(pack(reply), reply_to=message)

    @made.train()
    def train(message: Message, context: Context) -> Message:
        raise AppRefusedError(PUBLIC_REASON, hint="")

    return made


def site_of_environment() -> SiteFolder:
    """The folder of the site for which the executor was started."""
    return SiteFolder(Path(os.environ[SITE_VARIABLE]))


def installed_app(app_digest: str | None = None) -> ClientApp:
    """The app of the site whose folder the executor's environment names, for tasks with this bundle."""
    grace = float(os.environ.get(GRACE_VARIABLE, "20"))
    settings = AgentSettings(site_of_environment(), trainer_grace_s=grace, app_digest=app_digest)
    return create_client_app(Agent(settings))


def arrays_of(message: Message, request: TrainRequest) -> Arrays:
    """The adapter a message from the hub carries, by the layout it announces. Raises `SpoolError`."""
    record = message.content.array_records.get(ARRAYS)
    shapes = {place.name: place.shape for place in request.layout}
    size = sum(math.prod(shape) for shape in shapes.values())
    if record is None or set(record) != {FLAT} or 4 * size > MAX_ARRAY_BYTES:
        raise SpoolError("The hub's message carries no adapter.", hint="Hub and site run different releases.")
    try:
        return unflatten(decode_array(record[FLAT].data, (size,)), shapes)
    except ValueError as error:
        raise SpoolError("The hub's adapter cannot be decoded.", hint="Tell the coordinator.") from error
