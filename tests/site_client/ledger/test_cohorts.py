"""The book of cohorts: disjoint, growing, sealed, and naming nobody."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from pixcell_core.errors import BadInputError, PixcellError
from site_client.ledger.cohorts import SMALLEST_COHORT, CohortBook, CohortRefusedError
from tests.site_client.ledger.disk_calls import RefusingCall, watched_disk

EAST = [f"Patient-East-{n}" for n in range(12)]
WEST = [f"Patient-West-{n}" for n in range(7)]


def content(site_dir: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in (site_dir / "private").glob("cohorts.*")}


def test_a_cohort_is_kept_for_the_owner_alone_and_names_nobody(tmp_path: Path) -> None:
    CohortBook.open(tmp_path).require("east", EAST)
    assert CohortBook.open(tmp_path).names() == ("east",)
    for path in (tmp_path / "private").iterdir():
        assert path.stat().st_mode & 0o777 == 0o600, path
        assert not any(patient.encode() in path.read_bytes() for patient in EAST)


def test_the_same_patients_have_other_tags_at_another_site(tmp_path: Path) -> None:
    tags = []
    for site in ("north", "south"):
        CohortBook.open(tmp_path / site).require("east", EAST)
        tags.append(set(re.findall(rb"[0-9a-f]{64}", content(tmp_path / site)["cohorts.json"])))
    assert not tags[0] & tags[1]


def test_overlapping_cohorts_are_refused_without_a_name_or_a_number_and_nothing_changes(
    tmp_path: Path,
) -> None:
    book = CohortBook.open(tmp_path)
    book.require("east", EAST)
    before = content(tmp_path)
    for patients in ([*WEST, EAST[3]], EAST, [EAST[0], EAST[1]]):
        with pytest.raises(CohortRefusedError) as caught:
            book.require("west", patients)
        assert caught.value.code == "cohorts-overlap" and "'east' already" in caught.value.message
        said = caught.value.message + caught.value.hint
        assert not re.search(r"\d", said) and not any(p in said for p in patients)
        assert content(tmp_path) == before
    book.require("west", WEST)
    with pytest.raises(CohortRefusedError):
        book.require("east", [*EAST, WEST[0]])
    assert book.names() == ("east", "west")


def test_a_cohort_grows_and_who_left_it_stays_in_it(tmp_path: Path) -> None:
    book = CohortBook.open(tmp_path)
    book.require("east", EAST[:6])
    book.require("east", EAST[6:])
    before = content(tmp_path)
    book.require("east", EAST[2:4])
    assert content(tmp_path) == before, "asking again writes nothing"
    for patient in (EAST[0], EAST[11]):
        with pytest.raises(CohortRefusedError):
            CohortBook.open(tmp_path).require("west", [*WEST, patient])


@pytest.mark.parametrize("patients", [[], ["a"], ["a", "a", "a"], ["\u00e9", "e\u0301"]])
@pytest.mark.parametrize("cohort", ["east", "all"])
def test_a_cohort_of_one_is_refused(tmp_path: Path, patients: list[str], cohort: str) -> None:
    with pytest.raises(CohortRefusedError, match="at least 2 patients; this one has fewer"):
        CohortBook.open(tmp_path).require(cohort, patients)
    assert not (tmp_path / "private").exists()


def test_the_smallest_size_can_be_raised_but_not_lowered(tmp_path: Path) -> None:
    assert SMALLEST_COHORT == 2
    with pytest.raises(CohortRefusedError, match="at least 10"):
        CohortBook.open(tmp_path, smallest=10).require("east", EAST[:9])
    with pytest.raises(CohortRefusedError, match="at least 2"):
        CohortBook.open(tmp_path, smallest=0).require("east", EAST[:1])
    CohortBook.open(tmp_path, smallest=10).require("east", EAST[:10])


def test_every_patient_needs_no_book(tmp_path: Path) -> None:
    CohortBook.open(tmp_path, charged=("all",)).require("all", EAST)
    assert not (tmp_path / "private").exists()


@pytest.mark.parametrize("name", ["", "east wing", "../east", "x" * 129, "Erika Mustermann, 1950"])
def test_a_name_that_no_record_can_hold_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(BadInputError, match="cohort's name"):
        CohortBook.open(tmp_path).require(name, EAST)
    assert CohortBook.open(tmp_path).names() == ()


def move_a_tag(folder: Path) -> None:
    path = folder / "cohorts.json"
    tags = re.findall(rb"[0-9a-f]{64}", path.read_bytes())
    path.write_bytes(path.read_bytes().replace(tags[0], b"0" * 64))


def others_secret(folder: Path) -> None:
    (folder / "cohorts.secret").write_bytes(os.urandom(32))


DAMAGE: dict[str, Callable[[Path], object]] = {
    "a tag replaced": move_a_tag,
    "a cohort taken out": lambda f: (f / "cohorts.json").write_bytes(
        re.sub(rb'"east":\[[^]]*\],?', b"", (f / "cohorts.json").read_bytes())
    ),
    "cut": lambda f: (f / "cohorts.json").write_bytes((f / "cohorts.json").read_bytes()[:-9]),
    "emptied": lambda f: (f / "cohorts.json").write_bytes(b""),
    "garbage": lambda f: (f / "cohorts.json").write_bytes(b"\xff\x00[[[["),
    "book deleted": lambda f: (f / "cohorts.json").unlink(),
    "secret deleted": lambda f: (f / "cohorts.secret").unlink(),
    "secret cut": lambda f: (f / "cohorts.secret").write_bytes(b"short"),
    "another site's secret": others_secret,
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_book_is_refused_and_left_alone(tmp_path: Path, damage: Callable[[Path], object]) -> None:
    book = CohortBook.open(tmp_path)
    book.require("east", EAST)
    book.require("west", WEST)
    damage(tmp_path / "private")
    before = content(tmp_path)
    with pytest.raises(BadInputError) as caught:
        CohortBook.open(tmp_path, charged=("all", "east")).require("west", WEST)
    assert caught.value.code == "cohorts-broken" and "Restore" in caught.value.hint
    assert content(tmp_path) == before


def test_a_secret_that_others_can_read_is_refused(tmp_path: Path) -> None:
    CohortBook.open(tmp_path).require("east", EAST)
    (tmp_path / "private" / "cohorts.secret").chmod(0o644)
    with pytest.raises(BadInputError, match="other users"):
        CohortBook.open(tmp_path).require("east", EAST)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_disk_that_refuses_any_call_leaves_the_book_whole(tmp_path: Path, code: int) -> None:
    CohortBook.open(tmp_path / "site").require("east", EAST)
    at, refused = 0, True
    while refused:
        site_dir = tmp_path / f"{at}"
        shutil.copytree(tmp_path / "site", site_dir)
        disk = RefusingCall(at, code)
        try:
            with watched_disk(disk):
                CohortBook.open(site_dir).require("west", WEST)
        except PixcellError as error:
            assert os.strerror(code) in error.message
        assert CohortBook.open(site_dir).names() in (("east",), ("east", "west"))
        refused = disk.refused
        at += 1
    assert at >= 5 and CohortBook.open(site_dir).names() == ("east", "west")


def test_of_two_processes_that_claim_one_patient_one_is_refused(tmp_path: Path) -> None:
    CohortBook.open(tmp_path).require("start", ["x", "y"])
    children = []
    for name in ("east", "west", "south"):
        child = os.fork()
        if child == 0:
            try:
                CohortBook.open(tmp_path).require(name, [*(f"{name}-{n}" for n in range(500)), "shared"])
            except CohortRefusedError:
                os._exit(7)
            os._exit(0)
        children.append(child)
    ended = sorted(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children)
    assert ended == [0, 7, 7] and len(CohortBook.open(tmp_path).names()) == 2
