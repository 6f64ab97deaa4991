"""Names of the published package that a module has there and another module defines here.

Programs written for the published package import helpers and classes from any module that used them, e.g. `exists` from
`ldm.modules.attention`. A module with such names has one line,

    __getattr__ = published_names(__name__)

The other modules are imported on first use. Their functions and classes cost nothing at start-up, and the module's own
code stays free of them.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

_HELPERS = {
    "ldm.util": "count_params default exists isimage ismap",
    "ldm.io.grids": "log_txt_as_img",
    "ldm.modules.diffusionmodules.util": "mean_flat",
}
_GRIDS = {"ldm.modules.diffusionmodules.schedule": "make_ddim_sampling_parameters make_ddim_timesteps noise_like"}
_DISCRIMINATOR = {
    "ldm.modules.losses.discriminator": "NLayerDiscriminator weights_init",
    "ldm.modules.losses.lpips": "LPIPS",
}

# For each module, the modules that define its other published names.
NAMES: dict[str, dict[str, str]] = {
    "ldm.data.imagenet": {
        "taming.data.imagenet": "ImagePaths download give_synsets_from_indices retrieve str_to_indices",
        "ldm.modules.image_degradation": "degradation_fn_bsr degradation_fn_bsr_light",
    },
    "ldm.data.laion": {"ldm.training.shards": "WebDataModuleFromConfig"},
    "ldm.models.diffusion.classifier": {
        "ldm.models.diffusion.ddpm": "LatentDiffusion",
        "ldm.modules.diffusionmodules.openaimodel": "EncoderUNetModel UNetModel",
        "ldm.modules.frozen": "disabled_train",
        "ldm.util": "default ismap",
    },
    "ldm.models.diffusion.ddim": _GRIDS,
    "ldm.models.diffusion.ddpm": {
        **_HELPERS,
        "ldm.models.autoencoder": "AutoencoderKL IdentityFirstStage VQModelInterface",
        "ldm.models.diffusion.ddim": "DDIMSampler",
        "ldm.config.instantiate": "instantiate_from_config",
        "ldm.models.diffusion.stable_diffusion": (
            "LatentFinetuneDiffusion LatentInpaintDiffusion LatentUpscaleDiffusion"
        ),
        "ldm.modules.diffusionmodules.schedule": "make_beta_schedule noise_like",
        "ldm.modules.distributions.distributions": "normal_kl",
        "ldm.modules.frozen": "disabled_train",
        "ldm.modules.published": "__conditioning_keys__ uniform_on_device",
    },
    "ldm.models.diffusion.plms": _GRIDS,
    "ldm.modules.attention": {
        "ldm.modules.diffusionmodules.util": "checkpoint",
        "ldm.modules.published": "MemoryEfficientCrossAttention exists init_ max_neg_value uniq",
        "ldm.util": "default",
    },
    "ldm.modules.diffusionmodules.model": {
        "ldm.modules.diffusionmodules.published": (
            "FirstStagePostProcessor LatentRescaler MergedRescaleDecoder MergedRescaleEncoder Model Resize "
            "SimpleDecoder UpsampleDecoder Upsampler get_timestep_embedding"
        ),
        "ldm.util": "instantiate_from_config",
    },
    "ldm.modules.diffusionmodules.openaimodel": {
        "ldm.modules.diffusionmodules.util": "avg_pool_nd checkpoint linear",
        "ldm.modules.diffusionmodules.unet_blocks": "count_flops_attn",
        "ldm.modules.published": "Timestep convert_module_to_f16 convert_module_to_f32",
        "ldm.util": "exists",
    },
    "ldm.modules.diffusionmodules.util": {"ldm.modules.published": "CheckpointFunction"},
    "ldm.modules.losses.vqperceptual": _DISCRIMINATOR,
    "ldm.util": {
        "ldm.io.grids": "log_txt_as_img",
        "ldm.io.parallel": "parallel_data_prefetch",
        "ldm.modules.diffusionmodules.util": "mean_flat",
    },
    "main": {
        "ldm.data.base": "Txt2ImgIterableBaseDataset",
        "ldm.training.published": "nondefault_trainer_args worker_init_fn",
        "ldm.util": "instantiate_from_config",
    },
}


def published_names(module: str, more: Mapping[str, str] | None = None) -> Callable[[str], Any]:
    """Return the `__getattr__` of a module, which finds its published names in the modules that define them.

    Args:
        module: the dotted name of the module.
        more: further names, each with the module that defines it.
    """
    homes = {name: home for home, names in NAMES[module].items() for name in names.split()} | dict(more or {})

    def find(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        return getattr(importlib.import_module(homes[name]), name)

    return find
