"""Every kind of bad reply costs its own site the round and nobody else; and each check is needed."""

from __future__ import annotations

import copy
import io
import math
import re
import time
from collections.abc import Callable

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Message, MetricRecord

from pixcell_core.contracts.canonical import digest, parse_document
from pixcell_core.contracts.round import ARRAYS, FLAT, TrainReply
from pixcell_core.contracts.spool import Arrays
from pixcell_core.flower.messages import document_of, pack
from server.rounds.loop import QuorumError
from server.rounds.screening import flat_norm, surely_shorter
from tests.server.consortium import SHAPES, Consortium, update_of

FIRST = next(iter(SHAPES))
Change = Callable[[Message, Message], list[Message]]


def with_arrays(change: Callable[[Arrays], Arrays]) -> Change:
    """Replaces the tensors of a reply."""

    def tamper(question: Message, reply: Message) -> list[Message]:
        arrays = {name: array.numpy() for name, array in reply.content.array_records[ARRAYS].items()}
        reply.content[ARRAYS] = ArrayRecord({n: Array(v) for n, v in change(dict(arrays)).items()})
        return [reply]

    return tamper


def with_document(**changes: object) -> Change:
    """Replaces fields of a reply's document."""

    def tamper(question: Message, reply: Message) -> list[Message]:
        document = parse_document(TrainReply, document_of(reply)).model_copy(update=changes)
        reply.content["control"] = pack(document)["control"]
        return [reply]

    return tamper


def lying_header(question: Message, reply: Message) -> list[Message]:
    """Announces the right shape and sends a buffer whose own header claims a terabyte."""
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        stream, {"descr": "<f4", "fortran_order": False, "shape": (1 << 38,)}
    )
    good = reply.content.array_records[ARRAYS][FLAT]
    reply.content.array_records[ARRAYS][FLAT] = Array(
        dtype=good.dtype, shape=good.shape, stype=good.stype, data=stream.getvalue() + bytes(48)
    )
    return [reply]


def with_metrics(question: Message, reply: Message) -> list[Message]:
    """Adds what a site must not send."""
    reply.content["metrics"] = MetricRecord({"loss": 0.5})
    return [reply]


def without_document(question: Message, reply: Message) -> list[Message]:
    """Leaves the document out."""
    del reply.content["control"]
    return [reply]


def set_first(value: float) -> Callable[[Arrays], Arrays]:
    """One coordinate becomes `value`."""

    def change(arrays: Arrays) -> Arrays:
        spoiled = arrays[FLAT].copy()
        spoiled[0] = value
        return {FLAT: spoiled}

    return change


BAD = {
    "tensor-names": with_arrays(lambda a: a | {"extra": np.zeros(1, np.float32)}),
    "tensor-names ": with_arrays(lambda a: {"other": a[FLAT]}),
    "tensor-shape": with_arrays(lambda a: {FLAT: np.ones(1, np.float32)}),
    "tensor-shape ": with_arrays(lambda a: {FLAT: a[FLAT][:-1].copy()}),
    "tensor-shape  ": with_arrays(lambda a: {FLAT: a[FLAT].reshape(-1, 1)}),
    "tensor-rank": with_arrays(lambda a: {FLAT: np.tile(a[FLAT], 2)}),
    "tensor-rank ": with_arrays(lambda a: {FLAT: a[FLAT][: len(a[FLAT]) // 2].copy()}),
    "tensor-dtype": with_arrays(lambda a: {FLAT: a[FLAT].astype(np.float64)}),
    "tensor-dtype ": with_arrays(lambda a: {FLAT: a[FLAT].astype(np.int32)}),
    "tensor-damaged": lying_header,
    "not-finite": with_arrays(set_first(float("nan"))),
    "not-finite ": with_arrays(set_first(float("inf"))),
    "norm-bound": with_arrays(set_first(1e6)),
    "stale": with_document(round=9),
    "other-study": with_document(study_digest=digest(b"other")),
    "other-input": with_document(input_digest=digest(b"other")),
    "extra-record": with_metrics,
    "bad-form": without_document,
}


@pytest.mark.parametrize("code", BAD)
def test_a_bad_reply_excludes_its_site_only(consortium_of: Callable[..., Consortium], code: str) -> None:
    consortium = consortium_of(rounds=1)
    bad = consortium.nodes["north"]

    def tamper(question: Message, reply: Message) -> list[Message]:
        is_bad = question.metadata.dst_node_id == bad and question.metadata.message_type == "train"
        return BAD[code](question, reply) if is_bad else [reply]

    consortium.grid.tamper = tamper
    done = consortium.loop().run(consortium.start())
    assert done.record.included == ("east", "west")
    assert [(e.site, e.code) for e in done.record.excluded] == [("north", code.strip())]
    expected = (update_of("east", 1)[FIRST].flat[0] + update_of("west", 1)[FIRST].flat[0]) / 2
    for value in done.adapter.values():
        np.testing.assert_allclose(value, expected, rtol=1e-6)


def test_a_reply_of_another_rank_is_told_which(consortium_of: Callable[..., Consortium]) -> None:
    """The study's adapter has rank 2 and 20 coordinates; 30 are those of rank 3, and 21 those of no rank."""
    for size, code, words in (
        (30, "tensor-rank", "rank 3.*has rank 2"),
        (21, "tensor-shape", "another base"),
    ):
        consortium = consortium_of(rounds=1, id=f"size-{size}")
        consortium.folder = consortium.folder.with_name(f"size-{size}")
        consortium.sites["north"].update = lambda number, size=size: {"x": np.zeros(size, np.float32)}
        excluded = consortium.loop().run(consortium.start()).record.excluded
        assert [(e.site, e.code) for e in excluded] == [("north", code)]
        assert re.search(words, excluded[0].reason) and excluded[0].remedy


def test_a_reply_by_another_node_takes_nobodys_place(consortium_of: Callable[..., Consortium]) -> None:
    consortium = consortium_of(rounds=1, round_timeout_s=1.0)
    thief, victim = consortium.nodes["north"], consortium.nodes["east"]
    questions: dict[int, Message] = {}

    def forge(question: Message, reply: Message) -> list[Message]:
        """North answers its own question and east's, with an update east's would not be counted for."""
        if question.metadata.message_type != "train":
            return [reply]
        node = question.metadata.dst_node_id
        questions[node] = question
        if node != victim:
            return [reply]
        while thief not in questions:
            time.sleep(0.001)
        forged = Message(copy.deepcopy(reply.content), reply_to=question)
        forged.metadata.__dict__["_src_node_id"] = thief
        forged.content[ARRAYS] = ArrayRecord({FLAT: Array(np.full(20, 0.5, np.float32))})
        return [forged, reply]

    consortium.grid.tamper = forge
    done = consortium.loop().run(consortium.start())
    assert done.record.included == ("east", "north", "west")
    expected = np.mean([update_of(site, 1)[FIRST].flat[0] for site in consortium.study.sites])
    for value in done.adapter.values():
        np.testing.assert_allclose(value, expected, rtol=1e-6)


@pytest.mark.parametrize("values", [[np.nan], [np.inf, -np.inf], [3e38, 3e38], [1.0] * 70_000, [0.0]])
def test_the_norm_in_blocks_is_the_norm(values: list[float]) -> None:
    flat = np.array(values, dtype=np.float32)
    finite = bool(np.isfinite(flat).all())
    found = flat_norm(flat)
    assert math.isfinite(found) == finite
    if finite:
        assert found == pytest.approx(float(np.linalg.norm(flat.astype(np.float64))), rel=1e-12)


@pytest.mark.parametrize("scale", [1e-30, 1e-13, 1e-6, 1.0, 1e15, 1e19])
@pytest.mark.parametrize("size", [1, 17, 100_000])
def test_the_quick_look_never_lets_pass_what_is_too_long(scale: float, size: int) -> None:
    rng = np.random.default_rng(size)
    flat = (rng.standard_normal(size) * scale).astype(np.float32)
    length = flat_norm(flat)
    for bound in (length * 0.5, length * 0.999, length * (1 - 1e-6)):
        assert not surely_shorter(flat, bound)
    assert surely_shorter(flat, length * 1.1) or scale < 1e-12 or scale > 1e18
    flat[-1] = np.nan
    assert not surely_shorter(flat, length * 1.1)
    flat[-1] = np.inf
    assert not surely_shorter(flat, length * 1.1)


def test_a_reply_sent_twice_counts_once(consortium_of: Callable[..., Consortium]) -> None:
    consortium = consortium_of(rounds=1)
    consortium.grid.tamper = lambda question, reply: [reply, reply, reply]
    done = consortium.loop().run(consortium.start())
    expected = np.mean([update_of(site, 1)[FIRST].flat[0] for site in consortium.study.sites])
    for value in done.adapter.values():
        np.testing.assert_allclose(value, expected, rtol=1e-6)


def test_an_agent_that_fails_excludes_its_site_and_tells_nothing_of_it(
    consortium_of: Callable[..., Consortium],
) -> None:
    consortium = consortium_of(rounds=1)

    def fails(number: int) -> Arrays:
        raise ValueError("patient 4711 has no tiles")

    consortium.sites["north"].update = fails
    done = consortium.loop().run(consortium.start())
    assert [(e.site, e.code) for e in done.record.excluded] == [("north", "site-failed")]
    assert "4711" not in consortium.board().read().to_bytes().decode()  # type: ignore[union-attr]


def test_all_bad_is_a_failure_and_not_an_empty_round(consortium_of: Callable[..., Consortium]) -> None:
    consortium = consortium_of(rounds=1)
    consortium.grid.tamper = lambda question, reply: (
        BAD["not-finite"](question, reply) if question.metadata.message_type == "train" else [reply]
    )
    with pytest.raises(QuorumError, match="not finite"):
        consortium.loop().run(consortium.start())


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_the_norm_bound_is_made_of_public_settings_and_passes_an_honest_update(
    consortium_of: Callable[..., Consortium], optimizer: str
) -> None:
    study = consortium_of(optimizer=optimizer).study
    parameters = 10_000
    bound = study.update_norm_bound(parameters)
    if optimizer == "sgd":
        # T steps of the longest signal of a cohort as large as the divisor, and twice the expected noise.
        step = study.max_grad_norm * (
            1 + 2 * study.noise_multiplier * parameters**0.5 / study.expected_patients
        )
        assert study.steps_per_round * study.learning_rate * step < bound
    else:
        assert study.steps_per_round * study.learning_rate * parameters**0.5 < bound
    assert bound < 1e6
