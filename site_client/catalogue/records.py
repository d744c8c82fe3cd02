"""What the catalogue tells of a slide and of the split: copies that outlive the session they were read in."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from site_client.catalogue.schema import Slide, Split


@dataclass(frozen=True)
class SlideRecord:
    """A slide of the catalogue. `part` is the patient's: train, holdout or None."""

    id: int
    sha256: str
    patient: str
    part: str | None
    path: Path
    label: str | None
    vendor: str
    mpp: float
    mpp_assumed: bool
    width: int
    height: int
    tissue_mm2: float

    @classmethod
    def of(cls, row: Slide) -> SlideRecord:
        """The record of a row, with its patient."""
        return cls(
            id=row.id,
            sha256=row.sha256,
            patient=row.patient.name,
            part=row.patient.part,
            path=Path(row.path),
            label=row.label,
            vendor=row.vendor,
            mpp=row.mpp,
            mpp_assumed=row.mpp_assumed,
            width=row.width,
            height=row.height,
            tissue_mm2=row.tissue_mm2,
        )

    @property
    def public_name(self) -> str:
        """A name for rows and logs that tells neither file nor patient."""
        return self.sha256[:16]


@dataclass(frozen=True)
class SplitRecord:
    """The draw: `seed_source` is `operating-system` or `given`; the seed itself stays in the database."""

    seed_source: str
    holdout_fraction: float
    train: int
    holdout: int
    drawn_at: str

    @classmethod
    def of(cls, row: Split) -> SplitRecord:
        """The record of a row."""
        return cls(row.seed_source, row.holdout_fraction, row.train, row.holdout, row.drawn_at)
