"""What a demonstration is asked to do: sites, patients, rounds, sizes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pixcell_core.errors import BadInputError

HOSPITALS = ("hospital-a", "hospital-b", "hospital-c", "hospital-d", "hospital-e", "hospital-f")
STUDY_ID = "demo"


@dataclass(frozen=True)
class DemoPlan:
    """Everything `pixcell demo` was asked.

    `patients` per site, half of them held out. `base_twins` draws every surrogate again with the base alone, as a second
    null of the audit; it takes as long as drawing the surrogates did. `dishonest` sites plant `planted` real tiles
    among their surrogates.
    """

    out: Path
    sites: int = 3
    patients: int = 120
    slide_size: int = 1024
    rounds: int = 3
    steps_per_round: int = 2
    epsilon: float = 8.0
    delta: float = 1e-5
    tile_size: int = 128
    mpp: float = 0.5
    tiles_per_patient: int = 20
    surrogates: int = 160
    sampler_steps: int = 16
    guidance_scale: float = 2.0
    pretraining_tiles: int = 256
    pretraining_steps: int = 24
    dishonest: bool = True
    planted: int = 12
    slides: Path | None = None
    slides_csv: Path | None = None
    assume_mpp: float | None = None
    policy: str = str(Path(__file__).with_name("demonstration.yaml"))
    conditioning: str = "blend"
    vote_iterations: int = 2
    vote_share: float = 0.6
    candidates: int = 128
    base_twins: bool = False
    seed: int = 7

    def __post_init__(self) -> None:
        if not 1 <= self.sites <= len(HOSPITALS):
            raise BadInputError(
                f"{self.sites} sites cannot be shown.",
                hint=f"Ask for 1 to {len(HOSPITALS)}.",
                code="bad-sites",
            )
        if self.slides is None and self.patients < 8:
            raise BadInputError(
                f"{self.patients} patients per site are too few to hold half of them out and blend three.",
                hint="Ask for at least 8; 120 is the size the audit's policy is made for.",
                code="too-few-patients",
            )
        if self.conditioning not in ("own", "blend", "private"):
            raise BadInputError(
                f"There is no conditioning called '{self.conditioning}'.",
                hint="Choose blend, own or private.",
                code="bad-plan",
            )
        if self.planted > self.surrogates:
            raise BadInputError(
                "More tiles would be planted than there are surrogates.",
                hint="Raise --surrogates.",
                code="bad-plan",
            )

    @property
    def names(self) -> tuple[str, ...]:
        """The sites' names; with real slides there is one site that holds them all."""
        return HOSPITALS[: 1 if self.slides else self.sites]

    @property
    def dishonest_site(self) -> str | None:
        """The site that plants real tiles: the last of at least two."""
        return self.names[-1] if self.dishonest and len(self.names) > 1 else None

    @property
    def training_patients(self) -> int:
        """The public divisor of the noisy sum: half of the patients a site was asked to bring."""
        return 3 if self.slides else self.patients // 2

    @property
    def holdout_fraction(self) -> float:
        """Half is held out; with a handful of real patients a quarter, so that three remain to blend."""
        return 0.25 if self.slides else 0.5
