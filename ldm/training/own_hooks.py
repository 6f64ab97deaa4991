"""Training of models whose classes define hooks of their own, such as `training_step` or `configure_optimizers`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from pytorch_lightning import LightningModule
from torch import Tensor, nn

from ldm.errors import UserError
from ldm.models.lightning import REMOVED, REPLACING, attach_lightning
from ldm.training.modules import DiffusionTraining


def check_hooks(model: nn.Module, hooks: Sequence[str]) -> None:
    """Raise UserError if Lightning does not call a hook, or calls it with other arguments.

    Args:
        model: the model.
        hooks: the hooks that its class defines.
    """
    name = type(model).__name__
    for hook in hooks:
        if hook in REMOVED:
            raise UserError(f"{name}.{hook} is never called: Lightning 2 has no such hook; use {REMOVED[hook]}")
        if not hasattr(LightningModule, hook):
            raise UserError(f"{name}.{hook} is never called: Lightning has no such hook; rename it")
        if "optimizer_idx" in inspect.signature(getattr(model, hook)).parameters:
            raise UserError(
                f"{name}.{hook} takes optimizer_idx, which Lightning 2 does not pass; set automatic_optimization to "
                "False and step the optimizers in training_step"
            )


def refuse_hooks(model: nn.Module, hooks: Sequence[str]) -> None:
    """Raise UserError if a first stage or a classifier defines hooks, which their adapters do not call."""
    if hooks:
        raise UserError(
            f"{type(model).__name__} defines {hooks[0]}, which is never called; derive it from a diffusion model or "
            "LightningModule, or override shared_step, adversarial_loss or optimizer_parameters"
        )


class OwnHooksTraining(DiffusionTraining):
    """Adapter of a diffusion model that calls the hooks of its class.

    The model is a LightningModule, so its hooks can use `self.log`, `self.trainer`, `self.global_step` and others. The
    rest is the same as without hooks: random states in checkpoints, checks of batches and steps, sample images.

    Args:
        model: the model; it becomes a LightningModule if it is none.
        hooks: the hooks that its class defines.
    """

    def __init__(self, model: Any, hooks: Sequence[str]) -> None:
        attach_lightning(model)
        check_hooks(model, hooks)
        super().__init__(model)
        self.hooks = frozenset(hooks)
        self.automatic_optimization = model.automatic_optimization
        for hook in self.hooks - vars(OwnHooksTraining).keys():
            own = getattr(self, hook)
            setattr(self, hook, self._replacing(hook) if hook in REPLACING else self._after(own, hook))

    def _replacing(self, hook: str) -> Callable[..., Any]:
        return lambda *args, **kwargs: self._call(hook, *args, **kwargs)

    def _after(self, own: Callable[..., Any], hook: str) -> Callable[..., Any]:
        def call_both(*args: Any, **kwargs: Any) -> Any:
            result = own(*args, **kwargs)
            returned = self._call(hook, *args, **kwargs)
            return result if returned is None else returned

        return call_both

    def _call(self, hook: str, *args: Any, **kwargs: Any) -> Any:
        """Call a hook of the model, whose values are logged under the hook that Lightning is calling."""
        method = getattr(self.model, hook)
        self.model._current_fx_name = self._current_fx_name
        try:
            return method(*args, *[0] * _missing(method, args, kwargs), **kwargs)
        finally:
            self.model._current_fx_name = None

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        """Return the loss of one batch."""
        if "training_step" not in self.hooks:
            return super().training_step(batch, batch_idx)
        self._guard.begin(batch, batch_idx)
        output = self._call("training_step", batch, batch_idx)
        loss = output["loss"] if isinstance(output, dict) else output
        if isinstance(loss, Tensor):
            self._guard.record(loss)
        return output

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Skip the step if its loss or gradients are not finite, if Lightning takes the steps."""
        if self.automatic_optimization:
            super().on_before_optimizer_step(optimizer)
        if "on_before_optimizer_step" in self.hooks:
            self._call("on_before_optimizer_step", optimizer)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> Any:
        """Call the model before each batch."""
        if "on_train_batch_start" not in self.hooks:
            return super().on_train_batch_start(batch, batch_idx)
        if self.trainer.is_global_zero:
            self._caption_warning.check(self.model, batch)
        return self._call("on_train_batch_start", batch, batch_idx)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step, and update the moving average unless `on_train_batch_end` of the model does."""
        if "optimizer_step" in self.hooks:
            self._call("optimizer_step", *args, **kwargs)
        else:
            LightningModule.optimizer_step(self, *args, **kwargs)
        if "on_train_batch_end" not in self.hooks:
            self.model.update_ema()

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Call the model after each batch, and report a step that was skipped."""
        super().on_train_batch_end(outputs, batch, batch_idx)
        if "on_train_batch_end" in self.hooks:
            self._call("on_train_batch_end", outputs, batch, batch_idx)


def _missing(method: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> int:
    """Return the number of required arguments that Lightning 2 no longer passes, such as `dataloader_idx`."""
    parameters = [
        parameter
        for parameter in inspect.signature(method).parameters.values()
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
        and parameter.name not in kwargs
    ]
    return sum(parameter.default is parameter.empty for parameter in parameters[len(args) :])
