"""Build the objects that a configuration describes: a `target:` and its `params:`."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ldm.config import targets
from ldm.errors import UserError, did_you_mean

# Values of `cond_stage_config` that name a role instead of a class to build.
SPECIAL_CONFIGS = ("__is_first_stage__", "__is_unconditional__")


def get_obj_from_str(string: str, reload: bool = False) -> Any:
    """Return the class that a dotted `target:` names, such as `"ldm.models.autoencoder.VQModel"`.

    Args:
        string: the dotted path.
        reload: reload the module first.

    Raises:
        UserError: `ldm.config.targets` refuses the target, or the module or its attribute does not exist.
    """
    string = targets.resolve(string)
    _check_target(string, targets.refusal(string))
    module_name, _, name = string.rpartition(".")
    module = _import_module(module_name, string)
    if reload:
        module = importlib.reload(module)
    try:
        found = getattr(module, name)
    except AttributeError:
        hint = did_you_mean(name, (n for n in dir(module) if not n.startswith("_")))
        raise UserError(f'target "{string}": {module_name} has no "{name}"{hint}') from None
    _check_target(string, targets.object_refusal(string, found))
    return found


def _check_target(target: Any, refusal: str | None) -> None:
    if refusal is not None:
        raise UserError(f"target {targets.shown(target)} {refusal}")


def _import_module(module_name: str, target: str) -> Any:
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if missing != module_name and not module_name.startswith(missing + "."):
            raise  # the module exists, but one of its imports does not
        parent, _, leaf = missing.rpartition(".")
        hint = did_you_mean(leaf, _submodules(parent)) if parent else ""
        raise UserError(f'target "{target}": there is no module "{missing}"{hint}') from None


def _submodules(package: str) -> list[str]:
    import pkgutil

    try:
        path = importlib.import_module(package).__path__
    except (ImportError, AttributeError):
        return []
    return [module.name for module in pkgutil.iter_modules(path)]


def instantiate_from_config(config: Mapping[str, Any] | str, **extra: Any) -> Any:
    """Build `config["target"](**config["params"], **extra)`.

    The two role names in `SPECIAL_CONFIGS` build nothing and return None.

    Raises:
        UserError: the target is missing, refused or unknown; or a parameter is missing, unknown or of a wrong type.
    """
    if isinstance(config, str) and config in SPECIAL_CONFIGS:
        return None
    if not isinstance(config, Mapping) or "target" not in config:
        raise UserError(f'a configuration to build needs a "target" key, got: {_shorten(config)}')
    target = config["target"]
    cls = get_obj_from_str(target)
    params = config.get("params")
    if not isinstance(params, Mapping | None):
        raise UserError(f'{target}: "params" must hold names and values, got: {_shorten(params)}')
    params = {**(params or {}), **extra}
    _check_params(cls, target, params)
    try:
        built = cls(**params)
    except TypeError as error:
        # The constructor of a base class misses a parameter.
        if "__init__() missing" in str(error) and inspect.isclass(cls):
            raise UserError(f"{target}: {error}") from error
        raise
    if getattr(cls, "records_config", False):
        built.config = {"target": target, "params": params}
    return built


def _check_params(cls: Callable[..., Any], target: str, params: Mapping[str, Any]) -> None:
    for fault in parameter_faults(cls, target, params):
        raise UserError(fault)


def parameter_faults(cls: Callable[..., Any], target: str, params: Mapping[str, Any]) -> Iterator[str]:
    """Yield what is wrong with the parameters of a class: unknown names, values of a wrong type, missing ones.

    Args:
        cls: the class.
        target: its name in messages.
        params: names and values.
    """
    accepted, required, open_ended = parameters_of(cls)
    unknown = [str(key) for key in params if not isinstance(key, str) or not (open_ended or key in accepted)]
    for key, value in params.items():
        if str(key) in unknown:
            yield f'{target} has no parameter "{key}"{did_you_mean(str(key), accepted)}'
            continue
        expected = _expected_type(accepted.get(key), value)
        if expected is not None:
            yield f'{target} needs {expected} as "{key}", got: {_shorten(repr(value))}'
    # The correction of a misspelt name is not missing.
    missing = [name for name in required if name not in params and not did_you_mean(name, unknown)]
    if missing:
        yield f"{target} needs the parameter{'s'[: len(missing) > 1]} {', '.join(missing)}"


def _expected_type(annotation: Any, value: Any) -> str | None:
    """Return the type that a parameter needs if `value` has another one, else None.

    In YAML `"5"` is text and `5` a number, which users confuse. Only annotations of numbers, text and mappings are
    checked; whether a number must be an integer is left to the classes.
    """
    kinds = set(annotation.split(" | ")) - {"None"} if isinstance(annotation, str) else set()
    if not kinds or value is None:
        return None
    if kinds <= {"int", "float", "bool"} and isinstance(value, str | list | Mapping):
        return "true or false" if kinds == {"bool"} else "a number"
    if all(kind.startswith("Mapping[") for kind in kinds) and isinstance(value, str | int | float | list):
        return "names and values"
    return "text" if kinds == {"str"} and isinstance(value, int | float | list | Mapping) else None


def parameters_of(cls: Callable[..., Any]) -> tuple[dict[str, Any], list[str], bool]:
    """Return the accepted parameters with annotations, the required ones, and whether any other name is accepted.

    A constructor with `**kwargs` passes them to its base class, so it accepts the parameters of that class.
    """
    constructors = [cls]
    if inspect.isclass(cls):
        constructors = [vars(c)["__init__"] for c in inspect.getmro(cls)[:-1] if "__init__" in vars(c)]
    accepted: dict[str, Any] = {}
    required: list[str] = []
    for constructor in constructors:
        try:
            parameters = inspect.signature(constructor).parameters.values()
        except (TypeError, ValueError):
            return accepted, required, True
        named = [p for p in parameters if p.name != "self" and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        accepted = {p.name: p.annotation for p in named} | accepted
        # A derived class may provide what its base class requires, so only the first constructor counts.
        if constructor is constructors[0]:
            required = [p.name for p in named if p.default is p.empty]
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            return accepted, required, False
    return accepted, required, True


def _shorten(value: Any, limit: int = 80) -> str:
    text = str(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"
