"""Membership on the weights: does the generator know training patients better than patients it never saw?

Three attacks on the noise prediction eps(x, t, c), each a number per tile that is small for tiles the model knows:

    loss   E |eps(x_t, t, c) - e|^2 over draws of noise e
    PIA    |eps(x_0, 0, c) - eps(x_t, t, c)| with x_t = sqrt(a) x_0 + sqrt(1 - a) eps(x_0, 0, c)   (Kong et al., ICLR 2024)
    SimA   |eps(x_0, t, c)| at small t, one call                                                   (Rao et al. 2025)

Each is calibrated by the public base model, which never saw these patients: score = base - generator (Watson et al., ICLR
2022). The patient is the unit. The same attack on the base alone is the control: where it tells training from holdout,
the two differ by something else than membership, and nothing can be decided.

Legend: B tiles, C h w latents, n d condition tokens, m tiles, P patients.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from pixcell_core.cli.progress import progress
from pixcell_core.diffusion.schedule import NoiseSchedule, linear_schedule
from privacy_audit.evidence_parts import MembershipEvidence
from privacy_audit.intervals import clopper_pearson_lower, excess_over_null, two_sided
from privacy_audit.patients import permutations
from privacy_audit.policy import MembershipPolicy, Policy
from privacy_audit.result import Status, TestResult, histogram, not_tested
from privacy_audit.subject import Cohort

ATTACKS = ("loss", "PIA", "SimA")
CONTROL = "membership by weights: control on the base"
_CLAIM = "Whoever holds the weights cannot tell which patients trained them."
_SIMA_STEP = 10
_BATCH = 16


def attack_name(number: int) -> str:
    """Name of an attack's test."""
    return f"membership by weights: {ATTACKS[number]}"


def _found_name(number: int) -> str:
    """Name of the p-value of the patients that an attack finds at 1 % false alarms."""
    return f"{attack_name(number)}, found at 1 % false alarms"


@dataclass(frozen=True)
class Inputs:
    """What the attacks need of m tiles: scaled latents (m, C, h, w), tokens (m, n, d), and each tile's patient (m,)."""

    latents: Tensor
    tokens: Tensor
    owner: npt.NDArray[np.int64]


def gather(
    inputs: Inputs, base: nn.Module, generator: nn.Module, policy: MembershipPolicy, seed: int
) -> MembershipEvidence:
    """Run the three attacks on both models with the same noise."""
    with progress("attacking the weights", total=2 * len(inputs.owner), unit="tiles") as bar:
        scores = []
        for model in (base, generator):
            rows = []
            for start in range(0, len(inputs.owner), _BATCH):
                part = slice(start, start + _BATCH)
                rows.append(
                    attack_scores(
                        model, inputs.latents[part], inputs.tokens[part], policy, seed=seed, first=start
                    )
                )
                bar.advance(len(rows[-1]))
            scores.append(np.concatenate(rows))
    return MembershipEvidence(owner=inputs.owner, base=scores[0], generator=scores[1])


@torch.inference_mode()
def attack_scores(
    model: nn.Module,
    latents: Tensor,
    tokens: Tensor,
    policy: MembershipPolicy,
    *,
    seed: int,
    first: int = 0,
    schedule: NoiseSchedule | None = None,
) -> npt.NDArray[np.float64]:
    """Loss, PIA and SimA of each tile, (B, 3); the noise of a tile depends on the seed and its number alone.

    Args:
        model: called as `model(latents, encoder_hidden_states=, timestep=, return_dict=False)`.
        latents: scaled latents (B, C, h, w). tokens: condition (B, n, d).
        first: number of the first tile.
    """
    schedule = schedule or linear_schedule()
    device = next(model.parameters()).device
    x, c = latents.float().to(device), tokens.float().to(device)

    def predict(noisy: Tensor, step: int) -> Tensor:
        at = torch.full((len(noisy),), step, dtype=torch.long, device=device)
        output: Tensor = model(noisy, encoder_hidden_states=c, timestep=at, return_dict=False)[0]
        return output[:, : x.shape[1]].float()

    def size(values: Tensor) -> Tensor:
        return values.square().flatten(1).mean(dim=1)

    def noisy(noise: Tensor, step: int) -> Tensor:
        level = float(schedule.alphas_cumprod[step])
        return level**0.5 * x + (1.0 - level) ** 0.5 * noise

    start = predict(x, 0)
    loss = torch.zeros(len(x), device=device)
    proximal = torch.zeros(len(x), device=device)
    for step in policy.timesteps:
        proximal += size(start - predict(noisy(start, step), step)).sqrt()
        for draw in range(policy.noise_draws):
            noise = torch.stack([_noise(x.shape[1:], seed, first + row, step, draw) for row in range(len(x))])
            loss += size(predict(noisy(noise.to(device), step), step) - noise.to(device))
    steps = len(policy.timesteps)
    found = torch.stack(
        [loss / (steps * policy.noise_draws), proximal / steps, size(predict(x, _SIMA_STEP)).sqrt()], dim=1
    )
    return found.double().cpu().numpy()


def patient_means(
    scores: npt.NDArray[np.float64], owner: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """Mean score of each patient that has a tile, and their numbers."""
    patients = np.unique(owner)
    return np.array([scores[owner == patient].mean() for patient in patients]), patients


def auc(members: npt.NDArray[np.float64], others: npt.NDArray[np.float64]) -> float:
    """Chance that a member scores higher than another, ties counted half (Mann-Whitney)."""
    order = np.sort(others)
    below = np.searchsorted(order, members, side="left") + np.searchsorted(order, members, side="right")
    return float(below.sum() / (2.0 * len(members) * len(others)))


def auc_interval(
    members: npt.NDArray[np.float64],
    others: npt.NDArray[np.float64],
    resamples: int,
    rng: np.random.Generator,
    tail: float = 0.025,
) -> tuple[float, float]:
    """Percentile bootstrap over patients, each side on its own; `tail` is the share left out at either end."""
    found = [
        auc(
            members[rng.integers(len(members), size=len(members))],
            others[rng.integers(len(others), size=len(others))],
        )
        for _ in range(resamples)
    ]
    low, high = np.quantile(found, [tail, 1.0 - tail])
    return float(low), float(high)


def hits_at(
    members: npt.NDArray[np.float64], others: npt.NDArray[np.float64], false_rate: float
) -> tuple[int, int]:
    """Members above the limit that one of the others passes with a chance of at most `false_rate`, and its rank.

    The limit is the k-th largest of n other scores: another innocent patient lies above it with the chance k / (n + 1),
    so k = floor(rate (n + 1)). No such limit exists, and nobody is found, where k is 0.
    """
    allowed = int(np.floor(false_rate * (len(others) + 1) + 1e-9))
    if not allowed:
        return 0, 0
    return int((members > np.sort(others)[-allowed]).sum()), allowed


def p_values(
    evidence: MembershipEvidence, cohort: Cohort, policy: Policy, rng: np.random.Generator
) -> dict[str, float]:
    """Permutation p of each calibrated attack's AUC over patients, and p of the patients it finds at 1 % false alarms.

    The limit of these is itself drawn, and `excess_over_null` knows that; Clopper and Pearson's bound does not.
    """
    labels = permutations(cohort, policy.patients.permutations, rng)
    found = {}
    for number in range(len(ATTACKS)):
        means, patients = patient_means(_calibrated(evidence, number), evidence.owner)
        sides = cohort.is_train[patients]
        ranks = np.argsort(np.argsort(means, kind="stable"), kind="stable") + 1.0
        # The sum of ranks orders labellings as the AUC does where both sides keep their numbers.
        null = (labels[:, patients] * ranks).sum(axis=1)
        observed = float((sides * ranks).sum())
        found[attack_name(number)] = float((1 + (null >= observed - 1e-9).sum()) / (len(null) + 1))
        members, others = means[sides], means[~sides]
        hits, allowed = hits_at(members, others, 0.01)
        if len(others) >= policy.membership.min_patients_for_tpr:
            found[_found_name(number)] = excess_over_null(hits, len(members), allowed, len(others))
    return found


def results(
    evidence: MembershipEvidence | None,
    p: dict[str, float],
    adjusted: dict[str, float],
    cohort: Cohort,
    policy: Policy,
    rng: np.random.Generator,
) -> tuple[TestResult, ...]:
    """The control and the three attacks, or one line that says they were not run."""
    limits = policy.membership
    if evidence is None:
        return (
            not_tested(
                "membership by weights",
                "membership",
                claim=_CLAIM,
                statistic="AUC of attacks on the weights, calibrated by the base model",
                threshold=limits.max_auc_upper,
                direction="lower is safer",
                missing="the weights of generator and base were not given (--generator DIR, --base DIR).",
                required="membership" in policy.required,
            ),
        )
    control, odd = _control(evidence, cohort, policy, rng)
    return (
        control,
        *(
            _attack(number, evidence, p, adjusted, cohort, policy, rng, fair=number not in odd)
            for number in range(len(ATTACKS))
        ),
    )


def _calibrated(evidence: MembershipEvidence, number: int) -> npt.NDArray[np.float64]:
    return evidence.base[:, number] - evidence.generator[:, number]


def _sides(
    scores: npt.NDArray[np.float64], evidence: MembershipEvidence, cohort: Cohort
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    means, patients = patient_means(scores, evidence.owner)
    train = cohort.is_train[patients]
    return means[train], means[~train]


def _control(
    evidence: MembershipEvidence, cohort: Cohort, policy: Policy, rng: np.random.Generator
) -> tuple[TestResult, list[int]]:
    """The attack on the base alone: every attack must read .5 within its interval; and which attacks do not."""
    found = []
    for number in range(len(ATTACKS)):
        members, others = _sides(-evidence.base[:, number], evidence, cohort)
        # Three looks at one question: each interval is a little wider, so that together they err in one of twenty.
        tail = 0.025 / len(ATTACKS)
        interval = auc_interval(members, others, policy.membership.bootstrap, rng, tail)
        found.append((auc(members, others), *interval))
    odd = [number for number, (_, low, high) in enumerate(found) if not low <= 0.5 <= high]
    value, low, high = max(found, key=lambda one: abs(one[0] - 0.5))
    odd_names = ", ".join(ATTACKS[number] for number in odd)
    result = TestResult(
        name=CONTROL,
        section="membership",
        claim="A model that never saw these patients cannot tell training from holdout.",
        statistic="AUC farthest from .5 among the attacks on the base model alone",
        value=value,
        interval=(low, high),
        interval_kind="98.3 % bootstrap over patients",
        null="chance, .5",
        threshold=0.5,
        direction="lower is safer",
        status=Status.REVIEW if odd else Status.PASS,
        why=(
            f"Training and holdout differ for a model that saw neither ({odd_names}): scanner, stain or years. The "
            "same attacks below cannot tell this from membership and decide nothing."
            if odd
            else "The base model, which saw none of these patients, does not tell the two sides apart."
        ),
        cannot_show="Differences that only the generator responds to.",
    )
    return result, odd


def _attack(
    number: int,
    evidence: MembershipEvidence,
    p: dict[str, float],
    adjusted: dict[str, float],
    cohort: Cohort,
    policy: Policy,
    rng: np.random.Generator,
    *,
    fair: bool,
) -> TestResult:
    limits, name = policy.membership, attack_name(number)
    members, others = _sides(_calibrated(evidence, number), evidence, cohort)
    value = auc(members, others)
    low, high = auc_interval(members, others, limits.bootstrap, rng)
    (at_one, _), (at_ten, ranked) = hits_at(members, others, 0.01), hits_at(members, others, 0.10)
    enough = _found_name(number) in p
    found = (
        (clopper_pearson_lower(at_one, len(members)), adjusted[_found_name(number)]) if enough else (0.0, 1.0)
    )
    status, why = _decide(value, low, high, found, adjusted[name], policy)
    if _same_model(evidence, number):
        status = Status.INVALID
        why = (
            "The generator scores every tile exactly as the base does: it is the base itself, a copy of it, or the base "
            "with an adapter of zeros. Nothing was attacked; give the weights that drew the release."
        )
    elif not fair:
        status = Status.REVIEW
        why = "This attack on the base model is not at chance either, so this number decides nothing. " + why
    elif status is Status.FAIL and not limits.weights_leave:
        status = Status.REVIEW
        why += " The weights stay at the site, so a person decides."
    ten_low, ten_high = two_sided(at_ten, len(members))
    return TestResult(
        name=name,
        section="membership",
        claim=_CLAIM,
        statistic=f"AUC of training against holdout patients, {ATTACKS[number]} of the base minus that of the generator",
        value=value,
        interval=(low, high),
        interval_kind="95 % bootstrap over patients",
        null="holdout patients, and the base model that saw neither side",
        p=p[name],
        p_adjusted=adjusted[name],
        threshold=limits.max_auc_upper,
        direction="lower is safer",
        status=status,
        why=why,
        cannot_show="What attacks with many shadow models would find; and single tiles: the patient is the unit.",
        histogram=histogram(
            others,
            members,
            axis=f"{ATTACKS[number]}: base minus generator, mean of a patient",
            null_name="holdout patients",
            observed_name="training patients",
            threshold=None,
            bins=16,
        ),
        details={
            "found_at_10_percent_false": round(at_ten / len(members), 4) if ranked else None,
            "found_at_10_percent_low": round(ten_low, 4) if ranked else None,
            "found_at_10_percent_high": round(ten_high, 4) if ranked else None,
            "found_at_1_percent_false": round(at_one / len(members), 4) if enough else None,
            "found_at_1_percent_lower": round(found[0], 4) if enough else None,
            "found_at_1_percent_p_adjusted": round(found[1], 6) if enough else None,
        },
    )


def _same_model(evidence: MembershipEvidence, number: int) -> bool:
    """Whether two models answered alike to the last digits of float32 on every tile, as two different ones never do."""
    return bool(np.allclose(evidence.base[:, number], evidence.generator[:, number], rtol=1e-6, atol=0.0))


def _decide(
    value: float, low: float, high: float, found: tuple[float, float], adjusted: float, policy: Policy
) -> tuple[Status, str]:
    """Status and words; `found` is the lower bound of the share found at 1 % false alarms, and its adjusted p."""
    limits = policy.membership
    said = f"The attack tells a training from a holdout patient with an AUC of {value:.2f} ({low:.2f} to {high:.2f})"
    if value >= limits.fail_auc and low > 0.5 and adjusted < policy.patients.p_review:
        return Status.FAIL, f"{said}, FAIL from {limits.fail_auc:g}: the weights remember who trained them."
    if found[0] > limits.fail_tpr and found[1] < policy.patients.p_review:
        names = (
            f"{said}, and it names at least {found[0]:.0%} of the training patients at 1 % false alarms "
            f"(p = {found[1]:.2g} after Holm"
        )
        if found[1] < policy.patients.p_fail:
            return Status.FAIL, f"{names}, FAIL below {policy.patients.p_fail:g})."
        return Status.REVIEW, f"{names}, REVIEW below {policy.patients.p_review:g})."
    if low > 0.5 and adjusted < policy.patients.p_review:
        return Status.REVIEW, f"{said}: above chance, below {limits.fail_auc:g}."
    if high > limits.max_auc_upper:
        return Status.REVIEW, (
            f"{said}: it may be above {limits.max_auc_upper:g}. A sample too small to decide does not pass."
        )
    return Status.PASS, f"{said}: no better than chance."


def _noise(shape: torch.Size, seed: int, tile: int, step: int, draw: int) -> Tensor:
    own = np.random.SeedSequence([seed, tile, step, draw]).generate_state(1, np.uint64)[0]
    return torch.randn(shape, generator=torch.Generator().manual_seed(int(own >> np.uint64(1))))
