"""`pixcell private canaries` and `pixcell private audit`: does the code installed here keep the promise it computes?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from pydantic import BaseModel

from pixcell_core.cli.contract import FormatOption, OutputFormat, command, emit_note
from pixcell_core.cli.progress import progress
from pixcell_core.errors import BadInputError

if TYPE_CHECKING:
    from torch import nn

    from pixcell_core.private.canary_patients import OneRunFinding
    from pixcell_core.private.public_patients import PublicPatients

CANARIES_HELP = """Try the installed mechanism on made-up gradients: is the noise as large and the clip as tight as claimed?

Example: pixcell private canaries

Takes seconds, needs no model and no data. Made-up patients with known gradients go through the real engine with this
machine's own source of noise, each put in or left out by a coin; a second game tries Poisson sampling and empty
samples. Exit code 1 when the code is caught leaking more than the accountant says. A right installation is rejected
with the chance --alpha, once in 1000 runs of each of the two tests: run it again before you worry.
"""

AUDIT_HELP = """Train for real with made-up canary patients and guess who took part: a smoke alarm for the whole training.

Example: pixcell private audit --canaries 100 --steps 10 --noise-multiplier 1.9

One private training on the shipped starter (or --base), nobody's patients in it: canaries, and the PUBLIC patients of
--features where given. Guesses follow a rule fixed beforehand (Steinke, Nasr & Jagielski 2023). The result is a lower
bound of epsilon per patient; it can prove a leak, never its absence, and says how much it could have seen at most.
Exit code 1 when the bound passes what the accountant claims.
"""


class CanaryReport(BaseModel):
    """What the made-up gradients and the sampling games found."""

    canaries: int
    noise_multiplier: float
    steps: int
    claimed_mu: float
    measured_mu: float
    epsilon_claimed: float
    epsilon_lower_bound: float | None
    delta: float
    unit: str
    games: int
    game_sample_rate: float
    advantage_claimed: float
    advantage_lower_bound: float
    alpha: float
    consistent: bool
    text: str

    @property
    def exit_code(self) -> int:
        """1 when the mechanism was caught."""
        return 0 if self.consistent else 1

    def __str__(self) -> str:
        return self.text


class AuditReport(BaseModel):
    """What one audited training proved."""

    canaries: int
    public_patients: int
    steps: int
    noise_multiplier: float
    guesses: int
    correct: int
    epsilon_lower_bound: float
    ceiling: float
    epsilon_claimed: float
    delta: float
    confidence: float
    unit: str
    adjacency: str
    consistent: bool
    text: str

    @property
    def exit_code(self) -> int:
        """1 when the training was caught."""
        return 0 if self.consistent else 1

    def __str__(self) -> str:
        return self.text


@command
def canaries(
    noise_multiplier: Annotated[
        float,
        typer.Option(
            "--noise-multiplier",
            help="sigma. With the default steps, 1.7 is epsilon 8 per patient at delta 1e-5.",
        ),
    ] = 1.7,
    steps: Annotated[int, typer.Option("--steps", help="T: steps, everybody in each.")] = 8,
    number: Annotated[int, typer.Option("--canaries", help="Made-up patients; more see sharper.")] = 1000,
    alpha: Annotated[
        float, typer.Option("--alpha", help="Chance of each test to reject a right installation.")
    ] = 0.001,
    delta: Annotated[float, typer.Option("--delta", help="Of both epsilons; at most 1e-5.")] = 1e-5,
    format: FormatOption = OutputFormat.TEXT,
) -> CanaryReport:
    import math

    from pixcell_core.private.accounting import UNIT
    from pixcell_core.private.canaries import check_mechanism
    from pixcell_core.private.noise import SystemNoiseSource
    from pixcell_core.private.sampling_game import check_sampling

    source = SystemNoiseSource()
    with progress("mechanism", 2, "tests") as bar:
        gradients = check_mechanism(
            noise_multiplier, steps, noise_source=source, canaries=number, alpha=alpha, delta=delta
        )
        bar.advance()
        # Fixed: at these settings a doubled sensitivity is seen; they need not be those of anybody's study.
        sampling = check_sampling(0.5, 1.0, 4, noise_source=source, alpha=alpha)
        bar.advance()
    bound = gradients.epsilon_lower_bound
    return CanaryReport(
        canaries=gradients.canaries,
        noise_multiplier=noise_multiplier,
        steps=steps,
        claimed_mu=gradients.claimed_mu,
        measured_mu=gradients.measured_mu,
        epsilon_claimed=gradients.epsilon_claimed,
        epsilon_lower_bound=bound if math.isfinite(bound) else None,
        delta=delta,
        unit=UNIT,
        games=sampling.games,
        game_sample_rate=0.5,
        advantage_claimed=sampling.claimed_advantage,
        advantage_lower_bound=sampling.advantage_lower_bound,
        alpha=alpha,
        consistent=gradients.consistent and sampling.consistent,
        text=f"{gradients}\n{sampling}",
    )


@command
def audit(
    base: Annotated[
        Path | None, typer.Option("--base", help="Transformer folder; the shipped starter if absent.")
    ] = None,
    features: Annotated[
        Path | None,
        typer.Option(
            "--features", help="Feature store of PUBLIC patients who take part; never a site's own."
        ),
    ] = None,
    number: Annotated[
        int,
        typer.Option("--canaries", help="Made-up patients: 100 can prove up to epsilon 2.8, 1000 up to 5.1."),
    ] = 100,
    steps: Annotated[int, typer.Option("--steps", help="T: private steps, everybody in each.")] = 10,
    noise_multiplier: Annotated[
        float,
        typer.Option(
            "--noise-multiplier",
            help="sigma. With the default steps, 1.9 is epsilon 8 per patient at delta 1e-5.",
        ),
    ] = 1.9,
    kind: Annotated[str, typer.Option("--kind", help="Adapter: ffa-lora or lora.")] = "ffa-lora",
    rank: Annotated[int, typer.Option("--rank", help="Rank of the adapter.")] = 4,
    tiles: Annotated[int, typer.Option("--tiles", help="k: tiles of a public patient in each step.")] = 4,
    delta: Annotated[float, typer.Option("--delta", help="Of both epsilons; at most 1e-5.")] = 1e-5,
    confidence: Annotated[float, typer.Option("--confidence", help="Of the lower bound, one-sided.")] = 0.95,
    seed: Annotated[int, typer.Option("--seed", help="Of the canaries and the adapter; no secret.")] = 0,
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")] = "auto",
    format: FormatOption = OutputFormat.TEXT,
) -> AuditReport:
    from dataclasses import asdict

    from pixcell_core.private.canary_patients import audit_with_canaries
    from pixcell_core.private.noise import SystemNoiseSource

    model = _adapted(base, kind, rank, seed, device)
    public = _public(features, model)
    if public is None:
        emit_note("no --features: the canary patients train alone")
    finding: OneRunFinding
    with progress("audit", steps, "steps") as bar:
        finding = audit_with_canaries(
            model,
            noise_multiplier=noise_multiplier,
            steps=steps,
            canaries=number,
            noise_source=SystemNoiseSource(),
            public=public,
            public_patients=len(public.patients) if public is not None else 0,
            tiles_per_patient=tiles,
            delta=delta,
            confidence=confidence,
            seed=seed,
            on_step=lambda step: bar.advance(),
        )
    return AuditReport(**asdict(finding), consistent=finding.consistent, text=str(finding))


def _adapted(base: Path | None, kind: str, rank: int, seed: int, device: str) -> nn.Module:
    from typing import Any

    from pixcell_core.models import PixCellTransformer2DModel
    from pixcell_core.models.devices import choose_device
    from pixcell_core.starter import STARTER
    from pixcell_core.starter.weights import load_folder
    from pixcell_core.training.adapters import DEFAULT_TARGETS, attach_lora

    model = load_folder(PixCellTransformer2DModel, base or STARTER / "transformer").float()
    named: Any = kind
    attach_lora(model, kind=named, rank=rank, seed=seed, targets=DEFAULT_TARGETS)
    return model.to(choose_device(device)).eval()  # type: ignore[no-any-return]


def _public(features: Path | None, model: nn.Module) -> PublicPatients | None:
    if features is None:
        return None
    from pixcell_core.private.public_patients import PublicPatients
    from pixcell_core.training.feature_store import FeatureStore

    if any((folder / "site.json").is_file() for folder in features.resolve().parents):
        raise BadInputError(
            f"{features} lies in a site's folder; an audit trains on public patients alone.",
            hint="Give features of tiles that anybody may see, such as drawn ones, or leave --features out.",
            code="features-private",
        )
    public = PublicPatients(FeatureStore.open(features))
    if not public.patients:
        raise BadInputError(
            f"The feature store {features} holds no patient.",
            hint="Give a store with public tiles, or leave --features out.",
            code="no-features",
        )
    public.require_fit(model)
    return public


def register(private: typer.Typer) -> None:
    """Add the audits to the group `private`."""
    private.command("canaries", help=CANARIES_HELP)(canaries)
    private.command("audit", help=AUDIT_HELP)(audit)
