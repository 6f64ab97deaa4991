"""`main.py`: errors, files of a run, and published names."""

import shutil
import signal
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

import pytest
import torch
from hostile_files import hostile
from omegaconf import OmegaConf
from tiny_models import text_config

import main
from ldm.cli import train
from ldm.config.instantiate import get_obj_from_str
from ldm.errors import UserError
from ldm.training import configuration, options
from ldm.training.configuration import make_plan
from ldm.training.run import parse_gpus

QUIET = ["--enable_progress_bar", "false", "--enable_model_summary", "false"]
DDCONFIG = text_config()["params"]["first_stage_config"]["params"]["ddconfig"]


def tiny_config():
    """Return the configuration of a first stage that trains on 16 × 16 emoji."""
    loss = {"disc_start": 2, "perceptual_weight": 0.0, "disc_num_layers": 1}
    return {
        "model": {
            "base_learning_rate": 1e-3,
            "target": "ldm.models.autoencoder.AutoencoderKL",
            "params": {
                "monitor": "val/rec_loss",
                "embed_dim": 3,
                "ddconfig": dict(DDCONFIG),
                "lossconfig": {"target": "ldm.modules.losses.LPIPSWithDiscriminator", "params": loss},
            },
        },
        "data": {
            "target": "main.DataModuleFromConfig",
            "params": {
                "batch_size": 2,
                "num_workers": 0,
                "wrap": True,
                "train": {"target": "ldm.data.emoji.EmojiTrain", "params": {"size": 16}},
                "validation": {"target": "ldm.data.emoji.EmojiValidation", "params": {"size": 16}},
            },
        },
        "lightning": {"trainer": {"limit_train_batches": 4, "limit_val_batches": 1, "log_every_n_steps": 1}},
    }


@pytest.fixture
def config(tmp_path, monkeypatch):
    """Write a tiny configuration to an empty current folder and return its path."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "tiny.yaml"
    OmegaConf.save(OmegaConf.create(tiny_config()), path)
    return path


def write(text):
    return lambda folder: (folder / "other.yaml").write_text(text)


REFUSED = [
    ("no configuration", [], None, "--base"),
    ("missing file", ["-b", "tiny.yml"], None, 'there is no configuration "tiny.yml" (did you mean "tiny.yaml"?)'),
    ("broken YAML", ["-b", "other.yaml"], write("model:\n  - a\n b: ["), "not valid YAML: line 3"),
    ("a list", ["-b", "other.yaml"], write("- 1\n"), "has no sections"),
    ("a binary file", ["-b", "other.yaml"], lambda folder: (folder / "other.yaml").write_bytes(b"\xff\xfe\0"), "error"),
    ("unknown section", ["-b", "other.yaml"], write("modle: {}\n"), '"modle" (did you mean "model"?)'),
    ("no data", ["-b", "other.yaml"], write("model: {target: a.b}\n"), 'no "data:" section'),
    ("unresolvable", ["-b", "tiny.yaml", "other.yaml"], write("model: {params: {x: '${nowhere}'}}\n"), "nowhere"),
    ("unknown lightning section", ["-b", "tiny.yaml", "lightning.trianer.max_steps=1"], None, '"trainer"'),
    ("unknown trainer key", ["-b", "tiny.yaml", "lightning.trainer.max_stpes=1"], None, '"max_steps"'),
    (
        "unknown option",
        ["-b", "tiny.yaml", "--max_stpes", "1"],
        None,
        'no option --max_stpes (did you mean "--max_steps"',
    ),
    ("stray word", ["-b", "tiny.yaml", "-t", "true", "oops"], None, '"oops" is neither'),
    ("unknown override", ["-b", "tiny.yaml", "modle.params.x=1"], None, '"modle" (did you mean "model"?)'),
    ("name with resume", ["-r", "logs/x", "-n", "y"], None, "cannot be combined"),
    ("resume from nowhere", ["-r", "logs/x"], None, "no such folder or checkpoint"),
    ("resume from an empty folder", ["-r", "logs"], lambda folder: (folder / "logs").mkdir(), "last.ckpt"),
    ("resume from a stray file", ["-r", "x.ckpt"], lambda f: (f / "x.ckpt").touch(), "not inside LOGDIR/checkpoints"),
    ("nothing to do", ["-b", "tiny.yaml", "-t", "false"], None, "give -t"),
    ("seed", ["-b", "tiny.yaml", "-s", "many"], None, '"many" is not a whole number'),
    ("boolean", ["-b", "tiny.yaml", "-t", "perhaps"], None, "neither true nor false"),
    ("gpus", ["-b", "tiny.yaml", "--gpus", "first"], None, '--gpus "first"'),
    (
        "gpus and devices",
        ["-b", "tiny.yaml", "--gpus", "0,", "--devices", "1"],
        None,
        "--gpus cannot be combined with --accelerator or --devices",
    ),
    ("model target", ["-b", "tiny.yaml", "model.target=ldm.models.autoencoder.AutoencoderLK"], None, '"AutoencoderKL"'),
    ("model module", ["-b", "tiny.yaml", "model.target=ldm.models.autoencodre.VQModel"], None, '"autoencoder"'),
    ("model elsewhere", ["-b", "tiny.yaml", "model.target=os.system"], None, "--allow-target os"),
    ("data set elsewhere", ["-b", "tiny.yaml", "data.params.train.target=mine.Set"], None, "--allow-target mine"),
    ("logger elsewhere", ["-b", "tiny.yaml", "lightning.logger.target=os.system"], None, "--allow-target os"),
    (
        "weights with code",
        ["-b", "tiny.yaml", "model.params.ckpt_path=evil.ckpt"],
        lambda folder: (folder / "evil.ckpt").write_bytes(hostile(folder / "trap")["GLOBAL in a zip"]),
        'is refused: besides weights it contains "os.mkdir"',
    ),
    ("model parameter", ["-b", "tiny.yaml", "model.params.embed_dmi=3"], None, '"embed_dim"'),
    ("not trainable", ["-b", "tiny.yaml", "model.target=torch.nn.Identity"], None, "cannot be trained"),
    ("parts that do not fit", ["-b", "tiny.yaml", "model.params=[1]"], None, "cannot merge the configurations"),
    (
        "network's parameters",
        ["-b", "tiny.yaml", "model.params.ddconfig=3"],
        None,
        'needs names and values as "ddconfig"',
    ),
    *(
        (section, ["-b", "tiny.yaml", f"{section}=3"], None, f'"{section}" must be a mapping of keys to values')
        for section in (
            "lightning",
            "lightning.trainer",
            "lightning.callbacks",
            "lightning.logger",
            "lightning.logger.params",
            "lightning.modelcheckpoint",
            "lightning.modelcheckpoint.params",
        )
    ),
    ("learning rate", ["-b", "tiny.yaml", "model.base_learning_rate=fast"], None, "base_learning_rate"),
    ("infinite learning rate", ["-b", "tiny.yaml", "model.base_learning_rate=.inf"], None, "base_learning_rate"),
    ("learning rate of NaN", ["-b", "tiny.yaml", "model.base_learning_rate=.nan"], None, "base_learning_rate"),
    ("data parameter", ["-b", "tiny.yaml", "data.params.batchsize=3"], None, '"batch_size"'),
    ("batch size", ["-b", "tiny.yaml", "data.params.batch_size=0"], None, "must be an integer of at least 1, not 0"),
    ("batch size as text", ["-b", "tiny.yaml", "data.params.batch_size=many"], None, 'needs a number as "batch_size"'),
    ("missing value", ["-b", "tiny.yaml", "model.params.ckpt_path=???"], None, "give model.params.ckpt_path=VALUE"),
    ("network parameter", ["-b", "tiny.yaml", "model.params.ddconfig.attn_typ=none"], None, '"attn_type"'),
    ("log folder", ["-b", "tiny.yaml", "-l", "tiny.yaml"], None, '--logdir "tiny.yaml"'),
    ("data set", ["-b", "tiny.yaml", "data.params.train.target=ldm.data.emoji.EmojiTrian"], None, '"EmojiTrain"'),
    ("no training data", ["-b", "tiny.yaml", "data.params.train=null"], None, "no data.params.train"),
    (
        "callback parameter",
        ["-b", "tiny.yaml", "lightning.callbacks.image_logger.params.batch_freq=3"],
        None,
        "batch_freq",
    ),
    (
        "callback that writes anywhere",
        [
            *("-b", "tiny.yaml", "lightning.callbacks.x.target=main.SetupCallback"),
            "lightning.callbacks.x.params={resume: 0, now: x, logdir: a, ckptdir: b, cfgdir: c, config: 0, "
            "lightning_config: 0}",
        ],
        None,
        "lightning.x is refused",
    ),
    ("callback value", ["-b", "tiny.yaml", "lightning.modelcheckpoint.params.save_top_k=-5"], None, "modelcheckpoint"),
    ("accumulation", ["-b", "tiny.yaml", "--accumulate_grad_batches", "0"], None, "accumulate_grad_batches"),
    ("trainer value", ["-b", "tiny.yaml", "--precision", "bf17"], None, "bf17"),
    ("latent cache", ["-b", "tiny.yaml", "data.params.latent_cache.variant=3"], None, '"variants"'),
]


@pytest.mark.parametrize(("words", "prepare", "message"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED])
def test_mistake_prints_one_line_and_writes_nothing(words, prepare, message, config, tmp_path, capsys):
    if prepare:
        prepare(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    try:
        status = main.main([*words, *([] if "-t" in words else ["-t"]), *QUIET])
    except SystemExit as exit_status:
        status = exit_status.code
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert status == 2
    assert len(error) == 1 and message in error[0], error
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.skipif(torch.cuda.is_available() or torch.backends.mps.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("words", [["--gpus", "0,"], ["--gpus", "1"], ["--accelerator", "gpu"]])
def test_missing_gpu_is_an_error(words, config, capsys):
    assert main.main(["-b", str(config), "-t", *words]) == 2
    assert "PyTorch finds no GPU on this machine" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "devices"),
    [("0,", [0]), ("0,1", [0, 1]), ("2", 2), (2, 2), (0, 0), ("-1", -1), ([0, 3], [0, 3]), ("1,", [1])],
)
def test_gpus_are_a_list_or_a_number(text, devices):
    assert parse_gpus(text) == devices


def test_plan_contains_the_options(config):
    words = ["-b", "tiny.yaml", "-t", "-n", "run", "-f", "_x", "-l", "out", "-s", "7", "--scale_lr", "false"]
    args = train.parse([*words, "--max_steps", "5", "--precision", "bf16-mixed", "model.params.embed_dim=4"])
    plan = make_plan(args)
    assert plan.folder.parent == Path("out")
    assert plan.folder.name == f"{plan.now}_run_x"
    assert (plan.seed, plan.scale_lr, plan.train, plan.test) == (7, False, True, True)
    assert plan.config.model.params.embed_dim == 4
    trainer = {"limit_train_batches": 4, "limit_val_batches": 1, "log_every_n_steps": 1}
    assert plan.lightning.trainer == {**trainer, "max_steps": 5, "precision": "bf16-mixed"}


def test_later_files_and_overrides_take_precedence(config, tmp_path):
    (tmp_path / "b.yaml").write_text("model: {params: {embed_dim: 5, monitor: x}}")
    plan = make_plan(train.parse(["-b", "tiny.yaml", "b.yaml", "model.params.embed_dim=6", "-t"]))
    assert (plan.config.model.params.embed_dim, plan.config.model.params.monitor) == (6, "x")
    assert plan.folder.name.endswith("_tiny")


def test_devices_on_the_command_line_replace_those_of_the_files(config):
    words = ["-b", "tiny.yaml", "-t", "lightning.trainer.gpus=0,"]
    assert make_plan(train.parse(words)).lightning.trainer.gpus == "0,"
    trainer = make_plan(train.parse([*words, "--accelerator", "cpu"])).lightning.trainer
    assert trainer.accelerator == "cpu" and "gpus" not in trainer
    words = ["-b", "tiny.yaml", "-t", "lightning.trainer.devices=3", "--gpus", "2"]
    trainer = make_plan(train.parse(words)).lightning.trainer
    assert trainer.gpus == "2" and "devices" not in trainer


@pytest.mark.parametrize(
    "words", [["lightning.trainer.logger=false"], ["--fast_dev_run"], ["--barebones", "--log_every_n_steps", "0"]]
)
def test_training_without_logger_or_checkpoints(words, config, tmp_path):
    quiet = [] if "--barebones" in words else QUIET
    assert main.main(["-b", "tiny.yaml", "-t", "--max_steps", "1", *quiet, *words]) == 0


@pytest.mark.parametrize(
    ("text", "value"),
    [("3", 3), ("0.5", 0.5), ("true", True), ("None", None), ("[0,1]", [0, 1]), ("bf16-mixed", "bf16-mixed")],
)
def test_scalar_parses_trainer_options(text, value):
    assert train.scalar(text) == value


def test_every_argument_of_the_installed_trainer_is_known():
    import inspect

    from pytorch_lightning import Trainer

    parameters = inspect.signature(Trainer).parameters
    known = {*options.TRAINER_OPTIONS, *options.CONFIGURED_ELSEWHERE}
    assert known == {*parameters} == {*options.trainer_arguments(["other"])}
    boolean = {name for name, parameter in parameters.items() if "bool" in str(parameter.annotation)}
    assert boolean & {*options.TRAINER_OPTIONS} == options.BOOLEAN_OPTIONS


def test_public_names_come_from_ldm_training():
    for name in ("DataModuleFromConfig", "WrappedDataset", "ImageLogger", "SetupCallback", "CUDACallback"):
        assert get_obj_from_str(f"main.{name}") is getattr(main, name)
        assert getattr(main, name).__module__.startswith("ldm.training")
        assert name in dir(main)
    with pytest.raises(UserError, match="did you mean"):
        get_obj_from_str("main.ImageLoger")


def test_run_writes_documented_files(config, tmp_path):
    assert main.main(["-b", "tiny.yaml", "-t", "--max_steps", "6", *QUIET]) == 0
    (run,) = (tmp_path / "logs").iterdir()
    now = run.name.removesuffix("_tiny")
    time.strptime(now, "%Y-%m-%dT%H-%M-%S")
    names = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}
    assert {
        f"configs/{now}-project.yaml",
        f"configs/{now}-lightning.yaml",
        "checkpoints/last.ckpt",
        "checkpoints/epoch=000000.ckpt",
        "images/train/inputs_gs-000001_e-000000_b-000000.png",
        "images/train/reconstructions_gs-000002_e-000000_b-000001.png",
        "images/train/samples_gs-000004_e-000000_b-000003.png",
        "images/val/reconstructions_gs-000004_e-000000_b-000000.png",
    } <= names
    assert not any("gs-000003" in name for name in names)
    assert any(name.startswith("tensorboard/events.out.tfevents") for name in names)
    project = OmegaConf.load(run / "configs" / f"{now}-project.yaml")
    assert project == {key: tiny_config()[key] for key in ("model", "data")}
    lightning = OmegaConf.load(run / "configs" / f"{now}-lightning.yaml")
    assert lightning.lightning.trainer.max_steps == 6

    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 6
    assert "encoder.conv_in.weight" in checkpoint["state_dict"]
    assert "loss.discriminator.main.0.weight" in checkpoint["state_dict"]
    # scale_lr: accumulated batches × devices × batch size × base
    assert checkpoint["optimizer_states"][0]["param_groups"][0]["lr"] == pytest.approx(1 * 1 * 2 * 1e-3)


def test_runs_started_in_the_same_second_have_separate_folders(config, tmp_path, monkeypatch):
    class Noon(datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2025, 1, 1, 12)

    monkeypatch.setattr(configuration, "datetime", Noon)
    for steps in ("1", "2", "3"):
        assert main.main(["-b", "tiny.yaml", "-t", "--max_steps", steps, *QUIET]) == 0
    found = {
        path.parents[1].name: torch.load(path, weights_only=True)["global_step"]
        for path in tmp_path.glob("logs/*/checkpoints/last.ckpt")
    }
    name = "2025-01-01T12-00-00_tiny"
    assert found == {name: 1, f"{name}_1": 2, f"{name}_2": 3}
    for steps in (1, 2, 3):  # the name is free again after a debug run, but not below debug_runs
        shutil.rmtree(tmp_path / "logs" / name, ignore_errors=True)
        assert main.main(["-b", "tiny.yaml", "-t", "-d", "--max_steps", "1", *QUIET]) == 0
        assert len(list((tmp_path / "logs" / "debug_runs").iterdir())) == steps


def test_name_of_a_run_may_contain_an_equals_sign(config, tmp_path):
    assert main.main(["-b", "tiny.yaml", "-t", "-n", "v1.0=best", "--max_steps", "1", *QUIET]) == 0
    (folder,) = (tmp_path / "logs").iterdir()
    assert folder.name.endswith("_v1.0=best")


def test_weights_without_training_state_cannot_be_resumed(config, tmp_path, capsys):
    run = tmp_path / "logs" / "x"
    (run / "checkpoints").mkdir(parents=True)
    torch.save({"state_dict": {"w": torch.ones(1)}}, run / "checkpoints" / "last.ckpt")
    before = sorted(tmp_path.rglob("*"))
    assert main.main(["-b", "tiny.yaml", "-r", str(run), "-t", "--max_steps", "1", *QUIET]) == 2
    assert "it contains no optimizer_states" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


def test_another_model_or_finished_run_cannot_be_resumed(config, tmp_path, capsys):
    assert main.main(["-b", "tiny.yaml", "-t", "--max_steps", "1", *QUIET]) == 0
    (run,) = (tmp_path / "logs").iterdir()
    before = sorted(tmp_path.rglob("*"))
    assert main.main(["-r", str(run), "-t", *QUIET]) == 2
    assert "is already at step 1" in capsys.readouterr().err
    assert main.main(["-r", str(run), "-t", "--max_steps", "2", "model.params.embed_dim=4", *QUIET]) == 2
    assert "the model differs from it in" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


def test_debug_run_moves_to_debug_runs(config, tmp_path):
    assert main.main(["-b", "tiny.yaml", "-t", "-d", "--max_steps", "1", *QUIET]) == 0
    assert [path.name for path in (tmp_path / "logs").iterdir()] == ["debug_runs"]
    assert len(list((tmp_path / "logs" / "debug_runs").glob("*_tiny/checkpoints/last.ckpt"))) == 1


def test_help_is_fast_and_imports_nothing_heavy(repo_root):
    code = "import sys, main; sys.argv[1:] = ['--help']\ntry: main.main()\nfinally: print(*sys.modules)"
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], cwd=repo_root, capture_output=True, text=True)
    assert time.monotonic() - started < 5
    assert "--base" in done.stdout and "--max_steps" in done.stdout
    assert not {"torch", "pytorch_lightning", "numpy"} & set(done.stdout.split("\n")[-2].split())


@pytest.mark.slow
def test_signals_save_and_stop(config, tmp_path, repo_root):
    """SIGUSR1 saves a checkpoint and continues; Ctrl-C saves a checkpoint and exits with 130."""
    command = [sys.executable, str(repo_root / "main.py"), "-b", str(config), "-t", "--max_epochs", "1"]
    overrides = ["lightning.trainer.limit_train_batches=null", "lightning.callbacks.image_logger=null"]
    process = subprocess.Popen(
        [*command, *overrides, *QUIET], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        events = wait_for(tmp_path / "logs", "*/tensorboard/events*", process)
        assert not list(events.parents[1].glob("checkpoints/*.ckpt"))
        time.sleep(0.5)
        process.send_signal(signal.SIGUSR1)
        saved = wait_for(events.parents[1], "checkpoints/last.ckpt", process)
        first = torch.load(saved, weights_only=True)["global_step"]
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, output
    assert "Traceback" not in output
    assert torch.load(saved, weights_only=True)["global_step"] > first > 0


def wait_for(folder, pattern, process, seconds=60):
    """Return the first file that matches, or fail when the process ends first."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None:
        for path in folder.glob(pattern):
            return path
        time.sleep(0.1)
    pytest.fail(f"{pattern} did not appear: {process.communicate()[0] if process.poll() is not None else 'timeout'}")


def test_shipped_configurations_are_found_from_any_folder(tmp_path, monkeypatch):
    """An installed package has no `configs` in the working folder."""
    from ldm.cli import train
    from ldm.training.configuration import make_plan

    monkeypatch.chdir(tmp_path)
    plan = make_plan(train.parse(["--base", "configs/emoji/demo_first_stage.yaml", "-t"]))
    assert plan.config.model.target == "ldm.models.autoencoder.AutoencoderKL"
