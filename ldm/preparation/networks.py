"""Networks of a recipe: first stage and denoising network, sized to the images, their number and the machine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ldm.config.model_config import read_config
from ldm.config.model_files import MODEL_FOLDERS, named_model
from ldm.errors import UserError
from ldm.preparation.machine import GIGABYTE, Machine

KL = "ldm.models.autoencoder.AutoencoderKL"
VQ = "ldm.models.autoencoder.VQModel"
VQ_INTERFACE = "ldm.models.autoencoder.VQModelInterface"  # of a VQModel inside a diffusion model
UNET = "ldm.modules.diffusionmodules.openaimodel.UNetModel"
LARGEST_OF_FACTOR_4 = 96  # pixels; larger images get latents of an eighth of their side
LATENT_CHANNELS = 4
DOWNSCALING = 4  # of super-resolution


@dataclass(frozen=True)
class FirstStage:
    """First stage of a recipe.

    Attributes:
        target: its class for training.
        params: its parameters without loss and weights.
        weights: weights to start from; None for a new one.
        name: name of the model that these belong to.
    """

    target: str
    params: Mapping[str, Any]
    weights: Path | None = None
    name: str = ""

    @property
    def factor(self) -> int:
        """Pixels of a latent position along each side."""
        return 2 ** (len(self.params["ddconfig"]["ch_mult"]) - 1)

    @property
    def channels(self) -> int:
        """Channels of the latents."""
        return self.params["embed_dim"]

    @property
    def is_kl(self) -> bool:
        """True for an autoencoder with a KL term, False for one with a codebook."""
        return self.target == KL

    @property
    def inner_target(self) -> str:
        """Class inside a diffusion model."""
        return KL if self.is_kl else VQ_INTERFACE


def new_first_stage(size: int, machine: Machine, quick: bool = False) -> FirstStage:
    """Return a first stage for images of `size` pixels."""
    factor = 4 if size <= LARGEST_OF_FACTOR_4 else 8
    width = 128 if machine.gpu_memory >= 20 * GIGABYTE else 64 if machine.has_gpu else 32
    ddconfig = {
        "double_z": True,
        "z_channels": LATENT_CHANNELS,
        "resolution": size,
        "in_channels": 3,
        "out_ch": 3,
        "ch": 32 if quick else width,
        "ch_mult": [1, 2, 4] if factor == 4 else [1, 2, 4, 4],
        "num_res_blocks": 2 if machine.has_gpu and not quick else 1,
        "attn_resolutions": [],
        "dropout": 0.0,
    }
    return FirstStage(KL, {"embed_dim": LATENT_CHANNELS, "ddconfig": ddconfig})


def known_first_stage(name: str) -> FirstStage:
    """Return the first stage called `name`, or that of the diffusion model called `name`.

    Raises:
        UserError: there is no such model, or it has no autoencoder that can be trained here.
    """
    files = named_model(name, MODEL_FOLDERS)
    config: Mapping[str, Any] = read_config(files.config)
    inner = config["params"].get("first_stage_config")
    config = inner if isinstance(inner, Mapping) else config
    target = {VQ_INTERFACE: VQ}.get(str(config.get("target")), str(config.get("target")))
    params = config.get("params")
    if target not in (KL, VQ) or not isinstance(params, Mapping) or "ddconfig" not in params:
        raise UserError(f'--first-stage "{name}" is neither an AutoencoderKL nor a VQModel; name another model')
    used = {key: params[key] for key in ("embed_dim", "n_embed", "ddconfig") if key in params}
    return FirstStage(target, used, files.checkpoint.resolve(), name)


@dataclass(frozen=True)
class Denoiser:
    """Denoising network of a recipe.

    Attributes:
        params: parameters of the `UNetModel`.
        conditioning: parameters of the diffusion model that belong to the task.
        context: channels of a context that it attends to; 0 without one.
        notes: comments on some parameters.
    """

    params: Mapping[str, Any]
    conditioning: Mapping[str, Any]
    context: int = 0
    notes: Mapping[str, str] = field(default_factory=dict)

    @property
    def multiple(self) -> int:
        """Number that the side of the latents must be a multiple of."""
        return 2 ** (len(self.params["channel_mult"]) - 1)


def make_denoiser(
    task: str, size: int, stage: FirstStage, count: int, machine: Machine, quick: bool = False
) -> Denoiser:
    """Return the denoising network for a task.

    Args:
        task: see `recipes.TASKS`.
        size: side of the images in pixels.
        stage: the first stage.
        count: number of images.
        machine: the machine that trains it.
        quick: use a network for a trial of minutes.

    Raises:
        UserError: the task does not work with this first stage.
    """
    side = size // stage.factor
    levels, attention = _levels(side)
    width = 32 if quick else _width(count, machine)
    context = {"text": 2 * width, "class": width}.get(task, 0)
    channels, notes = stage.channels, {}
    conditioning: dict[str, Any] = {}
    if task == "inpainting":
        channels = 2 * stage.channels + 1
        notes["in_channels"] = "the latents, the latents of the masked image, and the mask"
        conditioning = {"concat_mode": True, "cond_stage_config": "__is_first_stage__"}
    elif task == "superres":
        channels, stage_config = _small_image(stage)
        notes["in_channels"] = "the latents, and the small image"
        conditioning = {"concat_mode": True, "cond_stage_config": stage_config}
    elif task == "unconditional":
        conditioning = {"cond_stage_config": "__is_unconditional__"}
    params: dict[str, Any] = {
        "image_size": side,
        "in_channels": channels,
        "out_channels": stage.channels,
        "model_channels": width,
        "attention_resolutions": attention,
        "num_res_blocks": 2 if machine.has_gpu and not quick else 1,
        "channel_mult": levels,
        "num_head_channels": 32,
        "legacy": False,
    }
    if context:
        params |= {"use_spatial_transformer": True, "transformer_depth": 1, "context_dim": context}
    return Denoiser(params, conditioning, context, notes)


def _levels(side: int) -> tuple[list[int], list[int]]:
    """Return the multipliers of the channels, and the reductions with attention, for latents of this side."""
    if side < 16:
        return [1, 2], [1, 2]
    if side < 32:
        return [1, 2, 3], [1, 2, 4]
    return [1, 2, 3, 4], [2, 4, 8]


def _width(count: int, machine: Machine) -> int:
    """Return the channels at the first level: more for more images, fewer for little memory."""
    by_images = 96 if count < 2_000 else 128 if count < 20_000 else 192 if count < 200_000 else 256
    memory = machine.gpu_memory / GIGABYTE
    by_memory = 64 if not machine.has_gpu else 128 if memory < 11 else 192 if memory < 22 else 256
    return min(by_images, by_memory)


def _small_image(stage: FirstStage) -> tuple[int, Any]:
    """Return the channels of the input for super-resolution, and the stage that brings the small image to its side."""
    ratio, remainder = divmod(stage.factor, DOWNSCALING)
    if remainder:
        raise UserError(
            f"super-resolution needs a first stage with a factor of at least {DOWNSCALING}, not {stage.factor}; "
            "choose another --first-stage"
        )
    if ratio == 1:
        return stage.channels + 3, {"target": "torch.nn.Identity"}
    unshuffle = {"target": "torch.nn.PixelUnshuffle", "params": {"downscale_factor": ratio}}
    return stage.channels + 3 * ratio**2, unshuffle
