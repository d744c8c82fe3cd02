"""Refuses embeddings that a model cannot read: another width, another number of tokens, NaN."""

from __future__ import annotations

import torch

from pixcell_core.errors import BadInputError


def check_embeddings(
    embeddings: torch.Tensor, *, embedding_dim: int, tokens: int, source: str = "the encoder"
) -> torch.Tensor:
    """Return `embeddings` (B, n, d) unchanged where they are what a model expects.

    Args:
        embeddings: condition tokens (B, n, d), floating point.
        embedding_dim: expected d (a transformer's caption_channels).
        tokens: expected n (a transformer's caption_num_tokens).
        source: who made them, for the message.

    Raises:
        BadInputError: another shape or type, or values that are NaN or infinite; says what was met and expected.
    """
    if embeddings.ndim != 3 or not embeddings.is_floating_point():
        raise BadInputError(
            f"Embeddings of {source} are {embeddings.dtype} {list(embeddings.shape)}, "
            f"expected floating point [B, {tokens}, {embedding_dim}].",
            hint="Make them with `pixcell model embed`.",
            code="embedding-shape",
        )
    if embeddings.shape[2] != embedding_dim:
        raise BadInputError(
            f"Embeddings of {source} are {embeddings.shape[2]} wide, expected {embedding_dim}.",
            hint="They come from another encoder than the model was trained with; embed the images again with its own.",
            code="embedding-width",
        )
    if embeddings.shape[1] != tokens:
        raise BadInputError(
            f"Embeddings of {source} have {embeddings.shape[1]} tokens per image, expected {tokens}.",
            hint="256, 512 and 1024 px images have 1, 4 and 16 tokens; take the model of the same size.",
            code="embedding-tokens",
        )
    broken = ~torch.isfinite(embeddings).flatten(1).all(dim=1)
    if bool(broken.any()):
        rows = broken.nonzero().flatten().tolist()
        raise BadInputError(
            f"{len(rows)} of {len(embeddings)} embeddings of {source} are NaN or infinite (first: number {rows[0]}).",
            hint="Expected finite numbers: embed again in float32, and look at that image.",
            code="embedding-not-finite",
        )
    return embeddings
