"""Load models for sampling: choose a device, build a model from its configuration, fill in its weights."""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.config.instantiate import instantiate_from_config
from ldm.config.model_config import read_config
from ldm.config.model_files import MODEL_FOLDERS, ModelFiles, available_models, find_model, with_additions
from ldm.errors import UserError
from ldm.io.checkpoint.kinds import foreign_kind
from ldm.io.checkpoint.loading import load_weights, part_of, without_ema
from ldm.io.checkpoint.reading import read_state_dict
from ldm.io.diffusers import autoencoder
from ldm.io.diffusers.pipeline import stated_scale
from ldm.io.diffusers.translation import Translation
from ldm.models.autoencoder import Autoencoder
from ldm.models.diffusion.adaptation import LEARNED_WORDS, NETWORK, UPDATES
from ldm.modules.lora import merged
from ldm.modules.precision import check_range, choose_precision
from ldm.pipelines.embeddings import add_embedding
from ldm.pipelines.lora import merge_lora

logger = logging.getLogger(__name__)

FIRST_STAGE = "first_stage_model."  # prefix of the first stage's weights in those of a diffusion model
_INIT_LOCK = threading.RLock()


def load(
    model: str | Path | None = None,
    *,
    config: str | Path | None = None,
    checkpoint: str | Path | None = None,
    vae: str | Path | None = None,
    loras: Sequence[str | Path | tuple[str | Path, float]] = (),
    embeddings: Sequence[str | Path | tuple[str | Path, str | None]] = (),
    device: str | torch.device | None = None,
    precision: str = "float32",
) -> Any:
    """Load a model, ready to sample: a diffusion model, or the autoencoder of a first stage.

    Args:
        model: a name such as "emoji64" or "kl-f8"; a folder with `config.yaml` and weights, that of a training run, or
            one in the form of diffusers; or the name of a model on the Hugging Face hub in the form of diffusers.
        config: YAML configuration, instead of `model`.
        checkpoint: weights, instead of `model`. Without `config` its configuration is looked up beside it, or
            recognised from the weights of Stable Diffusion.
        vae: weights of a first stage that replace those of the model: a file, or a folder in the form of diffusers.
        loras: LoRA files to merge into the weights, each with a factor: `[("style.safetensors", 0.8)]`.
        embeddings: files of textual inversions, whose tokens can be used in prompts; each may have a token of its own:
            `[("cat.pt", "<my-cat>")]`.
        device: "cpu", "cuda", "cuda:1", "mps"; default: a GPU if there is one.
        precision: "float32", "bfloat16", "float16", or "auto": bfloat16 if the hardware computes in it.

    Returns:
        The model in evaluation mode, such as a `LatentDiffusion`.

    Raises:
        UserError: A file is missing or damaged, or the configuration and the weights do not belong together.
    """
    pairs = [(each, 1.0) if isinstance(each, str | Path) else each for each in loras]
    words = [(each, None) if isinstance(each, str | Path) else each for each in embeddings]
    files = with_additions(_find(model, config, checkpoint), vae, pairs, words)
    target = choose_device(device)
    return load_files(files, read_config(files.config), target, choose_precision(precision, target))


def _find(
    model: str | Path | None,
    config: str | Path | None,
    checkpoint: str | Path | None,
) -> ModelFiles:
    if model is not None and (config is not None or checkpoint is not None):
        raise UserError("`model` names a configuration and its weights; leave out `config` and `checkpoint`")
    if config is not None and checkpoint is None:
        raise UserError(f'the configuration "{config}" needs weights; give its `checkpoint`')
    name, yaml, weights = (None if word is None else str(word) for word in (model, config, checkpoint))
    files = find_model(name, yaml, weights, MODEL_FOLDERS)
    if files is None:
        known = ", ".join(available_models(MODEL_FOLDERS)) or "none"
        raise UserError(f"no model is named; give a name (available: {known}), a folder, or a checkpoint")
    return files


def load_files(files: ModelFiles, config: Mapping[str, Any], device: torch.device | str, precision: torch.dtype) -> Any:
    """Load the model in `files` with the configuration that was read from them; messages call it by its name."""
    additions: dict[str, Any] = {"vae": files.vae, "loras": files.loras, "embeddings": files.embeddings}
    model = load_model(config, files.checkpoint, device, precision, **additions)
    model.name = files.name
    return model


def choose_device(name: str | torch.device | None = None) -> torch.device:
    """Return the device called `name`, or by default a GPU if there is one.

    Raises:
        UserError: torch does not know the device, or this machine does not have it.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f'the device "{name}" is not available here ({reason}); leave it out or give cpu') from None
    return device


def move(model: Any, device: str | torch.device | None = None, precision: str | None = None) -> Any:
    """Move a model to a device and convert it to a precision; None leaves it as it is.

    Raises:
        UserError: The device is not available, the precision is unknown, or a weight is too large for it.
    """
    if device is None and precision is None:
        return model
    target = model.device if device is None else choose_device(device)
    return model.to(target) if precision is None else _converted(model, target, choose_precision(precision, target))


def _converted(model: nn.Module, device: torch.device | str, precision: torch.dtype) -> Any:
    """Return the model on a device in a precision.

    Raises:
        UserError: A weight is too large for the precision; the model is unchanged.
    """
    check_range(model, precision)
    return model.to(device, precision)


def load_model(
    config: str | Path | Mapping[str, Any],
    checkpoint: str | Path,
    device: torch.device | str = "cpu",
    precision: torch.dtype = torch.float32,
    *,
    vae: str | Path | None = None,
    loras: Sequence[tuple[str | Path, float]] = (),
    embeddings: Sequence[tuple[str | Path, str | None]] = (),
) -> Any:
    """Build the model that `config` describes, with the weights of `checkpoint`.

    Moving averages replace the live weights if the configuration keeps them (`use_ema`) and the checkpoint holds them;
    `ema_scope` then changes nothing. Parts that only training needs are left out.

    Args:
        config: a YAML file, or the result of `read_config`.
        checkpoint: a checkpoint or safetensors file, or a folder in the form of diffusers.
        device: where the model goes.
        precision: the dtype of its weights.
        vae: weights of a first stage that replace those of the checkpoint.
        loras: LoRA files to merge into the weights, and their factors.
        embeddings: files of textual inversions, and tokens to use instead of theirs.

    Raises:
        UserError: A file is missing or damaged, they do not belong together, or a weight is too large for the
            precision.
    """
    model_config = config if isinstance(config, Mapping) else read_config(config)
    weights = read_state_dict(checkpoint)
    weights = without_ema(
        weights, use_average=bool(model_config["params"].get("use_ema", "unet_config" in model_config["params"]))
    )
    weights = _under_our_names(weights, model_config["params"])
    if vae is not None:
        stage = read_first_stage(vae, model_config)
        weights = {name: value for name, value in weights.items() if not name.startswith(FIRST_STAGE)}
        weights |= {FIRST_STAGE + name: value for name, value in stage.items()}
    model = build_model(for_inference(model_config, weights), weights, f'"{checkpoint}"', precision)
    for path, factor in loras:
        merge_lora(model, path, factor)
    for path, token in embeddings:
        add_embedding(model, path, token)
    return _converted(model, device, precision)


def read_first_stage(path: str | Path, model_config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Read the weights of a first stage for the diffusion model that `model_config` describes.

    Args:
        path: a file with names of this package or of diffusers, a checkpoint of a diffusion model with the same first
            stage, or a folder in the form of diffusers.
        model_config: `target` and `params` of the diffusion model.

    Raises:
        UserError: The file is damaged, or holds another network than the model's first stage.
    """
    config = model_config["params"].get("first_stage_config")
    params = _params_of(model_config["params"], "first_stage")
    if not isinstance(config, Mapping) or "ddconfig" not in params:
        raise UserError(f'the model has no first stage that the weights of "{path}" could replace; leave out the VAE')
    weights = _under_our_names(part_of(without_ema(read_state_dict(path)), FIRST_STAGE), params)
    _check_first_stage(weights, {**config, "params": _without_files(params)}, path)
    _warn_other_scale(Path(path), model_config["params"])
    return weights


def _warn_other_scale(path: Path, params: Mapping[str, Any]) -> None:
    """Log that the latents of a first stage have another scale than those of the model with the given parameters.

    The first stages of Stable Diffusion XL and 1 have the same shapes. Only folders in the form of diffusers state it.
    """
    stated = stated_scale(path) if path.is_dir() else None
    own = params.get("scale_factor", 1.0)
    if stated is not None and stated != own and not params.get("scale_by_std", False):
        logger.warning(
            'the first stage "%s" states the factor %g for its latents, and the model has %g; images may look wrong: '
            "choose a first stage of the same kind of model",
            path,
            stated,
            own,
        )


def _under_our_names(weights: dict[str, Tensor], params: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the weights of a first stage with the given parameters; they may have the names of diffusers."""
    if "ddconfig" in params and any(name.startswith(autoencoder.DIFFUSERS_PREFIXES) for name in weights):
        return Translation(autoencoder.layers(params["ddconfig"])).to_ours(weights)
    return weights


def _check_first_stage(weights: Mapping[str, Tensor], config: Mapping[str, Any], path: str | Path) -> None:
    """Raise an error if weights do not fit the first stage that `config` describes.

    Raises:
        UserError: They do not.
    """
    shapes = {name: tuple(value.shape) for name, value in weights.items()}
    with torch.device("meta"):
        expected = {name: tuple(each.shape) for name, each in instantiate_from_config(config).named_parameters()}
    if not expected.keys() & shapes.keys():
        kind = foreign_kind(shapes)
        what = kind.what if kind is not None else "not a first stage"
        raise UserError(f'"{path}" is {what}; give the weights of a first stage (VAE)')
    latent = "decoder.conv_in.weight"
    if latent in shapes and shapes[latent][1:2] != expected[latent][1:2]:
        raise UserError(
            f'the first stage "{path}" has latents of {shapes[latent][1]} channels, that of the model '
            f"{expected[latent][1]}; give one that was trained for this kind of model"
        )
    wrong = [name for name, shape in expected.items() if shapes.get(name) != shape]
    if wrong:
        first = shapes.get(wrong[0])
        raise UserError(
            f'the first stage "{path}" belongs to another model: {len(wrong)} weights are missing or of other shapes, '
            f"first {wrong[0]}: {first or 'missing'}, expected {expected[wrong[0]]}"
        )


def load_first_stage(
    config: str | Path,
    checkpoint: str | Path,
    device: torch.device | str = "cpu",
    precision: torch.dtype = torch.float32,
) -> Autoencoder:
    """Build the autoencoder that `config` describes, or the first stage of the diffusion model that it describes.

    Of the weights of a diffusion model, only those of its first stage are loaded.

    Raises:
        UserError: A file is missing or damaged, the two do not belong together, there is no autoencoder of images
            with three channels, or a weight is too large for the precision.
    """
    model_config: Mapping[str, Any] = read_config(config)
    weights = read_state_dict(checkpoint)
    inner, prefix = model_config["params"].get("first_stage_config"), FIRST_STAGE
    if inner is None:
        weights = without_ema(weights, use_average=bool(model_config["params"].get("use_ema", False)))
        weights = _under_our_names(weights, model_config["params"])
    else:
        weights = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
        if not isinstance(inner, Mapping) or not isinstance(inner.get("params"), Mapping) or not weights:
            raise UserError(f'the model of "{config}" has no first stage with weights; name one that has')
        model_config = inner
    model = build_model(for_inference(model_config, weights), weights, f'"{checkpoint}"')
    if not isinstance(model, Autoencoder) or model.encoder.conv_in.in_channels != 3:
        raise UserError(f'the model of "{config}" is not an autoencoder of RGB images; name one that is')
    return _converted(model, device, precision)


def build_model(
    model_config: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    source: str,
    precision: torch.dtype = torch.float32,
) -> Any:
    """Build the model that `model_config` describes, with `weights`, in evaluation mode and without gradients.

    The model is converted before it receives the weights, so that they are in memory only once, in their precision.
    Low-rank updates that were trained with the model are merged into its network.

    Raises:
        UserError: The weights, called `source` in the message, belong to another model, or one is too large for the
            precision.
    """
    weights = merged(weights, UPDATES, NETWORK)
    elsewhere = _parts_with_own_files(model_config)
    check_range({name: value for name, value in weights.items() if "." in name}, precision)
    with skip_init():
        model = instantiate_from_config(model_config)
    check_range({name: value for name, value in model.named_parameters() if name.startswith(elsewhere)}, precision)
    model.to(precision)
    report = load_weights(model, weights, elsewhere, source)
    missing = [name for name in report.missing if not name.startswith(elsewhere)]
    if not dict(model.named_parameters()).keys().isdisjoint(missing):
        # A few parameters are newer than the file; they need their initial values.
        model = instantiate_from_config(model_config).to(precision)
        load_weights(model, weights, elsewhere, source)
    return model.eval().requires_grad_(False)


def _parts_with_own_files(model_config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the name prefixes of weights that the model reads from files of their own, as its configuration states."""
    params = model_config["params"]
    parts = ["first_stage_model."] if _params_of(params, "first_stage").get("ckpt_path") else []
    if parts and params.get("cond_stage_config") == "__is_first_stage__":
        parts.append("cond_stage_model.")
    return tuple(parts)


def _params_of(params: Mapping[str, Any], part: str) -> Mapping[str, Any]:
    config = params.get(f"{part}_config")
    inner = config.get("params") if isinstance(config, Mapping) else None
    return inner if isinstance(inner, Mapping) else {}


def for_inference(model_config: Mapping[str, Any], weights: Mapping[str, Tensor] | None = None) -> dict[str, Any]:
    """Return `model_config` without the parts that only training needs: averages, losses, checkpoints to start from.

    Args:
        model_config: a model's `target` and `params`.
        weights: the state dict that will be loaded; parts that it fills need no file of their own.
    """
    # Low-rank updates are merged.
    left_out = {"ckpt_path", "lora_config"}
    if weights is None or any(name.startswith(LEARNED_WORDS) for name in weights):
        left_out.add("embedding_manager_ckpt")
    params = _without_loss({key: value for key, value in model_config["params"].items() if key not in left_out})
    if "use_ema" in params or "unet_config" in params:  # a diffusion model averages by default
        params["use_ema"] = False
    network = {name: value for name, value in _params_of(params, "unet").items() if name != "use_fp16"}
    if network:  # the precision of sampling is an option, not a property of the model
        params["unet_config"] = {**params["unet_config"], "params": network}
    for part in ("first_stage", "cond_stage"):
        inner = _without_loss(_params_of(params, part))
        if not inner:
            continue
        if weights is None or any(name.startswith(f"{part}_model.") for name in weights):
            inner.pop("ckpt_path", None)
        params[f"{part}_config"] = {**params[f"{part}_config"], "params": inner}
    return {**model_config, "params": params}


def _without_files(params: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in _without_loss(params).items() if key != "ckpt_path"}


def _without_loss(params: Mapping[str, Any]) -> dict[str, Any]:
    return {**params, "lossconfig": {"target": "torch.nn.Identity"}} if "lossconfig" in params else dict(params)


@contextmanager
def skip_init() -> Iterator[None]:
    """Build modules without sampling initial weights, which loading would overwrite; it saves seconds."""

    loading_thread = threading.get_ident()

    def skipped(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        @functools.wraps(function)
        def initialize(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            is_other = threading.get_ident() != loading_thread  # which needs its initial weights
            return function(tensor, *args, **kwargs) if is_other else tensor

        return initialize

    names = [name for name in dir(nn.init) if name.endswith("_") and not name.startswith("_")]
    with _INIT_LOCK:  # one thread replaces the functions at a time, so that the original ones come back
        saved = {name: getattr(nn.init, name) for name in names}
        try:
            for name, function in saved.items():
                setattr(nn.init, name, skipped(function))
            yield
        finally:
            for name, function in saved.items():
                setattr(nn.init, name, function)
