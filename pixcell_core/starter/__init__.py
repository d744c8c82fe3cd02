"""The small open model that ships: autoencoder, tile encoder, transformer, their cards, and the recipe."""

from pixcell_core.starter.weights import (
    STARTER,
    load_autoencoder,
    load_encoder,
    load_second_eye,
    load_transformer,
    starter_digest,
)

__all__ = [
    "STARTER",
    "load_autoencoder",
    "load_encoder",
    "load_second_eye",
    "load_transformer",
    "starter_digest",
]
