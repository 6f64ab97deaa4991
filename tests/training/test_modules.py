"""Lightning adapters: steps, counts, logs and checkpoints of tiny models."""

from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import nn

from ldm.errors import UserError
from ldm.training.loader import ResumableLoader
from ldm.training.modules import ManualOptimization, lightning_module

SCHEDULE = {
    "target": "ldm.lr_scheduler.LambdaLinearScheduler",
    "params": {"warm_up_steps": [2], "cycle_lengths": [100], "f_start": [0.0], "f_max": [1.0], "f_min": [1.0]},
}


@dataclass(frozen=True)
class Pass:
    inputs: torch.Tensor
    outputs: torch.Tensor
    regularizer: Any = None
    extra: Any = None


class ToyAutoencoder(nn.Module):
    """Autoencoder of one linear layer with a linear discriminator; it records its calls."""

    learning_rate = 0.1
    monitor = None

    def __init__(self, with_discriminator=True, scheduler_config=None):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Linear(3, 3)
        self.critic = nn.Linear(3, 1) if with_discriminator else None
        self.scheduler_config = scheduler_config
        self.calls, self.passes, self.dtypes = [], 0, []
        self.critic_gradients = []

    def reconstruct(self, batch):
        self.passes += 1
        outputs = self.net(batch["image"])
        self.dtypes.append(outputs.dtype)
        return Pass(batch["image"], outputs)

    def adversarial_loss(self, rec, optimizer_idx, global_step, split="train"):
        self.calls.append((optimizer_idx, global_step, split))
        if optimizer_idx == 0:
            loss = (rec.inputs - rec.outputs).square().mean()
            if self.critic is not None:
                loss = loss - self.critic(rec.outputs).mean()
            return loss, {f"{split}/rec_loss": loss.detach()}
        assert not rec.outputs.requires_grad
        self.critic_gradients.append(self.critic.weight.grad)
        loss = (self.critic(rec.outputs) - self.critic(rec.inputs)).mean() + self.critic.weight.square().sum()
        return loss, {f"{split}/disc_loss": loss.detach()}

    def optimizer_parameters(self):
        return list(self.net.parameters()), list(self.critic.parameters()) if self.critic is not None else []


class ToyDiffusion(nn.Module):
    """Linear layer with a moving average of its weights."""

    learning_rate = 0.1
    monitor = None
    use_ema = True

    def __init__(self, scheduler_config=None):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Linear(3, 3)
        self.register_buffer("average", self.net.weight.detach().clone())
        self.scheduler_config = scheduler_config
        self.first = []

    def shared_step(self, batch):
        loss = (self.net(batch["image"]) - torch.rand(3)).square().mean()
        return loss, {f"{'train' if self.training else 'val'}/loss": loss.detach()}

    def optimizer_parameters(self):
        return list(self.net.parameters())

    def before_training_batch(self, batch, is_first):
        self.first.append(is_first)

    def update_ema(self):
        self.average.lerp_(self.net.weight.detach(), 0.5)

    @contextmanager
    def ema_scope(self):
        live = self.net.weight.data
        self.net.weight.data = self.average.clone()
        yield
        self.net.weight.data = live


def images(count=8, batch_size=2):
    generator = torch.Generator().manual_seed(1)
    data = [{"image": torch.randn(3, generator=generator), "caption": "x"} for _ in range(count)]
    return ResumableLoader(data, batch_size)


def fit(model, loader=None, manual=None, validate=False, ckpt_path=None, **options):
    module = lightning_module(model, manual)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    plain = {"accelerator": "cpu", "max_epochs": 1, "num_sanity_val_steps": 0, "enable_checkpointing": False}
    trainer = Trainer(**{**quiet, **plain, **options})
    trainer.fit(module, loader or images(), images(2) if validate else None, ckpt_path=ckpt_path)
    return module, trainer


def test_discriminator_gets_no_gradients_of_autoencoder_loss():
    model = ToyAutoencoder()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    _, trainer = fit(model)
    assert model.passes == 4, "both losses share one forward pass of the autoencoder"
    assert [index for index, _, _ in model.calls] == [0, 1] * 4
    assert model.critic_gradients == [None] * 4
    assert not torch.equal(before["net.weight"], model.net.weight)
    assert not torch.equal(before["critic.weight"], model.critic.weight)
    assert trainer.global_step == 4


@pytest.mark.parametrize(("accumulated", "steps"), [(1, [0, 1, 2, 3]), (2, [0, 0, 1, 1]), (3, [0, 0, 0, 1])])
def test_steps_are_counted_once_for_both_optimizers(accumulated, steps):
    model = ToyAutoencoder()
    _, trainer = fit(model, manual=ManualOptimization(accumulated))
    assert [step for index, step, _ in model.calls if index == 0] == steps
    assert [step for index, step, _ in model.calls if index == 1] == steps
    assert trainer.global_step == steps[-1] + 1, "the remaining batches of an epoch make a step"


def test_max_steps_counts_steps_of_autoencoder():
    model = ToyAutoencoder()
    _, trainer = fit(model, max_steps=3, max_epochs=-1)
    assert trainer.global_step == model.passes == 3


def test_accumulated_batches_match_one_large_batch():
    """Adam's first step does not depend on the scale of the gradients, so the test compares several steps."""
    large, small = ToyAutoencoder(), ToyAutoencoder()
    fit(large, images(batch_size=4), max_epochs=3)
    fit(small, images(batch_size=2), ManualOptimization(2), max_epochs=3)
    for name, value in large.state_dict().items():
        torch.testing.assert_close(small.state_dict()[name], value, rtol=1e-5, atol=1e-6)


def test_gradients_are_clipped():
    norms = []

    class Spy(Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
            norms.append(torch.cat([g.flatten() for g in gradients]).norm().item())

    fit(ToyAutoencoder(), manual=ManualOptimization(gradient_clip_val=0.01), callbacks=[Spy()])
    assert len(norms) == 8
    assert max(norms) <= 0.01 * (1 + 1e-4)


def test_first_stage_without_discriminator_has_one_optimizer():
    model = ToyAutoencoder(with_discriminator=False)
    _, trainer = fit(model, validate=True)
    assert len(trainer.optimizers) == 1
    assert {index for index, _, _ in model.calls} == {0}
    assert "val/rec_loss" in trainer.callback_metrics


def test_published_optimizers_and_learning_rates():
    model = ToyAutoencoder()
    model.lr_g_factor = 2.0
    _, trainer = fit(model)
    assert [type(optimizer).__name__ for optimizer in trainer.optimizers] == ["Adam", "Adam"]
    assert [optimizer.defaults["betas"] for optimizer in trainer.optimizers] == [(0.5, 0.9)] * 2
    assert [optimizer.defaults["lr"] for optimizer in trainer.optimizers] == pytest.approx([0.2, 0.1])


@pytest.mark.parametrize("kind", [ToyAutoencoder, ToyDiffusion])
def test_optimizers_are_fused(kind):
    _, trainer = fit(kind())
    assert all(group["fused"] for optimizer in trainer.optimizers for group in optimizer.param_groups)


@pytest.mark.parametrize("kind", [ToyAutoencoder, ToyDiffusion])
def test_fused_optimizers_resume_from_checkpoint_of_plain_ones(kind, tmp_path):
    module, trainer = fit(kind())
    trainer.strategy.connect(module)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    saved = torch.load(tmp_path / "x.ckpt", weights_only=True)
    for state in saved["optimizer_states"]:
        for group in state["param_groups"]:
            group["fused"] = None
    torch.save(saved, tmp_path / "x.ckpt")
    _, trainer = fit(kind(), max_epochs=2, ckpt_path=tmp_path / "x.ckpt")
    assert trainer.global_step == 8
    assert all(group["fused"] for optimizer in trainer.optimizers for group in optimizer.param_groups)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_gradients_of_fused_optimizers_are_clipped(precision):
    """Lightning refuses to clip the gradients of PyTorch's fused optimizers in mixed precision."""
    weights = []
    for limit in (1e-9, None):  # below Adam's epsilon of 1e-8, the norm of the gradients matters
        model = ToyDiffusion()
        fit(model, precision=precision, gradient_clip_val=limit, max_steps=1, max_epochs=-1)
        weights.append((model.net.weight - ToyDiffusion().net.weight).abs().max().item())
    assert weights[0] < 0.02 < weights[1]
    fit(ToyAutoencoder(), manual=ManualOptimization(gradient_clip_val=0.01), precision=precision)


def test_schedules_follow_the_steps():
    _, adversarial = fit(ToyAutoencoder(scheduler_config=SCHEDULE), manual=ManualOptimization(4))
    assert [optimizer.param_groups[0]["lr"] for optimizer in adversarial.optimizers] == pytest.approx([0.05] * 2)
    _, diffusion = fit(ToyDiffusion(SCHEDULE), accumulate_grad_batches=4)
    assert diffusion.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.05)


def test_lower_precision_reaches_the_model():
    model = ToyAutoencoder()
    fit(model, precision="bf16-mixed")
    assert set(model.dtypes) == {torch.bfloat16}
    assert model.net.weight.dtype == torch.float32


@pytest.mark.parametrize("kind", [ToyAutoencoder, ToyDiffusion])
def test_checkpoints_have_names_of_the_model(kind, tmp_path):
    model = kind()
    module, trainer = fit(model)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    saved = torch.load(tmp_path / "x.ckpt", weights_only=True)
    assert saved["state_dict"].keys() == model.state_dict().keys()
    fresh = lightning_module(kind())
    fresh.load_state_dict(saved["state_dict"])
    assert torch.equal(fresh.model.net.weight, model.net.weight)
    with pytest.raises(RuntimeError, match="Missing key"):
        fresh.load_state_dict({})


def test_ema_is_updated_after_each_step():
    model = ToyDiffusion()
    averages = []
    model.update_ema = lambda: averages.append(model.net.weight.detach().clone())
    fit(model, accumulate_grad_batches=2)
    assert len(averages) == 2
    assert torch.equal(averages[-1], model.net.weight), "the average is updated after the step"


def test_validation_logs_live_and_averaged_weights():
    model = ToyDiffusion()
    _, trainer = fit(model, validate=True)
    metrics = trainer.callback_metrics
    assert metrics["val/loss"] != metrics["val/loss_ema"]
    assert {"train/loss", "val/loss", "val/loss_ema"} <= metrics.keys()


def test_validation_does_not_change_training():
    with_validation, without = ToyDiffusion(), ToyDiffusion()
    torch.manual_seed(5)
    fit(with_validation, validate=True, val_check_interval=1)
    torch.manual_seed(5)
    fit(without)
    assert torch.equal(with_validation.net.weight, without.net.weight)


def test_before_training_batch_marks_only_the_first_batch():
    model = ToyDiffusion()
    fit(model, max_epochs=2)
    assert model.first == [True] + [False] * 7


def test_lightning_module_is_returned_unchanged():
    module = LightningModule()
    assert lightning_module(module) is module


def test_model_without_loss_raises_user_error():
    with pytest.raises(UserError, match="Linear cannot be trained"):
        lightning_module(nn.Linear(1, 1))
