"""Cache of latents, which trains a diffusion model without running its first stage at every step."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset
from tqdm import tqdm

from ldm.errors import UserError
from ldm.io.batch_items import describe_items, item_names
from ldm.io.checkpoint.reading import read_checkpoint
from ldm.io.checkpoint.writing import save_atomically
from ldm.io.files import check_writable
from ldm.io.pixels import batch_entry, batch_images
from ldm.models.autoencoder import AutoencoderKL
from ldm.models.diffusion.ddpm import CONDITIONING_KEY, LATENT_KEY, LatentDiffusion
from ldm.training.batch_check import BatchCheck
from ldm.training.collate import Collate
from ldm.training.data import DataModuleFromConfig, shown_name
from ldm.training.fingerprint import fingerprint

log = logging.getLogger(__name__)


class CachedLatents(Dataset):
    """Data set whose images are replaced by the moments of their latents.

    An item contains the texts, numbers and rows of integers of the original item, and `latent_moments` (2c, h, w), the
    mean and log-variance from which the model samples a latent each time. With several variants, each original item
    occurs several times with different augmentation. For a model that is conditioned on images, an item also contains
    the output of the conditioning stage as `conditioning`.

    Args:
        moments: (items, 2c, h, w) float16.
        fields: the other entries of the items, lists of the same length.
        conditioning: (items, c', h, w) float16, or None.

    Attributes:
        source: the data set with the images, for previews.
    """

    source: Dataset | None = None

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

    def with_images(self, batch: dict[str, Any], key: str) -> dict[str, Any]:
        """Return a batch with the images of its items, read again from the original data set, as entry `key`.

        A data set with random augmentation returns another version of an image than the one that was encoded.
        """
        if self.source is None or key in batch or LATENT_KEY not in batch:
            return batch
        found = [self._position(moments) for moments in batch[LATENT_KEY].cpu()]
        positions = [position for position in found if position is not None]
        if len(positions) < len(found):
            return batch
        source: Any = self.source
        items = [{key: source[position % len(source)][key]} for position in positions]
        return {**batch, key: Collate(shown_name("train"))(items)[key]}

    def _position(self, moments: torch.Tensor) -> int | None:
        """Return the position of an item by its moments, so that no batch has to carry it."""
        for position in (self.moments[:, 0, 0, 0] == moments[0, 0, 0]).nonzero()[:, 0].tolist():
            if torch.equal(self.moments[position].float(), moments):
                return position
        return None

    def has_conditioning(self, model: LatentDiffusion) -> bool:
        """Return whether the items contain the conditioning of the model."""
        return self.conditioning is not None or _conditioning_entry(model) in (None, *self.fields)


def cache_latents(
    data: DataModuleFromConfig,
    model: LatentDiffusion,
    device: torch.device | str = "cpu",
    autocast_dtype: torch.dtype | None = None,
) -> None:
    """Replace the training set of `data` by its latents, according to its `latent_cache`.

    `variants` (default: 1) is the number of times each item is encoded, with the augmentation of the data set. `path`
    (default: none) is a file for the result. An existing file is used if it comes from the same first stage, settings
    and data (see `ldm.training.fingerprint`); otherwise it is computed again.

    Args:
        data: the data module.
        model: the model whose first stage encodes the images.
        device: the device for encoding.
        autocast_dtype: encode under autocast with this dtype.

    Raises:
        UserError: the first stage is not an `AutoencoderKL`, the training set is a stream, the cache cannot contain
            the conditioning of the model, an item is not what the model needs, or `path` is another file.
    """
    if not isinstance(getattr(model, "first_stage_model", None), AutoencoderKL):
        raise UserError("latent_cache needs an AutoencoderKL as the first stage; remove it from data.params")
    data.setup()
    dataset, settings = data.datasets["train"], data.latent_cache or {}
    if isinstance(dataset, IterableDataset):
        raise UserError("latent_cache needs a training set with a length; remove it from data.params")
    variants, path = settings.get("variants", 1), settings.get("path")
    key = {
        "first stage": _model_digest(model),
        "settings": _settings_digest(data.dataset_configs["train"], len(dataset), variants, autocast_dtype),
        "data": "" if path is None else fingerprint(dataset),
    }
    cached = _read_cache(path, key)
    if cached is None or not cached.has_conditioning(model):
        if path is not None:
            check_writable(Path(path).parent, "data.params.latent_cache.path")
        cached = _encode(dataset, model, variants, data.batch_size, torch.device(device), autocast_dtype)
        if path is not None:
            content = {"moments": cached.moments, "fields": cached.fields, "conditioning": cached.conditioning}
            save_atomically({"key": key, **content}, path)
    cached.source = dataset
    data.datasets["train"] = cached


def _read_cache(path: str | None, key: dict[str, str]) -> CachedLatents | None:
    """Read the latents from the file `path` if it has this key.

    Raises:
        UserError: the file is not a cache of latents, and must not be replaced.
    """
    if path is None or not Path(path).is_file():
        return None
    stored = read_checkpoint(path)
    if not {"key", "moments"} <= stored.keys():
        raise UserError(f'data.params.latent_cache.path "{path}" is not a cache of latents; name another file')
    stored_key = stored["key"] if isinstance(stored["key"], dict) else {}
    changed = [part for part, value in key.items() if stored_key.get(part) != value]
    if changed:
        log.info("computing latents again: those in %s are of another state (%s)", path, ", ".join(changed))
        return None
    log.info("using the latents in %s", path)
    return CachedLatents(stored["moments"], stored["fields"], stored.get("conditioning"))


@torch.no_grad()
def _encode(
    dataset: Any,
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
    name = shown_name("train")
    check = BatchCheck(model)
    loader = DataLoader(dataset, batch_size=batch_size, collate_fn=Collate(name))
    with tqdm(total=variants * len(dataset), desc="encoding latents", unit="image") as progress:
        for _ in range(variants):
            for batch in loader:
                check(batch, name)
                batch_fields = _non_image_fields(batch, model.first_stage_key)
                has_image_conditioning = _conditioning_entry(model) not in (None, *batch_fields)
                images = batch_images(batch, model.first_stage_key).to(device)
                with torch.autocast(device.type, autocast_dtype, enabled=autocast_dtype is not None):
                    if has_image_conditioning:
                        conditioning.append(_encode_conditioning(model, batch).to("cpu", torch.float16))
                    moments.append(model.first_stage_model.encode(images).parameters.to("cpu", torch.float16))
                _check_finite(moments[-1], batch, name)
                for key, values in batch_fields.items():
                    fields.setdefault(key, []).extend(values)
                progress.update(len(images))
    return CachedLatents(torch.cat(moments), fields, torch.cat(conditioning) if conditioning else None)


def _non_image_fields(batch: dict[str, Any], image_key: str) -> dict[str, list[Any]]:
    """Return the entries of a batch that are texts, one number per item, or one row of integers per item."""
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


def _conditioning_entry(model: LatentDiffusion) -> str | None:
    """Return the key of the batch entry that the model is conditioned on, or None."""
    return None if model.model.conditioning_key is None else model.cond_stage_key


def _encode_conditioning(model: LatentDiffusion, batch: dict[str, Any]) -> torch.Tensor:
    """Encode the images that condition the model, (B, c', h, w).

    Raises:
        UserError: the batch does not contain them, or their encoding changes during training.
    """
    key = model.cond_stage_key
    batch_entry(batch, key)
    if model.cond_stage_trainable or model.cond_dropout > 0 or model.shorten_cond_schedule:
        raise UserError(
            f'latent_cache cannot contain "{key}", the model\'s cond_stage_key, whose encoding changes in training '
            "(cond_stage_trainable, cond_dropout or num_timesteps_cond); remove it from data.params"
        )
    encoded = model.get_learned_conditioning(model.raw_conditioning(batch))
    if not isinstance(encoded, torch.Tensor) or encoded.dim() != 4:
        raise UserError(f'latent_cache cannot contain "{key}", the model\'s cond_stage_key; remove it from data.params')
    return encoded


def _check_finite(moments: torch.Tensor, batch: dict[str, Any], name: str) -> None:
    """Raise UserError if latents of a batch are not finite in float16."""
    finite = moments.flatten(1).isfinite().all(dim=1).tolist()
    bad = [position for position, is_finite in enumerate(finite) if not is_finite]
    if bad:
        items = describe_items(item_names(batch), bad)
        raise UserError(f"{name}: the latents of {items} in a batch are not finite; check images and first stage")


def _settings_digest(*settings: Any) -> str:
    """Return a hash of the settings."""
    return hashlib.sha256(repr(settings).encode()).hexdigest()


def _model_digest(model: LatentDiffusion) -> str:
    """Return a hash of the frozen stages' weights, which determine the latents."""
    digest = hashlib.sha256()
    stages = [model.first_stage_model]
    if _conditioning_entry(model) is not None and not model.cond_stage_trainable:
        digest.update(f"{model.cond_stage_key} {model.cond_stage_model}".encode())
        stages += [model.cond_stage_model] if model.cond_stage_model is not model.first_stage_model else []
    for stage in stages:
        for name, value in stage.state_dict().items():
            if not name.startswith("loss."):
                digest.update(name.encode())
                digest.update(value.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()
