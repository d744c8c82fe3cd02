"""What the `site data` commands return: counts and places, never a patient's name."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict


class _Result(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SynthesisResult(_Result):
    """Outcome of `data synthesise`."""

    folder: Path
    slides: int
    written: int
    seconds: float

    def __str__(self) -> str:
        again = f" ({self.slides - self.written} were there already)" if self.written < self.slides else ""
        return (
            f"{self.slides} procedural slides in {self.folder}{again}, {self.seconds:.1f} s.\n"
            f"Next: pixcell site data add --site-dir SITE --slides {self.folder}"
        )


class AddResult(_Result):
    """Outcome of `data add`."""

    added: int
    known: int
    patients: int
    late_patients: int

    def __str__(self) -> str:
        text = f"{self.added} slides added, {self.known} known already; {self.patients} patients in all."
        if self.late_patients:
            text += (
                f"\n{self.late_patients} patients came after the split was drawn: they belong to "
                "neither part and are "
                "not used in this study."
            )
        return text


class SlideProblem(_Result):
    """One slide that is not usable any more."""

    code: str
    message: str
    hint: str


class CheckResult(_Result):
    """Outcome of `data check`; exit code 1 when a slide has a problem."""

    slides: int
    deep: bool
    formats: dict[str, int]
    problems: list[SlideProblem]

    @property
    def exit_code(self) -> int:
        """1 when something is wrong."""
        return 1 if self.problems else 0

    def __str__(self) -> str:
        formats = ", ".join(f"{count} {name}" for name, count in sorted(self.formats.items()))
        depth = "every byte compared" if self.deep else "opened and measured; --deep compares every byte"
        lines = [f"{self.slides} slides ({formats}), {len(self.problems)} with a problem ({depth})."]
        lines += [f"  [{p.code}] {p.message}\n    → {p.hint}" for p in self.problems]
        return "\n".join(lines)


class TileResult(_Result):
    """Outcome of `data tile`."""

    made: int
    total: int
    without_tiles: int
    tile_size: int
    mpp: float

    def __str__(self) -> str:
        text = (
            f"{self.made} tiles of {self.tile_size} px at {self.mpp:g} microns per pixel cut now, "
            f"{self.total} in all."
        )
        if self.without_tiles:
            text += (
                f"\n{self.without_tiles} slides gave no tile: too little tissue for tiles of this size "
                "(see `pixcell site data show --sheet OUT.png`)."
            )
        return text


class SplitResult(_Result):
    """Outcome of `data split`."""

    train: int
    holdout: int
    seed_source: str
    drawn_at: str

    def __str__(self) -> str:
        origin = (
            "the operating system's randomness"
            if self.seed_source == "operating-system"
            else "a given seed (for demonstrations: whoever knows it knows each patient's part)"
        )
        return (
            f"{self.train} patients train, {self.holdout} are held out; drawn {self.drawn_at} from {origin}. "
            "This is final for this site folder."
        )


class ShowResult(_Result):
    """Outcome of `data show`."""

    patients: int
    slides: int
    tissue_mm2: float
    vendors: dict[str, int]
    assumed_mpp: int
    labels: int
    tiles: dict[str, int]
    train: int | None
    holdout: int | None
    split_drawn_at: str | None
    split_seed_source: str | None
    sheet: Path | None

    def render(self) -> object:
        """A table for the terminal."""
        from rich.table import Table

        table = Table(show_header=False, title="Slides of this site", title_justify="left")
        table.add_row("patients", str(self.patients))
        table.add_row(
            "slides", f"{self.slides} ({', '.join(f'{n} {v}' for v, n in sorted(self.vendors.items()))})"
        )
        table.add_row("tissue", f"{self.tissue_mm2:.2f} mm²")
        if self.assumed_mpp:
            table.add_row(
                "scale assumed", f"{self.assumed_mpp} slides (their files name no microns per pixel)"
            )
        table.add_row("labels", str(self.labels) if self.labels else "none given")
        for plan, count in self.tiles.items():
            table.add_row(f"tiles {plan}", str(count))
        if self.split_drawn_at is None:
            table.add_row("split", "not drawn yet: pixcell site data split")
        else:
            table.add_row(
                "split",
                f"{self.train} train, {self.holdout} holdout, drawn {self.split_drawn_at} "
                f"({self.split_seed_source})",
            )
        if self.sheet is not None:
            table.add_row("sheet", f"{self.sheet} (patients' tissue: for this site only)")
        return table
