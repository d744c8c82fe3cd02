"""Diffusion: the noise schedule, the training loss, guidance and the pipelines that draw tiles."""

from pixcell_core.diffusion.loss import drop_condition, training_loss
from pixcell_core.diffusion.pipeline import PixCellPipeline, default_scheduler
from pixcell_core.diffusion.schedule import NoiseSchedule, linear_schedule

__all__ = [
    "NoiseSchedule",
    "PixCellPipeline",
    "default_scheduler",
    "drop_condition",
    "linear_schedule",
    "training_loss",
]
