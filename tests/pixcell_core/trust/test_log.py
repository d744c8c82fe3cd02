"""The log: what it proves, what a crash leaves, and every way of rewriting it that must show."""

from __future__ import annotations

import json
import multiprocessing
import os
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pixcell_core.contracts.canonical import canonical_bytes
from pixcell_core.errors import BadInputError, PixcellError
from pixcell_core.trust.dsse import Envelope, sign_envelope
from pixcell_core.trust.keys import SigningKey
from pixcell_core.trust.log import (
    HEAD_PAYLOAD_TYPE,
    EventLog,
    LogBrokenError,
    TreeHead,
    newest_head,
    read_entries,
    verify_log,
)
from pixcell_core.trust.merkle import merkle_root, verify_consistency, verify_inclusion

NOW = datetime(2026, 1, 31, 23, 59, 59, tzinfo=UTC)
KEY, OTHER = SigningKey.generate(), SigningKey.generate()


def filled(folder: Path, count: int = 5) -> EventLog:
    log = EventLog(folder, KEY)
    for number in range(count):
        log.append("release.sealed", {"manifest": f"sha256:{number:064x}"}, now=NOW)
    return log


def test_an_honest_log_verifies(tmp_path: Path) -> None:
    log = filled(tmp_path / "log")
    report = verify_log(log.folder)
    assert (report.entries, report.key_id, report.key_trusted) == (5, KEY.key_id, False)
    assert verify_log(log.folder, trusted_keys=[KEY.verify_key]).key_trusted
    assert [entry.index for entry in log.entries()] == list(range(5))
    assert log.entries()[0].time == "2026-01-31T23:59:59Z"
    leaves = [entry.to_bytes() for entry in log.entries()]
    root = bytes.fromhex(str(report.root).removeprefix("sha256:"))
    assert root == merkle_root(leaves)
    assert verify_inclusion(leaves[2], 2, 5, log.inclusion_proof(2), root)
    assert verify_consistency(3, 5, merkle_root(leaves[:3]), root, log.consistency_proof(3))


def test_empty_and_absent_logs(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "log", KEY)
    assert verify_log(log.folder).entries == 0
    assert log.head() is None
    with pytest.raises(BadInputError):
        verify_log(tmp_path)


def test_reopening_continues_and_another_key_does_not(tmp_path: Path) -> None:
    first = filled(tmp_path / "log", 2)
    second = EventLog(first.folder, KEY)
    second.append("release.signed", {})
    first.append("release.exported", {})
    assert [entry.kind for entry in read_entries(first.folder)][2:] == ["release.signed", "release.exported"]
    assert verify_log(first.folder).entries == 4
    with pytest.raises(LogBrokenError):
        EventLog(first.folder, OTHER)
    with pytest.raises(LogBrokenError):
        verify_log(first.folder, trusted_keys=[OTHER.verify_key])


def _append_many(folder: Path, key: Path, count: int) -> None:
    log = EventLog(folder, SigningKey.load(key))
    for _ in range(count):
        log.append("test.event", {"pid": os.getpid()})


def test_several_processes_share_one_log(tmp_path: Path) -> None:
    KEY.save(tmp_path / "key")
    context = multiprocessing.get_context("fork")
    arguments = (tmp_path / "log", tmp_path / "key", 15)
    workers = [context.Process(target=_append_many, args=arguments) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    assert verify_log(tmp_path / "log").entries == 45


def test_an_interrupted_write_is_seen_and_mended(tmp_path: Path) -> None:
    log = filled(tmp_path / "log", 3)
    path = log.folder / "log.jsonl"
    whole = path.read_bytes()
    for cut in (1, 2, 100, len(whole.splitlines()[-1])):
        path.write_bytes(whole[:-cut])
        report = verify_log(log.folder)
        assert report.entries == 2
        assert report.unfinished_tail_bytes > 0
    EventLog(log.folder, KEY).append("test.after-crash", {})
    report = verify_log(log.folder)
    assert (report.entries, report.unfinished_tail_bytes) == (3, 0)
    assert read_entries(log.folder)[-1].kind == "test.after-crash"


def test_a_cut_end_shows_against_an_earlier_head(tmp_path: Path) -> None:
    log = filled(tmp_path / "log", 4)
    seen = log.head()
    assert seen is not None
    log.append("test.event", {})
    assert verify_log(log.folder, earlier_heads=[seen]).earlier_heads_checked == 1
    path = log.folder / "log.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:3]))
    assert verify_log(log.folder).entries == 3, (
        "alone, a shortened log is whole: that is why heads are exchanged"
    )
    with pytest.raises(LogBrokenError, match="cut off"):
        verify_log(log.folder, earlier_heads=[seen])


def test_an_owner_who_rewrites_the_past_is_caught_by_an_earlier_head(tmp_path: Path) -> None:
    log = filled(tmp_path / "log", 4)
    seen = newest_head(log.folder)
    assert seen is not None
    rewritten = EventLog(tmp_path / "rewritten", KEY)
    for entry in log.entries():
        rewritten.append(entry.kind, {"manifest": "another"} if entry.index == 1 else entry.data, now=NOW)
    rewritten.append("test.event", {})
    assert verify_log(rewritten.folder, trusted_keys=[KEY.verify_key]).entries == 5
    with pytest.raises(LogBrokenError, match="rewritten"):
        verify_log(rewritten.folder, earlier_heads=[seen])
    with pytest.raises(PixcellError):
        verify_log(log.folder, earlier_heads=[sign_envelope(HEAD_PAYLOAD_TYPE, b"{}", [OTHER])])


def _lines(log: EventLog) -> list[bytes]:
    return (log.folder / "log.jsonl").read_bytes().splitlines(keepends=True)


def _write(log: EventLog, lines: list[bytes]) -> None:
    (log.folder / "log.jsonl").write_bytes(b"".join(lines))


def test_removed_repeated_reordered_and_foreign_lines(tmp_path: Path) -> None:
    log = filled(tmp_path / "log")
    lines = _lines(log)
    foreign = json.loads(lines[4])
    head = TreeHead(tree_size=5, root=str(verify_log(log.folder).root), time="2026-01-31T23:59:59Z")
    foreign["head"] = sign_envelope(HEAD_PAYLOAD_TYPE, head.to_bytes(), [OTHER]).model_dump()
    mutants = [
        lines[1:],
        lines[:2] + lines[3:],
        [lines[0], *lines],
        [lines[1], lines[0], *lines[2:]],
        [*lines[:4], canonical_bytes(foreign) + b"\n"],
        [*lines[:4], lines[4].replace(b'"index":4', b'"index": 4')],
        [*lines, b"{}\n"],
        [*lines, b"\n"],
        [*lines, b"x" * 300_000],
    ]
    for mutant in mutants:
        _write(log, mutant)
        with pytest.raises(LogBrokenError, match="Line"):
            verify_log(log.folder)


def test_a_swapped_key_file_is_caught(tmp_path: Path) -> None:
    log = filled(tmp_path / "log", 2)
    OTHER.verify_key.save(log.folder / "log.pub")
    with pytest.raises(LogBrokenError, match="Line 1"):
        verify_log(log.folder)


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> EventLog:
    return filled(tmp_path_factory.mktemp("kept") / "log", 3)


@given(data=st.data())
@settings(max_examples=120, deadline=None)
def test_any_changed_byte_is_caught(kept: EventLog, data: st.DataObject) -> None:
    path = kept.folder / "log.jsonl"
    original = path.read_bytes()
    head = kept.head()
    assert isinstance(head, Envelope)
    changed = bytearray(original)
    changed[data.draw(st.integers(0, len(original) - 1))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(bytes(changed))
    try:
        with pytest.raises(PixcellError):
            verify_log(kept.folder, earlier_heads=[head])
    finally:
        path.write_bytes(original)


def test_bounds_and_kinds(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "log", KEY)
    with pytest.raises(BadInputError):
        log.append("test.event", {"x": "y" * 70_000})
    with pytest.raises(ValueError, match="kind"):
        log.append("Not A Kind", {})
    assert verify_log(log.folder).entries == 0
