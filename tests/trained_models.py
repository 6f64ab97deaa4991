"""Tiny trained models, as runs on disk, to diagnose."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tiny_models import class_config, text_config

from ldm.config.instantiate import instantiate_from_config
from ldm.training.run_folder import save_configuration

SIZE = 16
DDCONFIG = text_config()["params"]["first_stage_config"]["params"]["ddconfig"]
LOSS = {"disc_start": 10, "perceptual_weight": 0.0, "disc_num_layers": 1}
STEP = 100


def write_images(folder: Path) -> Path:
    """Write eight images of two classes, bands of colours in two directions, and return their folder."""
    generator = np.random.default_rng(0)
    for number in range(8):
        name = "rows" if number % 2 else "columns"
        colours = generator.integers(0, 256, (4, 1, 3)).repeat(SIZE // 4, 0).repeat(SIZE, 1).astype(np.uint8)
        (folder / name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(colours if number % 2 else colours.transpose(1, 0, 2)).save(folder / name / f"{number}.png")
    return folder


def data_config(folder: Path) -> dict[str, Any]:
    """Return the section `data` for these images."""
    dataset = {
        "target": "ldm.data.folder.FolderValidation",
        "params": {"data_root": str(folder), "size": SIZE, "label": "folder"},
    }
    return {"target": "main.DataModuleFromConfig", "params": {"batch_size": 4, "num_workers": 0, "train": dataset}}


def first_stage_config(kind: str = "AutoencoderKL") -> dict[str, Any]:
    """Return the configuration of a first stage with a discriminator."""
    is_vq = kind == "VQModel"
    loss = "vqperceptual.VQLPIPSWithDiscriminator" if is_vq else "LPIPSWithDiscriminator"
    params: dict[str, Any] = {
        "embed_dim": 3,
        "ddconfig": {**DDCONFIG, "double_z": not is_vq},
        "lossconfig": {"target": f"ldm.modules.losses.{loss}", "params": dict(LOSS)},
    }
    if is_vq:
        params["n_embed"] = 32
    return {"target": f"ldm.models.autoencoder.{kind}", "params": params}


def batch_of(data: dict[str, Any]) -> dict[str, Any]:
    """Return all images of the data as one batch."""
    module = instantiate_from_config(data)
    module.setup()
    return module.collate("train")([module.datasets["train"][index] for index in range(8)])


def train_first_stage(config: dict[str, Any], batch: dict[str, Any], steps: int) -> torch.nn.Module:
    """Return a first stage that reconstructs the batch."""
    torch.manual_seed(0)
    model = instantiate_from_config(config)
    optimizer = torch.optim.Adam(model.optimizer_parameters()[0], lr=4e-3)
    for _ in range(steps):
        rec = model.reconstruct(batch)
        loss = (rec.inputs - rec.outputs).abs().mean()
        if isinstance(rec.regularizer, torch.Tensor):
            loss = loss + rec.regularizer
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for module in model.loss.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.num_batches_tracked.fill_(STEP)
    return model


def train_diffusion(
    first_stage: torch.nn.Module, batch: dict[str, Any], steps: int
) -> tuple[dict[str, Any], torch.nn.Module]:
    """Return the configuration of a class-conditional model with this first stage, and the trained model."""
    stage = first_stage_config()
    stage["params"]["lossconfig"] = {"target": "torch.nn.Identity"}
    with torch.no_grad():
        z = first_stage.encode(first_stage.get_input(batch, "image")).sample()
    config = class_config(3, first_stage_config=stage, use_ema=True, cond_dropout=0.1, scale_factor=1 / float(z.std()))
    torch.manual_seed(0)
    model = instantiate_from_config(config)
    model.first_stage_model.load_state_dict(first_stage.state_dict(), strict=False)
    optimizer = torch.optim.AdamW(model.optimizer_parameters(), lr=2e-3)
    for _ in range(steps):
        loss, _ = model.shared_step(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.update_ema()
    return config, model


class HalfRange(torch.utils.data.Dataset):
    """The images of `FolderValidation` in [0, 1]."""

    def __init__(self, **params):
        self.images = instantiate_from_config({"target": "ldm.data.folder.FolderValidation", "params": params})

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        item = self.images[index]
        return {**item, "image": (item["image"] + 1) / 2}


@dataclass
class Run:
    """Run on disk with a trained model; tests change its parts and save it again."""

    folder: Path
    model_config: dict[str, Any]
    data: dict[str, Any]
    state: dict[str, torch.Tensor]
    step: int = STEP

    def copied(self, folder: Path) -> Run:
        """Return a copy for another folder."""
        state = {name: value.clone() for name, value in self.state.items()}
        return Run(folder, copy.deepcopy(self.model_config), copy.deepcopy(self.data), state, self.step)

    def save(self) -> str:
        """Write the run and return its folder."""
        (self.folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        content = {"state_dict": self.state, "global_step": self.step, "epoch": 0}
        torch.save(content, self.folder / "checkpoints" / "last.ckpt")
        project = {"model": {"base_learning_rate": 1e-3, **self.model_config}, "data": self.data}
        (self.folder / "configs").mkdir(exist_ok=True)
        save_configuration(self.folder / "configs", "2026-01-01T00-00-00", {"project": project})
        return str(self.folder)
