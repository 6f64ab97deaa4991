"""Check of the batches that a model reads.

Types, shapes, texts and labels are checked in every batch, which takes microseconds. The values of images are checked
in the first batch of a data set. Only tensors on the CPU are read, so that no device has to wait.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from torch import nn

from ldm.config.model_config import TEXT_KEYS
from ldm.errors import UserError, did_you_mean
from ldm.models.autoencoder import Autoencoder
from ldm.models.diffusion.batch_keys import (
    CLASS_KEY,
    CONDITIONING_KEY,
    LATENT_KEY,
    LAYOUT_KEY,
    LOW_RESOLUTION_KEY,
    MASK_KEY,
    MASKED_KEY,
)
from ldm.models.diffusion.classifier import NoisyLatentImageClassifier
from ldm.models.diffusion.ddpm import DDPM, LatentDiffusion
from ldm.modules.encoders.modules import ClassEmbedder, SpatialRescaler, TransformerEmbedder
from ldm.training.batch_entries import ClassMaps, Entry, Images, Labels, Maps, Masks, Tensors, Texts, Tokens
from ldm.training.collate import describe

logger = logging.getLogger(__name__)

IMAGE_CHANNELS = (1, 3, 4)
# Methods that read a batch. A class of the user's own that overrides one may read other entries.
READING = frozenset(
    ["get_input", "get_targets", "get_x_start", "raw_conditioning", "shared_step", "reconstruct", "training_input"]
)


class BatchCheck:
    """Check of the batches that a model reads.

    Args:
        model: a first stage, a diffusion model or a classifier; batches of other models are not checked.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._checked: set[str] = set()
        self._warned: set[tuple[str, str]] = set()

    def __call__(self, batch: Any, name: str, warn: bool = True) -> None:
        """Check a batch.

        Args:
            batch: the batch.
            name: name of the data set in messages, such as "data.params.train".
            warn: log warnings; of several processes, only one should do so.

        Raises:
            UserError: the batch lacks an entry, or one has another form than the model needs.
        """
        entries = entries_of(self.model, batch)
        if entries and not isinstance(batch, Mapping):
            raise UserError(_not_a_mapping(batch, name, entries))
        is_first = name not in self._checked
        for entry in entries:
            if entry.key not in batch:
                raise UserError(_missing(batch, name, entry))
            value = batch[entry.key]
            fault = entry.fault(value) or (entry.first_batch_fault(value) if is_first else None)
            if fault is not None:
                raise UserError(f'{name}: "{entry.key}" {fault}')
            if warn and is_first:
                self._warn_once(entry, value, name)
        self._checked.add(name)

    def _warn_once(self, entry: Entry, value: Any, name: str) -> None:
        if (name, entry.key) in self._warned:
            return
        warning = entry.warning(value)
        if warning is not None:
            self._warned.add((name, entry.key))
            logger.warning('%s: "%s" %s', name, entry.key, warning)


def _not_a_mapping(batch: Any, name: str, entries: list[Entry]) -> str:
    needed = ", ".join(f'"{entry.key}": …' for entry in entries)
    if isinstance(batch, list | tuple) and batch:
        present = ", ".join(describe(value) for value in batch[:4])
        return f"{name} returns tuples or lists (a batch of {present}); return a dictionary {{{needed}}} for each item"
    return f"{name} returns no dictionaries (a batch is {describe(batch)}); return {{{needed}}} for each item"


def _missing(batch: Mapping[Any, Any], name: str, entry: Entry) -> str:
    names = [key for key in batch if isinstance(key, str)]
    present = f"it returns {', '.join(names)}" if names else "it returns no named entries"
    return f'{name} returns no "{entry.key}"{did_you_mean(entry.key, names)}, the {entry.role}; {present}'


def entries_of(model: nn.Module, batch: Any) -> list[Entry]:
    """Return the entries of a batch that a model reads; an empty list for a model that is not known here.

    Entries that the batch replaces by cached latents or a cached conditioning are left out.
    """
    present = batch if isinstance(batch, Mapping) else {}
    if reads_batches_itself(model):
        return []
    if isinstance(model, NoisyLatentImageClassifier):
        return [*_image_entries(model.diffusion_model, present), _target_entry(model)]
    if isinstance(model, Autoencoder):
        return [_image_entry(model.image_key, "image_key of the model", model.encoder.conv_in.in_channels)]
    if isinstance(model, LatentDiffusion):
        return [*_image_entries(model, present), *_conditioning_entries(model, present)]
    return _image_entries(model, present) if isinstance(model, DDPM) else []


def reads_batches_itself(model: nn.Module) -> bool:
    """Return whether the class of a model is the user's own and overrides a method that reads a batch."""
    return any(READING & vars(cls).keys() for cls in type(model).__mro__ if _is_foreign(cls))


def _is_foreign(cls: type) -> bool:
    """Return whether a class is the user's own."""
    return cls.__module__.split(".")[0] not in ("ldm", "torch", "builtins")


def _image_entry(key: str, role: str, channels: int | None) -> Entry:
    kind = Images if channels is None or channels in IMAGE_CHANNELS else Maps
    return kind(key, role, channels)


def _image_entries(model: DDPM, present: Mapping[Any, Any]) -> list[Entry]:
    if LATENT_KEY in present:
        return []
    return [_image_entry(model.first_stage_key, "first_stage_key of the model", _image_channels(model))]


def _image_channels(model: DDPM) -> int | None:
    """Return the number of channels of a model's images, or None if it is not known."""
    first_stage = getattr(model, "first_stage_model", None)
    if isinstance(first_stage, Autoencoder):
        return first_stage.encoder.conv_in.in_channels
    channels = getattr(model.model.diffusion_model, "out_channels", None)
    return channels if isinstance(channels, int) else None


def _target_entry(model: NoisyLatentImageClassifier) -> Entry:
    kind = Labels if model.label_key == CLASS_KEY else ClassMaps
    return kind(model.label_key, "label_key of the model", model.num_classes, "num_classes")


def _conditioning_entries(model: LatentDiffusion, present: Mapping[Any, Any]) -> list[Entry]:
    key, stage, role = model.cond_stage_key, model.cond_stage_model, "cond_stage_key of the model"
    if model.model.conditioning_key is None or CONDITIONING_KEY in present:
        return []
    if _is_foreign(type(stage)):
        return [Entry(key, role)]
    if key == CLASS_KEY:
        return [_label_entry(model, key, role)]
    if key == LAYOUT_KEY and hasattr(stage, "transformer"):
        size, length = stage.transformer.num_tokens, stage.transformer.max_seq_len
        return [Tokens(key, role, size, "vocab_size", length)]
    if key in TEXT_KEYS:
        reads_tokens = isinstance(stage, TransformerEmbedder) or not getattr(stage, "use_tknz_fn", True)
        return [Texts(key, role, reads_tokens)]
    if key == MASKED_KEY:
        return [Images(key, role, _image_channels(model)), Masks(MASK_KEY, f'mask of "{key}"', 1)]
    if isinstance(stage, Autoencoder):
        return [_image_entry(key, role, stage.encoder.conv_in.in_channels)]
    if key == LOW_RESOLUTION_KEY:
        return [Images(key, role, None)]
    if isinstance(stage, SpatialRescaler):
        return [Maps(key, role, None if stage.channel_mapper is None else stage.channel_mapper.in_channels)]
    return [Tensors(key, role)]


def _label_entry(model: LatentDiffusion, key: str, role: str) -> Entry:
    count: Any
    if isinstance(model.cond_stage_model, ClassEmbedder):
        count, source = model.cond_stage_model.n_classes, "n_classes"
    else:
        count, source = getattr(model.model.diffusion_model, "num_classes", None), "num_classes"
    if not isinstance(count, int):
        return Tensors(key, role)
    return Labels(key, role, count, source, count - 1 if model.cond_dropout > 0 else None)
