"""Latents computed once: training a diffusion model without running its first stage at every step."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset
from tqdm import tqdm

from ldm.errors import UserError
from ldm.io.checkpoint.reading import read_checkpoint
from ldm.io.checkpoint.writing import save_whole
from ldm.io.pixels import batch_entry, batch_images
from ldm.models.autoencoder import AutoencoderKL
from ldm.models.diffusion.ddpm import CONDITIONING_KEY, LATENT_KEY, LatentDiffusion
from ldm.training.data import DataModuleFromConfig

log = logging.getLogger(__name__)


class CachedLatents(Dataset):
    """A dataset whose images are replaced by the moments of their latents.

    An item is the original item without its pictures, that is its text, numbers and rows of whole numbers, plus
    `latent_moments` (2c, h, w): mean and log-variance, from which the model samples anew each time. With several
    variants every original item is there so many times, each time augmented otherwise. Of a model that is conditioned
    on pictures, what its conditioning stage says of them is kept as `conditioning`.

    Args:
        moments: (items, 2c, h, w) float16.
        fields: the other entries of the items, lists of the same length.
        conditioning: (items, c', h, w) float16, or None.
    """

    def __init__(
        self, moments: torch.Tensor, fields: dict[str, list[Any]], conditioning: torch.Tensor | None = None
    ) -> None:
        self.moments, self.fields, self.conditioning = moments, fields, conditioning

    def __len__(self) -> int:
        return len(self.moments)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = {key: values[index] for key, values in self.fields.items()}
        if self.conditioning is not None:
            item[CONDITIONING_KEY] = self.conditioning[index].float()
        return {**item, LATENT_KEY: self.moments[index].float()}

    def serves(self, model: LatentDiffusion) -> bool:
        """Whether what the model is conditioned on is kept."""
        return self.conditioning is not None or _condition(model) in (None, *self.fields)


def cache_latents(
    data: DataModuleFromConfig,
    model: LatentDiffusion,
    device: torch.device | str = "cpu",
    autocast_dtype: torch.dtype | None = None,
) -> None:
    """Replace the training set of `data` by its latents, as its `latent_cache` asks.

    `variants` (1) is how many times every item is encoded, with the augmentation of the data set; `path` (none) is
    a file to keep the result in. A file there is used if it was made with this first stage and these settings, and
    made anew otherwise.

    Args:
        device: where to encode.
        autocast_dtype: encode under autocast in this precision.

    Raises:
        UserError: the first stage is not an `AutoencoderKL`, whose moments are what is kept, the training set is a
            stream, or the model is conditioned on what is not kept.
    """
    if not isinstance(getattr(model, "first_stage_model", None), AutoencoderKL):
        raise UserError("latent_cache needs an AutoencoderKL as first stage; remove it from data.params")
    data.setup()
    dataset, settings = data.datasets["train"], data.latent_cache
    if isinstance(dataset, IterableDataset):
        raise UserError("latent_cache needs a training set with a length; remove it from data.params")
    variants, path = settings.get("variants", 1), settings.get("path")
    key = _digest(model, data.dataset_configs["train"], len(dataset), variants, autocast_dtype)
    cached = _stored(path, key)
    if cached is None or not cached.serves(model):
        cached = _encode(dataset, model, variants, data.batch_size, torch.device(device), autocast_dtype)
        if path is not None:
            content = {"moments": cached.moments, "fields": cached.fields, "conditioning": cached.conditioning}
            save_whole({"key": key, **content}, path)
    data.datasets["train"] = cached


def _stored(path: str | None, key: str) -> CachedLatents | None:
    """What the file at `path` holds, if it was made under `key`."""
    if path is None or not Path(path).is_file():
        return None
    stored = read_checkpoint(path)
    if stored.get("key") != key:
        log.info("the latents in %s belong to another first stage or data set; making them anew", path)
        return None
    log.info("using the latents in %s", path)
    return CachedLatents(stored["moments"], stored["fields"], stored.get("conditioning"))


@torch.no_grad()
def _encode(
    dataset: Dataset,
    model: LatentDiffusion,
    variants: int,
    batch_size: int,
    device: torch.device,
    autocast_dtype: torch.dtype | None,
) -> CachedLatents:
    model = model.to(device)
    moments: list[torch.Tensor] = []
    conditioning: list[torch.Tensor] = []
    fields: dict[str, list[Any]] = {}
    loader = DataLoader(dataset, batch_size=batch_size)
    with tqdm(total=variants * len(dataset), desc="encoding latents", unit="image") as progress:
        for _ in range(variants):
            for batch in loader:
                small = _small_fields(batch, model.first_stage_key)
                pictures = _condition(model) not in (None, *small)
                images = batch_images(batch, model.first_stage_key).to(device)
                with torch.autocast(device.type, autocast_dtype, enabled=autocast_dtype is not None):
                    if pictures:
                        conditioning.append(_encode_condition(model, batch).to("cpu", torch.float16))
                    moments.append(model.first_stage_model.encode(images).parameters.to("cpu", torch.float16))
                for key, values in small.items():
                    fields.setdefault(key, []).extend(values)
                progress.update(len(images))
    return CachedLatents(torch.cat(moments), fields, torch.cat(conditioning) if conditioning else None)


def _small_fields(batch: dict[str, Any], image_key: str) -> dict[str, list[Any]]:
    """The entries that are not pictures: text, tensors with one number an item, or with a row of whole numbers."""
    fields: dict[str, list[Any]] = {}
    for key, value in batch.items():
        if isinstance(value, torch.Tensor):
            if value.dim() == 1:
                fields[key] = value.tolist()
            elif value.dim() == 2 and not value.is_floating_point():
                fields[key] = list(value)
        elif key != image_key and isinstance(value, list | tuple) and all(isinstance(text, str) for text in value):
            fields[key] = list(value)
    return fields


def _condition(model: LatentDiffusion) -> str | None:
    """The entry of a batch that the model is conditioned on."""
    return None if model.model.conditioning_key is None else model.cond_stage_key


def _encode_condition(model: LatentDiffusion, batch: dict[str, Any]) -> torch.Tensor:
    """What the conditioning stage says of a batch's pictures, (B, c', h, w).

    Raises:
        UserError: they are not there, or it may say something else later.
    """
    key = model.cond_stage_key
    batch_entry(batch, key)
    if model.cond_stage_trainable or model.cond_dropout > 0 or model.shorten_cond_schedule:
        raise UserError(
            f'latent_cache cannot keep "{key}", the model\'s cond_stage_key, which its training changes '
            "(cond_stage_trainable, cond_dropout or num_timesteps_cond); remove it from data.params"
        )
    encoded = model.get_learned_conditioning(model.raw_conditioning(batch))
    if not isinstance(encoded, torch.Tensor) or encoded.dim() != 4:
        raise UserError(f'latent_cache cannot keep "{key}", the model\'s cond_stage_key; remove it from data.params')
    return encoded


def _digest(model: LatentDiffusion, *settings: Any) -> str:
    """A hash of the frozen stages' weights and of the settings that decide what is encoded, and how."""
    digest = hashlib.sha256(repr(settings).encode())
    stages = [model.first_stage_model]
    if _condition(model) is not None and not model.cond_stage_trainable:
        digest.update(f"{model.cond_stage_key} {model.cond_stage_model}".encode())
        stages += [model.cond_stage_model] if model.cond_stage_model is not model.first_stage_model else []
    for stage in stages:
        for name, value in stage.state_dict().items():
            if not name.startswith("loss."):
                digest.update(name.encode())
                digest.update(value.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()
