"""Conditioning encoders on CLIP (arXiv:2103.00020), based on the packages transformers and kornia.

Shapes: B batch, N repetitions, D channels of CLIP's joint space.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from einops import repeat
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.config.distribution import install_hint
from ldm.errors import UserError, did_you_mean
from ldm.modules.encoders.device import DeviceOfWeights
from ldm.modules.encoders.truncation import MARKS, Truncation

logger = logging.getLogger(__name__)

# OpenAI's model names and the corresponding names on the Hugging Face hub.
HUB_NAMES = {
    "ViT-B/32": "openai/clip-vit-base-patch32",
    "ViT-B/16": "openai/clip-vit-base-patch16",
    "ViT-L/14": "openai/clip-vit-large-patch14",
    "ViT-L/14@336px": "openai/clip-vit-large-patch14-336",
}
# Mean and standard deviation per colour channel, in [0, 1], of CLIP's training images.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


class _FrozenCLIP(nn.Module):
    """Text or image encoder of a CLIP that follows this module's device but is not part of its state dict.

    The weights are always those of `version`. Checkpoints do not store them, like the published checkpoints.
    """

    device = DeviceOfWeights()
    _clip: Any  # a class of transformers, which is not imported here

    def __init__(self, version: str, unused: Sequence[str]) -> None:
        super().__init__()
        self.version = version
        clip = load_clip(clip_name(version))
        for part in unused:
            delattr(clip, part)
        object.__setattr__(self, "_clip", clip)  # not registered as a submodule
        self.freeze()

    def freeze(self) -> None:
        """Put the CLIP in evaluation mode and disable the gradients of its weights."""
        self._clip.eval().requires_grad_(False)

    @property
    def model(self) -> Any:
        """CLIP model of transformers, without the unused parts."""
        return self._clip

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _FrozenCLIP:
        super()._apply(fn, recurse)
        self._clip._apply(fn, recurse)
        return self


class FrozenCLIPTextEmbedder(_FrozenCLIP):
    """Text encoder that maps each caption to one vector in CLIP's joint space.

    Args:
        version: one of OpenAI's names (`HUB_NAMES`), a name on the Hugging Face hub, or a local folder.
        device: not used, part of published configurations; captions are moved to the device of the weights.
        max_length: number of tokens of a caption; longer captions are truncated.
        n_repeat: N, the number of repetitions of the vector in `encode`.
        normalize: scale the vectors to length 1.

    Raises:
        UserError: transformers is not installed, or the model does not exist.
    """

    def __init__(
        self,
        version: str = "ViT-L/14",
        device: torch.device | str | None = None,
        max_length: int = 77,
        n_repeat: int = 1,
        normalize: bool = True,
    ) -> None:
        super().__init__(version, unused=("vision_model", "visual_projection"))
        limit = self.model.config.text_config.max_position_embeddings
        if not 2 <= max_length <= limit:
            raise UserError(f"FrozenCLIPTextEmbedder: max_length must be between 2 and {limit}, not {max_length}")
        self.tokenizer = load_tokenizer(clip_name(version))
        self.max_length = max_length
        self.n_repeat = n_repeat
        self.normalize = normalize

    @torch.no_grad()
    def forward(self, text: str | Sequence[str]) -> Tensor:
        """Encode B captions to (B, D)."""
        captions = [text] if isinstance(text, str) else list(text)
        tokens = self.tokenizer(
            captions, truncation=True, max_length=self.max_length, padding="max_length", return_tensors="pt"
        )
        pooled = self.model.text_model(**tokens.to(self.model.device)).pooler_output
        z = self.model.text_projection(pooled)
        return F.normalize(z, dim=1) if self.normalize else z

    def encode(self, text: str | Sequence[str]) -> Tensor:
        """Encode B captions to a context (B, N, D)."""
        return repeat(self(text), "b d -> b n d", n=self.n_repeat)

    def truncation(self, text: str) -> Truncation | None:
        """Return the part of `text` that does not fit into `max_length` tokens; None if it fits."""
        return truncation(self.tokenizer, text, self.max_length)


class FrozenClipImageEmbedder(_FrozenCLIP):
    """Image encoder that maps each image to one vector in CLIP's joint space, without normalisation.

    Args:
        model: CLIP model, see `version` of `FrozenCLIPTextEmbedder`.
        jit: not used, part of published configurations.
        device: not used, part of published configurations; images are moved to the device of the weights.
        antialias: blur images before downsampling.

    Raises:
        UserError: transformers is not installed, or the model does not exist.
    """

    def __init__(
        self,
        model: str,
        jit: bool = False,
        device: torch.device | str | None = None,
        antialias: bool = False,
    ) -> None:
        super().__init__(model, unused=("text_model", "text_projection"))
        self.antialias = antialias
        self.register_buffer("mean", torch.tensor(MEAN), persistent=False)
        self.register_buffer("std", torch.tensor(STD), persistent=False)

    def preprocess(self, x: Tensor) -> Tensor:
        """Resize (bicubic, with aligned corners) and normalise images (B, 3, H, W) in [-1, 1] for CLIP."""
        kornia = _kornia()
        size = self.model.config.vision_config.image_size
        x = kornia.geometry.resize(x, (size, size), "bicubic", align_corners=True, antialias=self.antialias)
        return kornia.enhance.normalize((x + 1.0) / 2.0, self.mean, self.std)

    def forward(self, x: Tensor) -> Tensor:
        """Encode images (B, 3, H, W) in [-1, 1] to (B, D); gradients reach the images."""
        x = self.preprocess(x.to(self.model.device))
        pooled = self.model.vision_model(x.to(self.model.dtype)).pooler_output
        return self.model.visual_projection(pooled)


def truncation(tokenizer: Any, text: str, max_length: int) -> Truncation | None:
    """Return the part of `text` that does not fit into `max_length` tokens of CLIP; None if it fits.

    A tokenizer without positions, as in transformers 4, writes it in its own spelling, in lower case.
    """
    if tokenizer.is_fast:
        found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return Truncation.of(text, found["offset_mapping"], max_length)
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    room = max_length - MARKS
    return Truncation(len(ids) + MARKS, max_length, tokenizer.decode(ids[room:])) if len(ids) > room else None


def clip_name(version: str) -> str:
    """Return the name of a CLIP `version` for transformers: a name on the hub, or a folder.

    Raises:
        UserError: the model does not exist or transformers does not support it.
    """
    if version in HUB_NAMES:
        return HUB_NAMES[version]
    if Path(version).expanduser().is_dir():
        return str(Path(version).expanduser())
    known = ", ".join(HUB_NAMES)
    if version.startswith("RN"):
        raise UserError(f'CLIP "{version}" is a ResNet, which transformers does not support; choose one of {known}')
    # The hub's names are "owner/model".
    if version.startswith((".", "/", "~", "ViT")) or version.count("/") != 1:
        hint = did_you_mean(version, HUB_NAMES)
        raise UserError(f'there is no CLIP "{version}"{hint}; choose one of {known}, a hub name or a local folder')
    return version


def load_clip(name: str) -> Any:
    """Load a CLIP with transformers.

    The files of the model never select code. `AutoConfig` would ask on the terminal whether to import Python files of
    a folder, so this function reads the type from the JSON file and uses transformers' own classes.
    """
    transformers = import_transformers()
    try:
        entries, _ = transformers.CLIPConfig.get_config_dict(name)
        model_type = entries.get("model_type")
        if model_type != "clip":  # transformers would continue with random weights
            raise UserError(f'"{name}" is a model of type "{model_type}"; give a folder or hub name of a CLIP')
        config = transformers.CLIPConfig.from_dict(_without_code(entries))
        # Pickles are read with weights_only=True, the default of transformers; old versions lack the option.
        model, report = transformers.CLIPModel.from_pretrained(name, config=config, output_loading_info=True)
    except (OSError, ValueError, TypeError, AttributeError, RuntimeError, UnpicklingError) as error:
        raise _unavailable(name, error) from None
    missing = sorted(report["missing_keys"])
    if missing:
        raise UserError(f'"{name}" is an incomplete CLIP: {missing[0]} is missing; give a folder or hub name of a CLIP')
    return model


def text_settings(name: str) -> dict[str, Any]:
    """Return the settings of the text model of a CLIP on the Hugging Face hub or in a folder.

    Raises:
        UserError: there is no such CLIP.
    """
    try:
        return import_transformers().CLIPTextConfig.from_pretrained(name).to_dict()
    except (OSError, ValueError, TypeError) as error:
        raise _unavailable(name, error) from None


def download(name: str, file: str) -> Path:
    """Return a file of a model on the Hugging Face hub, from the local cache if possible.

    Raises:
        UserError: it cannot be downloaded.
    """
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(name, file))
    except (OSError, ValueError) as error:
        raise _unavailable(name, error) from None


def _without_code(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the configuration without entries that select code: custom classes, downloaded kernels and quantizers."""
    return {
        key: _without_code(value) if isinstance(value, Mapping) else value
        for key, value in config.items()
        if key not in ("auto_map", "quantization_config") and not key.endswith(("implementation", "_internal"))
    }


def load_tokenizer(name: str) -> Any:
    try:
        tokenizer = import_transformers().CLIPTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError, TypeError) as error:
        raise _unavailable(name, error) from None
    # If the files are missing, transformers returns a tokenizer with only the special tokens.
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        if Path(name).is_dir():
            raise UserError(f'"{name}" has no tokenizer; add the vocab.json and merges.txt of the CLIP')
        raise UserError(
            f'the tokenizer "{name}" is not on this machine and cannot be downloaded; go online once, or name a local '
            'folder with its vocab.json and merges.txt in the configuration ("tokenizer" of the text encoder)'
        )
    return tokenizer


def import_transformers() -> Any:
    try:
        import transformers
    except ModuleNotFoundError:
        raise _not_installed("transformers") from None
    return transformers


def _kornia() -> Any:
    try:
        import kornia
    except ModuleNotFoundError:
        raise _not_installed("kornia") from None
    return kornia


def _not_installed(package: str) -> UserError:
    return UserError(f"CLIP needs the package {package}; install it with {install_hint('clip')}")


def _unavailable(name: str, error: Exception) -> UserError:
    logger.debug("%s: %s", name, error)
    reason = str(error).strip().partition("\n")[0]
    return UserError(f'cannot load the CLIP "{name}" ({reason}); go online once, or give a local folder')
