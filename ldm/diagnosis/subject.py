"""Model to diagnose: its configuration, checkpoint and some batches of its data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from ldm.config.instantiate import instantiate_from_config
from ldm.config.model_files import MODEL_FOLDERS, RUN_CHECKPOINTS, find_model, named_model
from ldm.errors import UserError
from ldm.io.checkpoint.loading import LOSS_PREFIXES, load_weights
from ldm.io.checkpoint.names import EMA_PREFIX
from ldm.io.checkpoint.reading import read_checkpoint, read_state_dict, training_step
from ldm.models.autoencoder import Autoencoder
from ldm.models.diffusion.ddpm import DDPM, LatentDiffusion
from ldm.training.batch_check import BatchCheck
from ldm.training.configuration import merged_configuration, plain, read_yaml
from ldm.training.run_folder import saved_configurations

DATA_NAME = "the data"


@dataclass(frozen=True)
class Files:
    """Files of a model: its name, checkpoint and merged configuration with `model`, and `data` if it is known."""

    name: str
    checkpoint: Path
    config: dict[str, Any]


def find_files(path: str, configs: Sequence[str] = (), data: str | None = None) -> Files:
    """Return the files of a run, a model folder or a checkpoint.

    Args:
        path: the log folder of a run, a model folder or its name, or a checkpoint.
        configs: configurations that replace those beside the checkpoint.
        data: a configuration with the section `data`, or a folder of images.

    Raises:
        UserError: a file does not exist or is invalid, or the configuration has no model.
    """
    given = Path(path)
    if given.is_file():
        checkpoint = given
        run = next((each.parent for each in given.resolve().parents if each.name == RUN_CHECKPOINTS), None)
    elif (given / RUN_CHECKPOINTS / "last.ckpt").is_file():
        checkpoint, run = given / RUN_CHECKPOINTS / "last.ckpt", given
    else:
        files = named_model(path, MODEL_FOLDERS)
        checkpoint, run = files.checkpoint, None
        configs = configs or [str(files.config)]
    layers = [Path(config) for config in configs] or (saved_configurations(run) if run else [])
    if not layers:
        layers = [find_model(ckpt=path, config=None, name=None).config]
    config = merged_configuration([read_yaml(layer) for layer in layers])
    if data is not None:
        config.pop("data", None)
        config["data"] = _data_config(data, config)
    if "model" not in config:
        raise UserError(f'the configuration "{layers[-1]}" has no "model:" section; name another one with --base')
    name = run.resolve().name if run is not None else checkpoint.stem
    return Files(name, checkpoint, plain(config))


def _data_config(data: str, config: Mapping[str, Any]) -> Any:
    """Return the section `data` of a configuration, or that of a folder of images."""
    if not Path(data).is_dir():
        section = read_yaml(Path(data)).get("data")
        if section is None:
            raise UserError(f'the configuration "{data}" has no "data:" section; add it, or name a folder of images')
        return section
    from ldm.config.model_config import ImageSize

    params = config["model"]["params"]
    size = params["ddconfig"]["resolution"] if "ddconfig" in params else ImageSize.of(config["model"]).height
    dataset = {"target": "ldm.data.folder.FolderValidation", "params": {"data_root": data, "size": size}}
    return {"target": "main.DataModuleFromConfig", "params": {"batch_size": 8, "num_workers": 0, "train": dataset}}


@dataclass
class Subject:
    """Model to diagnose.

    Attributes:
        name: its name.
        config: its configuration.
        model: the model with the weights of the checkpoint, in evaluation mode.
        state: the weights of the checkpoint.
        content: the other entries of the checkpoint.
        step: the training step of the checkpoint; 0 if it states none.
        missing: names of parameters and other weights that the checkpoint lacks.
        batches: batches of the data.
    """

    name: str
    config: Mapping[str, Any]
    model: Any
    state: Mapping[str, Tensor]
    content: Mapping[str, Any]
    step: int
    missing: tuple[str, ...]
    batches: list[dict[str, Any]] = field(default_factory=list)

    @property
    def first_stage(self) -> Autoencoder | None:
        """The autoencoder: the model itself, or its first stage; None if there is none."""
        stage = self.model if isinstance(self.model, Autoencoder) else getattr(self.model, "first_stage_model", None)
        return stage if isinstance(stage, Autoencoder) else None

    @property
    def params(self) -> Mapping[str, Any]:
        """Parameters of the model in its configuration."""
        return self.config["model"].get("params") or {}

    @cached_property
    def images(self) -> list[Tensor]:
        """Images (B, C, H, W) of the batches."""
        model = self.model
        if isinstance(model, LatentDiffusion):
            return [super(LatentDiffusion, model).get_input(batch, model.first_stage_key) for batch in self.batches]
        key = model.image_key if isinstance(model, Autoencoder) else model.first_stage_key
        return [model.get_input(batch, key).to(model.device) for batch in self.batches]


def load_subject(files: Files, items: int, batches: int, device: torch.device) -> Subject:
    """Build the model of some files, load its weights and some batches of its data.

    Args:
        files: the files.
        items: items of a batch.
        batches: number of batches.
        device: the device of the model.

    Raises:
        UserError: the checkpoint belongs to another model, the model cannot be diagnosed, or there is no data.
    """
    from ldm.training.assembly import remove_weights

    config = files.config
    remove_weights(config["model"])
    state = read_state_dict(files.checkpoint)
    content = {} if files.checkpoint.is_dir() else read_checkpoint(files.checkpoint)
    model = instantiate_from_config(config["model"])
    if not isinstance(model, Autoencoder | DDPM):
        raise UserError(f"{type(model).__name__} is neither a first stage nor a diffusion model, and is not diagnosed")
    missing = _missing(model, state)
    load_weights(model, state, missing, source=f'"{files.checkpoint}"')
    if not any(name.startswith(EMA_PREFIX) for name in state) and hasattr(model, "model_ema"):
        model.use_ema = False  # an exported model has one set of weights
    model = model.to(device).eval()
    subject = Subject(files.name, config, model, state, content, training_step(files.checkpoint), missing)
    subject.batches = _read_batches(config, model, items, batches)
    return subject


def _missing(model: nn.Module, state: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Return the names of parameters that a checkpoint lacks, besides moving averages and losses."""
    optional = (EMA_PREFIX, *LOSS_PREFIXES)
    return tuple(name for name, _ in model.named_parameters() if name not in state and not name.startswith(optional))


def _read_batches(config: Mapping[str, Any], model: nn.Module, items: int, count: int) -> list[dict[str, Any]]:
    """Return batches of the training data, spread evenly over it."""
    if "data" not in config:
        raise UserError("the configuration has no data; name a configuration or a folder of images with --data")
    params = {**config["data"].get("params", {}), "latent_cache": None}
    data = instantiate_from_config({**config["data"], "params": params})
    data.prepare_data()
    data.setup()
    dataset = data.datasets.get("train") or next(iter(data.datasets.values()), None)
    if dataset is None:
        raise UserError("the configuration has no data set; name one as data.params.train")
    if isinstance(dataset, IterableDataset):
        found = [item for item, _ in zip(dataset, range(items * count), strict=False)]
    else:
        number = min(items * count, max(len(dataset), items))
        found = [dataset[index * len(dataset) // number] for index in range(number)]
    collate, check = data.collate(DATA_NAME), BatchCheck(model)
    number = max(1, len(found) // items)  # each batch is spread over the data, which may be sorted by class
    batches = [collate(found[index::number][:items]) for index in range(number)]
    for batch in batches:
        check(batch, DATA_NAME, warn=False)
    return batches
