"""Tests of the rules for all source files: layers, imports, start-up of commands, forbidden calls."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from ldm.cli.main import COMMANDS as SUB_COMMANDS

ROOT = Path(__file__).resolve().parent.parent
PATTERNS = ("ldm/**/*.py", "taming/**/*.py", "scripts/*.py", "benchmarks/*.py", "main.py")
SOURCES = sorted(path for pattern in PATTERNS for path in ROOT.glob(pattern))
PROGRAMS = [path for path in SOURCES if "\nif __name__ ==" in path.read_text(encoding="utf-8")]

# Imports point down: a module imports its own level and those below. The first matching pattern counts.
LEVELS = [
    (r"main|scripts\..*|benchmarks\..*", 6),
    (r"ldm\.cli(\..*)?", 5),
    (r"taming(\..*)?|ldm|ldm\.lr_scheduler", 4),
    (r"ldm\.(training|data|diagnosis|evaluation|pipelines|preparation|retrieval)(\..*)?", 4),
    (r"ldm\.models\.diffusion\.(ddpm|preview|classifier|stable_diffusion)", 3),
    (r"ldm\.models(\..*)?", 2),
    (r"ldm\.modules(\..*)?", 1),
    (r"ldm\.(config|io)(\..*)?|ldm\.(compat|errors|util)", 0),
]
# Samplers work with any object that has `apply_model` and the tables of the schedule, so they import no model.
SAMPLERS = tuple(f"ldm.models.diffusion.{name}" for name in ("sampler", "ancestral", "ddim", "plms", "dpm_solver"))

# Packages that take seconds to import, or that sampling does not need: functions that use them import them.
HEAVY = {"transformers", "torchvision", "kornia", "lpips", "pytorch_lightning", "tensorboard", "scipy", "cv2"}
# Optional packages: every module imports without them.
OPTIONAL = ["scann", "clip", "gradio", "wandb", "emoji", "diffusers", "albumentations", "faiss"]


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path) for path in SOURCES}


def every(*prefixes: str) -> pytest.MarkDecorator:
    """Run a test for each source file whose module name has one of the prefixes."""
    paths = [path for path in SOURCES if module_name(path).startswith(prefixes or "")]
    return pytest.mark.parametrize("path", paths, ids=[str(path.relative_to(ROOT)) for path in paths])


def level(module: str) -> int:
    for pattern, number in LEVELS:
        if re.fullmatch(pattern, module):
            return number
    raise AssertionError(f"{module} has no level; add it to LEVELS")


def typing_only(nodes: ast.Module) -> set[ast.AST]:
    """Return the nodes inside `if TYPE_CHECKING:`, which never run."""
    blocks = [n for n in ast.walk(nodes) if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.unparse(n.test)]
    return {inner for block in blocks for statement in block.body for inner in ast.walk(statement)}


def imports(path: Path) -> list[tuple[str, int]]:
    """Return each module that a file imports, also inside functions, with its line."""
    found = []
    skipped = typing_only(tree(path))
    package = module_name(path) if path.name == "__init__.py" else module_name(path).rpartition(".")[0]
    for node in ast.walk(tree(path)):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parent = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parent, base] if base else parent)
            names = [f"{base}.{alias.name}" for alias in node.names]
            found += [(name if name in MODULES else base, node.lineno) for name in names]
    return found


def ours(name: str) -> bool:
    return name.partition(".")[0] in {"ldm", "taming", "main", "scripts", "benchmarks"}


def calls(path: Path) -> list[ast.Call]:
    return [node for node in ast.walk(tree(path)) if isinstance(node, ast.Call)]


def places(path: Path, nodes: list) -> list[str]:
    return [f"{path.relative_to(ROOT)}:{node.lineno}" for node in nodes]


def test_sources_are_found():
    assert len(SOURCES) > 10


@every()
def test_imports_point_down(path):
    module = module_name(path)
    wrong = [
        f"line {line}: {module} (level {level(module)}) imports {name} (level {level(name)})"
        for name, line in imports(path)
        if ours(name) and level(name) > level(module)
    ]
    assert not wrong, wrong


@every(*SAMPLERS)
def test_samplers_import_no_model(path):
    allowed = {*SAMPLERS, "ldm.models.diffusion.attributes", "ldm.models.diffusion.conditioning"}
    assert not [name for name, _ in imports(path) if name.startswith("ldm.models") and name not in allowed]


@every()
def test_heavy_packages_are_imported_inside_functions(path):
    allowed = {"pytorch_lightning"} if module_name(path).startswith("ldm.training") else set()
    statements = [node for node in tree(path).body if isinstance(node, (ast.Import, ast.ImportFrom))]
    names = {
        (node.module or "") if isinstance(node, ast.ImportFrom) else alias.name
        for node in statements
        for alias in node.names
    }
    assert not {name.partition(".")[0] for name in names} & (HEAVY - allowed)


@every("ldm")
def test_only_training_imports_lightning(path):
    uses = [name for name, _ in imports(path) if name.partition(".")[0] in {"pytorch_lightning", "lightning"}]
    assert not uses or module_name(path).startswith("ldm.training")


@every("ldm", "taming")
def test_the_package_does_not_print(path):
    assert not places(path, [c for c in calls(path) if isinstance(c.func, ast.Name) and c.func.id == "print"])


@every()
def test_no_star_imports(path):
    stars = [n for n in ast.walk(tree(path)) if isinstance(n, ast.ImportFrom) and n.names[0].name == "*"]
    assert not places(path, stars)


@every()
def test_no_device_is_hard_coded(path):
    moves = [c for c in calls(path) if isinstance(c.func, ast.Attribute) and c.func.attr == "cuda"]
    devices = [
        argument
        for call in calls(path)
        for argument in [*call.args, *(k.value for k in call.keywords if k.arg == "device")]
        if isinstance(argument, ast.Constant)
        and isinstance(argument.value, str)
        and re.fullmatch(r"cuda(:\d+)?", argument.value)
        and ast.unparse(call.func).rpartition(".")[2] in {"to", "device", "randn", "zeros", "ones", "tensor", "empty"}
    ]
    assert not places(path, moves + devices)


@every()
def test_files_cannot_run_code(path):
    def keyword(call, name):
        return next((k.value.value for k in call.keywords if k.arg == name and isinstance(k.value, ast.Constant)), None)

    unsafe = []
    for call in calls(path):
        name = ast.unparse(call.func)
        unsafe += [call] if name == "torch.load" and keyword(call, "weights_only") is not True else []
        unsafe += [call] if name in {"pickle.load", "pickle.loads", "yaml.load", "eval", "exec"} else []
        unsafe += [call] if name in {"np.load", "numpy.load"} and keyword(call, "allow_pickle") else []
    assert not places(path, unsafe)


@every()
def test_only_one_module_opens_checkpoints(path):
    opened = [call for call in calls(path) if ast.unparse(call.func) in {"torch.load", "safe_open", "load_file"}]
    assert not opened or module_name(path) == "ldm.io.checkpoint.reading", places(path, opened)


@pytest.mark.parametrize(
    "path",
    [*SOURCES, *sorted((ROOT / "tests").glob("**/*.py"))],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_no_file_is_over_600_lines(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 600, "split it: one concept per file"


def run_python(code: str, *arguments: str) -> str:
    """Run code in a fresh interpreter in the repository root; return its output."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "scripts")])}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


IMPORT_WITHOUT_EXTRAS = """
import importlib, importlib.util, sys
optional, files = sys.argv[1].split(","), sys.argv[2:]

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in optional:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
failures = []
for number, entry in enumerate(files):
    try:
        if entry.endswith(".py"):
            spec = importlib.util.spec_from_file_location(f"script_{number}", entry)
            sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            importlib.import_module(entry)
    except BaseException as error:
        failures.append(f"{entry}: {type(error).__name__}: {error}")
print("\\n".join(failures))
"""


@pytest.mark.slow
def test_every_module_imports_without_optional_packages():
    entries = [
        str(path) if path.parent.name == "scripts" or path == ROOT / "main.py" else module_name(path)
        for path in SOURCES
        if path.parent.name != "benchmarks"  # they need diffusers
    ]
    assert run_python(IMPORT_WITHOUT_EXTRAS, ",".join(OPTIONAL), *entries).strip() == ""


SAMPLING = (
    "ldm.models.diffusion.ddpm",
    "ldm.models.diffusion.ddim",
    "ldm.models.autoencoder",
    "ldm.pipelines.text",
    "ldm.pipelines.loading",
    "ldm.pipelines.run",
)


@pytest.mark.parametrize("module", SAMPLING)
def test_sampling_starts_without_packages_of_training(module):
    """Each of them takes up to seconds to import."""
    code = "import importlib, sys; importlib.import_module(sys.argv[1]); print(*sys.modules)"
    loaded = {name.partition(".")[0] for name in run_python(code, module).split()}
    assert not loaded & {*HEAVY, "lightning", "torchmetrics", "matplotlib"}


def command_line(path: Path) -> tuple[str, ...]:
    """Return the arguments of Python that run a program."""
    module = module_name(path)
    return ("-m", module) if module.startswith(("benchmarks.", "ldm.")) else (str(path.relative_to(ROOT)),)


COMMANDS = [*map(command_line, PROGRAMS), *(("-m", "ldm.cli.main", name) for name in SUB_COMMANDS)]


def test_every_script_is_a_command():
    scripts = {path for path in ROOT.glob("scripts/*.py") if not path.name.startswith("_")}
    assert {ROOT / "main.py", ROOT / "ldm/cli/main.py", ROOT / "benchmarks/decode.py", *scripts} <= {*PROGRAMS}


@pytest.mark.parametrize(("option", "status"), [("--help", 0), ("--no-such-option", 2)])
@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_commands_show_help_and_errors_before_heavy_imports(words, option, status):
    """Python logs each import on stderr, as "import time: self | cumulative | module"."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *words, option], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == status, done.stderr[-3000:]
    lines = done.stderr.splitlines()
    imported = {line.rpartition("|")[2].strip() for line in lines if line.startswith("import time:")}
    assert "ldm.cli.command" in imported or words[-1] == "ldm.cli.main"
    heavy = {*HEAVY, *OPTIONAL, "torch", "numpy", "PIL", "safetensors"}
    assert not heavy & {name.partition(".")[0] for name in imported}
    printed = done.stdout if status == 0 else "\n".join(line for line in lines if not line.startswith("import time:"))
    assert "usage:" in printed if status == 0 else printed.startswith("error: ") and "\n" not in printed


def test_every_sub_command_has_a_module_and_its_published_script():
    modules = {path.stem for path in (ROOT / "ldm/cli").glob("*.py")}
    assert set(SUB_COMMANDS) <= modules
    texts = [path.read_text(encoding="utf-8") for path in ROOT.glob("scripts/*.py")]
    published = {name for text in texts for name in re.findall(r"^from ldm\.cli\.(\w+) import main$", text, flags=re.M)}
    assert set(SUB_COMMANDS) - {"train"} <= published


def test_sys_path_is_edited_in_few_places():
    """`scripts/_checkout.py` adds the repository; the other lines are for modules of the tests."""
    files = [*SOURCES, ROOT / "setup.py", *(path for path in ROOT.glob("tests/**/*.py") if path != Path(__file__))]
    lines = [
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for path in files
        for line in path.read_text(encoding="utf-8").splitlines()
        if re.search(r"sys\.path", line)
    ]
    assert len(lines) <= 3, lines
