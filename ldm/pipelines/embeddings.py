"""Add files of textual inversions to the text encoder of a model."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from ldm.errors import UserError
from ldm.io.checkpoint.embeddings import read_embeddings
from ldm.modules.embedding_manager import EmbeddingManager
from ldm.modules.encoders.text import TextEncoder

logger = logging.getLogger(__name__)


def add_embedding(model: Any, path: str | Path, token: str | None = None) -> list[str]:
    """Add the vectors in the file of a textual inversion; prompts that contain their token use them.

    Args:
        model: a model with a text encoder of Stable Diffusion.
        path: file in the form of diffusers, of the published program or of web interfaces.
        token: the token, instead of that in the file; the file must have one alone.

    Returns:
        The tokens.

    Raises:
        UserError: the file cannot be read or belongs to another model, or a token exists or is a word of the
            vocabulary; the model is unchanged.
    """
    encoder, source = getattr(model, "cond_stage_model", None), f'the embedding "{path}"'
    if not isinstance(encoder, TextEncoder):
        raise UserError(f"{source} needs a model with a text encoder of Stable Diffusion; leave it out")
    vectors = read_embeddings(path)
    if token is not None:
        if len(vectors) > 1:
            raise UserError(f'{source} has {len(vectors)} tokens; leave out the token "{token}"')
        vectors = {token: next(iter(vectors.values()))}
    manager = encoder.embedding_manager or EmbeddingManager(encoder)
    for each, value in vectors.items():
        manager.check(each, value, source)
    encoder.embedding_manager = manager
    for each, value in vectors.items():
        manager.add(each, value)
    counts = ", ".join(f'"{each}" ({len(value)} vectors)' for each, value in vectors.items())
    logger.info('added the embedding "%s": %s', path, counts)
    return list(vectors)
