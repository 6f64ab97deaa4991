"""The command that draws from a picture and text, on a tiny model."""

from __future__ import annotations

import shlex

import numpy as np
import pytest
import torch
from PIL import Image
from task_checks import assert_one_line, assert_replays, assert_same_at_every_batch_size, pixels, samples
from tiny_models import text_config, write_model

from ldm.config.instantiate import instantiate_from_config
from ldm.models.diffusion.noise import SeededNoise
from ldm.pipelines.loading import load_model
from ldm.pipelines.sampling import encode
from ldm.tasks.img2img import ImageToImage

TASK = ImageToImage()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A model, and pictures of two sizes."""
    base = tmp_path_factory.mktemp("img2img")
    write_model(base / "tiny")
    (base / "pictures").mkdir()
    random = np.random.default_rng(0)
    for name, (height, width) in {"a": (16, 16), "b": (18, 21), "c": (16, 16)}.items():
        Image.fromarray(random.integers(0, 255, (height, width, 3), np.uint8)).save(base / f"pictures/{name}.png")
    return base


@pytest.fixture(scope="module")
def model(base):
    return load_model(base / "tiny/config.yaml", base / "tiny/model.ckpt")


@pytest.fixture
def draw(load_script, base, tmp_path):
    """Run the command on the tiny model; gives its exit status."""

    def run(*options: object) -> int:
        fixed = ["--model", base / "tiny", "--steps", 2, "--prompt", "fox", "--seed", 1, "--outdir", tmp_path / "out"]
        return load_script("img2img").main([str(each) for each in (*fixed, *options)])

    return run


def test_the_options_have_the_defaults_that_users_know():
    args = vars(TASK.make_parser().parse_args(["--init-img", "x.png"]))
    expected = {"image": ["x.png"], "strength": 0.75, "steps": 50, "scale": 5.0, "eta": 0.0, "n_samples": 4}
    assert {key: args[key] for key in expected} == expected
    assert TASK.make_parser().parse_args(["--image", "x", "--ddim_steps", "7", "--ddim_eta", "0.5"]).steps == 7


@pytest.mark.parametrize("options", [("--eta", 1), ("--dpm",)], ids=str)
def test_a_picture_is_the_same_at_every_batch_size(base, tmp_path, options):
    fixed = ["--model", base / "tiny", "--image", base / "pictures", "--steps", 2, "--prompt", "fox", "--n_samples", 2]
    assert_same_at_every_batch_size(TASK, [*fixed, *options], tmp_path)


def test_pictures_are_drawn_again_bit_for_bit(draw, base, load_script, tmp_path):
    assert draw("--image", base / "pictures", "--n_samples", 1, "--eta", 1, "--batch_size", 2) == 0
    assert_replays(load_script("replay").main, tmp_path / "out")


def test_sizes_stay_and_inputs_stand_beside_results(draw, base, tmp_path):
    assert draw("--image", base / "pictures", "--n_samples", 1) == 0
    assert [pixels(path).shape for path in samples(tmp_path / "out")] == [(16, 16, 3), (18, 21, 3), (16, 16, 3)]
    sheet = pixels(tmp_path / "out/fox.png")
    assert sheet.shape == (3 * 20 + 2, 2 * 23 + 2, 3)
    assert (sheet[22:40, 2:23] == pixels(base / "pictures/b.png")).all()


@pytest.mark.parametrize(
    ("options", "size"), [(("--H", 24), (24, 28)), (("--W", 7), (6, 7)), (("--H", 8, "--W", 30), (8, 30))]
)
def test_other_sizes_can_be_asked_for(draw, base, tmp_path, options, size):
    assert draw("--image", base / "pictures/b.png", "--n_samples", 1, *options) == 0
    assert pixels(samples(tmp_path / "out")[0]).shape == (*size, 3)


def test_little_strength_keeps_the_picture_and_full_strength_loses_it(draw, base, model, tmp_path):
    """With no noise to speak of what comes back is the first stage's own copy; with all, what text alone gives."""
    picture = pixels(base / "pictures/a.png")
    for strength in (1e-6, 0.5, 1):
        options = ["--image", base / "pictures/a.png", "--n_samples", 1, "--scale", 1, "--steps", 6]
        assert draw(*options, "--strength", strength) == 0
    least, some, most = (pixels(path) for path in samples(tmp_path / "out"))
    x = torch.from_numpy(picture).permute(2, 0, 1)[None] / 127.5 - 1
    copy = ((model.decode_first_stage(encode(model, x)).clamp(-1, 1) + 1) * 127.5)[0].permute(1, 2, 0).numpy()
    distance = [np.abs(each - copy).mean() for each in (least, some, most)]
    assert distance[0] < distance[1] < distance[2]


def test_at_full_strength_the_start_is_nearly_the_noise_of_text_to_image(model):
    """The first draw of the seed, with the little of the picture that the schedule leaves."""
    x0 = encode(model, torch.rand(1, 3, 16, 16))
    noise = SeededNoise([3])((1, 3, 8, 8))
    top = model.q_sample(x0, torch.tensor([99]), noise)
    left = model.alphas_cumprod[99]
    assert torch.allclose(top, left.sqrt() * x0 + (1 - left).sqrt() * SeededNoise([3])((1, 3, 8, 8)))


def test_encoding_takes_the_mode_and_draws_nothing(model):
    x = torch.rand(2, 3, 16, 16)
    before = torch.get_rng_state()
    latents = encode(model, x)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.allclose(latents, model.scale_factor * model.encode_first_stage(x).mean, atol=1e-5)


def test_first_stages_with_a_codebook_encode_too():
    config = text_config()
    stage = config["params"]["first_stage_config"]
    stage["target"] = "ldm.models.autoencoder.VQModelInterface"
    stage["params"].update(n_embed=16, ddconfig={**stage["params"]["ddconfig"], "double_z": False})
    model = instantiate_from_config(config).eval()
    x = torch.rand(1, 3, 16, 16)
    assert torch.allclose(encode(model, x), model.first_stage_model.encode(x), atol=1e-5)


BAD = {
    "no picture": (["--image", "none.png"], 'there is no picture "none.png"'),
    "no image": (["--image", "{base}/tiny/config.yaml"], "cannot read the picture"),
    "empty folder": (["--image", "{base}/tiny"], "holds no .png"),
    "too many steps": (["--image", "x.png", "--steps", "101"], "100 or fewer"),
    "noisy plms": (["--image", "x.png", "--plms", "--eta", "0.5"], "deterministic"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_mistake_is_one_line(draw, base, tmp_path, capsys, caplog, case):
    options, message = BAD[case]
    status = draw("--n_samples", 1, *(option.replace("{base}", str(base)) for option in options))
    error = capsys.readouterr().err
    late = "see above" in error
    assert_one_line(status, error, "1 of 1 could not be drawn" if late else message)
    assert not late or message in caplog.records[-1].message
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", ["0", "1.01", "-1", "nan", "inf", "much"])
def test_a_strength_that_is_no_share_is_refused(draw, capsys, value):
    with pytest.raises(SystemExit) as exit:
        draw("--image", "x.png", "--strength", value)
    assert exit.value.code == 2 and "--strength" in capsys.readouterr().err


def test_a_picture_that_cannot_be_read_does_not_stop_the_others(draw, base, tmp_path, capsys):
    (tmp_path / "broken.png").write_bytes((base / "pictures/a.png").read_bytes()[:60])
    pictures = [base / "pictures/a.png", tmp_path / "broken.png", base / "pictures/c.png"]
    assert draw("--image", *pictures, "--n_samples", 1) == 2
    assert "1 of 3 could not be drawn" in capsys.readouterr().err
    assert [path.name for path in samples(tmp_path / "out")] == ["00000.png", "00002.png"]


def test_a_picture_that_has_changed_is_not_drawn_again(draw, base, load_script, tmp_path, capsys):
    copy = tmp_path / "copy.png"
    copy.write_bytes((base / "pictures/a.png").read_bytes())
    assert draw("--image", copy, "--n_samples", 1) == 0
    Image.new("RGB", (16, 16)).save(copy)
    assert_one_line(
        load_script("replay").main([str(samples(tmp_path / "out")[0])]), capsys.readouterr().err, "has changed since"
    )


@pytest.mark.slow
def test_the_example_works_as_typed(load_script, repo_root, tmp_path, monkeypatch):
    """On the bundled model, in few steps."""
    monkeypatch.chdir(repo_root)
    words = shlex.split(TASK.example)
    assert load_script("img2img").main([*words[2:], "--steps", "5", "--n_samples", "1", "--outdir", str(tmp_path)]) == 0
    sketch = pixels(repo_root / words[words.index("--image") + 1])
    (drawn,) = (pixels(path) for path in samples(tmp_path))
    assert drawn.shape == sketch.shape
    assert np.abs(drawn[:8, :8] - sketch[:8, :8]).mean() < 30, "the background is the one of the sketch"
