"""Write a model in the form of diffusers: the parts of its folder, their configurations and weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.errors import UserError
from ldm.io.diffusers import autoencoder, files, pipeline, scheduler, text_encoder, unet

if TYPE_CHECKING:
    from torch import Tensor

    from ldm.io.diffusers.translation import Layer

VERSION = {"_diffusers_version": "0.42.0"}  # whose names and options this package writes
ABSENT = [None, None]  # class of a part that a pipeline can have, and this one lacks
TOKENIZERS = {text_encoder.CLIP: "CLIPTokenizer", text_encoder.LDM_BERT: "BertTokenizer"}
LIBRARIES = {text_encoder.CLIP: "transformers", text_encoder.LDM_BERT: "latent_diffusion"}
# Classes of the models that diffusers has, and their pipelines.
LATENT, INPAINTING, UPSCALING = (
    f"{pipeline.DDPM}.{name}" for name in ("LatentDiffusion", "LatentInpaintDiffusion", "LatentUpscaleDiffusion")
)
STABLE_DIFFUSION = {
    LATENT: "StableDiffusionPipeline",
    INPAINTING: "StableDiffusionInpaintPipeline",
    UPSCALING: pipeline.UPSCALER,
}
CONDITIONING_KEYS = {LATENT: "crossattn", INPAINTING: "hybrid", UPSCALING: "hybrid-adm"}


@dataclass(frozen=True)
class Network:
    """Network of a folder.

    Attributes:
        folder: its folder, "" for that of the model.
        class_name: its class in diffusers or transformers.
        config: its configuration.
        prefix: prefix of the names of its weights here.
        layers: table of its layers.
    """

    folder: str
    class_name: str
    config: dict[str, Any]
    prefix: str
    layers: list[Layer]

    @property
    def is_text_encoder(self) -> bool:
        """True for a network of transformers."""
        return self.folder in files.TEXT_ENCODERS

    def weights(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the weights of this network in the form of diffusers from those of the whole model.

        Raises:
            UserError: diffusers has no such weight.
        """
        from ldm.io.diffusers.translation import Translation

        own = {name.removeprefix(self.prefix): v for name, v in state_dict.items() if name.startswith(self.prefix)}
        own = {name: value for name, value in own.items() if not name.startswith("loss.")}
        if self.is_text_encoder and self.class_name == text_encoder.CLIP:
            own = self._conditioning_weights(own)
        try:
            return Translation(self.layers).to_theirs(own)
        except KeyError as error:
            raise UserError(f"diffusers has no weight like {self.prefix}{error.args[0]}") from None

    def _conditioning_weights(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the weights of a text encoder without those that condition nothing, such as the last block."""
        count = self.config["num_hidden_layers"]
        blocks = tuple(f"model.transformer.resblocks.{i}." for i in range(count, text_encoder.MAX_LAYERS))
        unused = tuple(f"model.{name}" for name in text_encoder.UNUSED) + blocks
        return {name: value for name, value in weights.items() if not name.startswith(unused)}


@dataclass(frozen=True)
class Plan:
    """Content of a folder.

    Attributes:
        index: entries of `model_index.json`; None for a network alone.
        networks: the networks.
        schedulers: configuration of each scheduler, by its folder.
    """

    index: dict[str, Any] | None
    networks: list[Network]
    schedulers: dict[str, dict[str, Any]]


def plan(config: Mapping[str, Any], scale_factor: float = 1.0, text_sizes: Mapping[str, Any] | None = None) -> Plan:
    """Return the content of the folder for a model.

    Args:
        config: target and parameters of the model.
        scale_factor: factor of its latents.
        text_sizes: sizes of its text encoder, see `text_encoder.theirs`.

    Raises:
        UserError: diffusers has no such model; the message states the reason.
    """
    params = config["params"]
    if "ddconfig" in params:
        return Plan(None, [_first_stage("", "", config, 1.0)], {})
    if "unet_config" not in params or "first_stage_config" not in params:
        raise UserError(f"diffusers has no model like {config['target']}; it has latent diffusion models")
    kind = _pipeline(config, scale_factor)
    stage = "vae" if kind.startswith("Stable") else "vqvae"
    network = params["unet_config"]["params"]
    networks = [
        _first_stage(stage, pipeline.FIRST_STAGE_PREFIX, params["first_stage_config"], scale_factor),
        Network(
            files.UNET,
            unet.theirs(network)["_class_name"],
            unet.theirs(network),
            pipeline.UNET_PREFIX,
            unet.layers(network),
        ),
    ]
    index: dict[str, Any] = {"_class_name": kind}
    if text_sizes is not None:
        networks.append(_text_encoder(kind, params["cond_stage_config"], text_sizes))
        index[files.TOKENIZER] = ["transformers", TOKENIZERS[networks[-1].class_name]]
    schedulers = {files.SCHEDULER: scheduler.theirs(params)}
    if kind == pipeline.UPSCALER:
        low_scale = params["low_scale_config"]["params"]
        small = scheduler.theirs(low_scale["noise_schedule_config"])
        schedulers[files.SMALL_SCHEDULER] = {**small, "_class_name": "DDPMScheduler"}
        index |= {"max_noise_level": low_scale.get("max_noise_level", 1000)}
    for part in networks:
        index[part.folder] = [LIBRARIES.get(part.class_name, "diffusers"), part.class_name]
    index |= {name: ["diffusers", each["_class_name"]] for name, each in schedulers.items()}
    if kind.startswith("Stable"):
        index |= {"safety_checker": ABSENT, "feature_extractor": ABSENT}
        index |= {"watermarker": ABSENT} if kind == pipeline.UPSCALER else {"requires_safety_checker": False}
    return Plan(index, networks, schedulers)


def _pipeline(config: Mapping[str, Any], scale_factor: float) -> str:
    """Return the pipeline of diffusers for a model, by its conditioning.

    Raises:
        UserError: there is none.
    """
    params, target = config["params"], config["target"]
    stage = params.get("cond_stage_config")
    default = "concat" if params.get("concat_mode", True) else "crossattn"
    key = params.get("conditioning_key") or default
    if stage == "__is_unconditional__" and target == LATENT:
        return "LDMPipeline"
    encoder = stage.get("target") if isinstance(stage, Mapping) else stage
    if encoder == text_encoder.BERT_EMBEDDER and target == LATENT and key == "crossattn":
        if stage["params"].get("use_tokenizer", True):
            return "LDMTextToImagePipeline"
    elif encoder in text_encoder.EMBEDDERS and CONDITIONING_KEYS.get(target) == key:
        if (stage.get("params") or {}).get("layer", "last") in ("last", "penultimate"):
            return STABLE_DIFFUSION[target]
        raise UserError("the text encoder of the model has another layer than those of diffusers' pipelines")
    elif encoder == "torch.nn.Identity" and (params.get("cond_stage_key"), key) == ("LR_image", "concat"):
        if scale_factor == 1.0:
            return pipeline.SUPER_RESOLUTION
        raise UserError(f"the latents have the factor {scale_factor:g}; diffusers' super-resolution pipeline has none")
    condition = params.get("cond_stage_key", "image")
    raise UserError(f'diffusers has no pipeline for a {target.rpartition(".")[2]} that is conditioned on "{condition}"')


def _first_stage(folder: str, prefix: str, stage: Mapping[str, Any], scale_factor: float) -> Network:
    config = autoencoder.theirs(stage, scale_factor)
    layers = autoencoder.layers(stage["params"]["ddconfig"])
    return Network(folder, config["_class_name"], config, prefix, layers)


def _text_encoder(kind: str, stage: Mapping[str, Any], sizes: Mapping[str, Any]) -> Network:
    config = text_encoder.theirs(stage["target"], sizes)
    folder = "text_encoder" if kind.startswith("Stable") else "bert"
    layers = text_encoder.layers(stage["target"], stage.get("params"))
    return Network(folder, config["architectures"][0], config, pipeline.COND_STAGE_PREFIX, layers)


def write(
    folder: Path,
    content: Plan,
    state_dict: Mapping[str, Tensor],
    change: Callable[[str, Tensor], Tensor],
    metadata: Mapping[str, Any],
) -> None:
    """Write the networks and schedulers of a model to `folder`, which is created.

    Args:
        folder: the folder.
        content: its content.
        state_dict: the weights of the model under our names.
        change: function of a weight's name and value, such as a conversion to half precision.
        metadata: entries for the headers of the files of weights.
    """
    from ldm.io.checkpoint.writing import save_safetensors

    for network in content.networks:
        place = folder / network.folder
        place.mkdir(parents=True, exist_ok=True)
        write_json(place / files.CONFIG, network.config if network.is_text_encoder else {**VERSION, **network.config})
        weights = {name: change(name, value) for name, value in network.weights(state_dict).items()}
        stem = files.STEMS[1 if network.is_text_encoder else 0]
        save_safetensors(weights, place / f"{stem}.safetensors", metadata)
    for name, config in content.schedulers.items():
        (folder / name).mkdir()
        write_json(folder / name / files.SCHEDULER_CONFIG, {**VERSION, **config})
    if content.index is not None:
        write_json(folder / files.INDEX, {**VERSION, **content.index})


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a configuration in the layout of diffusers."""
    path.write_text(json.dumps(dict(content), indent=2, sort_keys=True) + "\n", encoding="utf-8")


def record(folder: Path, facts: Mapping[str, Any]) -> None:
    """Add facts about the origin of a model to its configuration; diffusers passes over names that begin with "_"."""
    path = files.config_file(folder)
    write_json(path, {**json.loads(path.read_text(encoding="utf-8")), "_ldm": dict(facts)})
