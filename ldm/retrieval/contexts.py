"""Encode prompts to the contexts of a retrieval-augmented model, with CLIP and nearest-neighbour search.

Shapes: k neighbours, D channels of CLIP's joint space.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from ldm.errors import UserError
from ldm.modules.encoders.clip import FrozenCLIPTextEmbedder
from ldm.modules.encoders.truncation import warn_truncations
from ldm.retrieval.conditioning import retrieval_conditioning
from ldm.retrieval.searcher import open_searcher

# Number of prompts that share one pass over the database.
QUERY_BATCH = 256


class Context(NamedTuple):
    """Context of one prompt.

    Attributes:
        vectors: (1 + k, D) float32 unit vectors on the CPU: the prompt, then its neighbours.
        neighbours: indices of the neighbours in the database, the nearest first.
    """

    vectors: Tensor
    neighbours: tuple[int, ...]


class ContextEncoder:
    """Encoder of prompts to contexts.

    It runs on the CPU, and encodes one prompt at a time with CLIP. The context of a prompt is therefore the same on
    every device and in every batch. This takes a fraction of a second, much less than sampling.

    Args:
        clip_type: name of the CLIP model, see `FrozenCLIPTextEmbedder`.
        database: name or folder of the database to search; None for contexts of the prompts alone.
        knn: k, the number of neighbours; a smaller database returns fewer.

    Raises:
        UserError: the database or the CLIP model is missing or damaged, or transformers is not installed.
    """

    def __init__(self, clip_type: str, database: str | None = None, knn: int = 0) -> None:
        self.searcher = open_searcher(database) if database is not None else None  # first, to fail before CLIP loads
        self.clip = FrozenCLIPTextEmbedder(version=clip_type)
        self.clip_type = clip_type
        self.knn = knn

    def check_width(self, width: int) -> None:
        """Check that the embeddings have the width D that a model needs.

        Raises:
            UserError: they have another width.
        """
        own = self.clip.model.config.projection_dim
        if own != width:
            raise UserError(
                f'the CLIP "{self.clip_type}" has embeddings of width {own}, and the model needs {width}; choose the '
                "--clip_type that the model was trained with"
            )

    def encode(self, prompts: Sequence[str]) -> list[Context]:
        """Return the context of each prompt, and log the ends of prompts that CLIP does not read.

        Raises:
            UserError: the database comes from another CLIP, or its vectors are not finite.
        """
        warn_truncations(self.clip, prompts)
        contexts: list[Context] = []
        with tqdm(total=len(prompts), desc="prompts", unit="prompt", delay=1.0, leave=False) as bar:
            for first in range(0, len(prompts), QUERY_BATCH):
                contexts += self._encode_batch(prompts[first : first + QUERY_BATCH], bar)
        return contexts

    def _encode_batch(self, prompts: Sequence[str], bar: tqdm) -> list[Context]:
        embeddings = []
        for prompt in prompts:
            embeddings.append(self.clip(prompt))
            bar.update()
        queries = torch.cat(embeddings)
        if self.searcher is None:
            return [Context(vectors, ()) for vectors in retrieval_conditioning(queries)]
        found = self.searcher.search(queries, self.knn)
        vectors = retrieval_conditioning(queries, found.embeddings)
        return [Context(*pair) for pair in zip(vectors, map(tuple, found.indices.tolist()), strict=True)]
