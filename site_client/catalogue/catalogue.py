"""The catalogue of one site: what slides it has, whose they are, how they were cut, and the split."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from sqlalchemy import Engine, create_engine, event, func, select, text
from sqlalchemy.exc import DatabaseError, IntegrityError
from sqlalchemy.orm import Session, joinedload

from pixcell_core.errors import BadInputError, RefusedError
from site_client.catalogue.records import SlideRecord, SplitRecord
from site_client.catalogue.schema import (
    SCHEMA_VERSION,
    TRIGGERS,
    Base,
    Patient,
    Slide,
    Split,
    TileRow,
    Tiling,
    now,
)
from site_client.catalogue.slide_list import two_patients_error
from site_client.catalogue.split import HOLDOUT, TRAIN, SplitSeed, draw
from site_client.slides.quality import TileQuality
from site_client.slides.reader import SlideFacts
from site_client.slides.storage import storage_errors
from site_client.slides.tiling import Tile

FILE_NAME = "catalogue.db"


class Catalogue:
    """An open catalogue; one SQLite file in write-ahead mode, safe to kill at any moment.

    Args:
        site_dir: the site's folder.
        create: make the file when it does not exist.

    Raises:
        BadInputError: codes `no-catalogue`, `catalogue-broken`, `catalogue-newer`, `not-writable`.
        StorageFullError: the disk took no more bytes.
    """

    def __init__(self, site_dir: Path, *, create: bool = False) -> None:
        self.site_dir = site_dir
        self.path = site_dir / FILE_NAME
        if not self.path.is_file() and not create:
            raise BadInputError(
                f"{site_dir} holds no catalogue of slides.",
                hint="Start with `pixcell site data add --site-dir DIR --slides DIR` "
                "(or `pixcell site data synthesise` for procedural slides).",
                code="no-catalogue",
            )
        with storage_errors("creating the catalogue", site_dir):
            site_dir.mkdir(parents=True, exist_ok=True)
        self._engine = self._connect()
        try:
            self._prepare()
        except BaseException:
            self._engine.dispose()
            raise

    def __enter__(self) -> Catalogue:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._engine.dispose()

    def _connect(self) -> Engine:
        engine = create_engine(f"sqlite:///{self.path}", connect_args={"timeout": 30})

        def pragmas(connection: object, _record: object) -> None:
            cursor = connection.cursor()  # type: ignore[attr-defined]
            for line in ("journal_mode=WAL", "synchronous=NORMAL", "foreign_keys=ON"):
                cursor.execute(f"PRAGMA {line}")
            cursor.close()

        event.listen(engine, "connect", pragmas)
        return engine

    def _prepare(self) -> None:
        with self._translate("opening the catalogue"), self._engine.begin() as connection:
            version = connection.execute(text("PRAGMA user_version")).scalar_one()
            if version > SCHEMA_VERSION:
                raise BadInputError(
                    f"{self.path} was written by a newer version of this program.",
                    hint="Update this installation; the catalogue was left untouched.",
                    code="catalogue-newer",
                )
            Base.metadata.create_all(connection)
            for trigger in TRIGGERS:
                connection.execute(text(trigger))
            connection.execute(text(f"PRAGMA user_version={SCHEMA_VERSION}"))

    @contextmanager
    def _translate(self, what: str) -> Iterator[None]:
        try:
            with storage_errors(what, self.site_dir):
                yield
        except IntegrityError:
            raise
        except DatabaseError as error:
            raise BadInputError(
                f"The catalogue {self.path} cannot be used ({what}): {error.orig}.",
                hint="If another command is running on this site, wait for it. If the file is "
                "damaged, restore it from "
                "a backup, or move it away and run `pixcell site data add` again (a new split "
                "must then be drawn).",
                code="catalogue-broken",
            ) from error

    @contextmanager
    def _write(self, what: str) -> Iterator[Session]:
        with self._translate(what), Session(self._engine) as session, session.begin():
            yield session

    @contextmanager
    def _read(self) -> Iterator[Session]:
        with self._translate("reading the catalogue"), Session(self._engine) as session:
            yield session

    # ---- slides
    # ----------------------------------------------------------------------------------------------

    def add_slide(
        self, path: Path, patient: str, label: str | None, digest: str, facts: SlideFacts, tissue_mm2: float
    ) -> bool:
        """Enter a slide.

        Returns:
            True when it is new, False when exactly this slide of this patient is there already.

        Raises:
            BadInputError: `slide-two-patients` (same bytes, other patient) or `slide-changed` (same path,
                other bytes).
        """
        with self._write("writing the catalogue") as session:
            if _recognise(session, path, patient, label, digest):
                return False
            if session.scalar(select(Slide.id).where(Slide.path == str(path))) is not None:
                raise changed_error(path)
            person = session.scalar(select(Patient).where(Patient.name == patient))
            if person is None:
                person = Patient(name=patient)
                session.add(person)
            session.add(
                Slide(
                    sha256=digest,
                    patient=person,
                    path=str(path),
                    label=label,
                    vendor=facts.vendor,
                    mpp=facts.mpp,
                    mpp_assumed=facts.mpp_assumed,
                    width=facts.width,
                    height=facts.height,
                    levels=facts.levels,
                    tissue_mm2=tissue_mm2,
                    added_at=now(),
                )
            )
            return True

    def digests(self) -> frozenset[str]:
        """Digests of all slides."""
        with self._read() as session:
            return frozenset(session.scalars(select(Slide.sha256)))

    def recognise(self, path: Path, patient: str, label: str | None, digest: str) -> bool:
        """Whether a slide of these bytes is this patient's already; its label and place are brought up to date.

        Raises:
            BadInputError: `slide-two-patients`.
        """
        with self._write("writing the catalogue") as session:
            return _recognise(session, path, patient, label, digest)

    def slides(self, part: str | None = None) -> list[SlideRecord]:
        """All slides by patient and digest, or those of one part of the split."""
        query = (
            select(Slide)
            .join(Slide.patient)
            .options(joinedload(Slide.patient))
            .order_by(Patient.name, Slide.sha256)
        )
        if part is not None:
            query = query.where(Patient.part == part)
        with self._read() as session:
            return [SlideRecord.of(row) for row in session.scalars(query)]

    def patients(self, part: str | None = None) -> list[str]:
        """Patients by name, or those of one part of the split."""
        query = select(Patient.name).order_by(Patient.name)
        if part is not None:
            query = query.where(Patient.part == part)
        with self._read() as session:
            return list(session.scalars(query))

    # ---- tiles
    # -----------------------------------------------------------------------------------------------

    def untiled(self, plan: str) -> list[SlideRecord]:
        """Slides that were not yet cut to the end under this plan."""
        with self._read() as session:
            done = set(session.scalars(select(Tiling.slide_id).where(Tiling.plan == plan)))
        return [slide for slide in self.slides() if slide.id not in done]

    def record_tiling(self, slide_id: int, plan: str, tiles: Sequence[Tile]) -> None:
        """Enter all tiles of a slide at once: a slide is cut whole or not at all."""
        with self._write("writing tiles to the catalogue") as session:
            tiling = Tiling(slide_id=slide_id, plan=plan, tiles=len(tiles), finished_at=now())
            session.add(tiling)
            session.flush()
            session.add_all(
                TileRow(
                    tile=t.tile,
                    tiling_id=tiling.id,
                    x=t.x,
                    y=t.y,
                    level=t.level,
                    mpp=t.mpp,
                    tissue=t.quality.tissue,
                    focus=t.quality.focus,
                    ink=t.quality.ink,
                )
                for t in tiles
            )

    def tiles(self, plan: str, slide_id: int) -> list[Tile]:
        """Tiles of a slide under a plan, top to bottom; empty when it was not cut."""
        query = (
            select(TileRow)
            .join(Tiling, TileRow.tiling_id == Tiling.id)
            .where(Tiling.plan == plan, Tiling.slide_id == slide_id)
            .order_by(TileRow.y, TileRow.x)
        )
        with self._read() as session:
            return [
                Tile(r.tile, r.x, r.y, r.level, r.mpp, TileQuality(r.tissue, r.focus, r.ink))
                for r in session.scalars(query)
            ]

    def without_tiles(self, plan: str) -> int:
        """How many slides were cut under a plan and gave no tile."""
        with self._read() as session:
            query = select(func.count()).select_from(Tiling).where(Tiling.plan == plan, Tiling.tiles == 0)
            return int(session.scalar(query) or 0)

    def patients_with_tiles(self) -> frozenset[str]:
        """Names of patients of whom a tile was cut, under whatever plan."""
        query = (
            select(Patient.name)
            .join(Slide, Slide.patient_id == Patient.id)
            .join(Tiling, Tiling.slide_id == Slide.id)
            .where(Tiling.tiles > 0)
            .distinct()
        )
        with self._read() as session:
            return frozenset(session.scalars(query))

    def tile_counts(self) -> dict[str, int]:
        """Number of tiles under each plan."""
        query = select(Tiling.plan, func.sum(Tiling.tiles)).group_by(Tiling.plan).order_by(Tiling.plan)
        with self._read() as session:
            return {str(plan): int(count) for plan, count in session.execute(query)}

    # ---- split
    # -----------------------------------------------------------------------------------------------

    def split(self) -> SplitRecord | None:
        """The draw, if it was made."""
        with self._read() as session:
            row = session.scalar(select(Split))
            return None if row is None else SplitRecord.of(row)

    def require_split(self) -> SplitRecord:
        """The draw; refuse to go on without one: a holdout chosen after training proves nothing.

        Raises:
            RefusedError: code `split-missing`.
        """
        split = self.split()
        if split is None:
            raise RefusedError(
                "This site has not drawn its split into train and holdout yet.",
                hint="Draw it first, once: `pixcell site data split --site-dir DIR --holdout-fraction 0.5`.",
                code="split-missing",
            )
        return split

    def draw_split(self, holdout_fraction: float, seed: SplitSeed) -> SplitRecord:
        """Draw train and holdout by patient, once.

        Raises:
            RefusedError: code `split-drawn` when it was drawn before.
            BadInputError: see `site_client.catalogue.split.draw`.
        """
        with self._write("writing the split") as session:
            if session.scalar(select(Split.id)) is not None:
                raise RefusedError(
                    "This site's split into train and holdout was drawn already and cannot be drawn again.",
                    hint="See it with `pixcell site data show`. A new draw after training would "
                    "let seen patients "
                    "pass for unseen ones; a new study on fresh terms needs a new site folder.",
                    code="split-drawn",
                )
            people = list(session.scalars(select(Patient)))
            parts = draw([p.name for p in people], holdout_fraction, seed)
            for person in people:
                person.part = parts[person.name]
            # Parts go to the database before the row that seals them: afterwards the triggers refuse.
            session.flush()
            row = Split(
                seed=seed.text,
                seed_source=seed.source,
                holdout_fraction=holdout_fraction,
                train=sum(part == TRAIN for part in parts.values()),
                holdout=sum(part == HOLDOUT for part in parts.values()),
                drawn_at=now(),
            )
            session.add(row)
            session.flush()
            return SplitRecord.of(row)


def _recognise(session: Session, path: Path, patient: str, label: str | None, digest: str) -> bool:
    known = session.scalar(select(Slide).where(Slide.sha256 == digest).options(joinedload(Slide.patient)))
    if known is None:
        return False
    if known.patient.name != patient:
        raise two_patients_error(f"{known.path} and {path} have the same bytes")
    known.label = label
    if not Path(known.path).exists():
        known.path = str(path)
    return True


def changed_error(path: Path) -> BadInputError:
    """The one error for a slide whose bytes are not those the catalogue knows."""
    return BadInputError(
        f"{path} is in the catalogue with other bytes: the file was replaced after it was added.",
        hint="Restore the original, or give the new scan a name of its own and add it.",
        code="slide-changed",
    )
