"""Committed rounds on disk. A round is there in full or not at all, whenever the process is killed.

Layout of a run's folder::

    rounds/00000/adapter.safetensors + round.json     where the study starts (B = 0)
    rounds/00001/...                                  after the first round
    rounds/.partial-*                                 never read; removed at the next start

A round's folder is filled and flushed beside its place and renamed into it. Each record holds the digest of its
tensors and of the record before it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pixcell_core.contracts.canonical import digest, load_document
from pixcell_core.contracts.round import RoundRecord
from pixcell_core.contracts.spool import Arrays, arrays_to_bytes, read_arrays
from pixcell_core.contracts.study import Study
from pixcell_core.errors import BadInputError, RefusedError

ADAPTER = "adapter.safetensors"
STATE = "optimizer.safetensors"
RECORD = "round.json"
PARTIAL = ".partial-"

Step = Callable[[str], None]


def _nothing(_step: str) -> None:
    """The default of the commit's observer."""


@dataclass(frozen=True)
class CommittedRound:
    """One round as it stands on disk."""

    record: RoundRecord
    adapter: Arrays
    state: Arrays | None = None


class RoundStore:
    """The committed rounds of one study, in one folder.

    `on_step` is told the name of each step of a commit just before it happens; tests kill there.
    """

    def __init__(self, folder: Path, study: Study, on_step: Step = _nothing) -> None:
        self._folder, self._study, self._on_step = folder / "rounds", study, on_step

    def open(self) -> None:
        """Make the folder and remove what a killed commit left behind."""
        self._folder.mkdir(parents=True, exist_ok=True)
        for partial in self._folder.glob(f"{PARTIAL}*"):
            shutil.rmtree(partial)

    def records(self) -> list[RoundRecord]:
        """Every committed record in order, checked as a chain without a gap.

        Raises `BadInputError` where a record is missing, altered, or of another study.
        """
        found = sorted(p for p in self._folder.glob("[0-9]*") if p.is_dir()) if self._folder.exists() else []
        records: list[RoundRecord] = []
        for index, place in enumerate(found):
            record = load_document(RoundRecord, place / RECORD)
            before = records[-1].digest if records else None
            if place.name != _name(index) or record.round != index or record.previous != before:
                raise _broken(place, "the chain of rounds has a gap or was altered")
            if record.study_digest != self._study.digest:
                raise RefusedError(
                    f"The rounds in {self._folder.parent} belong to another study than {self._study.id}.",
                    hint="A changed study is a new study: give it a new --id.",
                    code="rounds-of-another-study",
                )
            records.append(record)
        return records

    def latest(self) -> CommittedRound | None:
        """The last committed round with its tensors, or None."""
        records = self.records()
        if not records:
            return None
        place = self._folder / _name(records[-1].round)
        wanted = records[-1].state_digest
        state = read_arrays(place / STATE, wanted) if wanted is not None else None
        return CommittedRound(records[-1], read_arrays(place / ADAPTER, records[-1].adapter_digest), state)

    def commit(self, record: RoundRecord, adapter: Arrays, state: Arrays | None = None) -> CommittedRound:
        """Put one round in place, with the server optimiser's tensors if it has any. It then survives a power cut."""
        data = arrays_to_bytes(adapter)
        kept = arrays_to_bytes(state) if state is not None else None
        named = digest(kept) if kept is not None else None
        if digest(data) != record.adapter_digest or named != record.state_digest:
            raise ValueError("the record names other tensors than those given")
        place = self._folder / _name(record.round)
        if place.exists():
            raise RefusedError(
                f"Round {record.round} is already committed.",
                hint="Another round loop may be running on this folder. Stop one of them.",
                code="round-committed-twice",
            )
        partial = self._folder / f"{PARTIAL}{record.round:05d}-{os.urandom(4).hex()}"
        self._on_step("make")
        partial.mkdir()
        self._write(partial / ADAPTER, data)
        if kept is not None:
            self._write(partial / STATE, kept)
        self._write(partial / RECORD, record.to_bytes())
        self._on_step("flush-partial")
        _flush_folder(partial)
        self._on_step("rename")
        os.rename(partial, place)
        self._on_step("flush-folder")
        _flush_folder(self._folder)
        self._on_step("done")
        return CommittedRound(record, adapter, state)

    def _write(self, path: Path, data: bytes) -> None:
        self._on_step(f"write-{path.name}")
        with path.open("wb") as stream:
            stream.write(data[: len(data) // 2])
            self._on_step(f"half-{path.name}")
            stream.write(data[len(data) // 2 :])
            stream.flush()
            os.fsync(stream.fileno())


def _name(index: int) -> str:
    return f"{index:05d}"


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _broken(place: Path, why: str) -> BadInputError:
    return BadInputError(
        f"The committed rounds cannot be used: {why} (at {place.name}).",
        hint="Restore the run's folder from a copy. Nothing is trained on rounds that do not check.",
        code="rounds-broken",
    )
