"""Resumed runs: they equal uninterrupted runs bit for bit, and use the settings that are given for them."""

import copy
import shutil
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from small_runs import FIRST_STAGE, assert_same, only_run, state
from tiny_models import text_config

import main
from ldm.training import latents

QUIET = ["--enable_progress_bar", "false", "--enable_model_summary", "false", "--no-test"]

DIFFUSION = text_config(
    use_ema=True,
    scale_by_std=True,
    monitor="val/loss_simple_ema",
    scheduler_config={
        "target": "ldm.lr_scheduler.LambdaLinearScheduler",
        "params": {
            "warm_up_steps": [3],
            "cycle_lengths": [100],
            "f_start": [0.1],
            "f_max": [1.0],
            "f_min": [1.0],
        },
    },
)
UNSCHEDULED = text_config()


def write_config(path, model, **trainer):
    emoji = {"size": 16}
    config = {
        "model": {"base_learning_rate": 1e-3, **copy.deepcopy(model)},
        "data": {
            "target": "main.DataModuleFromConfig",
            "params": {
                "batch_size": 2,
                "num_workers": 0,
                "train": {"target": "ldm.data.emoji.EmojiTrain", "params": emoji},
                "validation": {"target": "ldm.data.emoji.EmojiValidation", "params": emoji},
            },
        },
        "lightning": {
            "trainer": {"limit_val_batches": 1, "num_sanity_val_steps": 1, **trainer},
            "callbacks": {"image_logger": {"params": {"disabled": True}}},
        },
    }
    OmegaConf.save(OmegaConf.create(config), path)
    return path


def train(*arguments):
    assert main.main(["-t", *QUIET, *map(str, arguments)]) == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("trainer", "stop"),
    [({"limit_train_batches": 2}, 2), ({"limit_train_batches": 10}, 2), ({"limit_train_batches": 3}, 4)],
    ids=["at the end of an epoch", "within the first epoch", "within the second epoch"],
)
@pytest.mark.parametrize("model", [FIRST_STAGE, DIFFUSION], ids=["first stage", "diffusion"])
def test_resumed_run_equals_uninterrupted_run(model, trainer, stop, tmp_path):
    config = write_config(tmp_path / "tiny.yaml", model, **trainer)
    train("-b", config, "-l", tmp_path / "whole", "--max_steps", stop + 3)
    train("-b", config, "-l", tmp_path / "halves", "--max_steps", stop)
    half = only_run(tmp_path / "halves")
    assert state(half)["global_step"] == stop
    train("-r", half, "--max_steps", stop + 3)

    whole, halves = state(only_run(tmp_path / "whole")), state(half)
    assert whole["global_step"] == halves["global_step"] == stop + 3
    assert whole["epoch"] == halves["epoch"]
    for entry in ("state_dict", "optimizer_states", "lr_schedulers", "rng"):
        assert_same(whole[entry], halves[entry], entry)


@pytest.fixture(scope="module")
def short_runs(tmp_path_factory):
    """Return runs of two steps of two images at 1e-3 per image, by the kind of their model."""
    folder = tmp_path_factory.mktemp("runs")
    for kind, model in {"first stage": FIRST_STAGE, "unscheduled": UNSCHEDULED, "scheduled": DIFFUSION}.items():
        config = write_config(folder / f"{kind}.yaml", model, limit_train_batches=10)
        train("-b", config, "-l", folder / kind, "--max_steps", "2")
    return {path.name: only_run(path) for path in folder.iterdir() if path.is_dir()}


@pytest.fixture
def short_run(short_runs, tmp_path):
    """Return `short_run(kind)`, which returns a copy of one of `short_runs`."""
    return lambda kind: Path(shutil.copytree(short_runs[kind], tmp_path / "run"))


def resume(run, steps, *words):
    train("-r", run, "--max_steps", steps, "--limit_val_batches", "0", *words)


def rates(run):
    """Return the learning rates in the optimizers of the last checkpoint."""
    return [group["lr"] for optimizer in state(run)["optimizer_states"] for group in optimizer["param_groups"]]


def files(run):
    return {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and "tfevents" not in path.name}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], 2e-3),
        (["model.base_learning_rate=5e-6"], 1e-5),
        (["--scale_lr", "false"], 1e-3),
        (["data.params.batch_size=3"], 3e-3),
        (["--accumulate_grad_batches", "2"], 4e-3),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)
@pytest.mark.parametrize("kind", ["first stage", "unscheduled"])
def test_learning_rate_of_resumed_run_is_the_one_in_the_log(kind, words, expected, short_run, caplog):
    run = short_run(kind)
    resume(run, 3, *words)
    assert rates(run) == pytest.approx([expected] * len(rates(run)), rel=1e-12)
    assert f"learning rate {expected:.2e}" in caplog.text
    change = f"resuming with learning rate {expected}; the checkpoint has 0.002"
    assert caplog.text.count(change) == (0 if expected == 2e-3 else 1)


def test_new_learning_rate_is_kept_when_the_run_is_resumed_again(short_run, caplog):
    run = short_run("unscheduled")
    resume(run, 3, "--scale_lr", "false")
    caplog.clear()
    resume(run, 4)
    assert rates(run) == [1e-3]
    assert "learning rate 1.00e-03" in caplog.text and "resuming with" not in caplog.text


def test_schedule_of_resumed_run_continues_at_its_position(short_run):
    run = short_run("scheduled")  # factors 0.1, 0.4, 0.7, 1, 1, …
    assert rates(run) == pytest.approx([0.7 * 2e-3])
    resume(run, 3, "model.base_learning_rate=5e-4")
    assert rates(run) == pytest.approx([1.0 * 1e-3])
    assert state(run)["lr_schedulers"][0]["base_lrs"] == [1e-3]
    warm_up = "model.params.scheduler_config.params.warm_up_steps=[10]"
    resume(run, 4, warm_up)
    assert rates(run) == pytest.approx([(0.1 + 0.9 * 4 / 10) * 1e-3])
    resume(run, 5, "model.params.scheduler_config=null")
    assert rates(run) == [1e-3] and "initial_lr" not in state(run)["optimizer_states"][0]["param_groups"][0]


def test_betas_and_weight_decay_are_those_of_the_configuration(short_run, monkeypatch, caplog):
    run = short_run("unscheduled")
    from ldm.models.diffusion.ddpm import DDPM

    monkeypatch.setattr(DDPM, "weight_decay", 0.5, raising=False)
    resume(run, 3)
    assert state(run)["optimizer_states"][0]["param_groups"][0]["weight_decay"] == 0.5
    assert "resuming with weight decay 0.5; the checkpoint has 0.01" in caplog.text


def test_patience_of_early_stopping_is_that_of_the_configuration(short_run):
    run = short_run("first stage")
    stopping = "lightning.callbacks.stop={target: pytorch_lightning.callbacks.EarlyStopping, params: {monitor: aeloss}}"
    resume(run, 3, stopping, "lightning.callbacks.stop.params.patience=5")
    resume(run, 4, "lightning.callbacks.stop.params.patience=7")
    (callback,) = (value for key, value in state(run)["callbacks"].items() if key.startswith("EarlyStopping"))
    assert callback["patience"] == 7


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model.params.cond_stage_trainable=false"], "this configuration trains other parameters than that run"),
        (["model.params.linear_end=0.03"], "the noise schedule differs from it in betas"),
        (["model.params.use_ema=false"], "the model differs from it in"),
        (["data.params.train.target=ldm.data.emoji.EmojiNone"], "EmojiNone"),
        (["lightning.trainer.max_epochs=0"], "is already at epoch 0"),
        (["--limit_train_batches", "0"], "no batch was trained"),
        (["-s", "5"], "--seed 5 has no effect on a resumed run"),
        (["model.params.ckpt_path=x.ckpt"], "model.params.ckpt_path has no effect on a resumed run"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_failed_resume_leaves_the_run_as_it_was(words, message, short_run, capsys):
    run = short_run("scheduled")
    before = files(run)
    assert main.main(["-t", *QUIET, "-r", str(run), "--max_steps", "3", *words]) == 2
    (error,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error:"))
    assert message in error
    assert files(run) == before
    resume(run, 3)
    assert state(run)["global_step"] == 3


def test_failure_in_the_first_batch_of_a_resumed_run_saves_no_override(short_run, monkeypatch):
    run = short_run("unscheduled")
    before = files(run)
    from ldm.models.diffusion.ddpm import LatentDiffusion

    def fail(self, batch):
        raise ZeroDivisionError

    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(LatentDiffusion, "shared_step", fail)
        main.main(["-t", *QUIET, "-r", str(run), "--max_steps", "3", "data.params.batch_size=1"])
    assert files(run) == before


def test_run_resumes_without_the_files_of_its_initial_weights(short_run, monkeypatch):
    run = short_run("unscheduled")
    (project,) = (run / "configs").glob("*-project.yaml")
    config = OmegaConf.load(project)
    config.model.params.first_stage_config.params.ckpt_path = "moved.ckpt"
    config.data.params.latent_cache = {"variants": 1}
    OmegaConf.save(config, project)
    name = "first_stage_model.encoder.conv_in.weight"
    trained, cached = state(run)["state_dict"][name], []
    monkeypatch.setattr(
        latents, "cache_latents", lambda data, model, *_: cached.append(model.state_dict()[name].clone())
    )
    resume(run, 3)
    assert torch.equal(cached[0], trained) and torch.equal(state(run)["state_dict"][name], trained)


def test_time_limit_counts_again_for_each_slice(short_run, monkeypatch):
    import time
    from types import SimpleNamespace

    from pytorch_lightning.callbacks import timer

    run = short_run("first stage")
    seconds = iter(range(0, 10**9, 1000))  # of a clock that is read in every step
    monkeypatch.setattr(timer, "time", SimpleNamespace(monotonic=lambda: next(seconds), time=time.time))
    steps = []
    for _ in range(2):
        resume(run, 1000, "--max_time", "00:01:00:00")
        steps.append(state(run)["global_step"])
    assert 2 < steps[0] < steps[1] < 1000


@pytest.mark.parametrize("words", [["--max_steps", "0"], ["--max_epochs", "0"]], ids=str)
def test_new_run_without_a_batch_is_an_error(words, tmp_path, capsys):
    config = write_config(tmp_path / "tiny.yaml", FIRST_STAGE)
    assert main.main(["-t", *QUIET, "-b", str(config), "-l", str(tmp_path / "logs"), *words]) == 2
    assert "error: no batch was trained; give larger limits of lightning.trainer (" in capsys.readouterr().err


def test_finished_epochs_are_an_error(tmp_path, capsys):
    config = write_config(tmp_path / "tiny.yaml", FIRST_STAGE, limit_train_batches=1)
    train("-b", config, "-l", tmp_path / "logs", "--max_epochs", "2")
    run = only_run(tmp_path / "logs")
    assert main.main(["-t", *QUIET, "-r", str(run)]) == 2
    assert 'last.ckpt" is already at epoch 2; give a larger --max_epochs' in capsys.readouterr().err
    train("-r", run, "--max_epochs", "3")
    assert state(run)["global_step"] == 3


def test_resuming_without_training_or_test_is_an_error(short_run, capsys):
    run = short_run("first stage")
    assert main.main(["-r", str(run)]) == 2
    assert "error: there is nothing to do: the model has no test step" in capsys.readouterr().err
