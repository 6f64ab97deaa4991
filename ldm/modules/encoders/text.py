"""Text encoders of Stable Diffusion: one feature for each token, from CLIP (v1) or OpenCLIP (v2).

Their weights belong to the checkpoint of the diffusion model. Without a checkpoint they are downloaded on first use.

Shapes: B batch, L tokens, D channels.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ldm.errors import UserError, did_you_mean
from ldm.io.checkpoint.names import respelled
from ldm.io.checkpoint.reading import read_state_dict
from ldm.modules.embedding_manager import EmbeddingManager
from ldm.modules.encoders import clip
from ldm.modules.encoders.device import DeviceOfWeights
from ldm.modules.encoders.open_clip import OpenCLIPText
from ldm.modules.encoders.truncation import Truncation
from ldm.modules.frozen import freeze

logger = logging.getLogger(__name__)

TOKENIZER = "openai/clip-vit-large-patch14"
# Settings of the text models, by the name of the CLIP. Building one needs no download.
CLIP_TEXT_MODELS: dict[str, dict[str, Any]] = {
    "openai/clip-vit-large-patch14": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_attention_heads": 12,
        "num_hidden_layers": 12,
        "projection_dim": 768,
    },
    "openai/clip-vit-base-patch32": {
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_attention_heads": 8,
        "num_hidden_layers": 12,
        "projection_dim": 512,
    },
}
OPEN_CLIP_TEXT_MODELS: dict[str, dict[str, int]] = {
    "ViT-H-14": {"width": 1024, "heads": 16, "layers": 24, "embed_dim": 1024},
    "ViT-L-14": {"width": 768, "heads": 12, "layers": 12, "embed_dim": 768},
    "ViT-B-32": {"width": 512, "heads": 8, "layers": 12, "embed_dim": 512},
}
# Where the weights of OpenCLIP are published, by architecture and version.
OPEN_CLIP_HUB_NAMES = {
    ("ViT-H-14", "laion2b_s32b_b79k"): "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
    ("ViT-L-14", "laion2b_s32b_b82k"): "laion/CLIP-ViT-L-14-laion2B-s32B-b82K",
    ("ViT-B-32", "laion2b_s34b_b79k"): "laion/CLIP-ViT-B-32-laion2B-s34B-b79K",
}


class TextEncoder(nn.Module):
    """Base class of text encoders: tokens of prompts, and weights that are loaded or downloaded on first use."""

    LAYERS: tuple[str, ...]
    pad_with_zero: bool
    device = DeviceOfWeights()

    def __init__(self, max_length: int, layer: str, tokenizer: str) -> None:
        super().__init__()
        if layer not in self.LAYERS:
            hint = did_you_mean(layer, self.LAYERS)
            raise UserError(
                f'{type(self).__name__}: layer "{layer}" is unknown{hint}; choose one of {", ".join(self.LAYERS)}'
            )
        self.max_length = max_length
        self.layer = layer
        self.tokenizer_name = tokenizer
        self.has_weights = False
        self._tokenizer: Any = None
        self.embedding_manager: EmbeddingManager | None = None  # learned vectors of new words

    @property
    def tokenizer(self) -> Any:
        """Tokenizer object of transformers, read or downloaded on first use."""
        if self._tokenizer is None:
            self._tokenizer = clip.load_tokenizer(clip.clip_name(self.tokenizer_name))
        return self._tokenizer

    def tokens(self, text: str | Sequence[str]) -> Tensor:
        """Return the token ids (B, L) int64 of prompts, truncated and padded."""
        prompts = [text] if isinstance(text, str) else list(text)
        manager = self.embedding_manager
        if manager is not None and any(map(manager.mentions, prompts)):
            return torch.tensor([manager.padded(each, self.max_length, self.pad_with_zero) for each in prompts])
        encoded = self.tokenizer(
            prompts, truncation=True, max_length=self.max_length, padding="max_length", return_tensors="pt"
        )
        ids = encoded["input_ids"]
        return ids.masked_fill(encoded["attention_mask"] == 0, 0) if self.pad_with_zero else ids

    def truncation(self, text: str) -> Truncation | None:
        """Return the part of `text` that does not fit into `max_length` tokens; None if it fits."""
        if self.embedding_manager is not None and self.embedding_manager.mentions(text):
            return self.embedding_manager.truncation(text, self.max_length)
        return clip.truncation(self.tokenizer, text, self.max_length)

    @property
    def token_embedding(self) -> nn.Embedding:
        """Layer that maps token ids to embeddings."""
        raise NotImplementedError

    def forward(self, text: str | Sequence[str] | Tensor) -> Tensor:
        """Map B prompts or token ids (B, L) to a context (B, L, D), or (B, 1, D) of the pooled layer."""
        if not self.has_weights:
            self.download_weights()
        tokens = text if isinstance(text, Tensor) else self.tokens(text)
        return self.encode_tokens(tokens.to(next(self.parameters()).device))

    def encode(self, text: str | Sequence[str] | Tensor) -> Tensor:
        return self(text)

    def encode_tokens(self, tokens: Tensor) -> Tensor:
        """Map token ids (B, L) to features."""
        raise NotImplementedError

    def download_weights(self) -> None:
        """Fill in the published weights from the Hugging Face hub or a folder."""
        raise NotImplementedError

    def freeze(self) -> None:
        """Switch to evaluation mode for good and require no gradients."""
        freeze(self)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        self.has_weights = self.has_weights or any(name.startswith(prefix) for name in state_dict)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class FrozenCLIPEmbedder(TextEncoder):
    """Text encoder of Stable Diffusion 1: the features of CLIP's text model.

    Args:
        version: CLIP whose text model it is: a name on the Hugging Face hub or a local folder.
        device: not used, part of published configurations; tokens are moved to the device of the weights.
        max_length: L; longer prompts are truncated.
        freeze: require no gradients.
        layer: "last" (after the final layer norm), "pooled" (of the end token) or "hidden" (of block `layer_idx`).
        layer_idx: index of the hidden layer; 0 is the embedding.
        tokenizer: hub name or folder of the vocabulary; by default `version`.
        text_config: arguments of transformers' `CLIPTextConfig` that replace those of `version`.

    Raises:
        UserError: transformers is not installed, or the model or the layer does not exist.
    """

    LAYERS = ("last", "pooled", "hidden")
    pad_with_zero = False

    def __init__(
        self,
        version: str = "openai/clip-vit-large-patch14",
        device: torch.device | str | None = None,
        max_length: int = 77,
        freeze: bool = True,
        layer: str = "last",
        layer_idx: int | None = None,
        tokenizer: str | None = None,
        text_config: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(max_length, layer, tokenizer or version)
        self.version = version
        self.transformer = CLIPText(_text_config(version, text_config))
        count = self.transformer.config.num_hidden_layers
        if layer == "hidden" and (layer_idx is None or not 0 <= abs(layer_idx) <= count):
            raise UserError(f'FrozenCLIPEmbedder: layer "hidden" needs a layer_idx from 0 to {count}, not {layer_idx}')
        self.layer_idx = layer_idx
        if freeze:
            self.freeze()

    @property
    def token_embedding(self) -> nn.Embedding:
        """Layer that maps token ids to embeddings."""
        return self.transformer.text_model.embeddings.token_embedding

    def encode_tokens(self, tokens: Tensor) -> Tensor:
        """Map token ids (B, L) to (B, L, D), or (B, 1, D) for the pooled layer."""
        output = self.transformer(tokens, output_hidden_states=self.layer == "hidden")
        if self.layer == "last":
            return output.last_hidden_state
        return output.pooler_output[:, None] if self.layer == "pooled" else output.hidden_states[self.layer_idx]

    def download_weights(self) -> None:
        """Fill in the weights of `version`."""
        logger.info('the text encoder has no weights in the checkpoint; loading those of "%s"', self.version)
        weights = clip.load_clip(clip.clip_name(self.version)).text_model.state_dict()
        self.transformer.text_model.load_state_dict(weights)
        self.has_weights = True


class FrozenOpenCLIPEmbedder(TextEncoder):
    """Text encoder of Stable Diffusion 2: the features of OpenCLIP's text transformer after the final layer norm.

    Args:
        arch: OpenCLIP's name of the architecture.
        version: OpenCLIP's name of the weights.
        device: not used, part of published configurations; tokens are moved to the device of the weights.
        max_length: L; longer prompts are truncated.
        freeze: require no gradients.
        layer: "last", or "penultimate", which leaves out the last block.
        tokenizer: hub name or folder of the vocabulary.
        text_config: arguments of `OpenCLIPText` that replace those of `arch`.

    Raises:
        UserError: the architecture or the layer does not exist.
    """

    LAYERS = ("last", "penultimate")
    pad_with_zero = True

    def __init__(
        self,
        arch: str = "ViT-H-14",
        version: str = "laion2b_s32b_b79k",
        device: torch.device | str | None = None,
        max_length: int = 77,
        freeze: bool = True,
        layer: str = "last",
        tokenizer: str = TOKENIZER,
        text_config: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(max_length, layer, tokenizer)
        if arch not in OPEN_CLIP_TEXT_MODELS:
            known = ", ".join(OPEN_CLIP_TEXT_MODELS)
            hint = did_you_mean(arch, OPEN_CLIP_TEXT_MODELS)
            raise UserError(f'FrozenOpenCLIPEmbedder: arch "{arch}" is unknown{hint}; choose one of {known}')
        self.arch, self.version = arch, version
        self.model = OpenCLIPText(**{**OPEN_CLIP_TEXT_MODELS[arch], **(text_config or {})})
        self.layer_idx = self.LAYERS.index(layer)
        if freeze:
            self.freeze()

    @property
    def token_embedding(self) -> nn.Embedding:
        """Layer that maps token ids to embeddings."""
        return self.model.token_embedding

    def encode_tokens(self, tokens: Tensor) -> Tensor:
        """Map token ids (B, L) to (B, L, D)."""
        return self.model(tokens, skip_last=self.layer_idx)

    def encode_with_transformer(self, text: Tensor) -> Tensor:
        """Map token ids (B, L) to (B, L, D)."""
        return self.encode_tokens(text)

    def download_weights(self) -> None:
        """Fill in the weights that OpenCLIP published for `arch` and `version`.

        Raises:
            UserError: there are none, or they cannot be downloaded.
        """
        name = OPEN_CLIP_HUB_NAMES.get((self.arch, self.version))
        if name is None:
            known = ", ".join(version for arch, version in OPEN_CLIP_HUB_NAMES if arch == self.arch)
            raise UserError(f'there are no weights "{self.version}" of OpenCLIP {self.arch}; choose {known}')
        logger.info('the text encoder has no weights in the checkpoint; loading those of "%s"', name)
        weights = read_state_dict(clip.download(name, "open_clip_model.safetensors"))
        self.model.load_state_dict({key: weights[key] for key in self.model.state_dict()})
        self.has_weights = True


class CLIPText(nn.Module):
    """Text model of transformers under the published names of weights, which begin with `text_model.`."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        model = clip.import_transformers().CLIPTextModel(config)
        # Up to transformers 4 the model is a wrapper of the network.
        self.text_model = getattr(model, "text_model", model)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        """Load the weights also under names without `text_model.`, and drop the positions that published files hold."""
        own = {prefix + name for name in self.state_dict()}
        for name, new in respelled([name for name in state_dict if name.startswith(prefix)], own).items():
            value = state_dict.pop(name)
            if new is not None:
                state_dict[new] = value
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    @property
    def config(self) -> Any:
        """Configuration object of transformers."""
        return self.text_model.config

    def forward(self, input_ids: Tensor, **options: Any) -> Any:
        """Return the output object of transformers for token ids (B, L)."""
        return self.text_model(input_ids=input_ids, **options)


def _text_config(version: str, overrides: Mapping[str, Any] | None) -> Any:
    """Return the settings of the text model of a CLIP; known ones, and complete overrides, need no file."""
    settings = CLIP_TEXT_MODELS.get(version)
    if settings is None and overrides is None:
        settings = clip.text_settings(clip.clip_name(version))
    return clip.import_transformers().CLIPTextConfig(**{**(settings or {}), **(overrides or {})})
