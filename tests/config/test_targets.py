"""Targets that a configuration may name, and targets that are refused."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from types import ModuleType

import pytest

from ldm.cli import command as cli
from ldm.cli.options import model_options
from ldm.config import instantiate, targets
from ldm.config.instantiate import get_obj_from_str, instantiate_from_config
from ldm.errors import UserError

CANARY = """
import pathlib
pathlib.Path(__file__).with_name("imported").touch()
class Set:
    pass
def make():
    return Set()
"""

# Refused by name, before any import.
HOSTILE = [
    "os.system",
    "posix.system",
    "subprocess.Popen",
    "builtins.eval",
    "builtins.exec",
    "builtins.__import__",
    "shutil.rmtree",
    "pathlib.Path",
    "importlib.import_module",
    "pickle.loads",
    "runpy.run_path",
    "socket.create_connection",
    "ctypes.CDLL",
    "webbrowser.open",
    "torch.load",
    "torch.hub.load",
    "torch.jit.load",
    "torch.nn.Module",
    "torch.nn.modules.linear.Identity",
    "torch.utils.cpp_extension.load",
    "torch.serialization.pickle.loads",
    "torchvision.datasets.CIFAR10",
    "numpy.load",
    "omegaconf.OmegaConf.load",
    "pytorch_lightning.Trainer",
    "pytorch_lightning.callbacks.LambdaCallback",
    "pytorch_lightning.callbacks.os.system",
    "pytorch_lightning.cli.LightningCLI",
    "pytorch_lightning.loggers.CometLogger",
    "lightning.pytorch.loggers.MLFlowLogger",
    "pytorch_lightning.strategies.DDPStrategy",
    "pytorch_lightning.profilers.AdvancedProfiler",
    "canary.Set",
    "canary.make",
    "ldmx.models.Model",
    "ldm_evil.Model",
    "main2.main",
    "mainframe.X",
    "taming_evil.X",
    "__main__.main",
    "ldm.__builtins__.eval",
    "ldm.util.__loader__.load_module",
    "ldm.io.checkpoint.reading._StandIn",
    "ldm..util.T",
    ".ldm.util.T",
    "ldm.util.UserError.",
    "ldm.util. UserError",
    " ldm.util.UserError",
    "ldm.util.UserError\n",
    "ldm.util.UserError\x00",
    "ldm/util/UserError",
    "ldm.util:UserError",
    "ldm.util.UserError()",
    "ldm.util.1x",
    "ⅼdm.util.UserError",  # a Roman numeral
    "ldm.utiⅼ.UserError",
    "ｌdm.util.UserError",  # full width, which Python itself would read as a letter l
    "ldm。util.UserError",
    "ldm.\u202eutil.UserError",
    "оs.system",  # a Cyrillic letter
    "canary",
    "ldm",
    "",
    ".",
    "ldm." + "x" * 1000 + ".X",
    "ldm" + ".x" * 5000,
    None,
    3,
    True,
    b"ldm.util.UserError",
    ["ldm.util.UserError"],
    {"target": "ldm.util.UserError"},
]
# Attributes of modules of this package that are defined elsewhere or are not classes.
REACHABLE_FROM_OURS = [
    "ldm.config.instantiate.importlib.import_module",
    "ldm.config.instantiate.importlib",
    "ldm.util.inspect",
    "ldm.util.get_obj_from_str",
    "ldm.util.instantiate_from_config",
    "ldm.modules.frozen.freeze",
    "ldm.util.T",
    "ldm.config.instantiate.SPECIAL_CONFIGS",
    "ldm.config.instantiate.Mapping",
    "ldm.io.files.os.system",
    "ldm.io.files.os",
    "ldm.io.files.Path",
    "ldm.io.files.atomic_path",
    "ldm.cli.command.sys.exit",
    "ldm.cli.command.argparse.FileType",
    "ldm.io.checkpoint.reading.read_checkpoint",
    "ldm.io.checkpoint.writing.save_safetensors",
    "ldm.io.checkpoint.reading.torch",
    "ldm.io.checkpoint.reading.pickle.loads",
    "ldm.models.autoencoder.nn",
    "ldm.models.autoencoder.Tensor",
    "ldm.models.autoencoder.AutoencoderKL.decode",
    "ldm.config.targets.allow",
    "main.sys.exit",
    "main.sys",
    "main.main",
    "main.command",
    "main.Path",
    "taming.modules.losses.vqperceptual.hinge_d_loss",
]


@pytest.fixture
def canary(tmp_path, monkeypatch):
    """File that importing the module `canary` creates."""
    (tmp_path / "canary.py").write_text(CANARY)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "canary", raising=False)
    yield tmp_path / "imported"
    sys.modules.pop("canary", None)


def refused(target) -> str:
    with pytest.raises(UserError) as error:
        instantiate_from_config({"target": target})
    message = str(error.value)
    assert "\n" not in message and message.isascii() and len(message) < 400
    return message


@pytest.mark.parametrize("target", HOSTILE, ids=lambda target: ascii(target)[:40])
def test_a_refused_target_imports_nothing(target, canary, monkeypatch):
    monkeypatch.setattr(instantiate.importlib, "import_module", lambda name: pytest.fail(f"{name} was imported"))
    before = set(sys.modules)
    refused(target)
    assert set(sys.modules) == before and not canary.exists()


@pytest.mark.parametrize("target", REACHABLE_FROM_OURS)
def test_objects_that_a_module_imports_are_refused(target):
    assert target in refused(target)


def test_the_message_names_the_target_and_the_option():
    message = refused("mydata.sets.Mine")
    assert '"mydata.sets.Mine"' in message
    assert message.endswith('give --allow-target mydata.sets, or in Python call ldm.config.allow("mydata.sets")')


def test_an_allowed_prefix_allows_only_that_package(canary):
    with targets.allowing("canary"):
        assert type(instantiate_from_config({"target": "canary.Set"})).__name__ == "Set"
        assert instantiate_from_config({"target": "canary.make"}).__class__.__module__ == "canary"
        assert "is neither a class nor a function" in refused("canary.pathlib")
        for other in ("canary2.Set", "os.system", "canary._Set"):
            refused(other)
    assert canary.exists()
    refused("canary.Set")


def test_objects_that_an_allowed_module_imports_are_not_allowed(monkeypatch):
    importer = ModuleType("importer")
    importer.system, importer.Popen = os.system, subprocess.Popen
    monkeypatch.setitem(sys.modules, "importer", importer)
    with targets.allowing("importer"):
        assert "--allow-target posix" in refused("importer.system") or os.name != "posix"
        assert refused("importer.Popen").endswith("--allow-target subprocess")
        with targets.allowing("subprocess"):
            assert get_obj_from_str("importer.Popen") is subprocess.Popen


def test_an_unlisted_logger_can_be_allowed():
    target = "pytorch_lightning.loggers.CometLogger"
    assert "give --allow-target pytorch_lightning.loggers, or" in refused(target)
    with targets.allowing("pytorch_lightning.loggers"):
        assert get_obj_from_str(target).__name__ == "CometLogger"


def test_a_single_class_can_be_allowed(canary):
    with targets.allowing("canary.Set"):
        get_obj_from_str("canary.Set")
        refused("canary.make")


@pytest.mark.parametrize("prefix", ["", ".", "a.", ".a", "a b", "a..b", "*", "_a", "a/b", "х", "a" * 300, None, 3])
def test_an_invalid_prefix_allows_nothing(prefix):
    with pytest.raises(ValueError, match="is not a prefix"):
        targets.allow("mydata", prefix)
    refused("mydata.Set")


def test_another_main_module_is_refused(tmp_path, monkeypatch):
    """Python imports from the working folder first, which may contain a downloaded `main.py`."""
    (tmp_path / "main.py").write_text(CANARY)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "main", raising=False)
    assert "--allow-target main" in refused("main.Set")
    assert get_obj_from_str("main.ImageLogger").__module__ == "ldm.training.callbacks"
    assert not (tmp_path / "imported").exists() and "main" not in sys.modules
    with targets.allowing("main"):
        assert get_obj_from_str("main.Set").__module__ == "main"
    sys.modules.pop("main")


def test_the_option_allows_targets_until_the_command_ends(canary):
    found = []

    @cli.command
    def main(argv=None):
        args = cli.Parser(parents=[model_options()]).parse_args(argv)
        found.append((args.allow_target, get_obj_from_str("canary.Set").__name__))

    assert main(["--allow-target", "mydata", "--allow-target", "canary"]) == 0
    assert found == [(["mydata", "canary"], "Set")]
    refused("canary.Set")
    assert main([]) == 2


@pytest.mark.parametrize("command", ["main", "txt2img", "evaluate_emoji", "export_model"])
def test_every_command_that_builds_a_model_has_the_option(command, load_script, capsys):
    if command == "main":
        import main as module
    else:
        module = load_script(command)
    with pytest.raises(SystemExit) as status:
        module.main(["--allow-target", "no such thing"])
    assert status.value.code == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: --allow-target:") and len(printed.splitlines()) == 1


def targets_in(folder) -> set[str]:
    files = [*folder.glob("configs/**/*.yaml"), *folder.glob("models/**/config.yaml")]
    assert len(files) > 35
    return {found for file in files for found in re.findall(r"target: *[\"']?([\w.]+)", file.read_text())}


def test_every_shipped_configuration_names_only_allowed_targets(repo_root):
    named = targets_in(repo_root)
    assert len(named) > 30
    assert {target: targets.refusal(target) for target in named if targets.refusal(target)} == {}
    assert all(isinstance(get_obj_from_str(target), type) for target in named)


def test_listed_classes_of_torch_and_lightning_exist():
    for target in sorted(targets.LISTED):
        if not target.startswith("lightning.") and not target.endswith(".TestTubeLogger"):
            assert isinstance(get_obj_from_str(target), type)
