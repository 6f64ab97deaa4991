"""The command that enlarges pictures, run in this process on a tiny model."""

from __future__ import annotations

import shlex
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import superresolution_config, write_model

from ldm import inference
from ldm.config.instantiate import instantiate_from_config
from ldm.config.model_config import read_config
from ldm.config.model_files import ModelFiles
from ldm.errors import UserError
from ldm.modules.tiles import TiledDenoiser
from ldm.tasks.superresolution import SuperResolution, enlargement

TASK = SuperResolution()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    write_model(folder, superresolution_config())
    return folder


@pytest.fixture
def enlarge(load_script, model, tmp_path):
    """Run the command on `in`, or what the options name, in few steps; returns its exit status."""

    def run(*options: object, outdir: str = "out") -> int:
        fixed = ["--model", model, "--steps", 2, "--seed", 1, "--outdir", tmp_path / outdir]
        source = [] if "--image" in options else ["--indir", tmp_path / "in"]
        return load_script("superres").main([str(each) for each in (*fixed, *source, *options)])

    return run


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "in").mkdir()
    return tmp_path / "in"


def picture(height: int = 8, width: int = 8, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8))


def pixels(path) -> np.ndarray:
    with Image.open(path) as file:
        return np.asarray(file).astype(int)


@pytest.mark.parametrize("size", [(8, 8), (5, 7), (1, 1), (9, 21)])
@pytest.mark.parametrize("tile", [[], ["--tile", 0], ["--tile", 8]], ids=str)
def test_any_size_is_doubled(enlarge, folder, tmp_path, size, tile):
    picture(*size).save(folder / "x.png")
    assert enlarge(*tile) == 0
    assert pixels(tmp_path / "out" / "x.png").shape == (2 * size[0], 2 * size[1], 3)
    sheet = pixels(tmp_path / "out" / "grid-0000.png")
    assert sheet.shape == (2 * size[0] + 4, 4 * size[1] + 6, 3), "bicubic beside the result"


@pytest.mark.parametrize("options", [(), ("--eta", 0), ("--plms",), ("--dpm",)], ids=str)
def test_a_picture_is_the_same_at_every_batch_size(enlarge, folder, tmp_path, options):
    for i in range(8):
        picture(8, 12, seed=i).save(folder / f"{i}.png")
    for size in (1, 3, 8):
        assert enlarge("--batch_size", size, "--skip_grid", *options, outdir=f"b{size}") == 0
    for i in range(8):
        alone, three, eight = (pixels(tmp_path / f"b{size}" / f"{i}.png") for size in (1, 3, 8))
        assert np.abs(alone - three).max() <= 1 and np.abs(alone - eight).max() <= 1


def test_replaying_is_identical(enlarge, folder, tmp_path, load_script):
    picture(9, 12).save(folder / "x.png")
    assert enlarge("--eta", 0.5) == 0
    assert load_script("replay").main([str(tmp_path / "out" / "x.png")]) == 0
    with Image.open(tmp_path / "out" / "x.png") as file:
        assert file.text["factor"] == "2" and file.text["tile"] == "16"


class Pointwise:
    """A model of x_0 that looks at single positions: large maps in tiles must give exactly what whole ones give."""

    num_timesteps, parameterization, device = 100, "x0", torch.device("cpu")
    alphas_cumprod = torch.linspace(0.99, 0.01, 100)

    def __init__(self) -> None:
        self.model, self.calls = torch.nn.Identity(), 0

    def apply_model(self, x, t, cond):
        self.calls += 1
        return torch.tanh(x * 0.3 + cond)


@pytest.mark.parametrize("sampler", ["ddim", "plms", "dpm"])
def test_tiles_of_a_pointwise_model_leave_no_seam(sampler):
    settings = inference.SamplerSettings(sampler, 5, 1.0 if sampler == "ddim" else 0.0)
    cond, start = torch.randn(2, 3, 20, 28), torch.randn(2, 3, 20, 28)
    results = []
    for model in (whole := Pointwise(), TiledDenoiser(parts := Pointwise(), 8, 2)):
        torch.manual_seed(0)
        results.append(inference.sample_latents(model, start.shape, settings, cond, noise=start))
    assert parts.calls == 15 * whole.calls
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=1e-5)


class TileMeans(Pointwise):
    """A model whose tiles disagree: each says the mean of what it sees."""

    def apply_model(self, x, t, cond):
        return cond.mean(dim=(2, 3), keepdim=True).expand_as(x)


def test_tiles_that_disagree_blend_without_a_seam():
    """On a ramp every tile has a mean of its own; the result climbs by steps no larger than the blend's."""
    ramp = torch.linspace(-1, 1, 64).expand(1, 1, 8, 64)
    model = TiledDenoiser(TileMeans(), 16, 8)
    settings = inference.SamplerSettings("ddim", 10)
    result = inference.sample_latents(model, ramp.shape, settings, ramp, noise=torch.zeros_like(ramp))
    row = result[0, 0, 4]
    apart = 8 * 2 / 63  # the difference between the means of neighbours, which a seam would show
    assert (row.diff() >= -1e-6).all() and row.diff().max() < 2.01 * apart / 9


def test_a_bad_picture_is_one_line_and_the_others_are_enlarged(enlarge, folder, tmp_path, caplog):
    for stem in ("a", "x", "z"):
        picture().save(folder / f"{stem}.png")
    (folder / "x.png").write_text("text")
    assert enlarge() == 2
    (error,) = [record.message for record in caplog.records if record.levelname == "ERROR"]
    assert "x.png" in error and "cannot read" in error and "\n" not in error
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.png", "grid-0000.png", "z.png"]


OPTIONS = {
    "no folder": (["--indir", "nowhere"], "there is no such folder"),
    "tile": (["--image", "{x}", "--tile", "9"], "--tile 9 is not a multiple of 4"),
    "outdir": (["--image", "{x}", "--outdir", "{in}"], "is drawn from; name another"),
    "eta": (["--image", "{x}", "--dpm", "--eta", "0.5"], "--dpm is deterministic; leave out --eta 0.5"),
    "text model": (["--image", "{x}", "--model", "emoji64"], 'draws from "caption"'),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_a_bad_option_is_one_line(load_script, model, folder, tmp_path, capsys, monkeypatch, case):
    options, message = OPTIONS[case]
    picture().save(folder / "x.png")
    monkeypatch.setattr(inference, "load_model", None)  # not reached
    options = [option.format(**{"in": folder, "x": folder / "x.png"}) for option in options]
    fixed = [] if "--model" in options else ["--model", str(model)]
    assert load_script("superres").main([*fixed, "--outdir", str(tmp_path / "out"), *options]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and message in error and not (tmp_path / "out").exists()


def test_the_factor_is_the_models():
    def config(stage):
        return superresolution_config() | {"params": superresolution_config()["params"] | {"cond_stage_config": stage}}

    unshuffle = {"target": "torch.nn.PixelUnshuffle", "params": {"downscale_factor": 2}}
    assert enlargement("m", config({"target": "torch.nn.Identity"})) == 2
    assert enlargement("m", config(unshuffle)) == 1
    with pytest.raises(UserError, match="does not tell how many times"):
        enlargement("m", config("__is_first_stage__"))


PHOTOGRAPHS = "python scripts/superres.py --indir data/superres_examples --outdir outputs/superres --seed 1"


@pytest.mark.parametrize(
    ("line", "pictures"),
    [
        (TASK.example, ["alarm_clock", "octopus", "penguin", "pineapple", "strawberry", "sunflower"]),
        (PHOTOGRAPHS, ["astronaut", "chelsea"]),
    ],
)
def test_the_examples_work_as_typed(repo_root, model, tmp_path, monkeypatch, line, pictures):
    """With a tiny model in the place of the real one."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").symlink_to(repo_root / "data")
    script, *options = shlex.split(line)[1:]
    command = [sys.executable, repo_root / script, *options, "--model", model, "--steps", "1", "--tile", "0"]
    done = subprocess.run(command, capture_output=True, text=True, env={"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    results = sorted(path.name for path in (tmp_path / "outputs/superres").iterdir())
    assert results == sorted(f"{name}.png" for name in [*pictures, "grid-0000"])


@pytest.mark.parametrize(
    ("path", "small", "latent"),
    [("models/ldm/bsr_sr/config.yaml", (16, 24), (16, 24)), ("configs/emoji/superres_64.yaml", (16, 32), (8, 16))],
)
def test_the_configurations_go_through(repo_root, path, small, latent):
    """The published one and the bundled one enlarge four times; their networks take what the task gives them."""
    config = read_config(repo_root / path)
    files = ModelFiles("m", repo_root / path, repo_root)
    settings = TASK.settings(TASK.make_parser().parse_args(["--image", "x"]), files, config)
    assert settings["factor"] == 4 and settings["steps"] == 100 and settings["eta"] == 1
    with torch.device("meta"):
        model = instantiate_from_config(inference.for_inference(config))
        conditioning = model.get_learned_conditioning(torch.zeros(2, 3, *small))
        latents = torch.zeros(2, model.channels, *latent)
        assert model.apply_model(latents, torch.zeros(2), conditioning).shape == latents.shape
    assert settings["tile"] == model.image_size * model.downsampling
