"""Reads and writes PixCell's weights in every published form: folders, original checkpoints, adapters."""

from pixcell_core.checkpoints.folders import load_pipeline, load_transformer_folder
from pixcell_core.checkpoints.lora import LoraAdapter
from pixcell_core.checkpoints.original import load_original, save_original

__all__ = ["LoraAdapter", "load_original", "load_pipeline", "load_transformer_folder", "save_original"]
