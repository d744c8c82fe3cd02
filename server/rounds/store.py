"""Committed rounds. A round is there in full or not at all, whenever the process is killed.

A round is a row of the registry, which holds its record, and a folder of tensors that the record names by digest::

    rounds/00000/adapter.safetensors                              where the study starts (B = 0)
    rounds/00001/adapter.safetensors + optimizer.safetensors      after the first round
    rounds/.partial-*                                             never read; removed at the next start

The folder is filled and flushed beside its place and renamed into it before the row is written; the row is the commit.
A folder without a row never counted and is removed; a row without its folder means that files were lost. Each record
holds the digest of its tensors and of the record before it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import Connection, insert, select
from sqlalchemy.exc import IntegrityError

from pixcell_core.contracts.canonical import digest
from pixcell_core.contracts.round import RoundRecord
from pixcell_core.contracts.spool import Arrays, arrays_to_bytes, read_arrays
from pixcell_core.contracts.study import Study
from pixcell_core.errors import BadInputError, RefusedError
from server.registry.events import note_act
from server.registry.faults import file_errors
from server.registry.registry import Registry
from server.registry.sealed import seal
from server.registry.tables import RoundRow
from server.rounds.records import BROKEN, read_records

ADAPTER = "adapter.safetensors"
STATE = "optimizer.safetensors"
PARTIAL = ".partial-"

Step = Callable[[str], None]


def _nothing(_step: str) -> None:
    """The default of the commit's observer."""


@dataclass(frozen=True)
class CommittedRound:
    """One round as it stands: its record and its tensors."""

    record: RoundRecord
    adapter: Arrays
    state: Arrays | None = None


class RoundStore:
    """The committed rounds of one study: rows of the registry, tensors in the run's folder.

    `on_step` is told the name of each step of a commit just before it happens; tests kill there.
    """

    def __init__(self, registry: Registry, folder: Path, study: Study, on_step: Step = _nothing) -> None:
        self._registry, self._study, self._on_step = registry, study, on_step
        self._folder = folder / "rounds"

    def open(self) -> None:
        """Make the folder and remove what a killed commit left behind."""
        with file_errors("the run's folder", self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
        for partial in self._folder.glob(f"{PARTIAL}*"):
            shutil.rmtree(partial, ignore_errors=True)
        # Under the lock no other loop stands between its rename and its row.
        with self._registry.write(lock=self._lock) as connection:
            committed = {_name(number) for number in self._committed(connection)}
            for place in self._places():
                if place.name not in committed:
                    shutil.rmtree(place)

    def records(self) -> list[RoundRecord]:
        """Every committed record in order, checked as a chain without a gap; each has its files.

        Raises `BadInputError` where a record is missing, altered, or without its files; `RefusedError` where it is of
        another study.
        """
        with self._registry.read() as connection:
            found = read_records(connection, self._study.id)
        for index, record in enumerate(found):
            before = found[index - 1].digest if index else None
            if record.round != index or record.previous != before:
                raise _broken(index, "the chain of rounds has a gap or was altered")
            if record.study_digest != self._study.digest:
                raise RefusedError(
                    f"The committed rounds of {self._study.id} belong to another study of that name.",
                    hint="A changed study is a new study: give it a new --id.",
                    code="rounds-of-another-study",
                )
            place = self._folder / _name(index)
            if not (place / ADAPTER).is_file() or (record.state_digest and not (place / STATE).is_file()):
                raise _broken(index, "its tensors are not in the run's folder")
        return found

    def latest(self) -> CommittedRound | None:
        """The last committed round with its tensors, or None."""
        records = self.records()
        return self.read(records[-1]) if records else None

    def read(self, record: RoundRecord) -> CommittedRound:
        """The tensors a committed record names; an input error where they are not those it names."""
        place = self._folder / _name(record.round)
        wanted = record.state_digest
        state = read_arrays(place / STATE, wanted) if wanted is not None else None
        return CommittedRound(record, read_arrays(place / ADAPTER, record.adapter_digest), state)

    def commit(self, record: RoundRecord, adapter: Arrays, state: Arrays | None = None) -> CommittedRound:
        """Put one round in place, with the server optimiser's tensors if it has any. It then survives a power cut.

        Raises `RefusedError` where the round is committed already, `StorageFullError` where the disk is full.
        """
        data = arrays_to_bytes(adapter)
        kept = arrays_to_bytes(state) if state is not None else None
        named = digest(kept) if kept is not None else None
        if digest(data) != record.adapter_digest or named != record.state_digest:
            raise ValueError("the record names other tensors than those given")
        partial = self._folder / f"{PARTIAL}{record.round:05d}-{os.urandom(4).hex()}"
        self._on_step("make")
        try:
            with file_errors(f"round {record.round}", self._folder):
                partial.mkdir(parents=True)
                self._write(partial / ADAPTER, data)
                if kept is not None:
                    self._write(partial / STATE, kept)
                self._on_step("flush-partial")
                _flush_folder(partial)
            self._enter(record, partial)
        except FileNotFoundError as error:
            # Another loop began meanwhile and took our unfinished folder for one of a killed commit.
            raise _twice(record) from error
        except Exception:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        self._on_step("done")
        return CommittedRound(record, adapter, state)

    def _enter(self, record: RoundRecord, partial: Path) -> None:
        """Move the folder into its place and write the row that names it, alone among all loops of this study.

        Where the commit itself fails the folder stays: a database that went away may have taken the row. The next
        start looks at the row and decides.
        """
        place = self._folder / _name(record.round)
        row = {
            "study_id": record.study_id,
            "round": record.round,
            "previous": record.previous,
            **seal(record),
        }
        try:
            with self._registry.write(lock=self._lock) as connection:
                committed = self._committed(connection)
                if record.round in committed:
                    raise _twice(record)
                if record.previous != committed.get(record.round - 1):
                    raise _broken(record.round, "the new record does not follow the last committed one")
                if place.exists():
                    shutil.rmtree(place)
                self._on_step("rename")
                os.rename(partial, place)
                self._on_step("flush-folder")
                _flush_folder(self._folder)
                self._on_step("row")
                connection.execute(insert(RoundRow).values(**row))
                note_act(connection, "round-committed", f"{record.study_id}/{record.round}")
                self._on_step("commit")
        except IntegrityError as error:
            raise _twice(record) from error

    @property
    def _lock(self) -> str:
        return f"rounds/{self._study.id}"

    def _committed(self, connection: Connection) -> dict[int, str]:
        """Digest of the record of every committed round."""
        wanted = select(RoundRow.round, RoundRow.digest).where(RoundRow.study_id == self._study.id)
        return {row.round: row.digest for row in connection.execute(wanted)}

    def _places(self) -> list[Path]:
        return [place for place in self._folder.glob("[0-9]*") if place.is_dir()]

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


def _broken(index: int, why: str) -> BadInputError:
    return BadInputError(
        f"The committed rounds cannot be used: {why} (round {index}).",
        hint="Restore the registry and the run's folder from a copy. Nothing is trained on rounds that do not check.",
        code=BROKEN,
    )


def _twice(record: RoundRecord) -> RefusedError:
    return RefusedError(
        f"Round {record.round} is already committed, or another loop is committing it.",
        hint="Another round loop may be running on this study. Stop one of them.",
        code="round-committed-twice",
    )
