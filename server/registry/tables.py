"""Tables of the registry. A row is a document in its canonical bytes, its digest, and what the database must know.

Moments are text, ISO 8601 in UTC. What may never change is kept so by the database itself: see `migrations`.
"""

from __future__ import annotations

from sqlalchemy import BigInteger, ForeignKey, Integer, LargeBinary, MetaData, UniqueConstraint
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

NAMES = {
    "pk": "pk_%(table_name)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "fk": "fk_%(table_name)s_%(column_0_name)s",
    "ix": "ix_%(table_name)s_%(column_0_N_name)s",
}
"""One name for a constraint on every database, so that a migration can speak of it."""


class Base(DeclarativeBase):
    """Root of the tables."""

    metadata = MetaData(naming_convention=NAMES)


class SiteRow(Base):
    """An enrolled site. Two sites cannot share a key: the digests of both keys are unique."""

    __tablename__ = "sites"
    site: Mapped[str] = mapped_column(primary_key=True)
    node_key_digest: Mapped[str] = mapped_column(unique=True)
    approval_key_digest: Mapped[str] = mapped_column(unique=True)
    document: Mapped[bytes] = mapped_column(LargeBinary)
    digest: Mapped[str]


class StudyRow(Base):
    """A study. Written once."""

    __tablename__ = "studies"
    study_id: Mapped[str] = mapped_column(primary_key=True)
    document: Mapped[bytes] = mapped_column(LargeBinary)
    digest: Mapped[str] = mapped_column(unique=True)


class HeadRow(Base):
    """The newest head of a site's privacy ledger, over all studies. `sequence` only grows."""

    __tablename__ = "heads"
    site: Mapped[str] = mapped_column(primary_key=True)
    sequence: Mapped[int] = mapped_column(BigInteger)
    document: Mapped[bytes] = mapped_column(LargeBinary)
    digest: Mapped[str]


class RunRow(Base):
    """The board of a study's run, replaced whole; `version` counts the times."""

    __tablename__ = "runs"
    study_id: Mapped[str] = mapped_column(primary_key=True)
    version: Mapped[int] = mapped_column(BigInteger)
    document: Mapped[bytes] = mapped_column(LargeBinary)
    digest: Mapped[str]


class RoundRow(Base):
    """A committed round. Written once; its tensors lie as files in the run's folder under the digests it names."""

    __tablename__ = "rounds"
    __table_args__ = (UniqueConstraint("study_id", "previous"),)
    study_id: Mapped[str] = mapped_column(primary_key=True)
    round: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    previous: Mapped[str | None] = mapped_column(ForeignKey("rounds.digest"))
    document: Mapped[bytes] = mapped_column(LargeBinary)
    digest: Mapped[str] = mapped_column(unique=True)


class EventRow(Base):
    """An act of the coordinator. Added, never changed."""

    __tablename__ = "events"
    id: Mapped[int] = mapped_column(BigInteger().with_variant(Integer(), "sqlite"), primary_key=True)
    at: Mapped[str]
    kind: Mapped[str]
    subject: Mapped[str]
