"""What a sampling run writes beside its images."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class SampledImage(BaseModel):
    """One line of the manifest; `seam_ratio` is measured where an image was drawn from several windows."""

    model_config = ConfigDict(extra="forbid")

    file: str
    seed: int
    condition: str
    seam_ratio: float | None = None


class SampleManifest(BaseModel):
    """Everything that is needed to draw the same images again."""

    model_config = ConfigDict(extra="forbid")

    width: int
    height: int
    sampler: str
    num_inference_steps: int
    guidance_scale: float
    eta: float
    seed: int
    conditions: str
    encoder: str | None
    init_image: str | None
    strength: float | None
    windows: int
    precision: str
    weights: dict[str, str]
    images: list[SampledImage]
