"""Which objects a configuration may name: a YAML file from elsewhere must not run whatever it likes.

Before anything is imported, `refusal` judges the dotted path alone; afterwards `object_refusal` judges what was found
there, because a module holds more than it defines. Both answer with the reason, or None. `ldm.util` asks them;
`--allow-target` and `allow` extend what is trusted, for a user's own datasets and models.
"""

from __future__ import annotations

import importlib.util
import inspect
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

OWN_PACKAGES = ("ldm", "taming")
# Published targets of `main.py`, by the modules that define them. Resolving them here needs no file `main.py`, which an
# installed package lacks, and never imports another program's.
MAIN_NAMES = {
    "CUDACallback": "ldm.training.callbacks",
    "DataModuleFromConfig": "ldm.training.data",
    "ImageLogger": "ldm.training.callbacks",
    "SetupCallback": "ldm.training.callbacks",
    "WrappedDataset": "ldm.training.data",
}
ROOT = Path(__file__).resolve().parents[2]
MAX_LENGTH = 200

# Modules without files or functions among their parameters: nothing, tables, distances, activations, orders.
_TORCH_NN = (
    "Identity Embedding L1Loss MSELoss SmoothL1Loss HuberLoss CrossEntropyLoss BCELoss BCEWithLogitsLoss KLDivLoss "
    "GaussianNLLLoss ReLU LeakyReLU ELU GELU SiLU Mish Softplus Sigmoid Tanh Hardtanh PixelShuffle PixelUnshuffle"
)
# What the sections `lightning.callbacks`, `lightning.logger` and `lightning.modelcheckpoint` can use; of the loggers
# that send what they log elsewhere, the one most used. TestTubeLogger left Lightning long ago; that older
# configurations name it is told as what it is, a name that is gone.
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
        *(
            f"{package}.{module}.{name}"
            for package in ("pytorch_lightning", "lightning.pytorch")  # two names of the same classes
            for module, names in _LIGHTNING.items()
            for name in names.split()
        ),
    ]
)

# Public names in ASCII: no look-alikes, no attributes that Python or a package keeps to itself.
_PATH = re.compile(r"[A-Za-z][A-Za-z0-9_]*(\.[A-Za-z][A-Za-z0-9_]*)*")

_allowed: tuple[str, ...] = ()


def allow(*prefixes: str) -> None:
    """Trust what lies under these dotted prefixes: `"mydata"` allows `mydata.Set` and `mydata.sets.Set`.

    Raises:
        ValueError: one of them is no dotted path of public names.
    """
    global _allowed
    for prefix in prefixes:
        if not isinstance(prefix, str) or len(prefix) > MAX_LENGTH or not _PATH.fullmatch(prefix):
            raise ValueError(f'{shown(prefix)} is no prefix of a target such as "mypackage" or "mypackage.data"')
    _allowed = (*_allowed, *(prefix for prefix in prefixes if prefix not in _allowed))


@contextmanager
def allowing(*prefixes: str) -> Iterator[None]:
    """Within the block these prefixes are trusted; afterwards whatever was before, whoever called `allow`.

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
    """Return the target that `main.NAME` stands for, and any other target unchanged."""
    if isinstance(target, str) and not _is_allowed(target):
        module, _, name = target.partition(".")
        if module == "main" and name in MAIN_NAMES:
            return f"{MAIN_NAMES[name]}.{name}"
    return target


def refusal(target: Any) -> str | None:
    """Why a configuration must not name `target`, judged without importing anything; None where it may."""
    if not isinstance(target, str) or "." not in target or not _PATH.fullmatch(target) or len(target) > MAX_LENGTH:
        return 'is not a dotted path of public names such as "package.module.Class"'
    target = resolve(target)
    package = target.partition(".")[0]
    if _is_allowed(target) or target in LISTED:
        return None
    if package not in OWN_PACKAGES:
        return (
            "is refused: a configuration names classes of ldm and a few of torch and Lightning; if the code is yours, "
            f"or you trust it, give --allow-target {target.rpartition('.')[0]}"
        )
    found = _foreign_home(package)
    if found is not None:
        return (
            f'is refused: Python finds "{package}" in "{found}", which is not ours; '
            f"run from another folder, or if it is yours, give --allow-target {package}"
        )
    return None


def object_refusal(target: str, found: Any) -> str | None:
    """Why `found`, to which `target` led, must not be built; None where it may."""
    home = getattr(found, "__module__", None)
    home = home if isinstance(home, str) else type(found).__name__
    if _is_allowed(target):
        if not (inspect.isclass(found) or inspect.isroutine(found)):
            return "is refused: it is neither a class nor a function"
        if home.partition(".")[0] != target.partition(".")[0] and not _is_allowed(f"{home}."):
            return f"is refused: it comes from {home}; if you trust that too, give --allow-target {home}"
        return None
    if not inspect.isclass(found):
        return "is refused: it is not a class"
    packages = OWN_PACKAGES if target.partition(".")[0] in OWN_PACKAGES else (target.partition(".")[0],)
    return None if home.partition(".")[0] in packages else f"is refused: it is {home}'s, not defined there"


def shown(value: Any, limit: int = 80) -> str:
    """`value` in quotes, in one line of ASCII at most `limit` characters long."""
    text = ascii(value)[1:-1] if isinstance(value, str) else ascii(value)
    return f'"{text}"' if len(text) <= limit else f'"{text[: limit - 3]}..."'


def _is_allowed(path: str) -> bool:
    return any(path == prefix or path.startswith(f"{prefix}.") for prefix in _allowed)


def _foreign_home(package: str) -> str | None:
    """Where Python would import one of our packages from, if not from here: e.g. another `main.py`."""
    try:
        spec = importlib.util.find_spec(package)
    except ValueError:  # put into sys.modules by hand
        return None
    if spec is None or spec.origin is None:
        return None
    return None if ROOT in Path(spec.origin).resolve().parents else spec.origin
