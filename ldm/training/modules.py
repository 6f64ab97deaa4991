"""Lightning adapters that train plain models.

An adapter owns optimizers, logging and validation. Its state dict is the model's own, without a prefix, so that
checkpoints hold the published names.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from pytorch_lightning import LightningModule
from pytorch_lightning.core.optimizer import LightningOptimizer
from torch import Tensor, nn
from torch.optim import Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from ldm.config.instantiate import instantiate_from_config
from ldm.errors import UserError
from ldm.training.optimizers import fused
from ldm.training.rng import rng_state, set_rng_state

RNG_KEY = "rng"


@dataclasses.dataclass(frozen=True)
class ManualOptimization:
    """What Lightning's Trainer refuses to do for several optimizers, so that the adapter does it itself."""

    accumulate_grad_batches: int = 1
    gradient_clip_val: float | None = None
    gradient_clip_algorithm: str | None = None


def lightning_module(model: nn.Module, manual: ManualOptimization | None = None) -> LightningModule:
    """The adapter that trains `model`; a LightningModule is returned as it is.

    Args:
        model: with `adversarial_loss` (first stages) or `shared_step` (diffusion models and classifiers).
        manual: for first stages, what the Trainer cannot do for them.

    Raises:
        UserError: the model has neither, or no loss to train with.
    """
    if isinstance(model, LightningModule):
        return model
    if hasattr(model, "adversarial_loss"):
        return AutoencoderTraining(model, manual or ManualOptimization())
    if hasattr(model, "noise_accuracies"):
        return ClassifierTraining(model)
    if hasattr(model, "shared_step"):
        return DiffusionTraining(model)
    raise UserError(
        f"{type(model).__name__} cannot be trained: it has neither adversarial_loss nor shared_step; "
        "give model.target a first stage or a diffusion model"
    )


class ModelTraining(LightningModule):
    """What the adapters share: the model's own state dict, random states in checkpoints, pictures."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self._saved_rng: dict[str, Any] | None = None
        self._training_rng: dict[str, Any] | None = None

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The model's state dict."""
        return self.model.state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load the model's state dict."""
        return self.model.load_state_dict(state_dict, strict=strict, assign=assign)

    @property
    def learning_rate(self) -> float:
        """The model's, which the run has set."""
        return float(self.model.learning_rate)

    def log_images(self, batch: Mapping[str, Any], **options: Any) -> dict[str, Tensor]:
        """The model's pictures of a batch."""
        return self.model.log_images(batch, **options)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the random states, so that a continued run draws what an uninterrupted one would have drawn."""
        checkpoint[RNG_KEY] = self._training_rng or rng_state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Remember the random states until training starts; setting up draws numbers too."""
        self._saved_rng = checkpoint.get(RNG_KEY)

    def on_train_start(self) -> None:
        """Set the random states, and give every process its own."""
        if self.trainer.world_size > 1:
            torch.manual_seed(torch.initial_seed() + self.trainer.global_rank + self.trainer.global_step)
        elif self._saved_rng is not None:
            set_rng_state(self._saved_rng)
        self._saved_rng = None

    def on_validation_start(self) -> None:
        """Set the training's random states aside: how often one validates must not change what is learnt."""
        self._training_rng = rng_state()

    def on_validation_end(self) -> None:
        """Take the training's random states up again."""
        if self._training_rng is not None:
            set_rng_state(self._training_rng)
        self._training_rng = None

    def _schedulers(self, optimizers: list[Optimizer]) -> list[dict[str, Any]]:
        config = getattr(self.model, "scheduler_config", None)
        if config is None:
            return []
        schedule = instantiate_from_config(config).schedule
        return [{"scheduler": LambdaLR(each, schedule), "interval": "step", "frequency": 1} for each in optimizers]


class OneLossTraining(ModelTraining):
    """Trains a model whose `shared_step` gives one loss: AdamW, learning rates by step."""

    def configure_optimizers(self) -> Any:
        """AdamW over what the model names, with the learning-rate schedule where it has one."""
        decay = getattr(self.model, "weight_decay", 1e-2)
        optimizer = fused(AdamW, self.model.optimizer_parameters(), lr=self.learning_rate, weight_decay=decay)
        return [optimizer], self._schedulers([optimizer])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The loss of one batch."""
        loss, log = self.model.shared_step(batch)
        size = _batch_size(batch)
        self.log_dict(log, prog_bar=True, on_step=True, on_epoch=True, batch_size=size)
        self.log("global_step", float(self.global_step), prog_bar=False, on_step=True, on_epoch=False, batch_size=size)
        if getattr(self.model, "scheduler_config", None) is not None:
            rate = self.optimizers().param_groups[0]["lr"]
            self.log("lr_abs", rate, prog_bar=True, on_step=True, on_epoch=False, batch_size=size)
        return loss


class DiffusionTraining(OneLossTraining):
    """Trains a diffusion model: one loss, a moving average of the weights."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Let the model prepare, e.g. measure the scale of its latents on the very first batch."""
        first = self.current_epoch == 0 and self.global_step == 0 and batch_idx == 0
        self.model.before_training_batch(batch, first)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step, and average at once: a checkpoint of this step must hold the average that belongs to it."""
        super().optimizer_step(*args, **kwargs)
        self.model.update_ema()

    @torch.no_grad()
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """The loss with the live weights, and under names with `_ema` with the averaged ones."""
        _, log = self.model.shared_step(batch)
        averaged = log
        if getattr(self.model, "use_ema", True):
            with self.model.ema_scope():
                _, averaged = self.model.shared_step(batch)
        log = {**log, **{f"{key}_ema": value for key, value in averaged.items()}}
        self.log_dict(log, on_step=False, on_epoch=True, batch_size=_batch_size(batch), sync_dist=True)


class ClassifierTraining(OneLossTraining):
    """Trains a classifier of noisy latents."""

    @torch.no_grad()
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Loss and accuracies at random steps, and the accuracy at each level of noise."""
        x = self.model.get_input(batch)
        _, log = self.model.shared_step(batch, x=x)
        log = {**log, **self.model.noise_accuracies(batch, x)}
        self.log_dict(log, on_step=False, on_epoch=True, batch_size=_batch_size(batch), sync_dist=True)


class AutoencoderTraining(ModelTraining):
    """Trains a first stage against a discriminator, two optimizers in turn (arXiv:2012.09841).

    One pass through the autoencoder serves both. The trainer's `global_step` counts the autoencoder's steps only,
    so `disc_start`, `max_steps` and file names mean what they meant when Lightning stepped both optimizers itself.
    """

    def __init__(self, model: nn.Module, manual: ManualOptimization) -> None:
        super().__init__(model)
        self.automatic_optimization = False
        self.manual = manual

    def configure_optimizers(self) -> Any:
        """Adam for the autoencoder and, if there is one, for the discriminator."""
        generator, discriminator = self.model.optimizer_parameters()
        factor = getattr(self.model, "lr_g_factor", 1.0)
        optimizers = [fused(Adam, generator, lr=factor * self.learning_rate, betas=(0.5, 0.9))]
        if discriminator:
            optimizers.append(fused(Adam, discriminator, lr=self.learning_rate, betas=(0.5, 0.9)))
        return optimizers, self._schedulers(optimizers)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """Add one batch's gradients; step when enough of them are in."""
        optimizers = self.optimizers()
        optimizers = optimizers if isinstance(optimizers, list) else [optimizers]
        step = self.global_step
        every = self.manual.accumulate_grad_batches
        last = (batch_idx + 1) % every == 0 or self.trainer.is_last_batch

        # The discriminator only judges here: it must not gather gradients from the autoencoder's loss.
        self.toggle_optimizer(optimizers[0])
        rec = self.model.reconstruct(batch)
        self._backward(rec, 0, step, batch, "aeloss")
        self.untoggle_optimizer(optimizers[0])
        if last:
            self._clip(optimizers[0])
            optimizers[0].step()
            optimizers[0].zero_grad()
            if hasattr(self.model, "update_ema"):
                self.model.update_ema()
        if len(optimizers) > 1:
            self._backward(_detached(rec), 1, step, batch, "discloss")
            if last:
                self._clip(optimizers[1])
                self._uncounted_step(optimizers[1])
                optimizers[1].zero_grad()
        if last:
            for scheduler in _as_list(self.lr_schedulers()):
                scheduler.step()

    def _backward(self, rec: Any, index: int, step: int, batch: Any, name: str) -> None:
        loss, log = self.model.adversarial_loss(rec, index, step, split="train")
        size = _batch_size(batch)
        self.log(name, loss.detach(), prog_bar=True, on_step=True, on_epoch=True, batch_size=size)
        self.log_dict(log, on_step=True, on_epoch=True, batch_size=size)
        self.manual_backward(loss / self.manual.accumulate_grad_batches)

    def _clip(self, optimizer: LightningOptimizer) -> None:
        if self.manual.gradient_clip_val:
            algorithm = self.manual.gradient_clip_algorithm or "norm"
            # In float16 the gradients still carry the loss's scale here.
            scaler = getattr(self.trainer.precision_plugin, "scaler", None)
            limit = self.manual.gradient_clip_val * (scaler.get_scale() if scaler else 1.0)
            self.clip_gradients(optimizer, limit, algorithm)

    def _uncounted_step(self, optimizer: LightningOptimizer) -> None:
        """Step through the strategy, which heeds the precision, but past the count of steps."""
        self.trainer.strategy.optimizer_step(optimizer.optimizer, closure=lambda: None)

    @torch.no_grad()
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Both losses, under `val/` and, with averaged weights, under `val_ema/`."""
        self._validate(batch, "val")
        if getattr(self.model, "use_ema", False):
            with self.model.ema_scope():
                self._validate(batch, "val_ema")

    def _validate(self, batch: Any, split: str) -> None:
        rec = self.model.reconstruct(batch)
        for index in range(len(_as_list(self.optimizers(use_pl_optimizer=False))) or 1):
            _, log = self.model.adversarial_loss(rec, index, self.global_step, split=split)
            self.log_dict(log, on_step=False, on_epoch=True, batch_size=_batch_size(batch), sync_dist=True)


def _as_list(given: Any) -> list[Any]:
    return given if isinstance(given, list) else [] if given is None else [given]


def _detached(rec: Any) -> Any:
    """The same reconstruction without the way back into the autoencoder."""
    return dataclasses.replace(rec, outputs=rec.outputs.detach())


def _batch_size(batch: Any) -> int:
    values = batch.values() if isinstance(batch, Mapping) else [batch]
    return next((len(value) for value in values if isinstance(value, Tensor) and value.dim()), 1)
