"""Files of textual inversions: the learned vectors of new words for a text encoder.

Four forms are common. That of diffusers maps each token to its vectors. Those of the published program and of web
interfaces have an entry `string_to_param`, and the latter also the name. Safetensors files may hold `emb_params`, whose
token is the name of the file.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.errors import UserError
from ldm.io.checkpoint.kinds import EMBEDDING, foreign_kind
from ldm.io.checkpoint.names import printable
from ldm.io.checkpoint.reading import read_checkpoint
from ldm.io.checkpoint.writing import save_safetensors

PARAMS, NAME, ALONE = "string_to_param", "name", "emb_params"
XL_PARTS = {"clip_l", "clip_g"}  # the two text encoders of Stable Diffusion XL
ADVICE = "give the file of a textual inversion"


def read_embeddings(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Return the vectors (N, D) in the file of a textual inversion, in float32, by their tokens.

    Raises:
        UserError: the file cannot be read, or is not one of a textual inversion.
    """
    checkpoint = read_checkpoint(path)
    content: Mapping[Any, Any] = checkpoint.get("state_dict", checkpoint)
    if content.keys() >= XL_PARTS:
        raise UserError(f'"{path}" is an embedding for Stable Diffusion XL, which this package does not implement')
    params = content.get(PARAMS)
    if isinstance(params, Mapping):
        vectors = _tensors(params)
        name = content.get(NAME)
        if isinstance(name, str) and name.strip() and len(vectors) == 1:  # its key is the same in all files
            vectors = {name: next(iter(vectors.values()))}
    elif isinstance(content.get(ALONE), Tensor):
        vectors = {Path(path).stem: content[ALONE]}
    else:
        vectors = _tensors(content)
    _check(path, vectors)
    found = {token: value.detach().float().reshape(-1, value.shape[-1]) for token, value in vectors.items()}
    for token, value in found.items():
        if not value.numel() or not value.isfinite().all():
            raise UserError(f'"{path}" is damaged: the vectors of "{printable(token)}" are empty or not finite')
    return found


def _tensors(content: Mapping[Any, Any]) -> dict[Any, Tensor]:
    return {token: value for token, value in content.items() if isinstance(value, Tensor)}


def _check(path: str | os.PathLike[str], vectors: Mapping[Any, Tensor]) -> None:
    shapes = {name: tuple(value.shape) for name, value in vectors.items() if isinstance(name, str)}
    kind = foreign_kind(shapes)
    if kind not in (None, EMBEDDING):
        raise UserError(f'"{path}" is {kind.what}, not an embedding; {ADVICE}')
    if not shapes or len(shapes) < len(vectors) or any(len(shape) not in (1, 2) for shape in shapes.values()):
        raise UserError(f'"{path}" is not an embedding: it holds no vectors by token; {ADVICE}')


def save_embedding(path: str | os.PathLike[str], token: str, vectors: Tensor, metadata: Mapping[str, Any]) -> None:
    """Write the vectors (N, D) of a token in the form of diffusers, which has one token a file.

    Args:
        path: the safetensors file.
        token: the token.
        vectors: its vectors.
        metadata: stored as strings in the header.
    """
    save_safetensors({token: vectors.detach().to(torch.float32)}, path, metadata)
