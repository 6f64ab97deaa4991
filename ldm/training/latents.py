"""Latents computed once: training a diffusion model without running its first stage at every step."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset
from tqdm import tqdm

from ldm.checkpoint import read_checkpoint, save_whole
from ldm.images import batch_images
from ldm.models.autoencoder import AutoencoderKL
from ldm.models.diffusion.ddpm import LATENT_KEY, LatentDiffusion
from ldm.training.data import DataModuleFromConfig
from ldm.util import UserError

log = logging.getLogger(__name__)


class CachedLatents(Dataset):
    """A dataset whose images are replaced by the moments of their latents.

    An item is the original item without its pictures, plus `latent_moments` (2c, h, w): mean and log-variance, from
    which the model samples anew each time. With several variants every original item is there so many times, each
    time augmented otherwise.

    Args:
        moments: (items, 2c, h, w) float16.
        fields: the other entries of the items, lists of the same length.
    """

    def __init__(self, moments: torch.Tensor, fields: dict[str, list[Any]]) -> None:
        self.moments, self.fields = moments, fields

    def __len__(self) -> int:
        return len(self.moments)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = {key: values[index] for key, values in self.fields.items()}
        return {**item, LATENT_KEY: self.moments[index].float()}


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
        UserError: the first stage is not an `AutoencoderKL`, whose moments are what is kept, or the training set
            is a stream.
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
    if cached is None:
        cached = _encode(dataset, model, variants, data.batch_size, torch.device(device), autocast_dtype)
        if path is not None:
            save_whole({"key": key, "moments": cached.moments, "fields": cached.fields}, path)
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
    return CachedLatents(stored["moments"], stored["fields"])


@torch.no_grad()
def _encode(
    dataset: Dataset,
    model: LatentDiffusion,
    variants: int,
    batch_size: int,
    device: torch.device,
    autocast_dtype: torch.dtype | None,
) -> CachedLatents:
    encoder = model.first_stage_model.to(device)
    moments: list[torch.Tensor] = []
    fields: dict[str, list[Any]] = {}
    loader = DataLoader(dataset, batch_size=batch_size)
    progress = tqdm(total=variants * len(dataset), desc="encoding latents", unit="image")
    for _ in range(variants):
        for batch in loader:
            images = batch_images(batch, model.first_stage_key).to(device)
            with torch.autocast(device.type, autocast_dtype, enabled=autocast_dtype is not None):
                moments.append(encoder.encode(images).parameters.to("cpu", torch.float16))
            for key, values in _small_fields(batch, model.first_stage_key).items():
                fields.setdefault(key, []).extend(values)
            progress.update(len(images))
    progress.close()
    return CachedLatents(torch.cat(moments), fields)


def _small_fields(batch: dict[str, Any], image_key: str) -> dict[str, list[Any]]:
    """The entries that are not pictures: text, and tensors with one number an item."""
    fields = {}
    for key, value in batch.items():
        if isinstance(value, torch.Tensor):
            if value.dim() == 1:
                fields[key] = value.tolist()
        elif key != image_key:
            fields[key] = list(value)
    return fields


def _digest(model: LatentDiffusion, *settings: Any) -> str:
    """A hash of the first stage's weights and of the settings that decide what is encoded, and how."""
    digest = hashlib.sha256(repr(settings).encode())
    for name, value in model.first_stage_model.state_dict().items():
        if not name.startswith("loss."):
            digest.update(name.encode())
            digest.update(value.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()
