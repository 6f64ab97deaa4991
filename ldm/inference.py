"""From files to pictures: what every command that samples shares."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ldm.checkpoint import load_weights, read_state_dict, without_ema
from ldm.model_files import read_config
from ldm.modules.attention import kept_contexts
from ldm.modules.packing import packed_weights
from ldm.util import UserError, did_you_mean, instantiate_from_config

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SamplerSettings:
    """How to walk from noise to a picture."""

    sampler: str = "ddim"  # a name that `make_sampler` knows
    steps: int = 50
    eta: float = 0.0
    scale: float = 1.0


def choose_device(name: str | None = None) -> torch.device:
    """The device called `name`, or without one the best there is.

    Raises:
        UserError: torch knows no such device, or this machine has none.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f'--device "{name}" cannot be used here ({reason}); leave it out or give cpu') from None
    return device


def load_model(
    config: str | Path,
    checkpoint: str | Path,
    device: torch.device | str = "cpu",
    precision: torch.dtype = torch.float32,
) -> Any:
    """Build the model that `config` describes, with the weights of `checkpoint`, ready to sample.

    Moving averages take the place of the live weights where the configuration keeps them (`use_ema`) and the
    checkpoint holds them; `ema_scope` then changes nothing. Parts that only train are left out.

    Raises:
        UserError: a file is missing or damaged, or the two do not belong together.
    """
    model_config = read_config(config)
    weights = read_state_dict(checkpoint)
    weights = without_ema(weights, use_average=bool(model_config["params"].get("use_ema", True)))
    model = build_model(for_inference(model_config, weights), weights, f'"{checkpoint}"')
    return model.to(device, precision)


def build_model(model_config: Mapping[str, Any], weights: Mapping[str, Tensor], source: str) -> Any:
    """The model that `model_config` describes, filled with `weights`, in evaluation mode without gradients.

    Raises:
        UserError: the weights, called `source` in the message, are another model's.
    """
    with skip_init():
        model = instantiate_from_config(model_config)
    report = load_weights(model, weights, source=source)
    if not dict(model.named_parameters()).keys().isdisjoint(report.missing):
        # A few parameters are younger than the file; they need their initial values after all.
        model = instantiate_from_config(model_config)
        load_weights(model, weights, source=source)
    return model.eval().requires_grad_(False)


def for_inference(model_config: Mapping[str, Any], weights: Mapping[str, Tensor] | None = None) -> dict[str, Any]:
    """`model_config` without what serves training alone: averages, losses, and files to start from.

    Args:
        model_config: a model's `target` and `params`.
        weights: the state dict that will be loaded; parts that it fills need no file of their own.
    """
    params = _without_loss({key: value for key, value in model_config["params"].items() if key != "ckpt_path"})
    if "use_ema" in params or "unet_config" in params:  # a diffusion model averages unless told otherwise
        params["use_ema"] = False
    for part in ("first_stage", "cond_stage"):
        config = params.get(f"{part}_config")
        if not isinstance(config, Mapping) or not isinstance(config.get("params"), Mapping):
            continue
        inner = _without_loss(config["params"])
        if weights is None or any(name.startswith(f"{part}_model.") for name in weights):
            inner.pop("ckpt_path", None)
        params[f"{part}_config"] = {**config, "params": inner}
    return {**model_config, "params": params}


def _without_loss(params: Mapping[str, Any]) -> dict[str, Any]:
    return {**params, "lossconfig": {"target": "torch.nn.Identity"}} if "lossconfig" in params else dict(params)


@contextmanager
def skip_init() -> Iterator[None]:
    """Build modules without drawing initial weights, which loading would overwrite: seconds less for a large model."""

    def keep(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return tensor

    saved = {name: getattr(nn.init, name) for name in dir(nn.init) if name.endswith("_") and not name.startswith("_")}
    try:
        for name in saved:
            setattr(nn.init, name, keep)
        yield
    finally:
        for name, function in saved.items():
            setattr(nn.init, name, function)


def make_sampler(name: str, model: Any) -> Any:
    """The sampler called `name` for `model`: "ddim", "plms", or "dpm" (DPM-Solver++ 2M).

    Raises:
        UserError: no sampler is called so.
    """
    from ldm.models.diffusion.ddim import DDIMSampler
    from ldm.models.diffusion.dpm_solver import DPMSolverSampler
    from ldm.models.diffusion.plms import PLMSSampler

    samplers = {"ddim": DDIMSampler, "plms": PLMSSampler, "dpm": DPMSolverSampler}
    if name not in samplers:
        raise UserError(f'there is no sampler "{name}"{did_you_mean(name, samplers)}; choose {", ".join(samplers)}')
    return samplers[name](model)


@contextmanager
def prepared(model: Any) -> Iterator[None]:
    """Run with what many steps of `model` share made once: the CPU's layout of its weights, keys of its context.

    Every sampling run goes through here. A command that makes several runs enters it around all of them; entering
    again inside costs nothing. Pictures stay the same up to rounding. Inside, the model only runs: see
    `packed_weights` and `kept_contexts`. `ema_scope` goes around it, and inside is an error.

    Args:
        model: a diffusion model with its network in `model`, and a `first_stage_model` where it has one.
    """
    stage = getattr(model, "first_stage_model", None)
    with packed_weights(model.model, *(stage.children() if stage is not None else ())), kept_contexts(model.model):
        yield


@torch.no_grad()
def text_to_images(
    model: Any,
    prompts: Sequence[str],
    size: tuple[int, int],
    settings: SamplerSettings,
    negative_prompt: str = "",
    noise: Tensor | None = None,
    progress: tqdm | None = None,
) -> Tensor:
    """One picture for each prompt, as one batch with classifier-free guidance (arXiv:2207.12598).

    Args:
        model: a text-conditional latent diffusion model.
        prompts: B texts.
        size: (height, width) of the latents.
        settings: sampler, steps, eta and guidance scale; at scale 1 nothing is guided.
        negative_prompt: what guidance leads away from.
        noise: `(B, C, *size)` to start from, instead of a draw from the global generator.
        progress: advanced by one at every step.

    Returns:
        `(B, 3, H, W)` float32 in [-1, 1], on the CPU.
    """
    count = len(prompts)
    guided = settings.scale != 1.0
    unconditional = model.get_learned_conditioning(count * [negative_prompt]) if guided else None
    conditioning = model.get_learned_conditioning(list(prompts))
    with prepared(model):
        latents, _ = make_sampler(settings.sampler, model).sample(
            S=settings.steps,
            batch_size=count,
            shape=(model.channels, *size),
            conditioning=conditioning,
            eta=settings.eta,
            x_T=noise,
            unconditional_guidance_scale=settings.scale,
            unconditional_conditioning=unconditional,
            callback=None if progress is None else lambda _: progress.update(),
            verbose=False,
        )
        return model.decode_first_stage(latents).float().clamp(-1.0, 1.0).cpu()


def unknown_words(model: Any, texts: Sequence[str]) -> list[str]:
    """The words of `texts` that the model's vocabulary lacks, each once; empty where the model cannot tell."""
    find = getattr(getattr(model.cond_stage_model, "tknz_fn", None), "unknown_words", None)
    return list(dict.fromkeys(word for text in texts for word in find(text))) if find else []
