"""Training runs of tiny models of Stable Diffusion, with additions such as a LoRA."""

from __future__ import annotations

import numpy as np
import torch
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import save_file
from tiny_models import make_model
from tiny_stable_diffusion import v1_config, v2_config
from torch.utils.data import default_collate

import main
from ldm.config.instantiate import instantiate_from_config
from ldm.io.checkpoint.reading import read_state_dict

QUIET = ["--enable_progress_bar", "false", "--enable_model_summary", "false", "--no-test", "--scale_lr", "false"]
LORA = {"target": "ldm.modules.lora.LoRA", "params": {"rank": 2, "alpha": 4}}
WORDS = {
    "target": "ldm.modules.embedding_manager.EmbeddingManager",
    "params": {"placeholder_strings": ["<cat-toy>"], "initializer_words": ["cat"], "num_vectors_per_token": 2},
}
VECTORS = "cond_stage_model.embedding_manager.vectors.0"
FIRST_LAYER = "model.diffusion_model.input_blocks.0.0.weight"
CAPTIONS = ("cat", "a cat", "b cat", "cat c")


def single(version, folder):
    """Return the configuration of a tiny Stable Diffusion in float32."""
    config = (v1_config if version == 1 else v2_config)(folder)
    config["params"]["unet_config"]["params"]["use_fp16"] = False
    config["params"] |= {"first_stage_key": "image", "cond_stage_key": "caption"}
    return config


def write_images(folder):
    """Write four images with captions to a folder; return it."""
    folder.mkdir()
    random = np.random.default_rng(0)
    for index, caption in enumerate(CAPTIONS):
        pixels = np.full((20, 16, 3), random.integers(0, 256, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text(caption)
    return folder


def captioned(images):
    """Return the configuration of the images with their captions."""
    return {
        "target": "ldm.data.folder.FolderTrain",
        "params": {"data_root": str(images), "size": 16, "caption": "txt", "flip_p": 0.0, "crop": "center"},
    }


def personalized(images):
    """Return the configuration of the images with captions of a new word."""
    params = {"data_root": str(images), "size": 16, "repeats": 4, "flip_p": 0.0, "placeholder_token": "<cat-toy>"}
    return {
        "target": "ldm.data.personalized.PersonalizedBase",
        "params": {**params, "center_crop": True, "templates": ["a {}", "my {} b"]},
    }


def masked(images):
    """Return the configuration of the images with captions and random masks."""
    return {"target": "ldm.data.text_inpainting.MaskedImages", "params": {"dataset": captioned(images)}}


class Runs:
    """Runs of the training command in one folder."""

    def __init__(self, folder):
        self.folder = folder

    def weights(self, config, name="weights.ckpt", change=lambda value: value):
        """Write random weights for a configuration; return the file and the values that it contains."""
        model = make_model(config)
        values = {name: change(value) for name, value in model.state_dict().items()}
        path = self.folder / name
        if path.suffix == ".safetensors":
            save_file({key: value.contiguous() for key, value in values.items()}, path)
        else:
            torch.save({"state_dict": values}, path)
        return path, values

    def write(self, config, data, **trainer):
        content = {
            "model": {"base_learning_rate": 1e-3, **config},
            "data": {
                "target": "main.DataModuleFromConfig",
                "params": {"batch_size": 2, "num_workers": 0, "train": data},
            },
            "lightning": {
                "trainer": {"max_steps": 20, **trainer},
                "callbacks": {"image_logger": {"params": {"disabled": True}}},
            },
        }
        path = self.folder / "run.yaml"
        OmegaConf.save(OmegaConf.create(content), path)
        return path

    def start(self, *arguments, logs="logs"):
        return main.main(["-t", *QUIET, "-l", str(self.folder / logs), *map(str, arguments)])

    def train(self, config, data, *arguments, logs="logs", **trainer):
        """Train; return the folder of the run and the weights of its last checkpoint."""
        path = self.write(config, data, **trainer)
        assert self.start("-b", path, *arguments, logs=logs) == 0
        (run,) = (self.folder / logs).iterdir()
        return run, read_state_dict(run / "checkpoints" / "last.ckpt")


def changed(before, after):
    """Return the names of the weights that training has changed."""
    return {name for name, value in before.items() if not torch.equal(value, after[name])}


def loss(config, weights, dataset):
    """Return the loss of a model with given weights, averaged over noises and timesteps that are always the same."""
    params = {**config["params"], "ckpt_path": None, "embedding_manager_ckpt": None}
    model = instantiate_from_config({**config, "params": params})
    model.load_state_dict(weights, strict=False)
    model.cond_stage_model.has_weights = True
    items = instantiate_from_config(dataset)
    torch.manual_seed(0)
    batch = default_collate([items[index] for index in range(4)])
    with torch.no_grad():
        return float(torch.stack([model.shared_step(batch)[0] for _ in range(16)]).mean())


def named(prefix, weights):
    """Return the names that begin with a prefix."""
    return {name for name in weights if name.startswith(prefix)}


def lora_config(runs, folder, version=1, **params):
    """Return the configuration of a run that trains a LoRA, and the weights that it starts from."""
    config = single(version, folder)
    path, before = runs.weights(config)
    config["params"] |= {"lora_config": LORA, "ckpt_path": str(path), **params}
    return config, before


def write_base(config, folder):
    """Write the configuration without additions; return its path."""
    params = {name: value for name, value in config["params"].items() if name not in ("lora_config", "ckpt_path")}
    OmegaConf.save(OmegaConf.create({"model": {**config, "params": params}}), folder / "base.yaml")
    return folder / "base.yaml"


@torch.no_grad()
def prediction(model):
    """Return the output of the network for fixed inputs."""
    generator = torch.Generator().manual_seed(3)
    z = torch.randn(2, 4, 8, 8, generator=generator)
    context = torch.randn(2, 77, 16, generator=generator)
    return model.eval().apply_model(z, torch.tensor([10, 700]), context)


def errors(capsys):
    """Return the lines of errors that a command has printed."""
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]


def assert_refused(runs, config, data, message, capsys):
    """Assert that a run ends with an error of one line, and writes nothing."""
    assert runs.start("-b", runs.write(config, data)) == 2
    (error,) = errors(capsys)
    assert error.startswith(f"error: {message}")
    assert not list((runs.folder / "logs").glob("*")), "nothing is written"


def words_config(runs, folder, version=1, **params):
    """Return the configuration of a run that trains vectors of a new word, and the weights that it starts from."""
    config = single(version, folder)
    path, before = runs.weights(config)
    config["params"] |= {"personalization_config": WORDS, "ckpt_path": str(path), **params}
    return config, before
