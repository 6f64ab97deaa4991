"""Published attributes of samplers, and the check of their overridden methods.

Programs read the tables of a sampler, subclasses replace them, and both override the published methods of its loop.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ldm.errors import UserError

# The published methods of the samplers' loops and steps.
LOOPS_AND_STEPS = ("ddim_sampling", "p_sample_ddim", "plms_sampling", "p_sample_plms")
# The modules that define published methods of samplers and models. A file that a program adds is not one of them.
_SAMPLERS = ("ancestral", "ddim", "dpm_solver", "plms", "sampler")
_MODELS = ("ddpm", "latent_space", "process", "sampling_methods", "stable_diffusion", "tiling")
OWN_MODULES = frozenset(f"ldm.models.diffusion.{name}" for name in (*_SAMPLERS, *_MODELS))


class OfModel:
    """Attribute of a sampler with the value of an attribute of its model, unless a program assigns another value."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, sampler: Any, owner: type | None = None) -> Any:
        return self if sampler is None else getattr(sampler.model, self.name)


class StepTable:
    """Table (S,) with a value for each step, as a float32 tensor on the model's device.

    `sampler.tables[name]` holds the values in float64. The steps read them there, so that a table that a subclass
    assigns is used.
    """

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, sampler: Any, owner: type | None = None) -> Any:
        if sampler is None:
            return self
        if self.name not in sampler.tables:
            raise AttributeError(f"{type(sampler).__name__} has no {self.name} before make_schedule")
        return torch.tensor(sampler.tables[self.name], dtype=torch.float32, device=sampler.model.device)

    def __set__(self, sampler: Any, values: Any) -> None:
        if isinstance(values, torch.Tensor):
            values = values.detach().cpu()
        sampler.tables[self.name] = np.asarray(values, dtype=np.float64)


def is_overridden(method: Any) -> bool:
    """Return whether a method of a sampler or diffusion model is defined outside this package; False for None."""
    return method is not None and getattr(method, "__module__", None) not in OWN_MODULES


def check_overrides(sampler: Any, called: tuple[str, ...]) -> None:
    """Raise UserError if a subclass overrides a published method that the sampler does not call.

    Args:
        sampler: the sampler.
        called: the methods of `LOOPS_AND_STEPS` that it calls.
    """
    for name in LOOPS_AND_STEPS:
        method = getattr(type(sampler), name, None)
        if method is not None and name not in called and is_overridden(method):
            remedy = f"override {' or '.join(called or ('step',))}"
            raise UserError(f"{type(sampler).__name__}.{name} is never called by {sampler.name} sampling; {remedy}")
