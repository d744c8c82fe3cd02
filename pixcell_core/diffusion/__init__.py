"""Diffusion: the noise schedule, the training loss, guidance and the pipelines that draw tiles."""

from pixcell_core.diffusion.decoding import DecodeTiling, decode_latents
from pixcell_core.diffusion.loss import drop_condition, training_loss
from pixcell_core.diffusion.pipeline import PixCellPipeline, default_scheduler
from pixcell_core.diffusion.samplers import SAMPLERS, sampler_named
from pixcell_core.diffusion.schedule import NoiseSchedule, linear_schedule
from pixcell_core.diffusion.seam import seam_ratio
from pixcell_core.diffusion.windows import Windowing, WindowPlan

__all__ = [
    "SAMPLERS",
    "DecodeTiling",
    "NoiseSchedule",
    "PixCellPipeline",
    "WindowPlan",
    "Windowing",
    "decode_latents",
    "default_scheduler",
    "drop_condition",
    "linear_schedule",
    "sampler_named",
    "seam_ratio",
    "training_loss",
]
