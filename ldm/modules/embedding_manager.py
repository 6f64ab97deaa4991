"""Learned vectors of new words for a text encoder (textual inversion, arXiv:2208.01618).

A prompt that contains the word, its token here, uses the vectors in its place. Token ids of learned vectors are
negative: -1 is the first vector of all tokens.

Shapes: N vectors of a token, B batch, L tokens, D channels.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.errors import UserError
from ldm.io.checkpoint.embeddings import read_embeddings
from ldm.io.checkpoint.names import printable
from ldm.io.checkpoint.writing import save_atomically
from ldm.modules.encoders.truncation import MARKS, Truncation


@dataclass(frozen=True)
class Encoded:
    """Token ids of a prompt without those that mark its start and its end, and the part of the prompt of each."""

    ids: list[int]
    positions: list[tuple[int, int]]


class EmbeddingManager(nn.Module):
    """Learned vectors of a text encoder by their tokens, under the published name of the class.

    Args:
        embedder: a text encoder with a tokenizer and `token_embedding`; its lookup also finds the vectors.
        placeholder_strings: the tokens, such as "<cat-toy>". A token may contain spaces and any characters. Upper and
            lower case are the same, as in CLIP.
        initializer_words: a word for each token, whose embedding is the initial value of all its vectors. Tokens
            without a word start at random values with the deviation of the vocabulary.
        num_vectors_per_token: N.
        per_image_tokens, progressive_words, initializer_per_img: accepted for published configurations that do not use
            them.

    Raises:
        UserError: a token is empty, occurs twice or is a word of the vocabulary, N is below 1, or an option is set that
            is not implemented.
    """

    embedder: Any  # a `TextEncoder`, whose module imports this one

    def __init__(
        self,
        embedder: Any,
        placeholder_strings: Sequence[str] = (),
        initializer_words: Sequence[str] = (),
        per_image_tokens: bool = False,
        num_vectors_per_token: int = 1,
        progressive_words: bool = False,
        initializer_per_img: Any = None,
    ) -> None:
        super().__init__()
        if per_image_tokens or progressive_words or initializer_per_img:
            raise UserError(
                "EmbeddingManager: per_image_tokens, progressive_words and initializer_per_img are not implemented; "
                "leave them out"
            )
        if not isinstance(num_vectors_per_token, int) or num_vectors_per_token < 1:
            raise UserError(
                f"EmbeddingManager: num_vectors_per_token must be an integer of at least 1, not {num_vectors_per_token}"
            )
        placeholders = [placeholder_strings] if isinstance(placeholder_strings, str) else list(placeholder_strings)
        words = [initializer_words] if isinstance(initializer_words, str) else list(initializer_words or ())
        if len(words) > len(placeholders):
            raise UserError(
                f"EmbeddingManager: {len(words)} initializer_words for {len(placeholders)} placeholder_strings; give "
                "one word for each token"
            )
        self.initializer_words = words
        self.tokens: list[str] = []
        self.vectors = nn.ParameterList()
        layer = embedder.token_embedding
        # A tokenizer belongs to its encoder, which contains this module.
        object.__setattr__(self, "embedder", embedder)
        self._pattern: re.Pattern[str] | None = None
        self._order: list[int] = []
        for token in placeholders:
            self.add(token, torch.zeros(num_vectors_per_token, layer.embedding_dim))
        for vectors in self.vectors:
            vectors.requires_grad_(True)
        layer.forward = _Lookup(layer, self)

    # -- tokens and their vectors ----------------------------------------------------------------------------

    def add(self, token: str, vectors: Tensor, source: str = "EmbeddingManager") -> None:
        """Add the vectors (N, D) of a token, without gradients.

        Args:
            token: the token.
            vectors: its vectors.
            source: origin of the vectors, for messages.

        Raises:
            UserError: the token is empty or exists, or the vectors have another number of channels.
        """
        self._check_vectors(token, vectors, source)
        weight = self.embedder.token_embedding.weight
        self.tokens.append(token.strip())
        vectors = vectors.detach().to(weight.device, weight.dtype, copy=True)
        self.vectors.append(nn.Parameter(vectors, requires_grad=False))
        # The longest token comes first. The group of a match is the position of its token in this order.
        self._order = sorted(range(len(self.tokens)), key=lambda index: len(self.tokens[index]), reverse=True)
        words = (f"({_word(self.tokens[index])})" for index in self._order)
        self._pattern = re.compile("|".join(words), re.IGNORECASE)

    def check(self, token: str, vectors: Tensor, source: str) -> None:
        """Raise an error if the vectors of a token cannot be added, or if the token is a word of the vocabulary.

        Raises:
            UserError: as `add` and `check_token`.
        """
        self._check_vectors(token, vectors, source)
        self.check_token(token, source)

    def _check_vectors(self, token: str, vectors: Tensor, source: str) -> None:
        weight = self.embedder.token_embedding.weight
        if not token.strip():
            raise UserError(f"{source}: a token is empty; give a word such as <cat-toy>")
        if token.strip().lower() in map(str.lower, self.tokens):
            raise UserError(f'{source}: the token "{printable(token)}" exists already; give each embedding its own')
        if vectors.dim() != 2 or not len(vectors) or vectors.shape[1] != weight.shape[1]:
            raise UserError(
                f"{source} belongs to another model: its vectors have the shape {tuple(vectors.shape)}, here (N, "
                f"{weight.shape[1]}); give an embedding that was trained for this kind of model"
            )

    @torch.no_grad()
    def initialise(self) -> None:
        """Set vectors that are zero, the value of new ones, to the embeddings of their initializer words.

        Raises:
            UserError: a token is a word of the vocabulary, or an initializer word is not.
        """
        weight = self.embedder.token_embedding.weight
        for index, (token, vectors) in enumerate(zip(self.tokens, self.vectors, strict=True)):
            self.check_token(token, "EmbeddingManager")
            if vectors.any():
                continue
            if index >= len(self.initializer_words):
                vectors.copy_(weight.mean(dim=0) + weight.std() * torch.randn_like(vectors))
                continue
            word = self.initializer_words[index]
            ids = self._ids(word)
            if len(ids) != 1 or ids[0] == self.embedder.tokenizer.unk_token_id:
                raise UserError(
                    f'EmbeddingManager: the initializer word "{printable(word)}" is {len(ids)} tokens of the '
                    "vocabulary; give a word of one token, such as toy"
                )
            vectors.copy_(weight[ids[0]].expand_as(vectors))

    def check_token(self, token: str, source: str) -> None:
        """Raise an error if a token is a word of the vocabulary; all prompts with that word would change.

        Punctuation is accepted, because the published configurations use the token "*".

        Raises:
            UserError: it is.
        """
        ids = self._ids(token)
        known = len(ids) == 1 and ids[0] != self.embedder.tokenizer.unk_token_id
        if known and any(letter.isalnum() for letter in token):
            raise UserError(
                f'{source}: the token "{printable(token)}" is a word of the vocabulary; choose another one, such as '
                f"<{printable(token)}>"
            )

    def embedding_parameters(self) -> Iterator[nn.Parameter]:
        """Return the vectors of all tokens, which training changes."""
        return iter(self.vectors)

    @property
    def string_to_param_dict(self) -> dict[str, nn.Parameter]:
        """Vectors (N, D) by token."""
        return dict(zip(self.tokens, self.vectors, strict=True))

    def table(self) -> Tensor:
        """Return the vectors of all tokens, (sum of N, D)."""
        return torch.cat(list(self.vectors))

    # -- prompts ---------------------------------------------------------------------------------------------

    def mentions(self, text: str) -> bool:
        """Return whether a prompt contains a token."""
        return self._pattern is not None and self._pattern.search(text) is not None

    def encode(self, text: str) -> Encoded:
        """Return the ids of a prompt; learned vectors have negative ids."""
        learned, count = [], 0
        for vectors in self.vectors:
            learned.append(range(-count - 1, -count - 1 - len(vectors), -1))
            count += len(vectors)
        ids: list[int] = []
        positions: list[tuple[int, int]] = []
        start = 0
        for match in self._pattern.finditer(text) if self._pattern is not None else ():
            self._append(text, start, match.start(), ids, positions)
            own = learned[self._order[(match.lastindex or 1) - 1]]
            ids += own
            positions += [match.span()] * len(own)
            start = match.end()
        self._append(text, start, len(text), ids, positions)
        return Encoded(ids, positions)

    def _append(self, text: str, start: int, end: int, ids: list[int], positions: list[tuple[int, int]]) -> None:
        """Append the ids and positions of a part of a prompt without learned tokens."""
        tokenizer, part = self.embedder.tokenizer, text[start:end]
        if not part.strip():
            return
        found = tokenizer(part, add_special_tokens=False, return_offsets_mapping=tokenizer.is_fast, verbose=False)
        ids += found["input_ids"]
        # Tokenizers of transformers 4 may lack positions; the whole part stands for each of its tokens.
        offsets = found.get("offset_mapping") or [(0, len(part))] * len(found["input_ids"])
        positions += [(start + first, start + last) for first, last in offsets]

    def padded(self, text: str, length: int, pad_with_zero: bool) -> list[int]:
        """Return the ids of a prompt with start and end, truncated and padded to `length`."""
        tokenizer = self.embedder.tokenizer
        ids = [tokenizer.bos_token_id, *self.encode(text).ids[: length - MARKS], tokenizer.eos_token_id]
        return ids + [0 if pad_with_zero else tokenizer.pad_token_id] * (length - len(ids))

    def truncation(self, text: str, length: int) -> Truncation | None:
        """Return the part of a prompt that does not fit into `length` tokens; None if it fits."""
        return Truncation.of(text, self.encode(text).positions, length)

    def _ids(self, text: str) -> list[int]:
        return self.embedder.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    # -- files -----------------------------------------------------------------------------------------------

    def save(self, ckpt_path: str | Path) -> None:
        """Write the vectors as a file in the published form, `embeddings_gs-*.pt`."""
        vectors = {token: value.detach().cpu() for token, value in self.string_to_param_dict.items()}
        save_atomically({"string_to_token": dict.fromkeys(vectors, 0), "string_to_param": vectors}, ckpt_path)

    @torch.no_grad()
    def load(self, ckpt_path: str | Path) -> None:
        """Replace the vectors of tokens by those in a file of any common form; other tokens of the file are added.

        Raises:
            UserError: the file cannot be read, or belongs to another model.
        """
        own = {token.lower(): index for index, token in enumerate(self.tokens)}
        for token, vectors in read_embeddings(ckpt_path).items():
            index = own.get(token.lower())
            if index is None:
                self.add(token, vectors, f'the embedding "{ckpt_path}"')
                self.vectors[-1].requires_grad_(any(each.requires_grad for each in self.vectors))
            elif vectors.shape == self.vectors[index].shape:
                self.vectors[index].copy_(vectors)
            else:
                raise UserError(
                    f'the embedding "{ckpt_path}" has vectors of the shape {tuple(vectors.shape)}, the model '
                    f"{tuple(self.vectors[index].shape)}; change num_vectors_per_token, or give another file"
                )


def _word(token: str) -> str:
    """Return the pattern of a token, which is not part of a longer word."""
    start = r"(?<!\w)" if re.match(r"\w", token) else ""
    end = r"(?!\w)" if re.search(r"\w$", token) else ""
    return f"{start}{re.escape(token)}{end}"


class _Lookup:
    """Replacement of the `forward` of an embedding layer that also finds learned vectors, by negative ids."""

    def __init__(self, layer: nn.Embedding, manager: EmbeddingManager) -> None:
        self.layer, self.manager = layer, manager

    def __call__(self, ids: Tensor) -> Tensor:
        """Map ids (B, L) to embeddings (B, L, D)."""
        found = F.embedding(ids.clamp(min=0), self.layer.weight)
        if not len(self.manager.vectors):
            return found
        learned = F.embedding((-ids - 1).clamp(min=0), self.manager.table()).to(found.dtype)
        return torch.where((ids < 0)[..., None], learned, found)
