"""Tables of the site's catalogue and the rules the database itself keeps.

The split is written once: triggers refuse any later change, whichever program asks.
"""

from __future__ import annotations

from datetime import UTC, datetime

from sqlalchemy import ForeignKey, UniqueConstraint
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

#: Kept in SQLite's user_version; raise it together with a migration.
SCHEMA_VERSION = 1


def now() -> str:
    """The moment, UTC, ISO 8601 to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


class Base(DeclarativeBase):
    """Root of the tables."""


class Patient(Base):
    """A person, under the identifier this site uses. Never leaves the site."""

    __tablename__ = "patient"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)
    #: train, holdout, or NULL while no split was drawn (or for a patient who came after it).
    part: Mapped[str | None]
    slides: Mapped[list[Slide]] = relationship(back_populates="patient")


class Slide(Base):
    """A whole-slide image; the digest of its bytes is its identity."""

    __tablename__ = "slide"
    id: Mapped[int] = mapped_column(primary_key=True)
    sha256: Mapped[str] = mapped_column(unique=True)
    patient_id: Mapped[int] = mapped_column(ForeignKey("patient.id"), index=True)
    path: Mapped[str] = mapped_column(unique=True)
    label: Mapped[str | None]
    vendor: Mapped[str]
    mpp: Mapped[float]
    mpp_assumed: Mapped[bool]
    width: Mapped[int]
    height: Mapped[int]
    levels: Mapped[int]
    tissue_mm2: Mapped[float]
    added_at: Mapped[str]
    patient: Mapped[Patient] = relationship(back_populates="slides")


class Tiling(Base):
    """The fact that a slide was cut to the end under one plan; its tiles come in the same transaction."""

    __tablename__ = "tiling"
    __table_args__ = (UniqueConstraint("slide_id", "plan"),)
    id: Mapped[int] = mapped_column(primary_key=True)
    slide_id: Mapped[int] = mapped_column(ForeignKey("slide.id"))
    plan: Mapped[str]
    tiles: Mapped[int]
    finished_at: Mapped[str]


class TileRow(Base):
    """One tile of one tiling; x and y are level-0 pixels of the left upper corner."""

    __tablename__ = "tile"
    id: Mapped[int] = mapped_column(primary_key=True)
    tile: Mapped[str]
    tiling_id: Mapped[int] = mapped_column(ForeignKey("tiling.id"), index=True)
    x: Mapped[int]
    y: Mapped[int]
    level: Mapped[int]
    mpp: Mapped[float]
    tissue: Mapped[float]
    focus: Mapped[float]
    ink: Mapped[float]


class Split(Base):
    """How patients were drawn into train and holdout. One row for ever."""

    __tablename__ = "split"
    id: Mapped[int] = mapped_column(primary_key=True)
    seed: Mapped[str]
    #: `operating-system` or `given` (demonstrations only: a guessable seed lets a patient's part be
    #: recomputed).
    seed_source: Mapped[str]
    holdout_fraction: Mapped[float]
    train: Mapped[int]
    holdout: Mapped[int]
    drawn_at: Mapped[str]


#: Kept by the database, not by our manners.
TRIGGERS = (
    "CREATE TRIGGER IF NOT EXISTS split_once BEFORE INSERT ON split WHEN (SELECT count(*) FROM split) > 0 "
    "BEGIN SELECT RAISE(ABORT, 'the split was drawn already'); END",
    "CREATE TRIGGER IF NOT EXISTS split_fixed BEFORE UPDATE ON split BEGIN SELECT RAISE(ABORT, "
    "'the split is fixed'); END",
    "CREATE TRIGGER IF NOT EXISTS split_kept BEFORE DELETE ON split BEGIN SELECT RAISE(ABORT, "
    "'the split is fixed'); END",
    "CREATE TRIGGER IF NOT EXISTS part_fixed BEFORE UPDATE OF part ON patient WHEN OLD.part IS NOT NULL "
    "BEGIN SELECT RAISE(ABORT, 'the split is fixed'); END",
    "CREATE TRIGGER IF NOT EXISTS part_only_at_draw BEFORE UPDATE OF part ON patient "
    "WHEN OLD.part IS NULL AND (SELECT count(*) FROM split) > 0 "
    "BEGIN SELECT RAISE(ABORT, 'the split was drawn already'); END",
    "CREATE TRIGGER IF NOT EXISTS part_not_on_entry BEFORE INSERT ON patient WHEN NEW.part IS NOT NULL "
    "BEGIN SELECT RAISE(ABORT, 'a patient gets a part only by the draw'); END",
    "CREATE TRIGGER IF NOT EXISTS patient_kept BEFORE DELETE ON patient WHEN OLD.part IS NOT NULL "
    "BEGIN SELECT RAISE(ABORT, 'the split is fixed'); END",
)
