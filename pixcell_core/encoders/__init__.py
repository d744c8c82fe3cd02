"""Tile encoders and latent autoencoders, shipped or brought by a person: found by name, called in one way."""

from pixcell_core.encoders.embedding_check import check_embeddings
from pixcell_core.encoders.latent_autoencoder import LatentAutoencoder
from pixcell_core.encoders.protocols import ImageEncoder, LatentCodec
from pixcell_core.encoders.registry import (
    AUTOENCODERS,
    TILE_ENCODERS,
    RegistryEntry,
    load_latent_autoencoder,
    load_tile_encoder,
    register_encoder,
)
from pixcell_core.encoders.tiled_encoder import TiledEncoder

__all__ = [
    "AUTOENCODERS",
    "TILE_ENCODERS",
    "ImageEncoder",
    "LatentAutoencoder",
    "LatentCodec",
    "RegistryEntry",
    "TiledEncoder",
    "check_embeddings",
    "load_latent_autoencoder",
    "load_tile_encoder",
    "register_encoder",
]
