"""Proof files: they check offline for the true log and for nothing else; rewriting in any form shows."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pixcell_core.contracts.canonical import parse_document
from pixcell_core.contracts.log_heads import ConsistencyProof, InclusionProof
from pixcell_core.errors import BadInputError, PixcellError
from pixcell_core.trust.dsse import SignatureRefusedError, sign_envelope
from pixcell_core.trust.keys import SigningKey
from pixcell_core.trust.log import HEAD_PAYLOAD_TYPE, EventLog, TreeHead, head_at, newest_head, verify_log
from pixcell_core.trust.log_proof import (
    ProofRefusedError,
    check_consistency,
    check_inclusion,
    load_proof,
    prove_consistency,
    prove_inclusion,
)
from pixcell_core.trust.merkle import merkle_root

NOW = datetime(2026, 1, 31, 23, 59, 59, tzinfo=UTC)
KEY, OTHER = SigningKey.generate(), SigningKey.generate()
OWNER = [KEY.verify_key]


def written(folder: Path, facts: list[int]) -> EventLog:
    log = EventLog(folder, KEY)
    for fact in facts:
        log.append("test.event", {"fact": fact}, now=NOW)
    return log


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> EventLog:
    """Seven events, as in the example of RFC 6962."""
    return written(tmp_path_factory.mktemp("proofs") / "log", list(range(7)))


@pytest.mark.parametrize("index", range(7))
def test_each_event_is_proven_and_no_other(log: EventLog, index: int) -> None:
    proof = prove_inclusion(log.folder, index)
    assert parse_document(InclusionProof, proof.to_bytes()) == proof
    assert check_inclusion(proof, OWNER, known=newest_head(log.folder)).tree_size == 7
    stranger = log.entries()[(index + 1) % 7]
    for entry in (
        stranger,
        proof.entry.model_copy(update={"data": {"fact": 99}}),
        proof.entry.model_copy(update={"time": "2026-02-01T00:00:00Z"}),
        proof.entry.model_copy(update={"kind": "test.other"}),
    ):
        with pytest.raises(ProofRefusedError):
            check_inclusion(proof.model_copy(update={"entry": entry}), OWNER)
    with pytest.raises(ProofRefusedError):
        check_inclusion(proof.model_copy(update={"path": proof.path[1:]}), OWNER)
    with pytest.raises(SignatureRefusedError):
        check_inclusion(proof, [OTHER.verify_key])


@pytest.mark.parametrize("size", range(1, 8))
def test_growth_is_proven_between_the_heads_one_holds(log: EventLog, size: int) -> None:
    proof = prove_consistency(log.folder, size)
    assert parse_document(ConsistencyProof, proof.to_bytes()) == proof
    older, newer = check_consistency(
        proof, OWNER, older=head_at(log.folder, size), newer=newest_head(log.folder)
    )
    assert (older.tree_size, newer.tree_size) == (size, 7)
    held = head_at(log.folder, size % 7 + 1)
    with pytest.raises(ProofRefusedError):
        check_consistency(proof, OWNER, older=held)
    if size < 7:
        with pytest.raises(ProofRefusedError):
            check_consistency(proof, OWNER, newer=held if size < 6 else head_at(log.folder, 1))
    with pytest.raises(SignatureRefusedError):
        check_consistency(proof, [OTHER.verify_key])


def test_a_head_signed_by_the_owner_over_another_tree_is_refused(log: EventLog) -> None:
    """The owner signs whatever it likes; only a tree that began with the older one passes."""
    proof = prove_consistency(log.folder, 3)
    leaves = [entry.to_bytes() for entry in log.entries()]
    forged = merkle_root([b"another", *leaves[1:]])
    head = TreeHead(tree_size=7, root="sha256:" + forged.hex(), time="2026-01-31T23:59:59Z")
    envelope = sign_envelope(HEAD_PAYLOAD_TYPE, head.to_bytes(), [KEY])
    with pytest.raises(ProofRefusedError, match="does not begin"):
        check_consistency(proof.model_copy(update={"newer": envelope}), OWNER)


def test_what_is_not_there_is_not_proven(log: EventLog, tmp_path: Path) -> None:
    for act, number in ((prove_inclusion, 7), (prove_inclusion, -1), (prove_consistency, 0)):
        with pytest.raises(BadInputError) as refused:
            act(log.folder, number)
        assert refused.value.code == "no-such-event"
    with pytest.raises(BadInputError):
        prove_consistency(log.folder, 8)
    with pytest.raises(BadInputError):
        head_at(log.folder, 8)
    for number, text in enumerate(('{"schema_version": "other/v1"}', "[]", "{}", "not json")):
        path = tmp_path / str(number)
        path.write_text(text)
        with pytest.raises(BadInputError):
            load_proof(path)


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_any_changed_byte_of_a_proof_file_is_refused(
    log: EventLog, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    size = data.draw(st.integers(1, 6))
    proof = data.draw(
        st.sampled_from([prove_inclusion(log.folder, size), prove_consistency(log.folder, size)])
    )
    raw = bytearray(proof.to_bytes())
    raw[data.draw(st.integers(0, len(raw) - 1))] ^= data.draw(st.integers(1, 255))
    path = tmp_path_factory.getbasetemp() / "changed.json"
    path.write_bytes(bytes(raw))
    with pytest.raises(PixcellError):
        found = load_proof(path)
        if isinstance(found, InclusionProof):
            check_inclusion(found, OWNER, known=newest_head(log.folder))
        elif isinstance(found, ConsistencyProof):
            check_consistency(found, OWNER, older=head_at(log.folder, size), newer=newest_head(log.folder))


Rewrite = st.sampled_from(["edit", "drop", "swap", "repeat", "insert", "truncate", "fork"])


@given(facts=st.lists(st.integers(0, 999), min_size=2, max_size=9, unique=True), data=st.data())
@settings(max_examples=80, deadline=None)
def test_an_owner_who_rewrites_and_signs_anew_meets_the_head_that_was_seen(
    tmp_path_factory: pytest.TempPathFactory, facts: list[int], data: st.DataObject
) -> None:
    """The strongest forger holds the key: every line is signed truly, and only the head seen before gives it away."""
    honest = written(tmp_path_factory.mktemp("honest") / "log", facts)
    seen = newest_head(honest.folder)
    assert seen is not None
    act, at = data.draw(Rewrite), data.draw(st.integers(0, len(facts) - 2))
    forged = {
        "edit": [*facts[:at], 1000, *facts[at + 1 :]],
        "drop": facts[:at] + facts[at + 1 :] + [1001],
        "swap": [*facts[:at], facts[at + 1], facts[at], *facts[at + 2 :]],
        "repeat": [*facts[: at + 1], *facts[at:]],
        "insert": [*facts[:at], 1002, *facts[at:]],
        "truncate": facts[: at + 1],
        "fork": [*facts[:-1], 1003, 1004],
    }[act]
    rewritten = written(tmp_path_factory.mktemp("forged") / "log", forged)
    assert verify_log(rewritten.folder, trusted_keys=OWNER).entries == len(forged), "alone it looks whole"
    with pytest.raises(PixcellError):
        verify_log(rewritten.folder, trusted_keys=OWNER, earlier_heads=[seen])
    if len(forged) >= len(facts):
        with pytest.raises(ProofRefusedError):
            check_consistency(prove_consistency(rewritten.folder, len(facts)), OWNER, older=seen)
    grown = written(honest.folder, [2000])
    check_consistency(prove_consistency(grown.folder, len(facts)), OWNER, older=seen)
    assert json.loads(prove_inclusion(grown.folder, len(facts)).to_bytes())["entry"]["data"] == {"fact": 2000}
