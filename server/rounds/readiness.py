"""Which sites may be asked to train: enrolled, connected, with an approval of exactly this study, and configured."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

from flwr.app import Message
from flwr.app.message_type import MessageType
from flwr.serverapp import Grid

from pixcell_core.contracts.canonical import parse_document
from pixcell_core.contracts.enrolment import EnrolmentRequest
from pixcell_core.contracts.round import PREPARE, PrepareReply, PrepareRequest, SiteState
from pixcell_core.contracts.study import Study, check_approval
from pixcell_core.errors import PixcellError, RefusedError
from pixcell_core.flower.messages import document_of, pack
from pixcell_core.trust.dsse import Envelope
from server.log_anchor.desk import HeadDesk
from server.rounds.approvals_seen import ApprovalsSeen
from server.rounds.board import LiveBoard
from server.rounds.screening import Rejection, plain

UNANSWERED = 5
"""A question without an answer is asked again after this many times the pause: a second one makes the site slower."""

HOPELESS = frozenset(
    {
        "approval-denied",
        "approval-withdrawn",
        "approval-expired",
        "base-differs",
        "code-differs",
        "log-forked",
        "log-rolled-back",
        "log-key-changed",
        "coordinator-log-forked",
        "coordinator-log-rewritten",
    }
)
"""What waiting does not cure: a person at the site has to act, and then the run is started again."""


@dataclass
class _Asked:
    """A question on its way to a site."""

    site: str
    since: float


class Readiness:
    """Asks the sites of a study whether they are ready, and remembers what they answered."""

    def __init__(
        self,
        grid: Grid,
        study: Study,
        sites: Mapping[str, EnrolmentRequest],
        nodes: Callable[[], Mapping[str, int]],
        board: LiveBoard,
        *,
        ask_again_s: float,
        clock: Callable[[], float],
        approvals: ApprovalsSeen | None = None,
        logs: HeadDesk | None = None,
    ) -> None:
        self._grid, self._study, self._sites, self._nodes = grid, study, sites, nodes
        self._board, self._patience, self._clock = board, ask_again_s, clock
        self._approvals, self._logs = approvals, logs
        self._digest = study.digest
        self._ready: set[str] = set()
        self._asked: dict[str, _Asked] = {}
        self._codes: dict[str, str] = {}
        self._last_asked: dict[str, float] = {}

    @property
    def ready(self) -> list[str]:
        """Sites that may be asked to train, sorted."""
        return sorted(self._ready)

    @property
    def hopeless(self) -> bool:
        """Whether every site that is not ready needs a person first."""
        missing = [site for site in self._study.sites if site not in self._ready]
        return bool(missing) and all(self._codes.get(site) in HOPELESS for site in missing)

    def nodes(self) -> dict[str, int]:
        """Node id of every site that is ready and still registered."""
        known = self._nodes()
        return {site: known[site] for site in self.ready if site in known}

    def doubt(self, site: str) -> None:
        """Ask this site again before its next round: it failed in this one."""
        self._ready.discard(site)
        self._codes.pop(site, None)

    def lacking(self, asked: set[str]) -> dict[str, Rejection]:
        """Why each site that is not among `asked` is not."""
        states = {state.site: state for state in self._board.state.sites}
        codes = {site: code for site, code in self._codes.items() if code != "ok"}
        return {
            site: Rejection(codes.get(site, "not-ready"), state.note or lacks(state))
            for site, state in states.items()
            if site not in asked
        }

    def ask(self) -> None:
        """Send the prepare question to every online site that is not ready and was not asked lately."""
        now = self._clock()
        waiting = {a.site for a in self._asked.values() if now - a.since < UNANSWERED * self._patience}
        waiting |= {site for site, since in self._last_asked.items() if now - since < self._patience}
        online, nodes = set(self._grid.get_node_ids()), self._nodes()
        shown = self._board.state
        for site in self._study.sites:
            node = nodes.get(site)
            self._board.site(site, registered=node in online)
            if node not in online:
                code = "not-connected" if node else "not-enrolled"
                self._ready.discard(site)
                self._codes[site] = code
                self._board.site(site, configured=False, code=code, note=code.replace("-", " "))
            elif site not in self._ready and site not in waiting:
                self._send(site, node, now)
        if self._board.state != shown:
            self._board.flush()

    def _send(self, site: str, node: int, now: float) -> None:
        document = PrepareRequest(
            study=self._study.model_dump(mode="json"),
            study_digest=self._digest,
            heads=self._logs.news(site) if self._logs is not None else None,
        )
        message = Message(
            pack(document),
            dst_node_id=node,
            message_type=f"{MessageType.QUERY}.{PREPARE}",
            ttl=self._study.round_timeout_s,
            group_id="prepare",
        )
        for sent in self._grid.push_messages([message]):
            if sent:
                self._asked[sent] = _Asked(site, now)
        self._last_asked[site] = now

    def hear(self) -> None:
        """Take the answers to prepare questions."""
        if not self._asked:
            return
        for message in self._grid.pull_messages(list(self._asked)):
            asked = self._asked.pop(message.metadata.reply_to_message_id, None)
            if asked is not None:
                self._judge(asked.site, message)
        expired = [k for k, v in self._asked.items() if self._clock() - v.since > self._study.round_timeout_s]
        for key in expired:
            del self._asked[key]

    def _judge(self, site: str, message: Message) -> None:
        self._board.site(site, last_reply_at=datetime.now(UTC), approved=False, configured=False)
        self._ready.discard(site)
        try:
            if message.has_error():
                raise RefusedError(
                    "the site's agent could not answer", hint="Its own log says why.", code="no-answer"
                )
            reply = parse_document(PrepareReply, document_of(message), name="answer")
            if reply.study_digest != self._digest:
                raise RefusedError("the answer is about another study", hint="", code="other-study")
            if not reply.approval:
                raise RefusedError(plain(reply.reason) or "no approval", hint="", code=reply.code)
            envelope = Envelope.from_bytes(reply.approval.encode(), name="approval")
            check_approval(envelope, self._sites[site].verify_key(), study=self._study, site=site)
            if self._approvals is not None:
                self._approvals.keep(site, envelope.to_bytes())
            if self._logs is not None:
                self._logs.take(site, reply.log_offer)
            self._codes[site] = reply.code
            self._board.site(
                site, approved=True, configured=reply.configured, code=reply.code, note=plain(reply.reason)
            )
            if reply.configured:
                self._ready.add(site)
        except PixcellError as error:
            self._codes[site] = error.code
            self._board.site(site, code=error.code, note=plain(error.message))
        self._board.flush()


def lacks(state: SiteState) -> str:
    """The first step to a round that a site has not taken."""
    for column in ("registered", "approved", "configured"):
        if not getattr(state, column):
            return f"not {column}" + (f" ({state.note})" if state.note else "")
    return "not ready"
