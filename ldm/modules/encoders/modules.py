"""Conditioning encoders for captions, classes and maps.

Shapes: B batch, L tokens.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import interpolate

from ldm.config.assets import search_path
from ldm.errors import UserError
from ldm.io.text import read_lines
from ldm.modules.encoders.clip import FrozenClipImageEmbedder, FrozenCLIPTextEmbedder
from ldm.modules.encoders.device import DeviceOfWeights
from ldm.modules.encoders.text import FrozenCLIPEmbedder, FrozenOpenCLIPEmbedder
from ldm.modules.encoders.truncation import Truncation
from ldm.modules.x_transformer import Encoder, TransformerWrapper

__all__ = [
    "AbstractEncoder",
    "BERTEmbedder",
    "BERTTokenizer",
    "ClassEmbedder",
    "FrozenCLIPEmbedder",
    "FrozenCLIPTextEmbedder",
    "FrozenClipImageEmbedder",
    "FrozenOpenCLIPEmbedder",
    "IdentityEncoder",
    "SpatialRescaler",
    "TransformerEmbedder",
    "find_vocabulary",
]

logger = logging.getLogger(__name__)
TOKENIZER_FILE = "tokenizer.json"  # of transformers, which writes it instead of vocab.txt since version 5


class AbstractEncoder(nn.Module):
    """Base class of conditioning encoders, whose method `encode` maps a batch of raw conditions to tensors."""

    def encode(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"{type(self).__name__} does not implement encode")


class IdentityEncoder(AbstractEncoder):
    """Conditioning encoder that returns its input unchanged."""

    def encode(self, x: Any) -> Any:
        return x


class ClassEmbedder(nn.Module):
    """Learned embedding of class labels.

    Args:
        embed_dim: channels of the embeddings.
        n_classes: number of classes, including the "no class" for guidance.
        key: entry of the batch with the labels.
    """

    def __init__(self, embed_dim: int, n_classes: int = 1000, key: str = "class") -> None:
        super().__init__()
        self.key = key
        self.n_classes = n_classes
        self.embedding = nn.Embedding(n_classes, embed_dim)

    def forward(self, batch: Mapping[str, Tensor], key: str | None = None) -> Tensor:
        """Map the labels `batch[key]` (B,) to a context of one token (B, 1, embed_dim)."""
        labels = batch[self.key if key is None else key]
        return self.embedding(rearrange(labels, "b -> b 1"))


class TransformerEmbedder(AbstractEncoder):
    """Transformer over token ids.

    Args:
        n_embed: channels of the output.
        n_layer: number of pairs of attention and perceptron.
        vocab_size: size of the vocabulary.
        max_seq_len: maximum number of tokens.
        device: not used, part of published configurations; token ids are moved to the device of the weights.
    """

    device = DeviceOfWeights()

    def __init__(
        self,
        n_embed: int,
        n_layer: int,
        vocab_size: int,
        max_seq_len: int = 77,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        layers = Encoder(dim=n_embed, depth=n_layer)
        self.transformer = TransformerWrapper(num_tokens=vocab_size, max_seq_len=max_seq_len, attn_layers=layers)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map token ids (B, L) to (B, L, n_embed)."""
        return self.transformer(tokens.to(self.transformer.token_emb.weight.device), return_embeddings=True)

    def encode(self, x: Tensor) -> Tensor:
        return self(x)


class BERTTokenizer(AbstractEncoder):
    """WordPiece tokenizer for lower-case captions: `[CLS] ... [SEP]`, truncated or padded to a fixed length.

    The token ids equal those of `transformers.BertTokenizerFast`. The package tokenizers imports much faster.

    Args:
        device: device of the token ids.
        vq_interface: return the token ids from `encode` in the format of a first-stage model, as published.
        max_length: number of tokens of every caption.
        version: a `vocab.txt` or a folder that contains one, searched in the current folder and then in the
            repository; or a name on the Hugging Face hub, downloaded on first use.
        max_tokens: size of the model's token embedding.

    Raises:
        UserError: the vocabulary does not exist, cannot be downloaded, or has more than `max_tokens` tokens.
    """

    def __init__(
        self,
        device: torch.device | str | None = None,
        vq_interface: bool = True,
        max_length: int = 77,
        version: str = "bert-base-uncased",
        max_tokens: int | None = None,
    ) -> None:
        super().__init__()
        self.device = device
        self.vq_interface = vq_interface
        self.max_length = max_length
        self.version = version
        self.max_tokens = max_tokens
        path = find_vocabulary(version)
        self._tokenizer = None if path is None else self._load_tokenizer(path)

    @property
    def tokenizer(self) -> Any:
        """Tokenizer object of the package tokenizers."""
        if self._tokenizer is None:
            self._tokenizer = self._load_tokenizer(_download_vocabulary(self.version))
        return self._tokenizer

    def _load_tokenizer(self, path: Path) -> Any:
        tokenizer = _read_vocabulary(path)
        size = tokenizer.get_vocab_size()
        if self.max_tokens is not None and size > self.max_tokens:
            raise UserError(f"vocabulary {self.version} has {size} tokens; raise vocab_size from {self.max_tokens}")
        tokenizer.enable_truncation(self.max_length)
        tokenizer.enable_padding(pad_id=tokenizer.token_to_id("[PAD]"), length=self.max_length)
        return tokenizer

    @torch.no_grad()
    def forward(self, text: str | Sequence[str]) -> Tensor:
        """Map captions to token ids (B, max_length) int64."""
        captions = [text] if isinstance(text, str) else list(text)
        ids = [encoding.ids for encoding in self.tokenizer.encode_batch(captions)]
        return torch.tensor(ids, dtype=torch.int64, device=self.device)

    @torch.no_grad()
    def encode(self, text: str | Sequence[str]) -> Any:
        """Return the token ids, or `(None, None, [None, None, ids])` with `vq_interface`."""
        ids = self(text)
        return (None, None, [None, None, ids]) if self.vq_interface else ids

    def decode(self, text: Any) -> Any:
        """Return `text` unchanged."""
        return text

    def truncation(self, text: str) -> Truncation | None:
        """Return the part of `text` that does not fit into `max_length` tokens; None if it fits."""
        encoding = self.tokenizer.encode(text)
        positions = [
            position
            for part in (encoding, *encoding.overflowing)
            for position, is_mark in zip(part.offsets, part.special_tokens_mask, strict=True)
            if not is_mark
        ]
        return Truncation.of(text, positions, self.max_length)

    def words(self, text: str) -> list[str]:
        """Return the lower-case words and punctuation marks of `text`, each of which is one token or several."""
        normalized = self.tokenizer.normalizer.normalize_str(text)
        return [word for word, _ in self.tokenizer.pre_tokenizer.pre_tokenize_str(normalized)]

    def unknown_words(self, text: str) -> list[str]:
        """Return the distinct lower-case words of `text` that are not tokens of the vocabulary."""
        return [word for word in dict.fromkeys(self.words(text)) if self.tokenizer.token_to_id(word) is None]


def find_vocabulary(name: str) -> Path | None:
    """Return the local vocabulary file `name`, or None for a name on the hub.

    Raises:
        UserError: `name` has the form of a path and the file does not exist.
    """
    for folder in search_path():
        path = folder / Path(name).expanduser()
        if path.is_dir():
            names = ("vocab.txt", TOKENIZER_FILE)
            path = next((path / name for name in names if (path / name).is_file()), path / names[0])
        if path.is_file():
            return path
    # The hub's names are "model" or "owner/model".
    if name.endswith(".txt") or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"vocabulary {name} does not exist; give a vocab.txt, a folder with one, or a hub name")
    return None


def _read_vocabulary(path: Path) -> Any:
    from tokenizers import BertWordPieceTokenizer

    ids = _token_ids(path)
    missing = [token for token in ("[PAD]", "[UNK]", "[CLS]", "[SEP]") if token not in ids]
    if missing:
        raise UserError(f"vocabulary {path} lacks {', '.join(missing)}; give a WordPiece vocab.txt, one token per line")
    return BertWordPieceTokenizer(ids, lowercase=True)


def _token_ids(path: Path) -> dict[str, int]:
    """Return the tokens of a vocab.txt, or of the JSON file of a WordPiece tokenizer, with their ids."""
    if path.name != TOKENIZER_FILE:
        return {token: index for index, token in enumerate(read_lines(path, "vocabulary"))}
    try:
        vocabulary = json.loads(path.read_text(encoding="utf-8"))["model"]["vocab"]
        return {str(token): int(index) for token, index in vocabulary.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"vocabulary {path} is damaged ({type(error).__name__}); give a WordPiece vocab.txt") from None


def _download_vocabulary(name: str) -> Path:
    """Return the vocabulary file of a model on the Hugging Face hub, from the local cache if possible.

    The file is downloaded directly because transformers' tokenizers are empty instead of an error without a network.
    """
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(name, "vocab.txt", local_files_only=True))
    except (OSError, ValueError):
        logger.info("downloading the vocabulary of %s from the Hugging Face hub", name)
    try:
        return Path(hf_hub_download(name, "vocab.txt"))
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f'cannot download the vocabulary "{name}" from the Hugging Face hub ({reason}); '
            "go online once, or set vocab to a local vocab.txt"
        ) from None


class BERTEmbedder(AbstractEncoder):
    """Transformer over WordPiece tokens that maps captions or token ids to a context, trained with the model.

    Args:
        n_embed: channels of the context.
        n_layer: number of pairs of attention and perceptron.
        vocab_size: size of the token embedding, at least the size of the vocabulary.
        max_seq_len: number of tokens of a context.
        device: not used, part of published configurations; token ids are moved to the device of the weights.
        use_tokenizer: accept captions instead of token ids.
        embedding_dropout: dropout after the embeddings.
        vocab: vocabulary, see `version` of `BERTTokenizer`.

    Raises:
        UserError: the vocabulary does not exist or has more than `vocab_size` tokens.
    """

    device = DeviceOfWeights()

    def __init__(
        self,
        n_embed: int,
        n_layer: int,
        vocab_size: int = 30522,
        max_seq_len: int = 77,
        device: torch.device | str | None = None,
        use_tokenizer: bool = True,
        embedding_dropout: float = 0.0,
        vocab: str = "bert-base-uncased",
    ) -> None:
        super().__init__()
        self.use_tknz_fn = use_tokenizer
        if use_tokenizer:
            self.tknz_fn = BERTTokenizer(
                vq_interface=False, max_length=max_seq_len, version=vocab, max_tokens=vocab_size
            )
        self.transformer = TransformerWrapper(
            num_tokens=vocab_size,
            max_seq_len=max_seq_len,
            attn_layers=Encoder(dim=n_embed, depth=n_layer),
            emb_dropout=embedding_dropout,
        )

    def forward(self, text: str | Sequence[str] | Tensor) -> Tensor:
        """Map B captions or token ids (B, L) to (B, L, n_embed), with L = max_seq_len for captions."""
        tokens = self.tknz_fn(text) if self.use_tknz_fn else cast(Tensor, text)
        return self.transformer(tokens.to(self.transformer.token_emb.weight.device), return_embeddings=True)

    def encode(self, text: str | Sequence[str] | Tensor) -> Tensor:
        return self(text)

    def truncation(self, text: str) -> Truncation | None:
        """Return the part of a caption that does not fit into `max_seq_len` tokens; None if it fits."""
        return self.tknz_fn.truncation(text) if self.use_tknz_fn else None


class SpatialRescaler(nn.Module):
    """Rescaling of a map, `n_stages` times by `multiplier`, with an optional 1 x 1 convolution to `out_channels`.

    Args:
        method: interpolation mode of `torch.nn.functional.interpolate`, e.g. "bilinear", "nearest" or "area".

    Raises:
        UserError: `method` is unknown.
    """

    METHODS = ("nearest", "linear", "bilinear", "trilinear", "bicubic", "area")

    def __init__(
        self,
        n_stages: int = 1,
        method: str = "bilinear",
        multiplier: float = 0.5,
        in_channels: int = 3,
        out_channels: int | None = None,
        bias: bool = False,
    ) -> None:
        super().__init__()
        if method not in self.METHODS:
            raise UserError(f'SpatialRescaler: method "{method}" is unknown; choose one of {", ".join(self.METHODS)}')
        self.n_stages = n_stages
        self.method = method
        self.multiplier = multiplier
        self.interpolator = partial(interpolate, mode=method)
        self.remap_output = bool(out_channels)
        self.channel_mapper = nn.Conv2d(in_channels, out_channels, 1, bias=bias) if out_channels else None

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, in_channels, H, W) to (B, out_channels or in_channels, H', W')."""
        for _ in range(self.n_stages):
            x = self.interpolator(x, scale_factor=self.multiplier)
        return x if self.channel_mapper is None else self.channel_mapper(x)

    def encode(self, x: Tensor) -> Tensor:
        return self(x)
