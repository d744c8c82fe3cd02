"""Named cohorts of this site's patients, kept disjoint, so that a cap can hold per cohort.

The ledger adds up what a cohort was charged. That speaks for every patient only if no patient is in two cohorts, and
this book refuses what would put one there. It lies under ``SITE/private/``, for the owner alone, and holds each
patient as an HMAC-SHA256 tag under a secret of this site that never leaves it: the file alone names nobody, and the
records of the ledger hold neither tags nor counts.

Files: ``cohorts.json`` (names and tags, sealed by an HMAC of its own), ``cohorts.secret`` (32 bytes), ``cohorts.lock``.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import hmac
import os
import secrets
import stat
import unicodedata
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from pixcell_core.contracts.canonical import Document, DocumentError, parse_document, read_bounded
from pixcell_core.errors import BadInputError, PixcellError, RefusedError
from pixcell_core.private.ledger_record import EVERY_PATIENT, Name
from pixcell_core.trust.durable import WriteFailedError, write_whole

SMALLEST_COHORT = 2
"""A promise to a cohort of one is a promise about one person's presence alone; it is refused."""

MAX_BOOK_BYTES = 64 * 1024 * 1024
_SECRET_BYTES = 32

Tag = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


class CohortRefusedError(RefusedError):
    """These patients cannot be charged as this cohort; nothing was changed."""

    default_code = "cohort-refused"


class _Book(Document):
    """The file's content: tags of each cohort's patients, sorted, and the seal over both."""

    schema_version: Literal["cohorts/v1"] = "cohorts/v1"
    cohorts: dict[Name, tuple[Tag, ...]] = Field(default_factory=dict)
    seal: Tag | Literal[""] = ""


class CohortBook:
    """The cohorts of one site. `require` is asked before a charge; what it answers is on disk before it returns."""

    def __init__(self, folder: Path, smallest: int) -> None:
        self._folder = folder
        self._smallest = smallest

    @classmethod
    def open(
        cls, site_dir: Path, *, charged: Collection[str] = (), smallest: int = SMALLEST_COHORT
    ) -> CohortBook:
        """Open a site's book; looking at a site that has none makes nothing.

        Args:
            site_dir: the site's folder.
            charged: the cohorts that the ledger has charged (`LedgerView.cohorts()`); the book must know each.
            smallest: the fewest patients a cohort may have; 2 at least.

        Raises:
            BadInputError: the book or its secret is missing, damaged, edited, or open to other users.
        """
        book = cls(Path(site_dir) / "private", max(SMALLEST_COHORT, smallest))
        lost = sorted(set(charged) - {EVERY_PATIENT} - set(book.names()))
        if lost:
            raise _broken(f"the ledger has charged the cohort {lost[0]!r}, which it does not know")
        return book

    def names(self) -> tuple[str, ...]:
        """Return the names of the cohorts, sorted. `all` is always there and is not written down."""
        return tuple(sorted(self._read().cohorts))

    def require(self, cohort: str, patients: Iterable[str]) -> None:
        """Make sure that `patients` may be charged as `cohort`; new ones are added to it. Returns when it is on disk.

        A cohort only grows: a patient who left was charged all the same and stays in it. `all` takes any patients.

        Args:
            cohort: its name.
            patients: identifiers as the site uses them, each as often as it likes.

        Raises:
            CohortRefusedError: too few patients, or one of them is in another cohort.
            BadInputError: a name that no record can hold; a broken book.
            PixcellError: the disk refused.
        """
        wanted = {unicodedata.normalize("NFC", patient) for patient in patients}
        if len(wanted) < self._smallest:
            raise CohortRefusedError(
                f"A cohort needs at least {self._smallest} patients; this one has fewer. Nothing was charged.",
                hint="Add patients, or charge them together with the site's others.",
                code="cohort-too-small",
            )
        if cohort == EVERY_PATIENT:
            return
        with self._alone():
            book = self._read()
            key = self._secret(make=not book.cohorts)
            tags = {_tag(key, patient) for patient in wanted}
            for name, others in book.cohorts.items():
                if name != cohort and not tags.isdisjoint(others):
                    raise CohortRefusedError(
                        f"Some of these patients are in the cohort {name!r} already, so the cohort {cohort!r} cannot "
                        "have them: what they pay in both would never be added up. Nothing was charged.",
                        hint=f"Charge them as {name!r}, or charge every patient of the site as {EVERY_PATIENT!r}.",
                        code="cohorts-overlap",
                    )
            before = set(book.cohorts.get(cohort, ()))
            if not tags <= before:
                self._write(key, {**book.cohorts, cohort: tuple(sorted(before | tags))})

    def _write(self, key: bytes, cohorts: dict[str, tuple[str, ...]]) -> None:
        try:
            book = _Book.model_validate({"cohorts": cohorts})
        except ValueError as error:
            raise BadInputError(
                "A cohort's name has letters, digits, '.', '_', ':' and '-', at most 128 of them.",
                hint="Give the cohort a short public name; it stands in the ledger.",
                code="cohort-name",
            ) from error
        sealed = book.model_copy(update={"seal": _seal(key, book)})
        write_whole(self._folder / "cohorts.json", sealed.to_bytes(), mode=0o600)

    def _read(self) -> _Book:
        path = self._folder / "cohorts.json"
        if not path.exists():
            return _Book()
        try:
            book = parse_document(_Book, read_bounded(path, MAX_BOOK_BYTES), name=path.name)
        except DocumentError as error:
            raise _broken("it cannot be read") from error
        if not hmac.compare_digest(_seal(self._secret(), book), book.seal):
            raise _broken("it was edited, or its secret is another site's")
        return book

    def _secret(self, *, make: bool = False) -> bytes:
        path = self._folder / "cohorts.secret"
        if make and not path.exists():
            with contextlib.suppress(FileExistsError):
                write_whole(path, secrets.token_bytes(_SECRET_BYTES), mode=0o600, replace=False)
        if not path.exists():
            raise _broken("its secret is missing")
        if stat.S_IMODE(path.stat().st_mode) & 0o077:
            raise BadInputError(
                f"{path} can be read by other users, so they could find out who is in a cohort.",
                hint=f"If you are sure that nobody did: chmod 600 {path}.",
                code="cohort-secret-exposed",
            )
        key = read_bounded(path, _SECRET_BYTES)
        if len(key) != _SECRET_BYTES:
            raise _broken("its secret was cut")
        return key

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Hold the book's lock: two processes must not add to it from the same past."""
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            descriptor = os.open(self._folder / "cohorts.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise WriteFailedError(
                f"Cannot write in {self._folder}: {error.strerror or error}.",
                hint="Check the folder, its owner and its permissions.",
            ) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


def _tag(key: bytes, patient: str) -> str:
    return hmac.new(key, b"patient\n" + patient.encode("utf-8"), hashlib.sha256).hexdigest()


def _seal(key: bytes, book: _Book) -> str:
    unsealed = book.model_copy(update={"seal": ""})
    return hmac.new(key, b"cohorts\n" + unsealed.to_bytes(), hashlib.sha256).hexdigest()


def _broken(reason: str) -> PixcellError:
    return BadInputError(
        f"The site's book of cohorts cannot be relied on: {reason}. Nothing was charged.",
        hint="Restore private/cohorts.json and private/cohorts.secret from one backup. Without them, charge every "
        f"patient of the site as {EVERY_PATIENT!r}.",
        code="cohorts-broken",
    )
