"""Tests of the command `img2img` with a tiny model."""

from __future__ import annotations

import shlex

import numpy as np
import pytest
import torch
from PIL import Image
from task_checks import assert_one_line, assert_replays, assert_same_at_every_batch_size, pixels, samples
from tiny_models import text_config, write_model

from ldm.cli import replay
from ldm.cli.img2img import Img2Img, main
from ldm.cli.options import sampler_settings
from ldm.config.instantiate import instantiate_from_config
from ldm.models.diffusion.noise import SeededNoise
from ldm.pipelines.loading import load_model
from ldm.pipelines.sampling import encode

TASK = Img2Img()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Return a folder with a model, and with images of two sizes."""
    base = tmp_path_factory.mktemp("img2img")
    write_model(base / "tiny")
    (base / "images").mkdir()
    random = np.random.default_rng(0)
    for name, (height, width) in {"a": (16, 16), "b": (18, 21), "c": (16, 16)}.items():
        Image.fromarray(random.integers(0, 255, (height, width, 3), np.uint8)).save(base / f"images/{name}.png")
    return base


@pytest.fixture(scope="module")
def model(base):
    return load_model(base / "tiny/config.yaml", base / "tiny/model.ckpt")


@pytest.fixture
def sample(base, tmp_path):
    """Return a function that runs the command with the tiny model and returns its exit status."""

    def run(*options: object) -> int:
        fixed = ["--model", base / "tiny", "--steps", 2, "--prompt", "fox", "--seed", 1, "--outdir", tmp_path / "out"]
        return main([str(each) for each in (*fixed, *options)])

    return run


def test_options_have_the_usual_defaults():
    parsed = TASK.make_parser().parse_args(["--init-img", "x.png"])
    args = {**vars(parsed), **sampler_settings(parsed)}
    expected = {"image": ["x.png"], "strength": 0.75, "steps": 50, "scale": 5.0, "eta": 0.0, "n_samples": 4}
    assert {key: args[key] for key in expected} == expected
    assert TASK.make_parser().parse_args(["--image", "x", "--ddim_steps", "7", "--ddim_eta", "0.5"]).steps == 7


@pytest.mark.parametrize("options", [("--eta", 1), ("--dpm",)], ids=str)
def test_image_does_not_depend_on_the_batch_size(base, tmp_path, options):
    fixed = ["--model", base / "tiny", "--image", base / "images", "--steps", 2, "--prompt", "fox", "--n_samples", 2]
    assert_same_at_every_batch_size(TASK, [*fixed, *options], tmp_path)


def test_replay_is_identical(sample, base, tmp_path):
    assert sample("--image", base / "images", "--n_samples", 1, "--eta", 1, "--batch_size", 2) == 0
    assert_replays(replay.main, tmp_path / "out")


def test_sizes_are_kept_and_the_grid_shows_inputs_beside_results(sample, base, tmp_path):
    assert sample("--image", base / "images", "--n_samples", 1) == 0
    assert [pixels(path).shape for path in samples(tmp_path / "out")] == [(16, 16, 3), (18, 21, 3), (16, 16, 3)]
    grid = pixels(tmp_path / "out/fox.png")
    assert grid.shape == (3 * 20 + 2, 2 * 23 + 2, 3)
    assert (grid[22:40, 2:23] == pixels(base / "images/b.png")).all()


@pytest.mark.parametrize(
    ("options", "size"), [(("--H", 24), (24, 28)), (("--W", 7), (6, 7)), (("--H", 8, "--W", 30), (8, 30))]
)
def test_size_options_set_the_image_size(sample, base, tmp_path, options, size):
    assert sample("--image", base / "images/b.png", "--n_samples", 1, *options) == 0
    assert pixels(samples(tmp_path / "out")[0]).shape == (*size, 3)


def test_low_strength_keeps_the_image_and_full_strength_loses_it(sample, base, model, tmp_path):
    """At a strength near 0 the result is the reconstruction of the first stage; at 1 little of the image is left."""
    image = pixels(base / "images/a.png")
    for strength in (1e-6, 0.5, 1):
        options = ["--image", base / "images/a.png", "--n_samples", 1, "--scale", 1, "--steps", 6]
        assert sample(*options, "--strength", strength) == 0
    least, some, most = (pixels(path) for path in samples(tmp_path / "out"))
    x = torch.from_numpy(image).permute(2, 0, 1)[None] / 127.5 - 1
    copy = ((model.decode_first_stage(encode(model, x)).clamp(-1, 1) + 1) * 127.5)[0].permute(1, 2, 0).numpy()
    distance = [np.abs(each - copy).mean() for each in (least, some, most)]
    assert distance[0] < distance[1] < distance[2]


def test_full_strength_starts_from_the_noise_of_the_seed(model):
    """The start is the first noise of the seed, plus what the schedule leaves of the image."""
    x0 = encode(model, torch.rand(1, 3, 16, 16))
    noise = SeededNoise([3])((1, 3, 8, 8))
    top = model.q_sample(x0, torch.tensor([99]), noise)
    left = model.alphas_cumprod[99]
    assert torch.allclose(top, left.sqrt() * x0 + (1 - left).sqrt() * SeededNoise([3])((1, 3, 8, 8)))


def test_encoding_returns_the_mode_without_random_numbers(model):
    x = torch.rand(2, 3, 16, 16)
    before = torch.get_rng_state()
    latents = encode(model, x)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.allclose(latents, model.scale_factor * model.encode_first_stage(x).mean, atol=1e-5)


def test_first_stage_with_a_codebook_encodes():
    config = text_config()
    stage = config["params"]["first_stage_config"]
    stage["target"] = "ldm.models.autoencoder.VQModelInterface"
    stage["params"].update(n_embed=16, ddconfig={**stage["params"]["ddconfig"], "double_z": False})
    model = instantiate_from_config(config).eval()
    x = torch.rand(1, 3, 16, 16)
    assert torch.allclose(encode(model, x), model.first_stage_model.encode(x), atol=1e-5)


BAD = {
    "no file": (["--image", "none.png"], 'there is no image "none.png"'),
    "no image": (["--image", "{base}/tiny/config.yaml"], "cannot read the image"),
    "empty folder": (["--image", "{base}/tiny"], "holds no images"),
    "too many steps": (["--image", "x.png", "--steps", "101"], "100 or fewer"),
    "noisy plms": (["--image", "x.png", "--plms", "--eta", "0.5"], "deterministic"),
}


@pytest.mark.parametrize("case", BAD)
def test_error_is_one_line(sample, base, tmp_path, capsys, caplog, case):
    options, message = BAD[case]
    status = sample("--n_samples", 1, *(option.replace("{base}", str(base)) for option in options))
    error = capsys.readouterr().err
    late = "see above" in error
    assert_one_line(status, error, "1 of 1 failed" if late else message)
    assert not late or message in caplog.records[-1].message
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", ["0", "1.01", "-1", "nan", "inf", "much"])
def test_strength_outside_its_range_is_an_error(sample, capsys, value):
    with pytest.raises(SystemExit) as exit:
        sample("--image", "x.png", "--strength", value)
    assert exit.value.code == 2 and "--strength" in capsys.readouterr().err


def test_unreadable_image_does_not_stop_the_others(sample, base, tmp_path, capsys):
    (tmp_path / "broken.png").write_bytes((base / "images/a.png").read_bytes()[:60])
    images = [base / "images/a.png", tmp_path / "broken.png", base / "images/c.png"]
    assert sample("--image", *images, "--n_samples", 1) == 2
    assert "1 of 3 failed" in capsys.readouterr().err
    assert [path.name for path in samples(tmp_path / "out")] == ["00000.png", "00002.png"]


def test_replay_refuses_a_changed_image(sample, base, tmp_path, capsys):
    copy = tmp_path / "copy.png"
    copy.write_bytes((base / "images/a.png").read_bytes())
    assert sample("--image", copy, "--n_samples", 1) == 0
    Image.new("RGB", (16, 16)).save(copy)
    assert_one_line(
        replay.main([str(samples(tmp_path / "out")[0])]),
        capsys.readouterr().err,
        "has changed since the image was sampled",
    )


@pytest.mark.slow
def test_example_works_as_typed(repo_root, tmp_path, monkeypatch):
    """With the bundled model, in few steps."""
    monkeypatch.chdir(repo_root)
    words = shlex.split(TASK.arguments)
    assert main([*words, "--steps", "5", "--n_samples", "1", "--outdir", str(tmp_path)]) == 0
    sketch = pixels(repo_root / words[words.index("--image") + 1])
    (sampled,) = (pixels(path) for path in samples(tmp_path))
    assert sampled.shape == sketch.shape
    assert np.abs(sampled[:8, :8] - sketch[:8, :8]).mean() < 30, "the background is that of the sketch"
