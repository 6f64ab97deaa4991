"""Losses and gradients that are not finite: they never reach weights, averages, optimizers or checkpoints."""

import copy
import logging
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from pytorch_lightning import Trainer
from pytorch_lightning.plugins.precision import MixedPrecision
from tiny_models import text_config, unconditional_config
from torch import nn

from ldm.config.instantiate import instantiate_from_config
from ldm.errors import UserError
from ldm.training.assembly import _build_callback
from ldm.training.best_checkpoint import ModelCheckpoint
from ldm.training.finite_steps import MAX_SKIPPED, DamagedBatchError, DivergenceError, NonFiniteStepError
from ldm.training.last_checkpoint import LastCheckpoint
from ldm.training.loader import ResumableLoader
from ldm.training.modules import ManualOptimization, lightning_module

NAN, INF = float("nan"), float("inf")


@dataclass(frozen=True)
class Pass:
    batch: Any
    outputs: torch.Tensor


class Numbers(nn.Module):
    """Model of one linear layer whose loss is a batch's `factor` times an error, as both kinds of adapters train it."""

    learning_rate = 0.1
    monitor = "val/loss"

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Linear(3, 3)
        self.register_buffer("average", self.net.weight.detach().clone())

    def loss_of(self, batch, split):
        loss = self.net(batch["image"]).square().mean() * batch["factor"].mean()
        return loss, {f"{split}/loss": loss.detach()}

    def update_ema(self):
        self.average.lerp_(self.net.weight.detach(), 0.5)


class Diffusion(Numbers):
    use_ema = False

    def shared_step(self, batch):
        return self.loss_of(batch, "train" if self.training else "val")

    def before_training_batch(self, batch, is_first):
        pass

    def optimizer_parameters(self):
        return list(self.net.parameters())


class FirstStage(Numbers):
    """The same as a first stage, whose discriminator has running statistics."""

    def __init__(self):
        super().__init__()
        self.critic = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 1))

    def reconstruct(self, batch):
        return Pass(batch, self.net(batch["image"]) * batch["factor"][:, None])

    def adversarial_loss(self, rec, optimizer_idx, global_step, split="train"):
        if optimizer_idx == 1:
            loss = self.critic(rec.outputs).square().mean()
            return loss, {f"{split}/critic": loss.detach()}
        loss, log = self.loss_of(rec.batch, split)
        return loss - 0.01 * self.critic(rec.outputs).mean(), log

    def optimizer_parameters(self):
        return list(self.net.parameters()), list(self.critic.parameters())


def items(factors=(), images=(), count=16):
    """Return items with a loss factor of 1, except for `factors`, and finite images, except for `images`."""
    generator = torch.Generator().manual_seed(1)
    data = [{"image": torch.randn(3, generator=generator), "factor": torch.tensor(1.0)} for _ in range(count)]
    for index, item in enumerate(data):
        item["file_path_"] = f"{index}.png"
        item["factor"] = torch.tensor(dict(factors).get(index, 1.0))
        if index in images:
            item["image"] = item["image"].clone()
            item["image"][1] = images[index]
    return data


def fit(model, data, validation=None, manual=None, folder=None, callbacks=(), policy=None, **options):
    trainer = Trainer(
        accelerator="cpu",
        **{"max_epochs": 1, **options},
        num_sanity_val_steps=0,
        logger=False,
        default_root_dir=folder,
        callbacks=list(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=bool(callbacks),
    )
    module = lightning_module(model, manual)
    module.non_finite_policy = policy
    trainer.fit(module, ResumableLoader(data, 2), ResumableLoader(validation, 2) if validation else None)
    return trainer


def assert_finite(tensors):
    for name, value in tensors:
        assert not value.is_floating_point() or value.isfinite().all(), name


def states(trainer):
    return [
        (name, value)
        for optimizer in trainer.optimizers
        for state in optimizer.state.values()
        for name, value in state.items()
    ]


def warnings(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


KINDS = pytest.mark.parametrize("kind", [Diffusion, FirstStage])


@KINDS
@pytest.mark.parametrize("value", [NAN, INF])
def test_step_with_loss_that_is_not_finite_is_skipped_and_named(kind, value, caplog):
    model = kind()
    trainer = fit(model, items(factors={5: value}))
    assert trainer.global_step == 8, "a skipped step counts"
    assert_finite([*model.state_dict().items(), *states(trainer)])
    assert warnings(caplog) == [
        'step 3 is skipped, because its loss is not finite: batch 2 of epoch 0 ("4.png", "5.png")'
    ]


@KINDS
def test_skipped_step_changes_nothing(kind):
    """The step of a damaged batch at the end leaves weights, statistics and optimizers of the steps before it."""
    before, after = kind(), kind()
    short = fit(before, items()[:14])
    long = fit(after, items(factors={15: NAN}))
    if kind is FirstStage:  # its count includes the skipped batch
        before.critic[0].num_batches_tracked.copy_(after.critic[0].num_batches_tracked)
    before.average = after.average.clone()  # the average approaches the unchanged weights
    for name, value in before.state_dict().items():
        assert torch.equal(value, after.state_dict()[name]), name
    for (name, a), (_, b) in zip(states(short), states(long), strict=True):
        assert torch.equal(a, b), name


def test_step_with_infinite_gradients_is_skipped(caplog):
    class Overflow(torch.autograd.Function):
        """Identity with infinite gradients."""

        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * INF

    class Model(Diffusion):
        count = 0

        def shared_step(self, batch):
            loss, log = super().shared_step(batch)
            self.count += 1
            return (Overflow.apply(loss) if self.count == 4 else loss), log

    model = Model()
    trainer = fit(model, items(), gradient_clip_val=1.0)
    assert_finite([*model.state_dict().items(), *states(trainer)])
    assert len(warnings(caplog)) == 1
    assert "step 4 is skipped, because its gradients are not finite" in warnings(caplog)[0]


@pytest.mark.parametrize(
    ("kind", "manual", "options"),
    [
        (Diffusion, None, {"accumulate_grad_batches": 4}),
        (FirstStage, ManualOptimization(4, gradient_clip_val=0.1, gradient_clip_algorithm="value"), {}),
    ],
)
def test_accumulated_step_is_skipped_and_its_batch_named(kind, manual, options, caplog):
    model = kind()
    trainer = fit(model, items(factors={2: NAN}), manual=manual, **options)
    assert trainer.global_step == 2
    assert_finite([*model.state_dict().items(), *states(trainer)])
    (line,) = warnings(caplog)
    assert 'step 1 is skipped, because its loss is not finite: batch 1 of epoch 0 ("2.png", "3.png")' in line


@KINDS
def test_data_that_is_not_finite_ends_training_and_is_named(kind, tmp_path):
    model = kind()
    last = LastCheckpoint(tmp_path)
    with pytest.raises(DamagedBatchError) as error:
        fit(model, items(images={9: NAN}), callbacks=[last], folder=tmp_path)
    assert str(error.value) == (
        'training data is not finite: "image" of "9.png" in batch 4 of epoch 0; repair or remove it'
    )
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 5
    assert_finite(checkpoint["state_dict"].items())
    for optimizer in checkpoint["optimizer_states"]:
        assert_finite((name, value) for state in optimizer["state"].values() for name, value in state.items())


def test_items_without_names_are_numbered():
    data = [{key: item[key] for key in ("image", "factor")} for item in items(images={9: INF})]
    with pytest.raises(DamagedBatchError, match=r'"image" of item 1 in batch 4 of epoch 0'):
        fit(Diffusion(), data)


@KINDS
def test_many_skipped_steps_in_a_row_end_training_and_keep_the_last_checkpoint(kind, tmp_path):
    (tmp_path / "last.ckpt").write_text("the last good one")
    data = items(factors=dict.fromkeys(range(8, 60), NAN), count=60)
    with pytest.raises(DivergenceError, match="the loss is not finite in 10 steps in a row, up to step 14; lower"):
        fit(kind(), data, callbacks=[LastCheckpoint(tmp_path)], folder=tmp_path)
    assert (tmp_path / "last.ckpt").read_text() == "the last good one"


def test_skipped_steps_between_good_ones_do_not_end_training(caplog):
    data = items(factors=dict.fromkeys(range(0, 100, 4), NAN), count=100)
    assert fit(Diffusion(), data).global_step == 50
    assert len(warnings(caplog)) == 25


def test_initial_weights_that_are_not_finite_are_named(tmp_path):
    model = Diffusion()
    model.net.bias.data[1] = NAN
    with pytest.raises(DivergenceError, match=r'the weights "net\.bias" are not finite; start from another checkpoint'):
        fit(model, items(), callbacks=[LastCheckpoint(tmp_path)], folder=tmp_path)
    assert not list(tmp_path.glob("*.ckpt"))


@KINDS
def test_overflow_in_float16_is_left_to_the_gradient_scaler(kind, caplog):
    model, scaler = kind(), torch.amp.GradScaler("cpu", init_scale=2.0**127)
    data = items(count=80)
    trainer = fit(model, data, plugins=[MixedPrecision("16-mixed", "cpu", scaler=scaler)])
    assert trainer.global_step == 40 > MAX_SKIPPED
    assert scaler.get_scale() < 2.0**120
    assert_finite(model.state_dict().items())
    assert warnings(caplog) == []


@KINDS
def test_loss_that_is_not_finite_is_named_in_float16_as_well(kind, caplog):
    model, scaler = kind(), torch.amp.GradScaler("cpu", init_scale=8.0)
    fit(model, items(factors={5: NAN}), plugins=[MixedPrecision("16-mixed", "cpu", scaler=scaler)])
    assert_finite(model.state_dict().items())
    assert ["step 3 is skipped" in line for line in warnings(caplog)] == [True]
    assert scaler.get_scale() < 8.0


@KINDS
def test_checkpoint_with_monitored_value_that_is_not_finite_is_no_best_one(kind, tmp_path, caplog):
    best = ModelCheckpoint(tmp_path, monitor="val/loss", save_top_k=3)
    fit(kind(), items(), items(factors={2: NAN}, count=4), callbacks=[best], folder=tmp_path, max_epochs=2)
    assert list(tmp_path.glob("*.ckpt")) == []
    assert best.best_k_models == {}
    assert len(warnings(caplog)) == 2, "one line for each validation"
    assert 'validation: "val/loss" is not finite for batch 1 of epoch 0 ("2.png", "3.png")' in warnings(caplog)[0]


def test_finite_values_still_select_the_best_checkpoints(tmp_path):
    best = ModelCheckpoint(tmp_path, monitor="val/loss", save_top_k=1)
    fit(Diffusion(), items(), items(count=4), callbacks=[best], folder=tmp_path, max_epochs=2)
    assert len(list(tmp_path.glob("*.ckpt"))) == 1
    assert best.state_key.startswith("ModelCheckpoint{"), "Lightning's checkpoints store its state under this name"


@pytest.mark.parametrize("package", ["pytorch_lightning", "lightning.pytorch"])
def test_configured_checkpoints_never_keep_values_that_are_not_finite(package, tmp_path):
    params = {"dirpath": str(tmp_path), "monitor": "val/loss"}
    config = {"target": f"{package}.callbacks.ModelCheckpoint", "params": params}
    assert type(_build_callback("modelcheckpoint", config)) is ModelCheckpoint


def test_damaged_validation_data_is_named(caplog):
    fit(Diffusion(), items(), items(images={1: NAN}, count=4))
    (line,) = warnings(caplog)
    assert line.endswith('; the data is not finite: "image" of "1.png" in batch 0 of epoch 0')


# -- policies and gradient norms ---------------------------------------------------------------------------------


@KINDS
def test_policy_stop_ends_the_run_at_the_step_and_keeps_its_weights(kind, tmp_path):
    before, after = kind(), kind()
    fit(before, items()[:4])
    last = LastCheckpoint(tmp_path)
    with pytest.raises(NonFiniteStepError) as error:
        fit(after, items(factors={5: NAN}), policy="stop", callbacks=[last], folder=tmp_path)
    assert str(error.value).startswith(
        'the loss is not finite in step 3: batch 2 of epoch 0 ("4.png", "5.png"); the weights are those before the step'
    )
    assert torch.equal(after.net.weight, before.net.weight)
    saved = torch.load(last.path, weights_only=True)["state_dict"]
    assert torch.equal(saved["net.weight"], before.net.weight)
    assert_finite(saved.items())


@KINDS
def test_policy_skip_also_skips_damaged_data_and_names_it(kind, caplog):
    model = kind()
    trainer = fit(model, items(images={5: NAN}), policy="skip")
    assert trainer.global_step == 8
    assert_finite([*model.state_dict().items(), *states(trainer)])
    (line,) = warnings(caplog)
    assert line == 'step 3 is skipped, because its loss is not finite: "image" of "5.png" in batch 2 of epoch 0'


@pytest.mark.parametrize("accumulated", [1, 2])
def test_gradient_norm_is_logged_before_clipping(accumulated):
    data = items()[: 2 * accumulated]
    model, reference = Diffusion(), Diffusion()
    loss = sum(reference.shared_step(batch)[0] for batch in ResumableLoader(data, 2)) / accumulated
    loss.backward()
    norm = torch.linalg.vector_norm(torch.cat([p.grad.flatten() for p in reference.parameters()]))
    options = {"accumulate_grad_batches": accumulated, "gradient_clip_val": 0.01}
    trainer = fit(model, data, **options)
    assert trainer.callback_metrics["train/grad_norm"].item() == pytest.approx(norm.item(), rel=1e-5)


def test_gradient_norms_of_both_optimizers_are_logged():
    trainer = fit(FirstStage(), items())
    assert trainer.callback_metrics["train/grad_norm"] > 0
    assert trainer.callback_metrics["train/grad_norm_disc"] > 0


@pytest.mark.parametrize("kind", [Diffusion, FirstStage])
def test_average_is_updated_once_for_each_step_with_accumulated_batches(kind):
    model = kind()
    updates = []
    model.update_ema = lambda: updates.append(model.net.weight.detach().clone())
    manual = ManualOptimization(3) if kind is FirstStage else None
    trainer = fit(model, items(), manual=manual, accumulate_grad_batches=1 if manual else 3)
    assert trainer.global_step == len(updates) == 3, "8 batches are 3 steps"
    assert torch.equal(updates[-1], model.net.weight), "the average contains the weights after the step"


# -- the scale of latents ----------------------------------------------------------------------------------------


@pytest.fixture
def pixels():
    """Return a model whose latents are the images themselves, and which measures their scale."""
    config = copy.deepcopy(unconditional_config(scale_by_std=True))
    config["params"]["first_stage_config"] = {"target": "ldm.models.autoencoder.IdentityFirstStage"}
    return instantiate_from_config(config)


@pytest.mark.parametrize("value", [0.0, 0.3, -1.0])
def test_constant_first_batch_raises_user_error(pixels, value):
    batch = {"image": torch.full((2, 8, 8, 3), value), "file_path_": ["a.png", "b.png"]}
    with pytest.raises(UserError, match=r'first training batch, and those of "a.png", "b.png" are constant; check'):
        pixels.before_training_batch(batch, is_first=True)
    assert pixels.scale_factor == 1.0


def test_first_batch_that_is_not_finite_raises_user_error(pixels):
    images = torch.rand(2, 8, 8, 3)
    images[1, 0, 0, 0] = NAN
    with pytest.raises(UserError, match=r"those of item 1 are not finite"):
        pixels.before_training_batch({"image": images}, is_first=True)


def test_scale_is_measured_as_before(pixels):
    images = torch.rand(2, 8, 8, 3)
    pixels.before_training_batch({"image": images}, is_first=True)
    assert pixels.scale_factor == 1.0 / images.permute(0, 3, 1, 2).flatten().std()


# -- two processes -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_all_processes_skip_the_same_step(tmp_path, repo_root):
    """The loss of one process is not finite; the run goes on, and the processes keep equal weights."""
    import os
    import subprocess
    import sys

    from omegaconf import OmegaConf

    (tmp_path / "toys.py").write_text(TOYS)
    model = text_config(use_ema=True, monitor="val/loss_simple_ema")
    data = {"batch_size": 2, "num_workers": 0, "train": {"target": "toys.Images"}}
    config = {
        "model": {"base_learning_rate": 1e-4, **model},
        "data": {"target": "main.DataModuleFromConfig", "params": data},
        "lightning": {"callbacks": {"image_logger": None, "spy": {"target": "toys.Spy"}}},
    }
    OmegaConf.save(OmegaConf.create(config), tmp_path / "tiny.yaml")
    words = ["-b", "tiny.yaml", "-t", "--allow-target", "toys", "--max_epochs", "1", "--accelerator", "cpu"]
    command = [sys.executable, str(repo_root / "main.py"), *words, "--devices", "2", "--enable_progress_bar", "false"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("is skipped, because its loss is not finite") == 1
    assert '"3.png"' in done.stderr
    sums = [(tmp_path / f"rank{rank}.txt").read_text() for rank in (0, 1)]
    assert sums[0] == sums[1] != "nan"


TOYS = """
import pathlib
import torch
from pytorch_lightning import Callback


class Images:
    def __len__(self):
        return 12

    def __getitem__(self, index):
        image = torch.rand(16, 16, 3, generator=torch.Generator().manual_seed(index)) * 2 - 1
        if index == 3:
            image[0, 0, 0] = 3e38
        return {"image": image, "caption": "a cat", "file_path_": f"{index}.png"}


class Spy(Callback):
    def on_train_end(self, trainer, module):
        total = sum(value.double().abs().sum().item() for value in module.parameters())
        pathlib.Path(f"rank{trainer.global_rank}.txt").write_text(repr(total))
"""
