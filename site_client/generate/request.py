"""What `pixcell site generate` was asked, and which conditioning policy that settles on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pixcell_core.contracts.study import Study
from pixcell_core.errors import BadInputError, RefusedError
from site_client.generate.conditions import SMALLEST_BLEND, check_policy_name
from site_client.generate.policy_names import BLEND, PRIVATE


@dataclass(frozen=True)
class GenerationRequest:
    """Everything `pixcell site generate` was asked."""

    site_dir: Path
    out: Path
    count: int
    adapter: Path | None
    base: Path | None
    study: Path | None
    policy: str | None
    blend_k: int | None
    guidance_scale: float
    num_inference_steps: int
    batch_size: int
    seed: int | None
    device: str
    threads: int
    candidates: Path | None = None
    variation: str = "interpolation"
    encoder: str = "starter"


@dataclass(frozen=True)
class SettledPolicy:
    """The policy a request comes to: its name, and k, which only `blend` reads."""

    name: str
    k: int


def settled_policy(request: GenerationRequest, study: Study | None) -> SettledPolicy:
    """The conditioning policy: the study's where there is one, and never another than the approved one.

    Raises:
        BadInputError: an unknown policy, `private` without a study, or candidates for a policy that uses none.
        RefusedError: another policy than the study was approved with.
    """
    if request.policy is not None:
        check_policy_name(request.policy)
    if study is None:
        k = SMALLEST_BLEND if request.blend_k is None else request.blend_k
        settled = SettledPolicy(request.policy or BLEND, k)
        if settled.name == PRIVATE:
            raise BadInputError(
                "Private conditions need a study: it fixes the votes, the public candidates and the budget.",
                hint="Add --study STUDY.json, a study whose conditioning is private.",
                code="private-needs-study",
            )
    else:
        settled = SettledPolicy(study.conditioning.mode, study.conditioning.k)
        wanted_k = settled.k if request.blend_k is None else request.blend_k
        if SettledPolicy(request.policy or settled.name, wanted_k) != settled:
            raise RefusedError(
                f"The study was approved with the conditioning policy {settled.name} (k = {settled.k}).",
                hint="Leave out --policy and --blend-k, or approve a study with another policy.",
                code="policy-not-approved",
            )
    if settled.name != PRIVATE and request.candidates is not None:
        raise BadInputError(
            f"The policy {settled.name} asks nobody to vote, so it has no use for candidates.",
            hint="Leave out --candidates, or take a study whose conditioning is private.",
            code="candidates-not-used",
        )
    return settled
