"""Finding a model on disk, and what its configuration says about the pictures it makes. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm.util import UserError, did_you_mean

ROOT = Path(__file__).resolve().parents[1]
MODELS = Path("models/ldm")
FIRST_STAGES = Path("models/first_stage_models")
TEXT_KEYS = ("caption", "txt")
WEIGHTS = ("model.safetensors", "model.ckpt", "last.ckpt")
RUN_CHECKPOINTS = "checkpoints"  # the folder of a training run that holds them
# Published models whose configuration is not kept beside their weights.
CONFIGS_ELSEWHERE = {
    "text2img-large": Path("configs/latent-diffusion/txt2img-1p4B-eval.yaml"),
    "cin256-v2": Path("configs/latent-diffusion/cin256-v2.yaml"),
    "rdm768x768": Path("configs/retrieval-augmented-diffusion/768x768.yaml"),
}


@dataclass(frozen=True)
class ModelFiles:
    """A model on disk: what to call it, its configuration and its weights."""

    name: str
    config: Path
    checkpoint: Path


def locate(path: str | Path) -> Path:
    """`path` where it exists from the working folder, else from the repository, else as given."""
    path = Path(path)
    inside = ROOT / path
    return inside if not path.exists() and inside.exists() else path


def find_model(
    name: str | None = None,
    config: str | None = None,
    ckpt: str | None = None,
    places: Sequence[Path] = (MODELS,),
) -> ModelFiles | None:
    """The files that `--model`, `--config` and `--ckpt` ask for; None when they ask for nothing.

    Args:
        places: the folders that hold models which may go by their name.

    Raises:
        UserError: a file or model does not exist, or the options contradict each other.
    """
    if name is not None:
        if config or ckpt:
            raise UserError("--model names a configuration and its weights together; leave out --config and --ckpt")
        return named_model(name, places)
    if ckpt is None:
        if config is not None:
            raise UserError(f'--config "{config}" needs --ckpt: give the weights that belong to it')
        return None
    checkpoint = _existing(ckpt, "checkpoint")
    folder = checkpoint.resolve().parent
    name = (folder.parent if folder.name == RUN_CHECKPOINTS else folder).name
    if config is not None:
        return ModelFiles(name, _existing(config, "configuration"), checkpoint)
    beside = checkpoint.with_name("config.yaml")
    found = beside if beside.is_file() else trained_config(checkpoint)
    if found is None:
        raise UserError(f'there is no config.yaml beside "{ckpt}"; name its configuration with --config')
    return ModelFiles(name, found, checkpoint)


def trained_config(checkpoint: Path) -> Path | None:
    """The newest configuration of the training run that wrote `checkpoint`; None where it is in none."""
    found = sorted((checkpoint.resolve().parent.parent / "configs").glob("*-project.yaml"))
    return found[-1] if found else None


def named_model(name: str, places: Sequence[Path] = (MODELS,)) -> ModelFiles:
    """The model `name` in the first of `places` that has it, or in the folder `name`, which may be a training run's.

    Raises:
        UserError: there is no such folder, or something is missing from it.
    """
    candidates = [*(locate(place / name) for place in places), Path(name)]
    folder = next((candidate for candidate in candidates if candidate.is_dir()), None)
    if folder is None:
        known = available_models(places)
        where, listed = " or ".join(map(str, places)), ", ".join(known) or "none"
        raise UserError(f'there is no model "{name}" in {where}{did_you_mean(name, known)}; available: {listed}')
    run_checkpoint = folder / RUN_CHECKPOINTS / "last.ckpt"
    files = (*(folder / file for file in WEIGHTS), run_checkpoint)
    checkpoint = next((path for path in files if path.is_file()), None)
    if checkpoint is None:
        raise UserError(
            f'the model folder "{folder}" holds no weights; put {" or ".join(WEIGHTS[:2])} there; '
            "published ones come by scripts/download_weights.py"
        )
    config = folder / "config.yaml"
    if not config.is_file():
        trained = trained_config(checkpoint) if checkpoint == run_checkpoint else None
        config = trained or locate(CONFIGS_ELSEWHERE.get(folder.name, config))
    if not config.is_file():
        raise UserError(f'the model folder "{folder}" holds no config.yaml; put the model\'s configuration there')
    return ModelFiles(folder.resolve().name, config, checkpoint)


def downloaded_model(name: str) -> ModelFiles | None:
    """The published model `name` where its weights are in `models/ldm`, else None."""
    return named_model(name) if name in available_models() else None


def available_models(places: Sequence[Path] = (MODELS,)) -> list[str]:
    """Names of the models whose weights are in `places`."""
    folders = {folder for base in (Path(), ROOT) for place in places for folder in (base / place).glob("*")}
    return sorted({folder.name for folder in folders if any((folder / file).is_file() for file in WEIGHTS)})


def _existing(path: str, what: str) -> Path:
    found = locate(path)
    if not found.is_file():
        raise UserError(f'there is no {what} "{path}"; check the path, or download it first')
    return found


def read_config(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The `model` section of a YAML configuration, with its references resolved, as plain dicts and lists.

    Args:
        overrides: `model.key.sub=value` each, which take the place of what the file says.

    Raises:
        UserError: the file is missing, is not YAML, or describes no model; or an override changes nothing in it.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        loaded = OmegaConf.load(path)
        if overrides:
            loaded = OmegaConf.merge(loaded, OmegaConf.from_dotlist([_checked_override(each) for each in overrides]))
        config = OmegaConf.to_container(loaded, resolve=True)
    except FileNotFoundError:
        raise UserError(f'there is no configuration "{path}"; check the path') from None
    except (YAMLError, OmegaConfBaseException, OSError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f'cannot read the configuration "{path}": {reason}; give a YAML file') from None
    model = config.get("model") if isinstance(config, Mapping) else None
    if not isinstance(model, Mapping) or "target" not in model:
        raise UserError(
            f'the configuration "{path}" describes no model; it needs "model:" with "target:" and "params:"'
        )
    params = model.get("params")
    if not isinstance(params, Mapping | None):
        raise UserError(f'the configuration "{path}" is damaged: "params:" of its model must hold names and values')
    return {**model, "params": dict(params or {})}


def _checked_override(text: str) -> str:
    key, equals, _ = text.partition("=")
    if not equals or not key.startswith("model."):
        raise UserError(f'"{text}" is no value of the model; write model.key.sub=value')
    return text


def check_text_model(name: str, model_config: Mapping[str, Any]) -> None:
    """Whether a model draws from text.

    Raises:
        UserError: it does not.
    """
    key = model_config["params"].get("cond_stage_key", "image")
    if key not in TEXT_KEYS:
        raise UserError(f'the model "{name}" draws from "{key}", not from text; choose a text-to-image model')


def check_condition(name: str, model_config: Mapping[str, Any], key: str, wanted: str) -> None:
    """Whether a model draws from the entry `key` of a batch.

    Raises:
        UserError: it does not; `wanted` says what model does.
    """
    found = model_config["params"].get("cond_stage_key", "image")
    if found != key:
        raise UserError(f'the model "{name}" draws from "{found}", not from "{key}"; choose {wanted} model')


def check_steps(model_config: Mapping[str, Any], steps: int) -> None:
    """Whether a model can be sampled in as many steps.

    Raises:
        UserError: it has fewer.
    """
    timesteps = model_config["params"].get("timesteps", 1000)
    if not isinstance(timesteps, int):
        raise UserError('the model\'s configuration needs a number as "timesteps"')
    if steps > timesteps:
        raise UserError(f"{steps} steps are more than the model's {timesteps}; give {timesteps} or fewer")


@dataclass(frozen=True)
class PictureSize:
    """What a configuration says about sizes, in pixels."""

    height: int
    width: int
    factor: int
    multiple: int

    @classmethod
    def of(cls, model_config: Mapping[str, Any]) -> PictureSize:
        """Read a model's configuration: its own size, pixels per latent, and what sizes must be multiples of.

        Raises:
            UserError: it is not written like one.
        """
        params = model_config["params"]
        try:
            factor = 2 ** _halvings(params.get("first_stage_config"), "ch_mult")
            unet = 2 ** _halvings(params.get("unet_config"), "channel_mult")
            size = params.get("image_size", 256 // factor)
            height, width = (size, size) if isinstance(size, int) else size
            if min(height, width) < 1:
                raise ValueError("no pixels")
            return cls(int(height) * factor, int(width) * factor, factor, factor * unet)
        except (AttributeError, TypeError, ValueError):
            raise UserError(
                "the model's configuration does not tell its size; image_size must be a positive number, or height "
                "and width, ch_mult and channel_mult must be lists"
            ) from None

    def check(self, option: str, pixels: int) -> int:
        """`pixels`, if the model can make pictures of that size.

        Raises:
            UserError: it cannot; the message names the nearest sizes that it can make.
        """
        if pixels % self.multiple:
            below = pixels // self.multiple * self.multiple
            near = " or ".join(str(size) for size in (below, below + self.multiple) if size)
            raise UserError(
                f"{option} {pixels} is not a multiple of {self.multiple}, as this model needs; nearest: {near}"
            )
        return pixels


def _halvings(config: Any, key: str) -> int:
    """How often a network halves its input: one time less than it has levels."""
    params = (config.get("params") if isinstance(config, Mapping) else None) or {}
    levels: Sequence[Any] | None = params.get(key) or (params.get("ddconfig") or {}).get(key)
    return len(levels) - 1 if levels else 0
