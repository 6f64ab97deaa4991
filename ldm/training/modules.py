"""Lightning adapters that train plain models.

An adapter owns optimizers, logging and validation. Its state dict is that of the model without a prefix, so that
checkpoints have the published names.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, cast

import torch
from pytorch_lightning import LightningModule
from pytorch_lightning.core.optimizer import LightningOptimizer
from pytorch_lightning.trainer.states import RunningStage
from torch import Tensor, nn
from torch.optim import Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from ldm.config.instantiate import instantiate_from_config
from ldm.errors import UserError
from ldm.io.batch_items import item_count
from ldm.models.lightning import Trainable, overridden_hooks
from ldm.training.batch_check import BatchCheck
from ldm.training.captions import CaptionWarning, report_captions
from ldm.training.data import shown_name
from ldm.training.finite_steps import StepGuard, ValidationRecord
from ldm.training.latent_scale import check_latents
from ldm.training.optimizers import fused
from ldm.training.rng import rng_state, set_rng_state

RNG_KEY, GRADIENTS_KEY = "rng", "gradients"


@dataclasses.dataclass(frozen=True)
class ManualOptimization:
    """Arguments that Lightning's Trainer rejects for several optimizers, and that the adapter applies itself."""

    accumulate_grad_batches: int = 1
    gradient_clip_val: float | None = None
    gradient_clip_algorithm: str | None = None


def lightning_module(model: nn.Module, manual: ManualOptimization | None = None) -> LightningModule:
    """Return the adapter that trains `model`; a LightningModule of the user's own is returned unchanged.

    Args:
        model: a model with `adversarial_loss` (first stages) or `shared_step` (diffusion models and classifiers). The
            hooks that its class defines are called.
        manual: arguments that the adapter of a first stage applies instead of the Trainer.

    Returns:
        A LightningModule, for `Trainer.fit(ldm.lightning_module(model), data)`.

    Returns:
        A LightningModule for `Trainer.fit`. Its state dict is that of the model.

    Raises:
        UserError: the model has neither method, or its class has hooks that are not called.
    """
    from ldm.training.own_hooks import OwnHooksTraining, refuse_hooks

    if trains_itself(model):
        return cast(LightningModule, model)
    hooks = overridden_hooks(type(model))
    if isinstance(model, Trainable) and hooks:
        return OwnHooksTraining(model, hooks)
    refuse_hooks(model, hooks)
    if hasattr(model, "adversarial_loss"):
        return AutoencoderTraining(model, manual or ManualOptimization())
    if hasattr(model, "noise_accuracies"):
        return ClassifierTraining(model)
    if hasattr(model, "shared_step"):
        return DiffusionTraining(model)
    raise UserError(
        f"{type(model).__name__} cannot be trained: it has neither adversarial_loss nor shared_step; "
        "set model.target to a first stage or a diffusion model"
    )


def trains_itself(model: nn.Module) -> bool:
    """Return whether a model is a LightningModule of the user's own, which needs no adapter."""
    return isinstance(model, LightningModule) and not isinstance(model, Trainable)


class ModelTraining(LightningModule):
    """Base class of the adapters: state dict, random states in checkpoints, and sample images."""

    model: Any  # a module with the methods that the adapter calls; the configuration chooses its class
    hooks: frozenset[str] = frozenset()  # hooks of the model's class that the adapter calls

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self._saved_rng: dict[str, Any] | None = None
        self._saved_gradients: dict[str, Tensor] = {}
        self._training_rng: dict[str, Any] | None = None
        self._check_batch = BatchCheck(model)
        self._guard = StepGuard(self)
        self._validation = ValidationRecord()

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return the state dict of the model."""
        return self.model.state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load the state dict of the model."""
        return self.model.load_state_dict(state_dict, strict=strict, assign=assign)

    @property
    def non_finite_policy(self) -> str | None:
        """Policy for steps that are not finite, see `StepGuard`."""
        return self._guard.policy

    @non_finite_policy.setter
    def non_finite_policy(self, policy: str | None) -> None:
        self._guard.policy = policy

    def log_gradient_norm(self, index: int, name: str, scale: float = 1.0) -> None:
        """Log the norm of an optimizer's gradients before clipping.

        Args:
            index: number of the optimizer, see `StepGuard`.
            name: name of the value.
            scale: factor of the gradients.
        """
        self.log(name, self._guard.gradient_norms[index] / scale, on_step=True, on_epoch=False, batch_size=1)

    @property
    def learning_rate(self) -> float:
        """Learning rate of the model, which the run has set."""
        return float(self.model.learning_rate)

    def log_images(self, batch: Mapping[str, Any], **options: Any) -> dict[str, Tensor]:
        """Return the images that the model generates for a batch."""
        return self.model.log_images(batch, **options)

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Check a batch before it is copied to the device."""
        stage = cast(RunningStage, self.trainer.state.stage)  # the Trainer sets it before it reads batches
        self._check_batch(batch, shown_name(str(stage.dataloader_prefix)), warn=self.trainer.is_global_zero)
        return batch

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the random states, so that a resumed run repeats the random numbers of an uninterrupted one."""
        checkpoint[RNG_KEY] = self._training_rng or rng_state()
        if self.is_accumulating() and self.trainer.world_size == 1 and "optimizer_states" in checkpoint:
            gradients = {name: value.grad for name, value in self.named_parameters() if value.grad is not None}
            checkpoint[GRADIENTS_KEY] = gradients

    def is_accumulating(self) -> bool:
        """Return whether the gradients of the latest batches wait for their step."""
        return self.trainer.fit_loop._should_accumulate()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Remember the random states until training starts, because setup also uses random numbers."""
        self._saved_rng = checkpoint.get(RNG_KEY)
        self._saved_gradients = checkpoint.get(GRADIENTS_KEY, {})

    def on_train_start(self) -> None:
        """Restore gradients and random states, or seed each of several processes differently."""
        for name, value in self.named_parameters():
            if name in self._saved_gradients:
                value.grad = self._saved_gradients[name].to(value, copy=True)
        self._saved_gradients = {}
        if self.trainer.world_size > 1:
            torch.manual_seed(torch.initial_seed() + self.trainer.global_rank + self.trainer.global_step)
        elif self._saved_rng is not None:
            set_rng_state(self._saved_rng)
        self._saved_rng = None

    def on_validation_start(self) -> None:
        """Save the random states, so that validation does not change training."""
        self._training_rng = rng_state()

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Report a step that was skipped, because its loss or gradients are not finite."""
        self._guard.end_batch()

    def log_validation(self, log: Mapping[str, Any], batch: Any, batch_idx: int) -> None:
        """Log the values of a validation batch, averaged over the epoch and all processes."""
        self._validation.record(log, batch, batch_idx, self.current_epoch)
        self.log_dict(log, on_step=False, on_epoch=True, batch_size=item_count(batch), sync_dist=True)

    def on_validation_end(self) -> None:
        """Report losses that are not finite, and restore the random states of training."""
        self._validation.report()
        if self._training_rng is not None:
            set_rng_state(self._training_rng)
        self._training_rng = None

    def _schedulers(self, optimizers: list[Optimizer]) -> list[dict[str, Any]]:
        config = getattr(self.model, "scheduler_config", None)
        if config is None:
            return []
        schedule = instantiate_from_config(config).schedule
        return [
            {"scheduler": LambdaLR(optimizer, schedule), "interval": "step", "frequency": 1} for optimizer in optimizers
        ]


class OneLossTraining(ModelTraining):
    """Base class of adapters for models whose `shared_step` returns one loss, trained with AdamW."""

    def configure_optimizers(self) -> Any:
        """Return AdamW over the model's `optimizer_parameters`, with its learning-rate schedule if it has one."""
        decay = getattr(self.model, "weight_decay", 1e-2)
        optimizer = fused(AdamW, self.model.optimizer_parameters(), lr=self.learning_rate, weight_decay=decay)
        return [optimizer], self._schedulers([optimizer])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss of one batch."""
        self._guard.begin(batch, batch_idx)
        loss, log = self.model.shared_step(batch)
        self._guard.record(loss)
        size = item_count(batch)
        self.log_dict(log, prog_bar=True, on_step=True, on_epoch=True, batch_size=size)
        self.log("global_step", float(self.global_step), prog_bar=False, on_step=True, on_epoch=False, batch_size=size)
        if getattr(self.model, "scheduler_config", None) is not None:
            rate = cast(LightningOptimizer, self.optimizers()).param_groups[0]["lr"]
            self.log("lr_abs", rate, prog_bar=True, on_step=True, on_epoch=False, batch_size=size)
        return loss

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Skip the step if its loss or gradients are not finite."""
        if self._guard.check(optimizer):
            self.log_gradient_norm(0, "train/grad_norm")
        self._guard.drop_gradients(optimizer)


class DiffusionTraining(OneLossTraining):
    """Adapter of a diffusion model, with a moving average of the weights."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self._caption_warning = CaptionWarning()

    def on_fit_start(self) -> None:
        """Report captions that the model does not read completely, if the data set returns them without its images."""
        data = getattr(self.trainer, "datamodule", None)
        dataset = getattr(data, "datasets", {}).get("train")
        if self.trainer.is_global_zero and dataset is not None:
            self._caption_warning.is_logged = report_captions(self.model, dataset)

    def log_images(self, batch: Mapping[str, Any], **options: Any) -> dict[str, Tensor]:
        """Return the images that the model generates for a batch. Cached latents are shown with their own images."""
        dataset: Any = getattr(getattr(self.trainer, "datamodule", None), "datasets", {}).get("train")
        if options.get("split") == "train" and hasattr(dataset, "with_images"):
            batch = dataset.with_images(batch, self.model.first_stage_key)
        return super().log_images(batch, **options)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Call the model before each batch, e.g. to measure the scale of its latents on the first batch of all."""
        first = self.current_epoch == 0 and self.global_step == 0 and batch_idx == 0
        self.model.before_training_batch(batch, first)
        if first:
            check_latents(self.model, batch, self.trainer)
        if self.trainer.is_global_zero:
            self._caption_warning.check(self.model, batch)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step and update the moving average, so that checkpoints contain the average of their step."""
        super().optimizer_step(*args, **kwargs)
        self.model.update_ema()

    @torch.no_grad()
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Log the loss with the live weights and, under names with `_ema`, with the averaged weights."""
        _, log = self.model.shared_step(batch)
        ema_log = log
        if getattr(self.model, "use_ema", True):
            with self.model.ema_scope():
                _, ema_log = self.model.shared_step(batch)
        log = {**log, **{f"{key}_ema": value for key, value in ema_log.items()}}
        self.log_validation(log, batch, batch_idx)


class ClassifierTraining(OneLossTraining):
    """Adapter of a classifier of noisy latents."""

    @torch.no_grad()
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Log the loss and the accuracies at random timesteps, and the accuracy at each noise level."""
        x = self.model.get_x_start(batch)
        _, log = self.model.shared_step(batch, x=x)
        log = {**log, **self.model.noise_accuracies(batch, x)}
        self.log_validation(log, batch, batch_idx)


class AutoencoderTraining(ModelTraining):
    """Adapter of a first stage with a discriminator: two optimizers step in turn (arXiv:2012.09841).

    Both losses share one forward pass of the autoencoder. The trainer's `global_step` counts only the steps of the
    autoencoder, so `disc_start`, `max_steps` and file names have the published meaning.
    """

    def __init__(self, model: nn.Module, manual: ManualOptimization) -> None:
        super().__init__(model)
        self.automatic_optimization = False
        self.manual = manual
        self.codes: dict[str, Tensor | None] = {}  # codebook indices of the latest batch, by split

    def configure_optimizers(self) -> Any:
        """Return Adam for the autoencoder and, if there is one, for the discriminator."""
        generator, discriminator = self.model.optimizer_parameters()
        factor = getattr(self.model, "lr_g_factor", 1.0)
        optimizers: list[Optimizer] = [fused(Adam, generator, lr=factor * self.learning_rate, betas=(0.5, 0.9))]
        if discriminator:
            optimizers.append(fused(Adam, discriminator, lr=self.learning_rate, betas=(0.5, 0.9)))
        return optimizers, self._schedulers(optimizers)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """Accumulate the gradients of one batch, and step after `accumulate_grad_batches` batches."""
        optimizers = self.optimizers()
        optimizers = optimizers if isinstance(optimizers, list) else [optimizers]
        step = self.global_step
        is_step = not self._accumulates(batch_idx)

        self._guard.begin(batch, batch_idx)
        # The discriminator must not accumulate gradients of the autoencoder's loss.
        self.toggle_optimizer(optimizers[0])
        rec = self.model.reconstruct(batch)
        self.codes["train"] = _codes(rec)
        self._backward(rec, 0, step, batch, "aeloss")
        self.untoggle_optimizer(optimizers[0])
        if is_step:
            self._check_and_clip(optimizers[0], 0)
            optimizers[0].step()
            optimizers[0].zero_grad()
            if hasattr(self.model, "update_ema"):
                self.model.update_ema()
        if len(optimizers) > 1:
            self._backward(_detached(rec), 1, step, batch, "discloss")
            if is_step:
                self._check_and_clip(optimizers[1], 1)
                self._uncounted_step(optimizers[1])
                optimizers[1].zero_grad()
        if is_step:
            for scheduler in _as_list(self.lr_schedulers()):
                scheduler.step()

    def _accumulates(self, batch_idx: int) -> bool:
        """Return whether the step follows a later batch."""
        return (batch_idx + 1) % self.manual.accumulate_grad_batches != 0 and not self.trainer.is_last_batch

    def is_accumulating(self) -> bool:
        """Return whether the gradients of the latest batches wait for their step."""
        batches = self.trainer.fit_loop.epoch_loop.batch_progress.current.completed
        return batches > 0 and self._accumulates(batches - 1)

    def on_validation_model_zero_grad(self) -> None:
        """Keep the gradients of a step that a validation interrupts."""
        if not self.is_accumulating():
            super().on_validation_model_zero_grad()

    def _backward(self, rec: Any, index: int, step: int, batch: Any, name: str) -> None:
        loss, log = self.model.adversarial_loss(rec, index, step, split="train")
        self._guard.record(loss, index)
        size = item_count(batch)
        self.log(name, loss.detach(), prog_bar=True, on_step=True, on_epoch=True, batch_size=size)
        self.log_dict(log, on_step=True, on_epoch=True, batch_size=size)
        self.manual_backward(loss / self.manual.accumulate_grad_batches)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Skip the step if its loss or gradients are not finite."""
        self._guard.drop_gradients(optimizer)

    def _check_and_clip(self, optimizer: LightningOptimizer, index: int) -> None:
        if not self._guard.check(optimizer, index):
            return
        # In float16 the gradients are still scaled here.
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        scale = scaler.get_scale() if scaler else 1.0
        self.log_gradient_norm(index, ("train/grad_norm", "train/grad_norm_disc")[index], scale)
        if self.manual.gradient_clip_val:
            algorithm = self.manual.gradient_clip_algorithm or "norm"
            limit = self.manual.gradient_clip_val * scale
            self.clip_gradients(optimizer, limit, algorithm)  # type: ignore[arg-type] # as Lightning documents it

    def _uncounted_step(self, optimizer: LightningOptimizer) -> None:
        """Step through the strategy, which handles the precision, without counting the step."""
        self.trainer.strategy.optimizer_step(optimizer.optimizer, closure=lambda: None)

    @torch.no_grad()
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Log both losses under `val/` and, with averaged weights, under `val_ema/`."""
        self._validate(batch, batch_idx, "val")
        if getattr(self.model, "use_ema", False):
            with self.model.ema_scope():
                self._validate(batch, batch_idx, "val_ema")

    def _validate(self, batch: Any, batch_idx: int, split: str) -> None:
        rec = self.model.reconstruct(batch)
        self.codes[split] = _codes(rec)
        for index in range(len(_as_list(self.optimizers(use_pl_optimizer=False))) or 1):
            _, log = self.model.adversarial_loss(rec, index, self.global_step, split=split)
            self.log_validation(log, batch, batch_idx)


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _codes(rec: Any) -> Tensor | None:
    """Return the codebook indices of a reconstruction, or None for a model without a codebook."""
    return (getattr(rec, "extra", None) or {}).get("predicted_indices")


def _detached(rec: Any) -> Any:
    """Return the reconstruction detached from the graph of the autoencoder."""
    return dataclasses.replace(rec, outputs=rec.outputs.detach())
