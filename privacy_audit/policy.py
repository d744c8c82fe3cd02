"""The policy of an audit: every threshold in one versioned, digested document, none in the code."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pixcell_core.contracts import digest
from pixcell_core.errors import BadInputError

SHIPPED = Path(__file__).parent / "policies"
DEFAULT_POLICY = "core"
_MAX_BYTES = 256 * 1024
_MAX_DEPTH = 16

Share = Annotated[float, Field(gt=0, lt=1)]
Kind = Literal[
    "exact",
    "jpeg50",
    "d4",
    "stain",
    "blur",
    "noise",
    "elastic",
    "shift25",
    "shift50",
    "zoom07",
    "rot15",
    "blend",
    "patch128",
    "patch64",
]
Count = Annotated[int, Field(ge=1, le=1_000_000)]
OptionalTest = Literal["conditioning", "membership", "dp", "human"]


class PolicyError(BadInputError):
    """The policy file cannot be read or says something it may not say."""

    default_code = "bad-policy"


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class PreconditionPolicy(_Part):
    """Sizes and evidence without which no verdict is possible."""

    invalid_patients_below: Annotated[int, Field(ge=2)]
    review_patients_below: Annotated[int, Field(ge=2)]
    min_null_tiles: Annotated[int, Field(ge=20)]
    min_synthetic_tiles: Annotated[int, Field(ge=1)]
    twin_correlation: Share
    require_split_evidence: bool
    min_count_shown: Annotated[int, Field(ge=1)]


class CopyPolicy(_Part):
    """How near copies are searched and when one is flagged or confirmed."""

    eye_pixels: Annotated[int, Field(ge=32, le=512)]
    candidates_per_source: Annotated[int, Field(ge=1, le=64)]
    verified_orientations: Annotated[int, Field(ge=1, le=64)]
    min_overlap: Annotated[float, Field(ge=0.25, le=1)]
    voted_candidates: Annotated[int, Field(ge=0, le=64)]
    chance_inliers: Annotated[int, Field(ge=0, le=64)]
    half_inliers: Annotated[float, Field(gt=0, le=64)]
    chance_detail: Share
    half_detail: Annotated[float, Field(gt=0, le=1)]
    flag_p: Share
    confirm_score: Share
    max_flagged_share: Share
    excess_p_fail: Share
    excess_p_review: Share
    large_release_tiles: Count
    large_max_flagged_share: Share
    large_flag_p: Share

    def for_sizes(self, released: int, null: int) -> CopyPolicy:
        """The same policy with the limits for large releases where release and null are both large.

        Flags of a large release measured against a large null are no chance: then the generator fails, not the tiles.
        That can only be said where chance flags far fewer than the limit, hence a smaller p.
        """
        if min(released, null) < self.large_release_tiles:
            return self
        return self.model_copy(
            update={
                "max_flagged_share": min(self.max_flagged_share, self.large_max_flagged_share),
                "flag_p": min(self.flag_p, self.large_flag_p),
            }
        )


class PatientPolicy(_Part):
    """The exact permutation test over patients, and the power it must have."""

    permutations: Annotated[int, Field(ge=99, le=1_000_000)]
    tail_share: Share
    min_tail_tiles: Annotated[int, Field(ge=1)]
    p_review: Share
    p_fail: Share
    power_copy_share: Share
    power_min_copies: Annotated[int, Field(ge=1)]
    min_power: Share
    power_simulations: Annotated[int, Field(ge=10)]
    power_permutations: Annotated[int, Field(ge=99)]


class SelfTestPolicy(_Part):
    """Planted controls: how many, and what the audit must see to hold an opinion."""

    planted_per_kind: Annotated[int, Field(ge=4, le=10_000)]
    max_null_false_positive: Share
    max_recoloured_false_positive: Share
    recoloured_tiles: Annotated[int, Field(ge=10)]
    gates: dict[Kind, Share]


class ConditioningPolicy(_Part):
    """Is a released tile too near to the very tile it was conditioned on?"""

    p_review: Share
    p_fail: Share


class StrataPolicy(_Part):
    """The patients whom averages forget: the most isolated, and those of rare classes."""

    isolated_share: Share
    min_isolated_patients: Annotated[int, Field(ge=2, le=10_000)]
    min_class_patients: Annotated[int, Field(ge=1, le=10_000)]
    p_fail: Share


class MembershipPolicy(_Part):
    """Attacks on the weights: effort, and how well they may work."""

    tiles_per_patient: Count
    noise_draws: Annotated[int, Field(ge=1, le=64)]
    timesteps: Annotated[tuple[Annotated[int, Field(ge=1, le=999)], ...], Field(min_length=1, max_length=16)]
    bootstrap: Annotated[int, Field(ge=99, le=100_000)]
    max_auc_upper: Share
    fail_auc: Share
    fail_tpr: Share
    min_patients_for_tpr: Count
    weights_leave: bool


class LinkabilityPolicy(_Part):
    """The motivated intruder: how often a released tile leads to the right patient, beyond the control."""

    top_patients: Annotated[int, Field(ge=1, le=100)]
    tiles_per_patient: Count
    max_risk: Share
    fail_risk: Share


class CliquePolicy(_Part):
    """Groups of near-duplicates among the released tiles: what a generator repeats, it may have learnt by heart."""

    group_tiles: Annotated[int, Field(ge=2, le=1000)]
    candidates: Annotated[int, Field(ge=2, le=256)]
    review_groups: Count
    fail_groups: Count


class DisclosurePolicy(_Part):
    """Pen ink, burnt-in text and labels on released tiles."""

    min_ink_share: Share
    holdout_quantile: Share
    min_glyphs: Annotated[int, Field(ge=2, le=100)]
    min_label_blocks: Annotated[int, Field(ge=1, le=1000)]


class ContextPolicy(_Part):
    """Familiar numbers that decide nothing."""

    permutations: Annotated[int, Field(ge=99, le=100_000)]
    tiles_per_patient: Count


class ReviewPolicy(_Part):
    """The blinded queue for a pathologist; `marks` bounds the tiles that may bear text, ink or a label."""

    pairs: Annotated[int, Field(ge=1, le=1000)]
    decoys: Annotated[int, Field(ge=1, le=1000)]
    marks: Annotated[int, Field(ge=1, le=400)]
    max_p: Share


class Policy(_Part):
    """Everything an audit is judged by. Its digest stands in the report and in the verdict."""

    schema_version: Literal["audit-policy/v1"]
    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,63}$")]
    words: str = ""
    preconditions: PreconditionPolicy
    copies: CopyPolicy
    patients: PatientPolicy
    self_test: SelfTestPolicy
    conditioning: ConditioningPolicy
    strata: StrataPolicy
    membership: MembershipPolicy
    linkability: LinkabilityPolicy
    cliques: CliquePolicy
    disclosure: DisclosurePolicy
    context: ContextPolicy
    review: ReviewPolicy
    required: Annotated[tuple[OptionalTest, ...], Field(max_length=4)]

    @property
    def digest(self) -> str:
        """``sha256:<hex>`` of the canonical JSON of the effective policy (comments do not count)."""
        return digest(self.model_dump(mode="json"))


class _Loader(yaml.SafeLoader):
    """YAML's safe reader, of no deeper nesting than a policy has: depth costs the reader time by its square."""

    _depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise yaml.YAMLError(f"it is nested more than {_MAX_DEPTH} deep")
        try:
            return super().compose_node(parent, index)
        finally:
            self._depth -= 1


def load_policy(source: str | Path | None = None) -> Policy:
    """Load a policy file, or one that ships here by its name (`core`, `rehearsal`); the default is `core`.

    Raises:
        PolicyError: unreadable, too large, not YAML, an unknown key (the nearest known one is named), a bad value.
    """
    path = policy_path(source)
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise PolicyError(
            f"The audit policy {path} cannot be read: {error.strerror or error}.",
            hint=f"Give a YAML file or one of the shipped names: {', '.join(shipped_policies())}.",
            code="policy-missing",
        ) from error
    if len(raw) > _MAX_BYTES:
        raise PolicyError(
            f"The audit policy {path.name} is larger than {_MAX_BYTES} bytes.",
            hint="Start from the output of `pixcell audit policy show`.",
        )
    try:
        value = yaml.load(raw.decode("utf-8"), _Loader)
    except (yaml.YAMLError, ValueError, TypeError, OverflowError, RecursionError) as error:
        # Besides its own errors the reader lets through what impossible dates, numbers and nestings raise.
        raise PolicyError(
            f"The audit policy {path.name} is not YAML: {(str(error).splitlines() or ['damaged'])[0][:200]}.",
            hint="Start from the output of `pixcell audit policy show`.",
        ) from error
    if not isinstance(value, dict):
        raise PolicyError(
            f"The audit policy {path.name} is no mapping of settings.",
            hint="Start from the output of `pixcell audit policy show`.",
        )
    return parse_policy(value, path.name)


def parse_policy(value: dict[str, Any], name: str = "policy") -> Policy:
    """Validate a policy that was already parsed; the first error is said in one line."""
    try:
        policy = Policy.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        location = tuple(part for part in first["loc"] if part != "[key]")
        where = ".".join(str(part) for part in location)
        unknown = first["type"] == "extra_forbidden" or location != first["loc"]
        if unknown:
            near = difflib.get_close_matches(str(location[-1]), _known_keys(location), n=1, cutoff=0.0)
            hint = f"Did you mean `{near[0]}`?" if near else "Remove it."
        else:
            hint = "See `pixcell audit policy show` for the shipped value and its source."
        message = "unknown key" if unknown else first["msg"].lower()
        raise PolicyError(f"{name}: `{where}`: {message}.", hint=hint) from error
    limits = policy.preconditions
    if limits.review_patients_below < limits.invalid_patients_below:
        raise PolicyError(
            f"{name}: `preconditions.review_patients_below` lies under `invalid_patients_below`.",
            hint="REVIEW begins above INVALID: raise the first or lower the second.",
        )
    for low, high, words in (
        (
            policy.linkability.max_risk,
            policy.linkability.fail_risk,
            "linkability.fail_risk` lies under `max_risk",
        ),
        (
            policy.membership.max_auc_upper,
            policy.membership.fail_auc,
            "membership.fail_auc` lies under `max_auc_upper",
        ),
        (policy.patients.p_fail, policy.patients.p_review, "patients.p_review` lies under `p_fail"),
        (
            policy.conditioning.p_fail,
            policy.conditioning.p_review,
            "conditioning.p_review` lies under `p_fail",
        ),
        (
            policy.cliques.review_groups,
            policy.cliques.fail_groups,
            "cliques.fail_groups` lies under `review_groups",
        ),
    ):
        if high < low:
            raise PolicyError(
                f"{name}: `{words}`.", hint="REVIEW lies between PASS and FAIL: put the two in order."
            )
    if not policy.self_test.gates:
        raise PolicyError(
            f"{name}: `self_test.gates` names no kind of copy.",
            hint="An audit that proves no sensitivity may not pass anything; name at least `exact`.",
        )
    return policy


def policy_path(source: str | Path | None) -> Path:
    """The file behind a path, a shipped name, or nothing (the default)."""
    text = str(source or DEFAULT_POLICY)
    return SHIPPED / f"{text}.yaml" if text in shipped_policies() else Path(text)


def shipped_policies() -> list[str]:
    """Names of the policies that ship with the package."""
    return sorted(path.stem for path in SHIPPED.glob("*.yaml"))


def _known_keys(location: tuple[int | str, ...]) -> list[str]:
    model: type[BaseModel] = Policy
    for part in location[:-1]:
        annotation = model.model_fields[str(part)].annotation if str(part) in model.model_fields else None
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return list(Kind.__args__)  # type: ignore[attr-defined]
        model = annotation
    return list(model.model_fields)
