"""Every change to a ledger's past is found, and the first bad record is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from pixcell_core.private.ledger_record import ReserveRecord, encode_line, head_of
from pixcell_core.trust.keys import SigningKey
from site_client.ledger.journal import HEAD_SLOT_BYTES, read_head
from site_client.ledger.ledger import Ledger
from site_client.ledger.view import BudgetCap, LedgerBrokenError, LedgerCheck, read_ledger

Lines = list[bytes]


def check_after(folder: Path, change: Callable[[Lines], Lines]) -> LedgerCheck:
    path = folder / "ledger.jsonl"
    path.write_bytes(b"".join(change(path.read_bytes().splitlines(keepends=True))))
    return read_ledger(folder).check


def test_an_untouched_ledger_verifies(filled: Path) -> None:
    check = read_ledger(filled).check
    assert check.ok and check.records == 9 and check.first_bad is None and "9 records" in str(check)


def test_every_single_byte_of_a_record_matters(filled: Path) -> None:
    """All bytes of one line, each replaced by a byte of every class, are found at that record."""
    path = filled / "ledger.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    target = lines[3]
    for position in range(len(target)):
        replacement = (b"0", b"x", b'"', b"\xff", b"\n", b" ")[position % 6]
        if target[position : position + 1] == replacement:
            replacement = b"7"
        changed = target[:position] + replacement + target[position + 1 :]
        path.write_bytes(b"".join([*lines[:3], changed, *lines[4:]]))
        check = read_ledger(filled).check
        assert not check.ok and check.first_bad == 3, (position, replacement, str(check))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("noise_multiplier", 40.0),
        ("steps", 2),
        ("sample_rate", 0.5),
        ("max_grad_norm", 9.0),
        ("study", "other"),
        ("round", 7),
        ("site", "south"),
        ("time", "2025-01-02T03:04:05+00:00"),
        ("sequence", 30),
        ("previous_hash", "sha256:" + "a" * 64),
        ("unit", "tile"),
        ("kind", "spent"),
        ("extra", 1),
    ],
)
@pytest.mark.parametrize("rehash", [False, True])
def test_every_field_is_bound(filled: Path, field: str, value: object, rehash: bool) -> None:
    def change(lines: Lines) -> Lines:
        from pixcell_core.contracts.canonical import canonical_bytes, digest

        outer = json.loads(lines[2])
        outer["record"][field] = value
        if rehash:
            outer["hash"] = digest(outer["record"])
        return [*lines[:2], canonical_bytes(outer) + b"\n", *lines[3:]]

    check = check_after(filled, change)
    assert not check.ok and check.first_bad == 2, str(check)


@pytest.mark.parametrize(
    ("change", "first_bad"),
    [
        (lambda lines: lines[1:], 0),
        (lambda lines: lines[:4] + lines[5:], 4),
        (lambda lines: lines[:8], 8),
        (lambda lines: lines[:1], 1),
        (lambda lines: [], 0),
        (lambda lines: [*lines[:3], lines[4], lines[3], *lines[5:]], 3),
        (lambda lines: [*lines[:5], lines[4], *lines[5:]], 5),
        (lambda lines: [*lines[:5], b"\n", *lines[5:]], 5),
        (lambda lines: [b"\xef\xbb\xbf" + lines[0], *lines[1:]], 0),
        (lambda lines: [*lines[:6], b"{" * 5000 + b"\n", *lines[7:]], 6),
        (lambda lines: [*lines, b"not json\n"], 9),
        (lambda lines: [*lines[:8], lines[8][:-20]], 8),
    ],
    ids=[
        "opening removed",
        "line removed",
        "last line removed",
        "all but the opening removed",
        "emptied",
        "two lines swapped",
        "line repeated",
        "blank line",
        "byte order mark",
        "deep nesting",
        "garbage appended",
        "last line cut although it was on disk",
    ],
)
def test_lines_removed_moved_cut_or_added_are_found(
    filled: Path, change: Callable[[Lines], Lines], first_bad: int
) -> None:
    check = check_after(filled, change)
    assert not check.ok and check.first_bad == first_bad, str(check)
    assert f"record {first_bad}" in str(check)


def test_a_record_signed_by_another_key_is_found(filled: Path) -> None:
    other = SigningKey.generate()
    view = read_ledger(filled)
    record = view.records[2]
    assert isinstance(record, ReserveRecord)
    cheaper = record.model_copy(update={"noise_multiplier": 99.0})
    check = check_after(filled, lambda lines: [*lines[:2], encode_line(cheaper, other), *lines[3:]])
    assert check.first_bad == 2 and "another key" in check.reason


def test_even_the_key_holder_cannot_change_the_middle_unseen(filled: Path, key: SigningKey) -> None:
    view = read_ledger(filled)
    record = view.records[2]
    assert isinstance(record, ReserveRecord)
    cheaper = record.model_copy(update={"noise_multiplier": 99.0})
    check = check_after(filled, lambda lines: [*lines[:2], encode_line(cheaper, key), *lines[3:]])
    assert check.first_bad == 3 and "follow" in check.reason
    # A chain rebuilt to its end verifies by itself; the head that others hold gives it away.
    assert view.head is not None and head_of(cheaper) != head_of(record)


def test_a_removed_or_changed_head_is_found(filled: Path) -> None:
    head = filled / "head.json"
    kept = head.read_bytes()
    head.unlink()
    assert not read_ledger(filled).check.ok
    head.write_bytes(kept.replace(b"sha256:", b"sha256:0")[: len(kept)])
    assert not read_ledger(filled).check.ok
    head.write_bytes(b"\x00garbage")
    assert not read_ledger(filled).check.ok
    head.write_bytes(kept)
    assert read_ledger(filled).check.ok


def test_a_broken_ledger_takes_no_charge(filled: Path, open_ledger: Callable[..., Ledger]) -> None:
    check_after(filled, lambda lines: lines[:4] + lines[5:])
    before = (filled / "ledger.jsonl").read_bytes()
    with pytest.raises(LedgerBrokenError, match="record 4") as caught:
        open_ledger()
    assert "Do not delete" in caught.value.hint
    assert (filled / "ledger.jsonl").read_bytes() == before


def test_a_line_torn_by_a_crash_is_told_apart_from_a_cut_one(
    filled: Path, open_ledger: Callable[..., Ledger]
) -> None:
    """At every length of the last line: unknown to the head it is dropped, or kept when whole; known, it is damage."""
    path, head = filled / "ledger.jsonl", filled / "head.json"
    whole, newest = path.read_bytes(), head.read_bytes()
    lines = whole.splitlines(keepends=True)
    view = read_ledger(filled)
    earlier = head_of(view.records[-2])
    older = json.dumps({"hash": earlier.hash, "sequence": earlier.sequence}).encode()
    start = len(whole) - len(lines[-1])
    for length in [*range(1, len(lines[-1]), 37), len(lines[-1]) - 1]:
        path.write_bytes(whole[: start + length])
        head.write_bytes(newest)
        is_whole = length == len(lines[-1]) - 1
        assert read_ledger(filled).check.ok is is_whole
        head.write_bytes(older)
        check = read_ledger(filled).check
        assert (
            check.ok
            and check.records == (9 if is_whole else 8)
            and check.torn_tail == (0 if is_whole else length)
        )
        with open_ledger(cap=None) as ledger:
            assert ledger.verify().ok
            assert sum(e.steps for e in ledger.totals()) == 6
        assert read_ledger(filled).check.ok and path.read_bytes().startswith(whole[:start])


def test_a_head_left_half_written_is_told_apart_at_every_byte(
    filled: Path, open_ledger: Callable[..., Ledger]
) -> None:
    """Whatever mixture of an old and a new slot a crash leaves: one of the last two heads is read, and it goes on."""
    path = filled / "head.json"
    before = path.read_bytes()
    with open_ledger(cap=BudgetCap(9.0, 1e-5)) as ledger:
        newest = ledger.head
    after = path.read_bytes()
    slot = HEAD_SLOT_BYTES * (newest.sequence % 2)
    assert len(before) == len(after) == 2 * HEAD_SLOT_BYTES
    for cut in range(HEAD_SLOT_BYTES + 1):
        end = slot + HEAD_SLOT_BYTES
        mixture = after[slot : slot + cut] + before[slot + cut : end]
        path.write_bytes(after[:slot] + mixture + after[end:])
        found = read_head(filled)
        assert found is not None and found.sequence in (newest.sequence - 1, newest.sequence)
        check = read_ledger(filled).check
        assert check.ok and check.records == newest.sequence + 1, cut
    path.write_bytes(before)
    with open_ledger(cap=None) as ledger:
        assert ledger.head == newest and read_head(filled) == newest


def test_a_head_written_before_there_were_slots_is_read(
    filled: Path, open_ledger: Callable[..., Ledger]
) -> None:
    path = filled / "head.json"
    head = read_head(filled)
    assert head is not None
    path.write_bytes(json.dumps({"hash": head.hash, "sequence": head.sequence}).encode() + b"\n")
    assert read_ledger(filled).check.ok
    with open_ledger(cap=BudgetCap(9.0, 1e-5)) as ledger:
        assert read_head(filled) == ledger.head and path.stat().st_size == 2 * HEAD_SLOT_BYTES
