"""Allow list of the objects that a configuration may name, so that a YAML file cannot run arbitrary code.

`refusal` checks the dotted path before anything is imported. `object_refusal` checks the object found there, because a
module also contains objects that it imports. Both return the reason of a refusal, or None. `--allow-target` and `allow`
extend the list with a user's own datasets and models.
"""

from __future__ import annotations

import importlib.util
import inspect
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ldm.errors import did_you_mean

OWN_PACKAGES = ("ldm", "taming")
# Published targets in `main.py`, and the modules that define them. An installed package has no `main.py`, and another
# program may have one.
MAIN_NAMES = {
    "CUDACallback": "ldm.training.callbacks",
    "DataModuleFromConfig": "ldm.training.data",
    "ImageLogger": "ldm.training.callbacks",
    "SetupCallback": "ldm.training.callbacks",
    "WrappedDataset": "ldm.training.data",
}
ROOT = Path(__file__).resolve().parents[2]
MAX_LENGTH = 200

# Classes without files or functions among their parameters.
_TORCH_NN = (
    "Identity Embedding L1Loss MSELoss SmoothL1Loss HuberLoss CrossEntropyLoss BCELoss BCEWithLogitsLoss KLDivLoss "
    "GaussianNLLLoss ReLU LeakyReLU ELU GELU SiLU Mish Softplus Sigmoid Tanh Hardtanh PixelShuffle PixelUnshuffle"
)
# Transforms of images for `image_transforms` of shards, without functions among their parameters.
_TRANSFORMS = (
    "CenterCrop ColorJitter GaussianBlur Grayscale Pad RandomAdjustSharpness RandomAutocontrast RandomCrop "
    "RandomGrayscale RandomHorizontalFlip RandomPerspective RandomResizedCrop RandomRotation RandomVerticalFlip Resize"
)
# Classes for the sections `lightning.callbacks`, `lightning.logger` and `lightning.modelcheckpoint`. Of the loggers
# that use a server, only the most common one is listed. TestTubeLogger no longer exists; it is listed so that older
# configurations get an error about a missing name.
_LIGHTNING = {
    "callbacks": (
        "BackboneFinetuning BatchSizeFinder DeviceStatsMonitor EarlyStopping EMAWeightAveraging "
        "GradientAccumulationScheduler LearningRateFinder LearningRateMonitor ModelCheckpoint ModelPruning "
        "ModelSummary OnExceptionCheckpoint RichModelSummary RichProgressBar SpikeDetection "
        "StochasticWeightAveraging ThroughputMonitor Timer TQDMProgressBar WeightAveraging"
    ),
    "loggers": "CSVLogger TensorBoardLogger TestTubeLogger WandbLogger",
}
LISTED = frozenset(
    [
        *(f"torch.nn.{name}" for name in _TORCH_NN.split()),
        *(f"torchvision.transforms.{name}" for name in _TRANSFORMS.split()),
        *(
            f"{package}.{module}.{name}"
            for package in ("pytorch_lightning", "lightning.pytorch")  # two names of the same classes
            for module, names in _LIGHTNING.items()
            for name in names.split()
        ),
    ]
)

# Public names in ASCII: no look-alike letters, no private attributes.
_PATH = re.compile(r"[A-Za-z][A-Za-z0-9_]*(\.[A-Za-z][A-Za-z0-9_]*)*")

_allowed: tuple[str, ...] = ()


def allow(*prefixes: str) -> None:
    """Allow the targets below these dotted prefixes: `"mydata"` allows `mydata.Set` and `mydata.sets.Set`.

    Raises:
        ValueError: a prefix is not a dotted path of public names.
    """
    global _allowed
    for prefix in prefixes:
        if not isinstance(prefix, str) or len(prefix) > MAX_LENGTH or not _PATH.fullmatch(prefix):
            raise ValueError(f'{shown(prefix)} is not a prefix of a target, such as "mypackage" or "mypackage.data"')
    _allowed = (*_allowed, *(prefix for prefix in prefixes if prefix not in _allowed))


@contextmanager
def allowing(*prefixes: str) -> Iterator[None]:
    """Allow these prefixes inside the block, and restore the earlier ones afterwards.

    Raises:
        ValueError: as `allow`.
    """
    global _allowed
    before = _allowed
    try:
        allow(*prefixes)
        yield
    finally:
        _allowed = before


def resolve(target: Any) -> Any:
    """Return the full target of a published `main.NAME`, and any other target unchanged."""
    if isinstance(target, str) and not is_allowed(target):
        module, _, name = target.partition(".")
        if module == "main" and name in MAIN_NAMES:
            return f"{MAIN_NAMES[name]}.{name}"
    return target


def refusal(target: Any) -> str | None:
    """Return why a configuration must not name `target`, or None; imports nothing."""
    if not isinstance(target, str) or "." not in target or not _PATH.fullmatch(target) or len(target) > MAX_LENGTH:
        return 'is not a dotted path of public names such as "package.module.Class"'
    target = resolve(target)
    package = target.partition(".")[0]
    if is_allowed(target) or target in LISTED:
        return None
    if package not in OWN_PACKAGES:
        module, _, name = target.rpartition(".")
        hint = did_you_mean(name, MAIN_NAMES) if module == "main" else ""
        return (
            f"is refused{hint}: a configuration can name classes of ldm, and a few of torch and Lightning; "
            f'if you trust this one, give --allow-target {module}, or in Python call ldm.config.allow("{module}")'
        )
    found = _other_location(package)
    if found is not None:
        return (
            f'is refused: Python finds "{package}" in "{found}", which does not belong to ldm; '
            f"run from another folder, or if you trust it, give --allow-target {package}"
        )
    return None


def object_refusal(target: str, found: Any) -> str | None:
    """Return why `found`, the object at `target`, must not be built, or None."""
    home = getattr(found, "__module__", None)
    home = home if isinstance(home, str) else type(found).__name__
    if is_allowed(target):
        if not (inspect.isclass(found) or inspect.isroutine(found)):
            return "is refused: it is neither a class nor a function"
        if home.partition(".")[0] != target.partition(".")[0] and not is_allowed(f"{home}."):
            return f"is refused: it is defined in {home}; if you trust that too, give --allow-target {home}"
        return None
    if not inspect.isclass(found):
        return "is refused: it is not a class"
    packages = OWN_PACKAGES if target.partition(".")[0] in OWN_PACKAGES else (target.partition(".")[0],)
    return None if home.partition(".")[0] in packages else f"is refused: it is defined in {home}, not there"


def shown(value: Any, limit: int = 80) -> str:
    """Return `value` in quotes for a message, as one line of at most `limit` ASCII characters."""
    text = ascii(value)[1:-1] if isinstance(value, str) else ascii(value)
    return f'"{text}"' if len(text) <= limit else f'"{text[: limit - 3]}..."'


def is_allowed(path: str) -> bool:
    """Return whether `allow` or `--allow-target` has allowed a dotted path, or one of its prefixes."""
    return any(path == prefix or path.startswith(f"{prefix}.") for prefix in _allowed)


def _other_location(package: str) -> str | None:
    """Return the file from which Python imports one of our packages, if it is not part of this project."""
    try:
        spec = importlib.util.find_spec(package)
    except ValueError:  # put into sys.modules by hand
        return None
    if spec is None or spec.origin is None:
        return None
    return None if ROOT in Path(spec.origin).resolve().parents else spec.origin
