"""Published training hooks of the diffusion models, for Lightning's Trainer and for subclasses.

`ldm.training.modules` trains the models without them, unless a subclass defines hooks of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from ldm.config.instantiate import instantiate_from_config
from ldm.models.lightning import Trainable


class TrainingHooks(Trainable):
    """Mixin of `DDPM`: one loss, AdamW, and the moving average of the weights.

    A model has Lightning's methods, such as `log_dict`, if the program imported Lightning before it built the model.
    """

    learning_rate: float
    use_scheduler: bool
    scheduler_config: Mapping[str, Any] | None

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        """Return the loss of a batch, and log its values."""
        model = self._as_lightning_module()
        loss, log = model.shared_step(batch)
        size = _batch_size(batch)
        model.log_dict(log, prog_bar=True, logger=True, on_step=True, on_epoch=True, batch_size=size)
        step = float(model.global_step)
        model.log("global_step", step, prog_bar=False, on_step=True, on_epoch=False, batch_size=size)
        if self.use_scheduler:
            rate = model.optimizers().param_groups[0]["lr"]
            model.log("lr_abs", rate, prog_bar=True, on_step=True, on_epoch=False, batch_size=size)
        return loss

    @torch.no_grad()
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Log the loss of a batch, and under names with `_ema` that of the averaged weights."""
        model = self._as_lightning_module()
        _, log = model.shared_step(batch)
        with model.ema_scope():
            _, averaged = model.shared_step(batch)
        log = {**log, **{f"{name}_ema": value for name, value in averaged.items()}}
        model.log_dict(log, on_step=False, on_epoch=True, batch_size=_batch_size(batch))

    def _as_lightning_module(self) -> Any:
        if not hasattr(self, "log_dict"):
            raise RuntimeError(
                "training hooks need Lightning: import it before the model is built, or use ldm.lightning_module(model)"
            )
        return self

    def configure_optimizers(self) -> Any:
        """Return AdamW over the model's `optimizer_parameters`, with its learning-rate schedule if it has one."""
        parameters: list[nn.Parameter] = self.optimizer_parameters()
        optimizer = AdamW(parameters, lr=self.learning_rate)
        if self.scheduler_config is None:
            return optimizer
        schedule = instantiate_from_config(self.scheduler_config).schedule
        return [optimizer], [{"scheduler": LambdaLR(optimizer, schedule), "interval": "step", "frequency": 1}]

    def optimizer_parameters(self) -> list[nn.Parameter]:
        """Return the parameters that the optimizer trains."""
        raise NotImplementedError

    def on_train_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Prepare the model for a batch, e.g. measure the scale of its latents on the first one of a new run."""
        model = self._as_lightning_module()
        model.before_training_batch(batch, model.current_epoch == 0 and model.global_step == 0 and batch_idx == 0)

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Update the moving average of the weights."""
        model: Any = self
        model.update_ema()


def _batch_size(batch: Any) -> int:
    values = batch.values() if isinstance(batch, Mapping) else [batch]
    return next((len(value) for value in values if isinstance(value, torch.Tensor) and value.dim()), 1)
