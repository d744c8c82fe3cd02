"""The study every site approves before it trains, and the approval a site signs.

A study fixes, in public and in advance, all that decides what runs and what it may cost: model and code digests,
adapter, rounds, sampling, noise, budget, quorum, deadlines. Nothing in it comes from anybody's data: divisors and
rates are settings, never counts. Its digest is its identity; one changed character is another study and needs new
approvals.
"""

from __future__ import annotations

import math
from datetime import UTC, datetime
from typing import Annotated, Literal, Self

from pydantic import Field, StringConstraints, model_validator

from pixcell_core.contracts.canonical import Digest, Document, Moment, parse_document
from pixcell_core.errors import RefusedError
from pixcell_core.trust.dsse import Envelope, sign_envelope, verify_envelope
from pixcell_core.trust.keys import SigningKey, VerifyKey

APPROVAL_PAYLOAD_TYPE = "application/vnd.pixcell.approval+json"

SiteName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9-]{0,39}$")]
"""A site's public name: lower-case letters, digits and hyphens, at most 40."""

StudyId = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9-]{0,59}$")]
"""A study's public name: lower-case letters, digits and hyphens, at most 60."""

ModuleName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_.]{0,119}$")]


ClassName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9 ._-]{0,59}$")]
"""Public name of a class of tiles."""


class ApprovalError(RefusedError):
    """A study may not run here: no approval, or one that does not cover it."""

    default_code = "not-approved"


class AdapterSettings(Document):
    """The trainable part. Both kinds draw A from `seed`; `ffa-lora` freezes it and trains B alone, `lora` trains both.

    With FFA the mean of the sites' updates is exact and half of the parameters carry noise; it is the default.
    """

    kind: Literal["ffa-lora", "lora"] = "ffa-lora"
    rank: Annotated[int, Field(ge=1, le=256)] = 4
    targets: Annotated[tuple[ModuleName, ...], Field(min_length=1, max_length=32)]
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0


class PatientVotes(Document):
    """Settings of private conditions: patients vote for public candidates, and only a noisy histogram is looked at.

    Each of `iterations` rounds of voting is one Gaussian mechanism over all patients (q = 1) whose noise has the
    standard deviation `noise_multiplier` (a patient's vote has L2 norm 1 at most); bins below `threshold` standard
    deviations of that noise are dropped. `labels` are the public names of the classes, none for unlabelled tiles.
    `candidates_digest` names the public embeddings, so that nothing private can stand among them.
    """

    noise_multiplier: Annotated[float, Field(gt=0, le=1e6)]
    iterations: Annotated[int, Field(ge=1, le=50)] = 2
    candidates: Annotated[int, Field(ge=2, le=100_000)] = 128
    threshold: Annotated[float, Field(ge=0, le=100)] = 2.0
    labels: Annotated[tuple[ClassName, ...], Field(max_length=64)] = ()
    candidates_digest: Digest

    @model_validator(mode="after")
    def _labels_differ(self) -> Self:
        if len(set(self.labels)) != len(self.labels):
            raise ValueError("a label stands twice among the labels")
        return self


class ConditioningPolicy(Document):
    """What may condition a surrogate of this study: `own`, `blend` of k patients, or `private` conditions by votes."""

    mode: Literal["own", "blend", "private"] = "blend"
    k: Annotated[int, Field(ge=1, le=64)] = 3
    votes: PatientVotes | None = None

    @model_validator(mode="after")
    def _settings_fit_the_mode(self) -> Self:
        if self.mode == "blend" and self.k < 3:
            raise ValueError("a blend needs the embeddings of at least 3 different patients")
        if (self.mode == "private") != (self.votes is not None):
            raise ValueError("the mode private, and no other, needs the settings of its votes")
        return self


class SiteKey(Document):
    """The identity of one site as its peers know it: the Ed25519 key that signs its approvals, in PEM."""

    site: SiteName
    approval_key: Annotated[
        str, StringConstraints(pattern=r"^-----BEGIN PUBLIC KEY-----\n[\n\r -~]*$", max_length=400)
    ]

    @property
    def key_id(self) -> str:
        """What `pixcell key show keys/approval.pub` prints at that site. Raises `KeyFileError` for a broken key."""
        return VerifyKey.from_pem(self.approval_key.encode("utf-8"), name=f"The key of {self.site}").key_id


class MaskingSettings(Document):
    """Secure aggregation: the hub learns the sum of at least `threshold` updates and no single one.

    `coordinate_bound` is the largest absolute value of a coordinate that is sent; sites clip to it, and the fixed-point
    grid follows from it. `identities` are the sites' signing keys: they stand in the study, so that a site's approval
    covers whom it masks with, and nobody between the sites can put other keys in their place.
    """

    threshold: Annotated[int, Field(ge=2, le=1000)]
    coordinate_bound: Annotated[float, Field(gt=0, le=1e6)]
    identities: Annotated[tuple[SiteKey, ...], Field(min_length=3, max_length=1000)]


class AggregationSettings(Document):
    """How replies become the next adapter. Every site weighs the same: weights by patients would tell their number.

    `rule` is the mean, or per coordinate the median, or the mean without the share `trim` at either end.
    `proximal_mu` (FedProx) pulls a site's steps towards the round's start. With `server_optimizer` "adam" (FedAdam) the
    mean update is a gradient of the server's optimiser with `server_learning_rate`; with "sgd" and 1.0 it is added.
    """

    rule: Literal["mean", "trimmed-mean", "median"] = "mean"
    trim: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    proximal_mu: Annotated[float, Field(ge=0, le=1e6)] = 0.0
    server_optimizer: Literal["sgd", "adam"] = "sgd"
    server_learning_rate: Annotated[float, Field(gt=0, le=1e6)] = 1.0
    masking: MaskingSettings | None = None

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        if (self.rule == "trimmed-mean") != (self.trim > 0):
            raise ValueError("the rule trimmed-mean, and no other, needs a share to trim")
        if self.masking is not None and self.rule != "mean":
            raise ValueError(
                "a sum that nobody can open has no median and nothing to trim: masking needs the mean"
            )
        return self


class Study(Document):
    """One federated study: public settings only.

    `sample_rate` is q, the chance of a patient to take part in a step; `steps_per_round` is T; `noise_multiplier` is
    sigma in units of `max_grad_norm` (C); `expected_patients` is the public divisor of the noisy sum, a setting and
    never a count of anybody's patients. `epsilon_cap` is per site, unit patient, at `delta`, for training and private
    conditions together; neighbouring cohorts differ in one patient. `ema_decay` averages the adapter over the steps of a
    round, after the noise (0 sends the last step's). `precision` is that of forward and backward on an accelerator;
    unit gradients, clipping and noise are always float32 and float64. `reply_grid_s`: a site's replies leave at whole
    multiples of so many seconds after the question, since the time a round takes grows with the number of patients.
    `app_digest` is that of the Flower bundle the hub announces; sites refuse any other. `straggler_rule`: a round waits
    to its deadline for everybody, or once the quorum answered only `straggler_grace_s` more.
    """

    schema_version: Literal["study/v1"] = "study/v1"
    id: StudyId
    title: Annotated[str, StringConstraints(max_length=200)] = ""
    created_at: Moment
    expires_at: Moment
    base_digest: Digest
    code_digest: Digest
    app_digest: Digest | None = None
    adapter: AdapterSettings
    aggregation: AggregationSettings = AggregationSettings()
    rounds: Annotated[int, Field(ge=1, le=10_000)]
    sample_rate: Annotated[float, Field(gt=0, le=1)] = 1.0
    steps_per_round: Annotated[int, Field(ge=1, le=100_000)]
    noise_multiplier: Annotated[float, Field(gt=0, le=1e6)]
    max_grad_norm: Annotated[float, Field(gt=0, le=1e6)]
    delta: Annotated[float, Field(gt=0, le=1e-5)]
    epsilon_cap: Annotated[float, Field(gt=0, le=1e6)]
    expected_patients: Annotated[int, Field(ge=1, le=10_000_000)]
    tiles_per_patient: Annotated[int, Field(ge=1, le=4096)]
    noise_draws: Annotated[int, Field(ge=1, le=1024)] = 1
    optimizer: Literal["sgd", "adam"] = "sgd"
    learning_rate: Annotated[float, Field(gt=0, le=1e6)]
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.0
    gradient_checkpointing: bool = False
    precision: Literal["float32", "bfloat16"] = "float32"
    tile_size: Annotated[int, Field(ge=32, le=4096)]
    mpp: Annotated[float, Field(gt=0, le=100)]
    unit: Literal["patient"] = "patient"
    adjacency: Literal["add-or-remove-one"] = "add-or-remove-one"
    conditioning: ConditioningPolicy = ConditioningPolicy()
    audit_policy_digest: Digest | None = None
    sites: Annotated[tuple[SiteName, ...], Field(min_length=1, max_length=1000)]
    quorum: Annotated[int, Field(ge=1, le=1000)]
    round_timeout_s: Annotated[float, Field(gt=0, le=604_800)] = 3600.0
    straggler_rule: Literal["deadline", "grace"] = "deadline"
    straggler_grace_s: Annotated[float, Field(gt=0, le=604_800)] = 60.0
    reply_grid_s: Annotated[float, Field(ge=0, le=86_400)] = 5.0
    max_update_norm: Annotated[float, Field(gt=0)] | None = None

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if len(set(self.sites)) != len(self.sites):
            raise ValueError("a site stands twice among the sites")
        if self.quorum > len(self.sites):
            raise ValueError(f"a quorum of {self.quorum} cannot be met by {len(self.sites)} sites")
        if self.reply_grid_s > self.round_timeout_s / 2:
            raise ValueError("replies leave at multiples of reply_grid_s, at most half of round_timeout_s")
        if self.expires_at <= self.created_at:
            raise ValueError("the study expires before it is created")
        masking = self.aggregation.masking
        if masking is not None:
            if sorted(key.site for key in masking.identities) != sorted(self.sites):
                raise ValueError("masking needs the key of every site of the study, and of no other")
            if len({key.approval_key for key in masking.identities}) != len(self.sites):
                raise ValueError("two sites carry the same key")
            if not len(self.sites) / 2 < masking.threshold <= self.quorum:
                raise ValueError(
                    "the masking threshold is more than half of the sites and at most the quorum"
                )
        return self

    def update_norm_bound(self, parameters: int) -> float:
        """The largest L2 norm an honest update of `parameters` coordinates is allowed; public settings alone.

        With SGD each of T steps moves by learning_rate x (clipped sum + noise) / divisor. The sum of m patients is at
        most m C; m = 4 x expected_patients is far above any cohort the divisor was chosen for, and the noise of d
        coordinates exceeds 2 sigma C sqrt(d) with a probability below 2^-d. With Adam (betas 0.9, 0.999) a coordinate
        moves by at most 3.2 x learning_rate a step. A study may state its own bound.
        """
        if self.max_update_norm is not None:
            return self.max_update_norm
        if self.optimizer == "adam":
            return 4.0 * self.steps_per_round * self.learning_rate * math.sqrt(parameters)
        noise = 2.0 * self.noise_multiplier * math.sqrt(max(parameters, 16)) / self.expected_patients
        return self.steps_per_round * self.learning_rate * self.max_grad_norm * (4.0 + noise)


class Approval(Document):
    """A site's decision about one study digest. Signed by the site; nobody else can make, widen or move it.

    `sequence` grows with every decision a site makes: of two decisions the one with the larger number counts, so that
    an approval from before a withdrawal cannot come back. `epsilon_cap` may be less than the study's, never more.
    """

    schema_version: Literal["approval/v1"] = "approval/v1"
    study_id: StudyId
    study_digest: Digest
    site: SiteName
    decision: Literal["approve", "deny", "revoke"]
    epsilon_cap: Annotated[float, Field(gt=0)]
    sequence: Annotated[int, Field(ge=0, lt=2**53)] = 0
    decided_at: Moment
    expires_at: Moment

    def sign(self, key: SigningKey) -> Envelope:
        """The envelope by which this decision travels."""
        return sign_envelope(APPROVAL_PAYLOAD_TYPE, self.to_bytes(), [key])


def check_approval(
    envelope: Envelope, key: VerifyKey, *, study: Study, site: str, now: datetime | None = None
) -> Approval:
    """The verified approval of exactly this study by exactly this site, valid at `now`.

    Raises `SignatureRefusedError` where the site did not sign it, `ApprovalError` where it does not cover the study.
    """
    moment = now or datetime.now(UTC)
    payload = verify_envelope(envelope, [key], payload_type=APPROVAL_PAYLOAD_TYPE)
    approval = parse_document(Approval, payload, name="approval")
    if approval.study_digest != study.digest or approval.study_id != study.id:
        raise ApprovalError(
            f"The approval of {approval.site} is for another study ({approval.study_digest[:19]}…).",
            hint="A changed study needs a new approval: the site runs `pixcell site approve` on the new file.",
            code="approval-of-another-study",
        )
    if approval.site != site or site not in study.sites:
        raise ApprovalError(
            f"The approval names {approval.site}, not {site}, or {site} is not a site of the study.",
            hint="Each site signs for itself, and only sites that the study names take part.",
            code="approval-of-another-site",
        )
    if approval.decision != "approve":
        raise ApprovalError(
            f"{site} answered '{approval.decision}' to study {study.id}.",
            hint="Talk to the site; only the site can change its answer.",
            code="approval-withdrawn" if approval.decision == "revoke" else "approval-denied",
        )
    if moment >= min(approval.expires_at, study.expires_at):
        raise ApprovalError(
            f"The approval of {site} or the study itself expired.",
            hint="Make a new study with a later end, or ask the site to approve again.",
            code="approval-expired",
        )
    if approval.expires_at > study.expires_at:
        raise ApprovalError(
            "The approval lasts longer than the study it is for.",
            hint="Approve again from the study file itself.",
            code="approval-too-wide",
        )
    if approval.epsilon_cap > study.epsilon_cap:
        raise ApprovalError(
            "The approval allows more epsilon (unit patient) than the study asks for.",
            hint="Approve again from the study file itself.",
            code="approval-too-wide",
        )
    return approval
