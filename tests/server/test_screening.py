"""Every kind of bad reply costs its own site the round and nobody else; and each check is needed."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Message, MetricRecord

from pixcell_core.contracts.canonical import digest, parse_document
from pixcell_core.contracts.round import ARRAYS, FLAT, TrainReply
from pixcell_core.contracts.spool import Arrays
from pixcell_core.flower.messages import document_of, pack
from server.rounds.loop import QuorumError
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
