"""Runs of several processes, and the decisions that they take together."""

import contextlib
import os
import signal
import subprocess
import sys
import time
import types

import pytest
import torch
from omegaconf import OmegaConf
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from tiny_models import text_config, unconditional_config
from torch.multiprocessing import ProcessRaisedException

from ldm.training.processes import any_process, end_launched, failed_process, user_error_of

QUIET = ["--enable_progress_bar", "false", "--enable_model_summary", "false", "lightning.callbacks.image_logger=null"]


def test_one_process_decides_alone():
    assert any_process(True, False) == (True, False)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (MisconfigurationException("a\nb"), "Lightning rejects the configuration: a b"),
        (ProcessRaisedException("Traceback:\nldm.errors.UserError: one: line\n", 0, 1), "one: line"),
        (ProcessRaisedException("Traceback:\nZeroDivisionError: x\n", 0, 1), None),
        (RuntimeError("ldm.errors.UserError: x"), None),
    ],
)
def test_error_of_the_user_behind_another_error(error, message):
    found = user_error_of(error)
    assert (None if found is None else str(found)) == message


def trainer_with(*codes):
    """Return a trainer that has launched programs with these exit statuses; None for one that does not end."""
    programs = [f"exit {code}" if code is not None else "sleep 30" for code in codes]
    launcher = types.SimpleNamespace(procs=[subprocess.Popen(["sh", "-c", program]) for program in programs])
    launcher.kill = lambda number: [process.send_signal(number) for process in launcher.procs]
    return types.SimpleNamespace(strategy=types.SimpleNamespace(launcher=launcher))


@pytest.mark.parametrize(
    ("codes", "expected"), [((2,), 1), ((None, 2), 2), ((0, 1), None), ((None,), None), ((), None)]
)
def test_failed_process_is_found_and_the_others_are_ended(codes, expected):
    trainer = trainer_with(*codes)
    assert failed_process(trainer, seconds=1.0 if expected else 0.2) == expected
    end_launched(trainer)
    for code, process in zip(codes, trainer.strategy.launcher.procs, strict=True):
        assert process.wait(timeout=10) == (-signal.SIGKILL if code is None else code)


@pytest.fixture
def start(tmp_path, repo_root):
    """Return `start(model, *words)`, which starts a training run in a process group that is killed afterwards."""
    processes = []

    def run(model, *words, names=None):
        emoji = {"target": "ldm.data.emoji.EmojiTrain", "params": {"size": 16, "names": names}}
        validation = {"target": "ldm.data.emoji.EmojiValidation", "params": {"size": 16, "names": ["fox"]}}
        data = {"batch_size": 2, "num_workers": 0, "train": emoji, "validation": validation}
        config = {
            "model": {"base_learning_rate": 1e-4, **model},
            "data": {"target": "main.DataModuleFromConfig", "params": data},
        }
        OmegaConf.save(OmegaConf.create(config), tmp_path / "tiny.yaml")
        command = [sys.executable, str(repo_root / "main.py"), "-b", "tiny.yaml", "-t", "--accelerator", "cpu", *words]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "start_new_session": True}
        processes.append(subprocess.Popen([*command, *QUIET], cwd=tmp_path, env=environment, **options))
        return processes[-1]

    yield run
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def wait_for(folder, pattern, process, seconds=90):
    """Return the first file in the log folder of the run that matches, or fail when the process ends first."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None:
        for path in folder.glob(f"logs/*/{pattern}"):
            return path
        time.sleep(0.1)
    return pytest.fail(f"{pattern} did not appear")


def first_stage():
    ddconfig = text_config()["params"]["first_stage_config"]["params"]["ddconfig"]
    loss = {"disc_start": 1, "perceptual_weight": 0.0, "disc_num_layers": 1}
    lossconfig = {"target": "ldm.modules.losses.LPIPSWithDiscriminator", "params": loss}
    params = {"embed_dim": 3, "ddconfig": ddconfig, "lossconfig": lossconfig, "monitor": "val/rec_loss"}
    return {"target": "ldm.models.autoencoder.AutoencoderKL", "params": params}


@pytest.mark.slow
def test_fewer_validation_items_than_processes(start, tmp_path):
    """One item is validated by three processes. With `ddp`, a first stage trains as without `--strategy`."""
    process = start(first_stage(), "--devices", "3", "--strategy", "ddp", "--max_epochs", "1", names=["fox"])
    output, _ = process.communicate(timeout=150)
    assert process.returncode == 0, output
    assert {path.name for path in tmp_path.glob("logs/*/checkpoints/*")} == {"epoch=000000.ckpt", "last.ckpt"}


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_to_one_of_two_processes(number, start, tmp_path):
    """The first process saves on request, and all processes save and stop when only the second one is interrupted."""
    process = start(unconditional_config(), "--devices", "2", "--max_epochs", "1")
    events = wait_for(tmp_path, "tensorboard/events*", process)
    assert not list(events.parents[1].glob("checkpoints/*"))
    process.send_signal(signal.SIGUSR1)
    saved = wait_for(tmp_path, "checkpoints/last.ckpt", process)
    first = torch.load(saved, weights_only=True)["global_step"]
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(children[0]), number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number, output
    assert "Traceback" not in output
    assert output.count('checkpoints/last.ckpt" at step') == 1
    assert torch.load(saved, weights_only=True)["global_step"] > first > 0
