"""What a round of ours costs over Flower's bare FedAvg, and the server's peak memory as sites are added.

    python -m bench.bench_rounds [--sites 5] [--parameters 5000000]

Both loops run on the same in-process grid with the same sites and the same payload: one flat float32 tensor each way.
The grid makes a reply when it is asked for, so that it holds none itself. Messages travel in two ways: as the objects
that Flower's own grid makes of every message, without its network, and handed over in memory, where bare Flower does
hardly anything. Overhead is a ratio of CPU seconds, paired in one run; ours includes screening, the exact sum, digests,
and every commit to disk. Peak memory is that of fresh processes, imports included.
"""

from __future__ import annotations

import argparse
import logging
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, no_object_id_recompute
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from bench.paired import compare, show
from pixcell_core.contracts.canonical import parse_document
from pixcell_core.contracts.enrolment import EnrolmentRequest
from pixcell_core.contracts.round import ARRAYS, FLAT, PrepareReply, TrainReply, TrainRequest
from pixcell_core.contracts.spool import Arrays
from pixcell_core.contracts.study import (
    AdapterSettings,
    AggregationSettings,
    Approval,
    MaskingSettings,
    SiteKey,
    Study,
)
from pixcell_core.flower.messages import document_of, pack, pack_words
from pixcell_core.trust.keys import SigningKey
from server.registry.opening import open_registry
from server.rounds.board import LiveBoard, RunBoard
from server.rounds.heads import HeadBook
from server.rounds.loop import LoopSettings, RoundLoop
from server.rounds.masked_rounds import MaskedRounds
from server.rounds.store import RoundStore
from site_client.agent.masking import SiteMasking, answer_masking
from site_client.approvals.book import ApprovalBook
from site_client.approvals.site_folder import SiteFolder, SiteIdentity
from tests.any_study import any_study

ROUNDS = 8
TENSORS = 40
logging.getLogger("flwr").setLevel(logging.ERROR)


@dataclass
class Payload:
    """The update every site sends: it reads the tensor that came and makes one of its own, as any client does."""

    update: npt.NDArray[np.float32]

    @classmethod
    def of(cls, parameters: int) -> Payload:
        """Small random numbers."""
        rng = np.random.default_rng(0)
        return cls(rng.standard_normal(parameters, dtype=np.float32) * np.float32(1e-4))

    def answer_to(self, question: Message) -> ArrayRecord:
        """The site's part."""
        came = question.content.array_records[ARRAYS][FLAT].numpy()
        assert came.shape == self.update.shape
        return ArrayRecord({FLAT: Array(self.update)})


def travel(content: RecordDict) -> RecordDict:
    """What Flower's grid does to a message's content on its way: content-addressed objects, and back."""
    with no_object_id_recompute():
        wire = {name: part.deflate() for name, part in get_all_nested_objects(content).items()}
        found = inflate_object_from_contents(content.object_id, wire)
    assert isinstance(found, RecordDict)
    return found


class BenchGrid(Grid):
    """Answers each question when its reply is pulled."""

    def __init__(
        self, nodes: Iterable[int], answer: Callable[[Message], Message], objects: bool = False
    ) -> None:
        self._objects = objects
        TaskIdentity.run_id = TaskIdentity.task_id = TaskIdentity.node_id = 1
        self._nodes, self._answer = list(nodes), answer
        self._asked: dict[str, Message] = {}

    def set_run(self, run: Run) -> None:
        """There is one run."""

    @property
    def run(self) -> Run:
        """There is one run."""
        raise AssertionError("no loop here asks for the run")

    def create_message(self, *_args: object, **_kwargs: object) -> Message:
        """Deprecated in Flower."""
        raise AssertionError("deprecated in Flower")

    def get_node_ids(self) -> Iterable[int]:
        """All nodes."""
        return self._nodes

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Keep the questions."""
        ids = []
        for message in messages:
            identity = uuid.uuid4().hex
            message.metadata.__dict__.update(_message_id=identity, _run_id=1, _src_node_id=1)
            self._asked[identity] = message
            ids.append(identity)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Answer now."""
        found = []
        for identity in list(message_ids):
            question = self._asked.pop(identity, None)
            if question is None:
                continue
            if self._objects:
                question.content = travel(question.content)
            reply = self._answer(question)
            if self._objects:
                reply.content = travel(reply.content)
            found.append(reply)
        return found

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Both at once, without the pause that Flower's own grid makes."""
        return self.pull_messages(self.push_messages(messages))


def bare_fedavg(sites: int, payload: Payload, objects: bool) -> Callable[[], object]:
    """Flower's FedAvg over `ROUNDS` rounds."""

    def answer(question: Message) -> Message:
        content = RecordDict(
            {"arrays": payload.answer_to(question), "metrics": MetricRecord({"num-examples": 1})}
        )
        return Message(content, reply_to=question)

    def act() -> object:
        grid = BenchGrid(range(2, 2 + sites), answer, objects)
        strategy = FedAvg(
            fraction_evaluate=0.0, min_train_nodes=sites, min_available_nodes=sites, min_evaluate_nodes=0
        )
        return strategy.start(
            grid=grid,
            initial_arrays=ArrayRecord({FLAT: Array(np.zeros_like(payload.update))}),
            num_rounds=ROUNDS,
        )

    return act


def names_of(sites: int) -> tuple[str, ...]:
    """Names of so many sites."""
    return tuple(f"site-{i:03d}" for i in range(sites))


def settings_of(rule: str, keys: dict[str, SigningKey]) -> AggregationSettings:
    """The settings of a row of the table."""
    if rule != "masked":
        return AggregationSettings.model_validate(RULES[rule])
    identities = tuple(
        SiteKey(site=site, approval_key=key.verify_key.to_pem().decode()) for site, key in keys.items()
    )
    threshold = -(-2 * len(keys) // 3)
    return AggregationSettings(
        masking=MaskingSettings(threshold=threshold, coordinate_bound=1e-2, identities=identities)
    )


def masked_answers(
    folder: Path,
    study: Study,
    keys: dict[str, SigningKey],
    nodes: dict[str, int],
    payload: Payload,
    plain: Callable[[Message], Message],
) -> Callable[[Message], Message]:
    """Sites that mask as agents do, state on disk and all; the loop's first question is answered by `plain`."""
    apps: dict[int, ClientApp] = {}
    maskings: dict[int, SiteMasking] = {}
    for site, key in keys.items():
        place = SiteFolder(folder / site)
        place.keys.mkdir(parents=True)
        key.save(place.approval_key)
        place.identity_file.write_bytes(SiteIdentity(site=site, hub="h:1").to_bytes())
        ApprovalBook(place).decide(study, "approve")
        maskings[nodes[site]] = SiteMasking(place, lambda digest: study)
        apps[nodes[site]] = ClientApp()
        answer_masking(apps[nodes[site]], maskings[nodes[site]])
    context = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config={})

    def answer(question: Message) -> Message:
        node = question.metadata.dst_node_id
        if question.metadata.message_type == "query.prepare":
            return plain(question)
        if question.metadata.message_type != "train":
            return apps[node](question, context)
        request = parse_document(TrainRequest, document_of(question))
        assert maskings[node].accept(study, request)
        update, at = {}, 0
        for tensor in request.layout:
            count = int(np.prod(tensor.shape))
            update[tensor.name] = payload.update[at : at + count].reshape(tensor.shape)
            at += count
        words = maskings[node].mask(study, request, update)
        reply = TrainReply(
            study_digest=request.study_digest,
            round=request.round,
            input_digest=request.input_digest,
            status="ok",
        )
        return Message(pack_words(reply, words), reply_to=question)

    return answer


def our_rounds(sites: int, payload: Payload, rule: str, objects: bool) -> Callable[[], object]:
    """Our loop over `ROUNDS` rounds, from a fresh folder to the last commit."""
    names = names_of(sites)
    keys = {name: SigningKey.generate() for name in names}
    aggregation = settings_of(rule, keys)
    study = any_study(
        id="bench",
        adapter=AdapterSettings(rank=4, targets=("block",)),
        aggregation=aggregation,
        rounds=ROUNDS,
        sites=names,
        quorum=sites,
        reply_grid_s=0.0,
        max_update_norm=1e6,
    )
    nodes = {name: 2 + i for i, name in enumerate(names)}
    approvals = {
        nodes[name]: Approval(
            study_id=study.id,
            study_digest=study.digest,
            site=name,
            decision="approve",
            epsilon_cap=study.epsilon_cap,
            decided_at=study.created_at,
            expires_at=study.expires_at,
        )
        .sign(keys[name])
        .to_bytes()
        .decode()
        for name in names
    }
    enrolled = {
        name: EnrolmentRequest(
            site=name,
            node_key="ecdsa-sha2-nistp384 " + "A" * 120,
            approval_key=keys[name].verify_key.to_pem().decode(),
            created_at=study.created_at,
        )
        for name in names
    }
    start = start_of(payload.update.size)

    def answer(question: Message) -> Message:
        if question.metadata.message_type != "train":
            reply = PrepareReply(
                study_digest=study.digest, approval=approvals[question.metadata.dst_node_id], configured=True
            )
            return Message(pack(reply), reply_to=question)
        request = parse_document(TrainRequest, document_of(question))
        content = pack(
            TrainReply(
                study_digest=request.study_digest,
                round=request.round,
                input_digest=request.input_digest,
                status="ok",
            )
        )
        content[ARRAYS] = payload.answer_to(question)
        return Message(content, reply_to=question)

    def act() -> object:
        with tempfile.TemporaryDirectory(prefix="pixcell-bench-") as text:
            folder = Path(text)
            registry = open_registry(folder)
            heads, board = HeadBook(registry), LiveBoard(RunBoard(registry, study.id), study)
            reply, exchange = answer, None
            grid = BenchGrid(nodes.values(), lambda question: reply(question), objects)
            if study.aggregation.masking is not None:
                reply = masked_answers(folder, study, keys, nodes, payload, answer)
                exchange = MaskedRounds(grid, study, heads, board, folder=folder / "masked", poll_s=0.001)
            loop = RoundLoop(
                grid,
                study,
                enrolled,
                lambda: nodes,
                RoundStore(registry, folder, study),
                board,
                heads,
                LoopSettings(poll_s=0.001, ask_again_s=1.0),
                folder=folder,
                exchange=exchange,
            )
            done = loop.run(start)
            registry.close()
            return done

    return act


def start_of(parameters: int) -> Arrays:
    """An adapter of rank 4 in `TENSORS` tensors."""
    rows = parameters // (4 * TENSORS)
    return {f"m{i:03d}.lora_B.default.weight": np.zeros((rows, 4), dtype=np.float32) for i in range(TENSORS)}


def peak_mb() -> float:
    """Largest resident size of this process so far, MB; `getrusage` would tell the parent's, which forked it."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) / 1024


def measure_peak(sites: int, parameters: int, rule: str) -> None:
    """In a fresh process: print the peak, and the peak before the first round."""
    payload = Payload.of(parameters)
    act = our_rounds(sites, payload, rule, objects=False)
    before = peak_mb()
    act()
    print(f"{peak_mb():.1f} {before:.1f}")


RULES: dict[str, dict[str, object]] = {
    "mean": {"rule": "mean"},
    "fedadam": {"server_optimizer": "adam", "server_learning_rate": 0.01},
    "median": {"rule": "median"},
    "trimmed-mean": {"rule": "trimmed-mean", "trim": 0.25},
    "masked": {},
}


def main() -> None:
    """Print all figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sites", type=int, default=5)
    parser.add_argument("--parameters", type=int, default=5_000_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rules", default=",".join(RULES), help="comma-separated rows of the table")
    parser.add_argument("--peak", nargs=2, metavar=("SITES", "RULE"))
    given = parser.parse_args()
    if given.peak:
        measure_peak(int(given.peak[0]), given.parameters, given.peak[1])
        return
    payload = Payload.of(given.parameters)
    for objects in (True, False):
        way = "with Flower's objects on the way" if objects else "handed over in memory"
        theirs = bare_fedavg(given.sites, payload, objects)
        for rule in given.rules.split(","):
            ours = our_rounds(given.sites, payload, rule, objects=objects)
            found = compare(ours, theirs, given.repeats)
            show(f"{ROUNDS} rounds, {rule}, {way}", "Flower's FedAvg", found)
    for rule in given.rules.split(","):
        peaks = {}
        for sites in (4, 20):
            words = [sys.executable, "-m", "bench.bench_rounds", "--peak", str(sites), rule]
            words += ["--parameters", str(given.parameters)]
            done = subprocess.run(words, check=True, capture_output=True, text=True)
            peaks[sites] = float(done.stdout.split()[-2])
        print(
            f"peak memory, {rule}: {peaks[20] / peaks[4]:.2f} x at 20 sites of that at 4 "
            f"({peaks[20]:.0f} MB against {peaks[4]:.0f} MB)"
        )


if __name__ == "__main__":
    main()
