"""Whole models of diffusers: Stable Diffusion 1 and 2, latent diffusion models, and first stages alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.errors import UserError
from ldm.io.diffusers import autoencoder, files, scheduler, text_encoder, unet
from ldm.io.diffusers.entries import check_types, read_json

if TYPE_CHECKING:
    from torch import Tensor

    from ldm.io.diffusers.translation import Layer

DDPM = "ldm.models.diffusion.ddpm"
UPSCALER, SUPER_RESOLUTION = "StableDiffusionUpscalePipeline", "LDMSuperResolutionPipeline"
SUPPORTED = (
    "StableDiffusionPipeline",
    "StableDiffusionInpaintPipeline",
    UPSCALER,
    "LDMPipeline",
    "LDMTextToImagePipeline",
    SUPER_RESOLUTION,
)
# Parts of a pipeline without weights that a model needs.
OTHER_PARTS = ("safety_checker", "feature_extractor", "image_encoder", "watermarker")
MAX_NOISE_LEVEL = 350  # diffusers' default for the upscaler
UNET_PREFIX, FIRST_STAGE_PREFIX, COND_STAGE_PREFIX = "model.diffusion_model.", "first_stage_model.", "cond_stage_model."


class Pipeline:
    """Folder of a whole model: the names of its parts, and their configurations.

    Args:
        folder: the folder with `model_index.json`.

    Raises:
        UserError: a file is missing or damaged, or the model has parts that this package does not implement.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.index = read_json(folder / files.INDEX)
        self.kind = self.index.get("_class_name")
        given = {name for name, entry in self.index.items() if isinstance(entry, list) and entry[-1:] != [None]}
        stages = [name for name in files.FIRST_STAGES if name in given]
        texts = [name for name in files.TEXT_ENCODERS if name in given]
        known = {files.UNET, *stages, *texts, files.TOKENIZER, files.SCHEDULER, files.SMALL_SCHEDULER, *OTHER_PARTS}
        if not {files.UNET, files.SCHEDULER} <= given or len(stages) != 1 or len(texts) > 1 or given - known:
            raise self.not_implemented()
        self.first_stage = stages[0]
        self.text_encoder = texts[0] if texts else None

    def not_implemented(self) -> UserError:
        """Return the error for a model that this package does not implement."""
        return UserError(
            f'"{self.folder}" is a {self.kind} of diffusers, which this package does not implement; '
            f"it implements {', '.join(SUPPORTED)}"
        )

    def path(self, part: str) -> Path:
        """Return the file with the configuration of a part."""
        name = files.SCHEDULER_CONFIG if part in (files.SCHEDULER, files.SMALL_SCHEDULER) else files.CONFIG
        return self.folder / part / name

    def config(self, part: str) -> tuple[dict[str, Any], str]:
        """Return the configuration of a part, and the name of its file for messages.

        Raises:
            UserError: the file is missing or damaged.
        """
        config, where = read_json(self.path(part)), f'"{self.path(part)}"'
        check_types(config, where)
        return config, where

    @property
    def tokenizer(self) -> str | None:
        """Folder of the vocabulary; None if the model has none."""
        folder = self.folder / files.TOKENIZER
        return str(folder) if folder.is_dir() else None


# -- configuration -----------------------------------------------------------------------------------------------


def model_config(folder: Path) -> dict[str, Any]:
    """Return target and parameters of the model in a folder.

    Args:
        folder: a pipeline, with `model_index.json`, or a first stage alone, with `config.json`.

    Raises:
        UserError: a file is missing or damaged, or the model has parts that this package does not implement.
    """
    if not (folder / files.INDEX).is_file():
        return _first_stage_alone(folder)
    pipeline = Pipeline(folder)
    params = _shared_params(pipeline)
    if pipeline.text_encoder is None:
        return {"target": f"{DDPM}.LatentDiffusion", "params": params | _image_params(pipeline, params)}
    params["cond_stage_config"] = text_encoder.ours(*pipeline.config(pipeline.text_encoder), pipeline.tokenizer)
    context = params["unet_config"]["params"].get("context_dim")
    _check_fit(pipeline, pipeline.text_encoder, "context", text_encoder.width(params["cond_stage_config"]), context)
    if params["cond_stage_config"]["target"] == text_encoder.BERT_EMBEDDER:
        text_params = {"cond_stage_key": "caption", "cond_stage_trainable": True, "conditioning_key": "crossattn"}
        return {"target": f"{DDPM}.LatentDiffusion", "params": params | text_params}
    return _stable_diffusion(pipeline, params)


def _first_stage_alone(folder: Path) -> dict[str, Any]:
    path = folder / files.CONFIG
    config = read_json(path)
    kind = config.get("_class_name", (config.get("architectures") or ["network"])[0])
    if kind not in autoencoder.TARGETS:
        raise UserError(f'"{folder}" is a {kind}, only a part of a model; give the folder with {files.INDEX}')
    check_types(config, f'"{path}"')
    return autoencoder.ours(config, f'"{path}"')


def _shared_params(pipeline: Pipeline) -> dict[str, Any]:
    """Return the parameters that all models have: schedule, network and first stage."""
    stage, where = pipeline.config(pipeline.first_stage)
    first_stage = autoencoder.ours(stage, where, inner=True)
    network, network_file = pipeline.config(files.UNET)
    network_params = unet.ours(network, network_file)
    latent = first_stage["params"]["embed_dim"]
    _check_fit(pipeline, pipeline.first_stage, "latents", latent, network_params["out_channels"])
    # The super-resolution pipeline of diffusers does not scale latents.
    scale = 1.0 if pipeline.kind == SUPER_RESOLUTION else autoencoder.scale_factor(stage)
    return {
        **scheduler.ours(*pipeline.config(files.SCHEDULER)),
        "num_timesteps_cond": 1,
        "log_every_t": 200,
        "first_stage_key": "image",
        "image_size": network_params["image_size"],
        "channels": network_params["out_channels"],
        "scale_factor": scale,
        "use_ema": False,
        "unet_config": {"target": unet.TARGET, "params": network_params},
        "first_stage_config": first_stage,
    }


def _check_fit(pipeline: Pipeline, part: str, what: str, channels: Any, expected: Any) -> None:
    """Raise an error if a part has other channels than the network expects. None is a number that is not stated.

    Raises:
        UserError: they differ.
    """
    if None not in (channels, expected) and channels != expected:
        raise UserError(
            f'"{pipeline.folder}": {part} has {channels} channels of {what}, and {files.UNET} expects {expected}; '
            "choose parts of the same model"
        )


def _image_params(pipeline: Pipeline, params: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parameters of a model that is unconditional, or conditioned on a small image."""
    extra = params["unet_config"]["params"]["in_channels"] - params["channels"]
    if extra == 0:
        return {"cond_stage_config": "__is_unconditional__", "cond_stage_key": "class_label", "conditioning_key": None}
    if pipeline.kind != SUPER_RESOLUTION or extra != 3:
        raise pipeline.not_implemented()
    identity = {"target": "torch.nn.Identity"}
    return {"cond_stage_config": identity, "cond_stage_key": "LR_image", "conditioning_key": "concat"}


def _stable_diffusion(pipeline: Pipeline, params: dict[str, Any]) -> dict[str, Any]:
    """Return target and parameters of a Stable Diffusion model, by the channels of its network."""
    network = params["unet_config"]["params"]
    extra = network["in_channels"] - params["channels"]
    params |= {
        "first_stage_key": "jpg",
        "cond_stage_key": "txt",
        "cond_stage_trainable": False,
        "conditioning_key": "hybrid" if extra else "crossattn",
    }
    if pipeline.kind == UPSCALER and extra == 3 and network.get("num_classes"):
        params |= {"conditioning_key": "hybrid-adm", "low_scale_key": "lr", "low_scale_config": _low_scale(pipeline)}
        return {"target": f"{DDPM}.LatentUpscaleDiffusion", "params": params}
    if network.get("num_classes") or extra not in (0, params["channels"] + 1):
        raise pipeline.not_implemented()
    if extra:
        return {"target": f"{DDPM}.LatentInpaintDiffusion", "params": {**params, "finetune_keys": None}}
    return {"target": f"{DDPM}.LatentDiffusion", "params": params}


def _low_scale(pipeline: Pipeline) -> dict[str, Any]:
    """Return target and parameters of the noise augmentation of an upscaler."""
    params = scheduler.ours(*pipeline.config(files.SMALL_SCHEDULER))
    known = ("beta_schedule", "timesteps", "linear_start", "linear_end")
    return {
        "target": "ldm.modules.diffusionmodules.upscaling.ImageConcatWithNoiseAugmentation",
        "params": {
            "noise_schedule_config": {key: params[key] for key in known if key in params},
            "max_noise_level": pipeline.index.get("max_noise_level", MAX_NOISE_LEVEL),
        },
    }


def stated_scale(folder: Path) -> float | None:
    """Return the factor of the latents that a folder with an `AutoencoderKL` states; None if it states none."""
    path = next((each for name in ("", *files.FIRST_STAGES) if (each := folder / name / files.CONFIG).is_file()), None)
    config = {} if path is None else read_json(path)
    check_types(config, f'"{path}"')
    return config.get("scaling_factor") if config.get("_class_name") == autoencoder.KL else None


# -- weights -----------------------------------------------------------------------------------------------------


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Return the weights of the model in a folder under our names.

    Raises:
        UserError: a file is missing or damaged, or the model has parts that this package does not implement.
    """
    from ldm.io.checkpoint.reading import read_state_dict
    from ldm.io.diffusers.translation import Translation

    weights: dict[str, Tensor] = {}
    for part, prefix, layers in _networks(folder):
        given: dict[str, Tensor] = {}
        for file in files.weights_files(part):
            given |= read_state_dict(file)
        given = text_encoder.without_unused(given) if prefix == COND_STAGE_PREFIX else given
        weights |= {prefix + name: value for name, value in Translation(layers).to_ours(given).items()}
    return weights


def _networks(folder: Path) -> Iterator[tuple[Path, str, list[Layer]]]:
    """Yield the folder of each network, the prefix of its weights in the whole model, and its layers."""
    config = model_config(folder)
    params = config["params"]
    if not (folder / files.INDEX).is_file():
        yield folder, "", autoencoder.layers(params["ddconfig"])
        return
    pipeline = Pipeline(folder)
    yield folder / files.UNET, UNET_PREFIX, unet.layers(params["unet_config"]["params"])
    ddconfig = params["first_stage_config"]["params"]["ddconfig"]
    yield folder / pipeline.first_stage, FIRST_STAGE_PREFIX, autoencoder.layers(ddconfig)
    if pipeline.text_encoder is not None:
        stage = params["cond_stage_config"]
        yield folder / pipeline.text_encoder, COND_STAGE_PREFIX, text_encoder.layers(stage["target"], stage["params"])
