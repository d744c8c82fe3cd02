"""The sitting: every call on disk at once, resumed by the same person alone, signed once, decoys counted at the end."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import pytest

from pixcell_core.contracts import parse_document
from pixcell_core.errors import PixcellError
from pixcell_core.trust.dsse import Envelope, verify_envelope
from pixcell_core.trust.keys import SigningKey
from pixcell_core.trust.log import read_entries, verify_log
from privacy_audit.intervals import two_sided
from privacy_audit.review.session import DECISIONS, RECORD, RECORD_TYPE, ReviewRecord, ReviewSession
from privacy_audit.review_queue import KEY, QUEUE, Call, read_decisions
from tests.privacy_audit.review.queue_folder import kinds_of, make_queue

KEY_A, KEY_B = SigningKey.generate(), SigningKey.generate()


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return make_queue(tmp_path / "out")


def code_of(act: Any, *arguments: Any, **more: Any) -> str:
    with pytest.raises(PixcellError) as refused:
        act(*arguments, **more)
    assert refused.value.hint
    return refused.value.code


def decide_all(session: ReviewSession, **calls: Call) -> None:
    kinds = kinds_of(session.out)
    for item in session.queue.items:
        session.decide(item.id, calls.get(kinds[item.id], "different"))


def test_every_call_is_on_disk_at_once_and_a_kill_loses_none(out: Path) -> None:
    first = ReviewSession(out, "Dr. A", KEY_A)
    items = [item.id for item in first.queue.items]
    first.decide(items[0], "same field")
    first.decide(items[1], "unsure")
    first.decide(items[0], "different")
    # What a killed process leaves: its lock is gone with it, nothing else was closed or flushed.
    os.close(first._lock)
    again = ReviewSession(out, "Dr. A", KEY_A)
    assert again.calls == {items[0]: "different", items[1]: "unsure"}
    assert again.open == len(items) - 2
    again.close()
    for path in (out / "site").glob("review-*"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path


def test_the_key_that_unblinds_is_not_opened_before_the_signature(out: Path) -> None:
    hidden = out / "site" / "elsewhere"
    (out / KEY).rename(hidden)
    session = ReviewSession(out, "Dr. A", KEY_A)
    for item in session.queue.items:
        session.decide(item.id, "different")
    assert code_of(session.sign) == "document-unreadable", "only now it is needed"
    assert session.signed is None and not (out / DECISIONS).exists()
    hidden.rename(out / KEY)
    assert session.sign().decoys.different == 4
    session.close()


def test_the_signature_binds_reviewer_queue_and_counts(out: Path, tmp_path: Path) -> None:
    session = ReviewSession(out, "Dr. A", KEY_A, log=tmp_path / "log")
    decide_all(session, pair="same field", decoy="different")
    unsure = next(name for name, kind in kinds_of(out).items() if kind == "decoy")
    session.decide(unsure, "unsure")
    record = session.sign()
    assert session.sign() is record
    assert code_of(session.decide, unsure, "different") == "review-signed"
    session.close()
    envelope = Envelope.load(out / DECISIONS)
    found = read_decisions(out, envelope, KEY_A.verify_key).human
    assert (found.pair_same, found.decoy_same, found.decoy_unsure, found.open) == (4, 0, 1, 0)
    signed = verify_envelope(Envelope.load(out / RECORD), [KEY_A.verify_key], payload_type=RECORD_TYPE)
    assert parse_document(ReviewRecord, signed) == record
    assert (record.user, record.reviewer, record.queue) == ("Dr. A", KEY_A.key_id, found.queue)
    assert (record.decoys.different, record.decoys.total, record.pairs.same) == (3, 4, 4)
    assert record.decoy_agreement == 0.75 and record.decoy_interval == two_sided(3, 4)
    assert record.decoy_interval[0] == pytest.approx(0.194, abs=5e-4), (
        "Clopper-Pearson of 3 of 4, as tables have it"
    )
    assert verify_log(tmp_path / "log", trusted_keys=[KEY_A.verify_key]).entries == 1
    assert read_entries(tmp_path / "log")[0].data["record"] == record.digest


def test_refusals(out: Path, tmp_path: Path) -> None:
    session = ReviewSession(out, "Dr. A", KEY_A)
    assert code_of(session.sign) == "review-unfinished"
    assert code_of(session.decide, "0" * 16, "different") == "no-such-item"
    assert code_of(ReviewSession, out, "Dr. A", KEY_A) == "review-open"
    second = ReviewSession(out, "Dr. B", KEY_B, decisions=tmp_path / "b.json")
    second.close()
    session.close()
    assert code_of(ReviewSession, out, "Dr. B", KEY_A) == "review-of-another-user"
    for name in ("", "x" * 81, "two\nlines"):
        assert code_of(ReviewSession, out, name, SigningKey.generate()) == "bad-user"
    session = ReviewSession(out, "Dr. A", KEY_A)
    decide_all(session)
    session.sign()
    session.close()
    assert code_of(ReviewSession, out, "Dr. A", KEY_A) == "review-signed"
    assert code_of(ReviewSession, out, "Dr. C", SigningKey.generate()) == "review-signed"
    second = ReviewSession(out, "Dr. B", KEY_B, decisions=tmp_path / "b.json")
    decide_all(second)
    second.sign()
    second.close()
    assert (tmp_path / "b.json").exists() and (tmp_path / "b.record.json").exists()
    assert code_of(ReviewSession, tmp_path, "Dr. A", KEY_A) == "no-review-queue"


def test_single_tiles_have_answers_of_their_own_and_are_counted_apart(tmp_path: Path) -> None:
    out = make_queue(tmp_path / "marks", pairs=2, decoys=2, marks=2, clean=3)
    session = ReviewSession(out, "Dr. A", KEY_A)
    asks = {item.id: item.asks for item in session.queue.items}
    single, pair = (next(name for name, asked in asks.items() if asked == what) for what in ("mark", "field"))
    assert code_of(session.decide, single, "same field") == "call-of-another-question"
    assert code_of(session.decide, pair, "clean") == "call-of-another-question"
    assert session.calls == {}
    for name, kind in kinds_of(out).items():
        call: Call = {"pair": "different", "decoy": "different", "mark": "marked", "clean": "clean"}[kind]  # type: ignore[assignment]
        session.decide(name, call)
    record = session.sign()
    session.close()
    assert record.marks is not None and (record.marks.marked, record.marks.total) == (2, 2)
    assert record.clean is not None and (record.clean.marked, record.clean.total) == (0, 3)
    read = read_decisions(out, Envelope.load(out / DECISIONS), KEY_A.verify_key)
    assert read.marks is not None and (read.marks.marked, read.marks.shown, read.marks.open) == (2, 2, 0)
    assert (read.human.pairs, read.human.decoys, read.human.open) == (2, 2, 0)


def test_an_audit_that_ran_again_is_not_mixed_with_old_calls(out: Path, tmp_path: Path) -> None:
    session = ReviewSession(out, "Dr. A", KEY_A)
    session.decide(session.queue.items[0].id, "same field")
    session.close()
    other = make_queue(tmp_path / "other", pairs=3)
    for name in (QUEUE, KEY):
        (out / name).write_bytes((other / name).read_bytes())
    assert code_of(ReviewSession, out, "Dr. A", KEY_A) == "review-of-another-queue"


def test_an_empty_queue_and_a_damaged_session(out: Path, tmp_path: Path) -> None:
    empty = make_queue(tmp_path / "empty", pairs=0, decoys=0)
    assert code_of(ReviewSession, empty, "Dr. A", KEY_A) == "no-review-queue"
    session = ReviewSession(out, "Dr. A", KEY_A)
    session.close()
    session._path.write_text("{}")
    assert code_of(ReviewSession, out, "Dr. A", KEY_A) == "bad-document"
