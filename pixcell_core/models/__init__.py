"""The models: transformer, autoencoder, tile encoders. No training, no files of any hospital."""

from pixcell_core.models.autoencoder import TileAutoencoder
from pixcell_core.models.efficientnet_lite import EfficientNetLite
from pixcell_core.models.tile_encoder import TileEncoder, TileEncoderProtocol
from pixcell_core.models.transformer import PixCellTransformer2DModel

__all__ = [
    "EfficientNetLite",
    "PixCellTransformer2DModel",
    "TileAutoencoder",
    "TileEncoder",
    "TileEncoderProtocol",
]
