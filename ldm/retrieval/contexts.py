"""From prompts to what a retrieval-augmented model is told: CLIP, the search for neighbours, and the two joined.

Legend: D channels of CLIP's joint space, k neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from ldm.errors import UserError
from ldm.modules.encoders.clip import FrozenCLIPTextEmbedder
from ldm.retrieval.conditioning import retrieval_conditioning
from ldm.retrieval.searcher import open_searcher

# Prompts that are searched for together: one pass over the database serves them all.
QUERIES_AT_ONCE = 256


class Context(NamedTuple):
    """What the model is told of one prompt."""

    vectors: Tensor  # (1 + k, D) float32 of length 1, on the CPU: the prompt, then its neighbours
    neighbours: tuple[int, ...]  # which vectors of the database, the nearest first


class Contexts:
    """Makes the contexts of prompts.

    All of it runs on the CPU, and CLIP prompt by prompt: a prompt has the same context wherever, and beside whatever
    else, it is drawn. That costs a fraction of a second, which sampling dwarfs.

    Args:
        clip_type: which CLIP, see `FrozenCLIPTextEmbedder`.
        database: the name or folder of the database to search; None draws from the texts alone.
        knn: k, how many neighbours; fewer where the database is smaller.

    Raises:
        UserError: the database or the CLIP is missing or damaged, or transformers is not installed.
    """

    def __init__(self, clip_type: str, database: str | None = None, knn: int = 0) -> None:
        self.searcher = open_searcher(database) if database is not None else None  # first: it needs no CLIP to fail
        self.clip = FrozenCLIPTextEmbedder(version=clip_type)
        self.clip_type = clip_type
        self.knn = knn

    def check_width(self, width: int) -> None:
        """Whether a model that takes vectors of `width` numbers takes this CLIP's.

        Raises:
            UserError: it does not.
        """
        own = self.clip.model.config.projection_dim
        if own != width:
            raise UserError(
                f'the CLIP "{self.clip_type}" gives vectors of {own} numbers, and the model takes {width}; choose '
                "the --clip_type that it was trained with"
            )

    def of(self, prompts: Sequence[str]) -> list[Context]:
        """The context of each prompt.

        Raises:
            UserError: the database holds vectors of another CLIP, or such that are not finite.
        """
        found: list[Context] = []
        with tqdm(total=len(prompts), desc="prompts", unit="prompt", delay=1.0, leave=False) as bar:
            for first in range(0, len(prompts), QUERIES_AT_ONCE):
                some = prompts[first : first + QUERIES_AT_ONCE]
                found += self._of_some(some, bar)
        return found

    def _of_some(self, prompts: Sequence[str], bar: tqdm) -> list[Context]:
        queries = []
        for prompt in prompts:
            queries.append(self.clip(prompt))
            bar.update()
        query = torch.cat(queries)
        if self.searcher is None:
            return [Context(vectors, ()) for vectors in retrieval_conditioning(query)]
        indices, _, embeddings = self.searcher.search(query, self.knn)
        context = retrieval_conditioning(query, embeddings)
        return [Context(*each) for each in zip(context, map(tuple, indices.tolist()), strict=True)]
