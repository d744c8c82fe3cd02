"""A Flower grid inside one process: real ServerApp and ClientApp code, no sockets, faults on demand.

Contents are copied on their way, as over the wire: what one end changes later, the other never sees.
"""

from __future__ import annotations

import copy
import uuid
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

RUN_ID = 1
Tamper = Callable[[Message, Message], list[Message]]
"""`(question, reply) -> replies`: what reaches the server instead of one honest reply."""


def honest(question: Message, reply: Message) -> list[Message]:
    """One reply as it is."""
    return [reply]


class LocalGrid(Grid):
    """Calls each node's ClientApp; `offline` nodes are not listed and never answer."""

    def __init__(self, apps: Mapping[int, ClientApp], workers: int = 4) -> None:
        TaskIdentity.run_id = TaskIdentity.task_id = TaskIdentity.node_id = RUN_ID
        self._apps = dict(apps)
        self._contexts = {
            node: Context(run_id=RUN_ID, node_id=node, node_config={}, state=RecordDict(), run_config={})
            for node in apps
        }
        self._jobs: dict[str, Future[list[Message]]] = {}
        self._pool = ThreadPoolExecutor(workers)
        self.offline: set[int] = set()
        self.tamper: Tamper = honest
        self.sent: list[Message] = []
        self.on_push: Callable[[Message], None] = lambda message: None

    def close(self) -> None:
        """End the workers."""
        self._pool.shutdown(wait=True)

    def set_run(self, run: Run) -> None:
        """There is one run."""

    @property
    def run(self) -> Run:
        """There is one run."""
        raise AssertionError("the round loop does not need the run")

    def create_message(self, *_args: object, **_kwargs: object) -> Message:
        """Deprecated in Flower."""
        raise AssertionError("deprecated")

    def get_node_ids(self) -> Iterable[int]:
        """Nodes that are online."""
        return [node for node in self._apps if node not in self.offline]

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Deliver copies to their nodes."""
        ids = []
        for message in messages:
            self.on_push(message)
            sent = Message(
                copy.deepcopy(message.content),
                dst_node_id=message.metadata.dst_node_id,
                message_type=message.metadata.message_type,
                group_id=message.metadata.group_id,
                ttl=message.metadata.ttl,
            )
            identity = uuid.uuid4().hex
            sent.metadata.__dict__.update(_message_id=identity, _run_id=RUN_ID, _src_node_id=1)
            self.sent.append(sent)
            self._jobs[identity] = self._pool.submit(self._deliver, sent)
            ids.append(identity)
        return ids

    def _deliver(self, message: Message) -> list[Message]:
        node = message.metadata.dst_node_id
        if node in self.offline:
            return []
        try:
            reply = self._apps[node](message, self._contexts[node])
        except Exception as error:
            reply = Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, repr(error)), reply_to=message)
        return [copy.deepcopy(r) for r in self.tamper(message, reply)]

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Replies that are there."""
        found: list[Message] = []
        for identity in list(message_ids):
            job = self._jobs.get(identity)
            if job is not None and job.done() and job.result():
                found += job.result()
                del self._jobs[identity]
        return found

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Not used: its pause of three seconds is fixed."""
        raise AssertionError("the round loop polls by itself")
