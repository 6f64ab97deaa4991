"""CLIP (arXiv:2103.00020) as a conditioning encoder, through the transformers package.

Shapes: B batch, N repetitions, D channels of CLIP's joint space.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.errors import UserError, did_you_mean

logger = logging.getLogger(__name__)

# OpenAI's names of its models, and what the Hugging Face hub calls them.
HUB_NAMES = {
    "ViT-B/32": "openai/clip-vit-base-patch32",
    "ViT-B/16": "openai/clip-vit-base-patch16",
    "ViT-L/14": "openai/clip-vit-large-patch14",
    "ViT-L/14@336px": "openai/clip-vit-large-patch14-336",
}
# Means and deviations of the colours, in [0, 1], that CLIP was trained with.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


class _FrozenCLIP(nn.Module):
    """One half of a CLIP, which moves along with this module but is no part of its state dict.

    Its weights are always those that `version` names, so that checkpoints need not hold them; published ones do not.
    """

    def __init__(self, version: str, unused: Sequence[str]) -> None:
        super().__init__()
        self.version = version
        clip = _load(clip_name(version)).eval().requires_grad_(False)
        for part in unused:
            delattr(clip, part)
        object.__setattr__(self, "_clip", clip)  # past nn.Module, which would register it

    @property
    def model(self) -> Any:
        """Transformers' model, without the parts that this half needs not."""
        return self._clip

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _FrozenCLIP:
        super()._apply(fn, recurse)
        self._clip._apply(fn, recurse)
        return self


class FrozenCLIPTextEmbedder(_FrozenCLIP):
    """Captions to one vector each, in the space that CLIP shares with images.

    Args:
        version: one of OpenAI's names (`HUB_NAMES`), a name on the Hugging Face hub, or a local folder.
        device: only for published configurations; captions follow the weights.
        max_length: tokens of a caption, longer ones are cut.
        n_repeat: N, how often `encode` repeats the vector.
        normalize: scale the vectors to length 1.

    Raises:
        UserError: transformers is not installed, or there is no such model.
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
            raise UserError(f"FrozenCLIPTextEmbedder: max_length must lie between 2 and {limit}, not {max_length}")
        self.tokenizer = _load_tokenizer(clip_name(version))
        self.max_length = max_length
        self.n_repeat = n_repeat
        self.normalize = normalize

    @torch.no_grad()
    def forward(self, text: str | Sequence[str]) -> Tensor:
        """Captions (B of them) to (B, D)."""
        captions = [text] if isinstance(text, str) else list(text)
        tokens = self.tokenizer(
            captions, truncation=True, max_length=self.max_length, padding="max_length", return_tensors="pt"
        )
        pooled = self.model.text_model(**tokens.to(self.model.device)).pooler_output
        z = self.model.text_projection(pooled)
        return F.normalize(z, dim=1) if self.normalize else z

    def encode(self, text: str | Sequence[str]) -> Tensor:
        """Captions (B of them) to a context (B, N, D)."""
        return self(text)[:, None].repeat(1, self.n_repeat, 1)


class FrozenClipImageEmbedder(_FrozenCLIP):
    """Images to one vector each, in the space that CLIP shares with captions; not normalised.

    Args:
        model: which CLIP, see `FrozenCLIPTextEmbedder`'s `version`.
        jit: only for published configurations.
        device: only for published configurations; images go where the weights are.
        antialias: blur before making images smaller.

    Raises:
        UserError: transformers is not installed, or there is no such model.
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
        self.register_buffer("mean", torch.tensor(MEAN).reshape(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD).reshape(1, 3, 1, 1), persistent=False)

    def preprocess(self, x: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] as CLIP wants them: resized, bicubically from corner to corner."""
        size = self.model.config.vision_config.image_size
        if self.antialias:
            x = blurred_for(x, size)
        x = F.interpolate(x, size=(size, size), mode="bicubic", align_corners=True)
        return ((x + 1.0) / 2.0 - self.mean.to(x)) / self.std.to(x)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] to (B, D), with gradients for the images."""
        x = self.preprocess(x.to(self.model.device))
        pooled = self.model.vision_model(x.to(self.model.dtype)).pooler_output
        return self.model.visual_projection(pooled)


def blurred_for(x: Tensor, size: int) -> Tensor:
    """Images (B, C, H, W) blurred as making them `size` pixels high and wide needs, as kornia does it.

    The Gaussian's deviation is (f - 1) / 2 along a side that becomes f times smaller, cut off at twice that.
    """
    channels = x.shape[1]
    for axis in (2, 3) if max(x.shape[2:]) > size else ():
        sigma = max((x.shape[axis] / size - 1.0) / 2.0, 1e-3)
        width = int(max(4.0 * sigma, 3)) // 2 * 2 + 1
        offsets = torch.arange(width, device=x.device, dtype=x.dtype) - width // 2
        kernel = (-0.5 * (offsets / sigma) ** 2).softmax(dim=0)
        across = axis == 3
        half = width // 2
        padded = F.pad(x, (half, half, 0, 0) if across else (0, 0, half, half), mode="reflect")
        shape = (channels, 1, 1, width) if across else (channels, 1, width, 1)
        x = F.conv2d(padded, kernel.expand(channels, width).reshape(shape), groups=channels)
    return x


def clip_name(version: str) -> str:
    """What transformers calls the CLIP that is named `version`: a name on the hub, or a folder.

    Raises:
        UserError: there is no such model, or none that transformers has.
    """
    if version in HUB_NAMES:
        return HUB_NAMES[version]
    if Path(version).expanduser().is_dir():
        return str(Path(version).expanduser())
    known = ", ".join(HUB_NAMES)
    if version.startswith("RN"):
        raise UserError(f'CLIP "{version}" is a ResNet, which transformers has not; choose one of {known}')
    # The hub's names are "owner/model".
    if version.startswith((".", "/", "~", "ViT")) or version.count("/") != 1:
        hint = did_you_mean(version, HUB_NAMES)
        raise UserError(f'there is no CLIP "{version}"{hint}; choose one of {known}, a hub name or a local folder')
    return version


def _load(name: str) -> Any:
    """Transformers' CLIP of that name.

    Its files choose no code: `AutoConfig` would ask on the terminal whether to import the Python that a folder
    brings, so the type is read from the JSON first, and the classes are transformers' own.
    """
    transformers = _transformers()
    try:
        given, _ = transformers.CLIPConfig.get_config_dict(name)
        kind = given.get("model_type")
        if kind != "clip":  # transformers would go on, with random weights
            raise UserError(f'"{name}" is a model of type "{kind}"; give a folder or hub name of a CLIP')
        config = transformers.CLIPConfig.from_dict(_without_code(given))
        # Pickles are read with weights_only=True, transformers' default; old versions have no option for it.
        model, report = transformers.CLIPModel.from_pretrained(name, config=config, output_loading_info=True)
    except (OSError, ValueError, TypeError, AttributeError, RuntimeError, UnpicklingError) as error:
        raise _unavailable(name, error) from None
    missing = sorted(report["missing_keys"])
    if missing:
        raise UserError(f'"{name}" holds no whole CLIP: it lacks {missing[0]}; give a folder or hub name of a CLIP')
    return model


def _without_code(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration without what names code: classes of the folder's own, kernels to download, quantizers."""
    return {
        key: _without_code(value) if isinstance(value, Mapping) else value
        for key, value in config.items()
        if key not in ("auto_map", "quantization_config") and not key.endswith(("implementation", "_internal"))
    }


def _load_tokenizer(name: str) -> Any:
    try:
        tokenizer = _transformers().CLIPTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError, TypeError) as error:
        raise _unavailable(name, error) from None
    # Without its files transformers makes a tokenizer of the special tokens alone.
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise UserError(f'"{name}" holds no tokenizer; put the CLIP\'s vocab.json and merges.txt there')
    return tokenizer


def _transformers() -> Any:
    try:
        import transformers
    except ModuleNotFoundError:
        raise UserError('CLIP needs the package transformers; install it with pip install "ldm[clip]"') from None
    return transformers


def _unavailable(name: str, error: Exception) -> UserError:
    logger.debug("%s: %s", name, error)
    reason = str(error).strip().partition("\n")[0]
    return UserError(f'cannot load the CLIP "{name}" ({reason}); go online once, or give a local folder')
