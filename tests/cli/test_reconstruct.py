"""The command `reconstruct`: image sizes, scores, and images that cannot be read."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from tiny_models import write_model

from ldm.cli import reconstruct
from ldm.config.assets import ROOT
from ldm.config.instantiate import instantiate_from_config
from ldm.config.model_config import read_config
from ldm.config.model_files import FIRST_STAGES, named_model
from ldm.errors import UserError
from ldm.io.images import save_png
from ldm.modules.losses import lpips
from ldm.pipelines.generation import Item, batches
from ldm.pipelines.loading import load_first_stage, load_model
from ldm.pipelines.reconstruction import Reconstruction
from ldm.pipelines.run import run

PUBLISHED = sorted(folder.name for folder in (ROOT / FIRST_STAGES).iterdir())
FACTORS = {name: int(name.partition("-f")[2].partition("-")[0]) for name in PUBLISHED}


@pytest.fixture
def image() -> np.ndarray:
    return np.random.RandomState(0).randint(0, 256, (24, 36, 3), dtype=np.uint8)


def published(name: str, **ddconfig) -> dict:
    config = read_config(ROOT / FIRST_STAGES / name / "config.yaml")
    config["params"]["lossconfig"] = {"target": "torch.nn.Identity"}
    config["params"]["ddconfig"].update(ddconfig)
    return config


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """`tiny(name)`: a folder with the published first stage `name` at a quarter of its width, with random weights."""

    def write(name):
        folder = tmp_path_factory.getbasetemp() / f"first-stage-{name}"
        if not folder.exists():
            folder.mkdir()
            config = published(name, ch=32, num_res_blocks=1)
            torch.manual_seed(0)
            torch.save({"state_dict": instantiate_from_config(config).state_dict()}, folder / "model.ckpt")
            OmegaConf.save({"model": config}, folder / "config.yaml")
        return folder

    return write


def test_nine_first_stages_are_published():
    assert len(PUBLISHED) == 9 and set(FACTORS.values()) == {4, 8, 16, 32}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_first_stages_reconstruct_images_of_any_size(tiny, tmp_path, image, name):
    save_png(image, tmp_path / "in.png")
    out = tmp_path / "out"
    assert (
        reconstruct.main([str(tmp_path / "in.png"), "--model", str(tiny(name)), "--outdir", str(out), "--no-psim"]) == 0
    )
    with Image.open(out / "images" / "in.png") as result:
        assert result.size == (36, 24)
    assert 2 ** (len(published(name)["params"]["ddconfig"]["ch_mult"]) - 1) == FACTORS[name]


def test_bundled_model_is_the_default(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(reconstruct, "DRAWINGS", 2)
    options = ["--outdir", str(tmp_path), "--no-psim", "--json", str(tmp_path / "a.json")]
    assert reconstruct.main(options) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[0] == "| image | size | PSNR, dB | SSIM |" and table[4].startswith("| mean |")
    report = json.loads((tmp_path / "a.json").read_text())
    assert report["settings"]["model"] == "emoji64" and len(report["images"]) == 2
    assert all(20 < score["psnr"] < 35 and 0.6 < score["ssim"] < 1 for score in report["images"])
    assert report["mean"]["psnr"] == pytest.approx(sum(score["psnr"] for score in report["images"]) / 2)
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.size == (4 * 64 + 10, 64 + 4)
    # The files have the same names.
    names = [score["image"] for score in report["images"]]
    assert sorted(names) == sorted(path.name for path in (tmp_path / "images").iterdir())


def test_the_first_stage_in_a_diffusion_model_is_the_same(tmp_path):
    write_model(tmp_path / "text")
    files = named_model(str(tmp_path / "text"))
    whole, stage = load_model(files.config, files.checkpoint), load_first_stage(files.config, files.checkpoint)
    wanted = whole.first_stage_model.state_dict()
    assert wanted.keys() == stage.state_dict().keys()
    assert all(torch.equal(wanted[key], value) for key, value in stage.state_dict().items())


def test_model_without_first_stage_raises_user_error(tmp_path, image):
    write_model(tmp_path / "text")
    files = named_model(str(tmp_path / "text"))
    config = OmegaConf.load(files.config)
    config.model.params.first_stage_config.target = "ldm.models.autoencoder.IdentityFirstStage"
    OmegaConf.save(config, tmp_path / "pixels.yaml")
    with pytest.raises(UserError, match="is not an autoencoder of RGB images"):
        load_first_stage(tmp_path / "pixels.yaml", files.checkpoint)


class Mirror(torch.nn.Module):
    """First stage of factor 32 that returns its input and keeps it in `seen`."""

    def __init__(self):
        super().__init__()
        self.seen = []
        self.device = torch.device("cpu")
        self.encoder = torch.nn.Module()
        self.encoder.down = [None] * 6

    def get_last_layer(self):
        return torch.zeros(1)

    def encode(self, x):
        self.seen.append(x)
        return x

    def decode(self, z):
        return z


@pytest.mark.parametrize("shape", [(24, 36), (17, 16), (32, 64)])
def test_odd_sizes_are_mirrored_and_cropped(shape):
    model = Mirror()
    images = [np.random.RandomState(i).randint(0, 256, (*shape, 3), dtype=np.uint8) for i in range(2)]
    outputs = run(Reconstruction(), model, images, output_type="pt", progress=False)
    for output, image in zip(outputs, images, strict=True):
        assert np.allclose(output.permute(1, 2, 0), image / 127.5 - 1, atol=1e-6)
    (seen,) = model.seen
    height, width = seen.shape[2:]
    assert height % 32 == width % 32 == 0 and height - shape[0] < 32 and width - shape[1] < 32
    if height > shape[0]:
        assert torch.equal(seen[:, :, shape[0]], seen[:, :, shape[0] - 2])


def test_neighbours_of_one_size_share_a_batch():
    shapes = [(24, 24), (25, 32), (32, 32), (32, 32), (33, 32), (8, 8)]
    items = [Item(i, 0, np.zeros((*shape, 3), np.uint8)) for i, shape in enumerate(shapes)]
    groups = [[item.index for item in batch] for batch in batches(Reconstruction(), items, 2)]
    assert groups == [[0], [1], [2, 3], [4], [5]]


def test_scores_have_their_closed_forms(image):
    exact = image / 127.5 - 1
    off = (exact + 0.2).astype(np.float32)
    score = reconstruct.measure("a", image, off, None)
    assert score.psnr == pytest.approx(20, abs=1e-4) and (score.width, score.height) == (36, 24)
    assert reconstruct.measure("a", image, exact.astype(np.float32), None).ssim == pytest.approx(1, abs=1e-6)
    # Of two flat images SSIM compares means alone: (2 m n + c) / (m² + n² + c), with c = (0.01 · range)².
    flat = np.full((32, 32, 3), 255, np.uint8)
    ssim = reconstruct.measure("a", flat, np.full((32, 32, 3), 0.5, np.float32), None).ssim
    assert ssim == pytest.approx((2 * 0.5 + 0.02**2) / (1 + 0.25 + 0.02**2), abs=1e-4)


def test_psim_is_measured_or_left_out_with_a_warning(tiny, tmp_path, image, monkeypatch, capsys, caplog):
    save_png(image, tmp_path / "in.png")
    words = [str(tmp_path / "in.png"), "--model", str(tiny("kl-f4")), "--outdir", str(tmp_path / "out")]

    def absent():
        raise UserError("LPIPS has no weights: no network")

    with monkeypatch.context() as patch:
        patch.setattr(lpips, "pretrained_weights", absent)
        assert reconstruct.main(words) == 0
    assert "PSIM" not in capsys.readouterr().out
    assert [r.getMessage() for r in caplog.records if "PSIM" in r.getMessage()] == [
        "PSIM is left out, as with --no-psim: LPIPS has no weights: no network"
    ]
    torch.manual_seed(0)
    weights = {name: 0.01 * torch.rand_like(value) for name, value in lpips.LPIPS().named_parameters()}
    monkeypatch.setattr(lpips, "pretrained_weights", lambda: weights)
    assert reconstruct.main(words) == 0
    assert "| PSIM |" in capsys.readouterr().out


def test_unreadable_images_are_reported_and_the_others_reconstructed(tiny, tmp_path, image, capsys, caplog):
    inside = tmp_path / "in"
    save_png(image, inside / "good.png")
    save_png(image, inside / "deeper" / "good.png")
    whole = (inside / "good.png").read_bytes()
    (inside / "cut.png").write_bytes(whole[: len(whole) // 2])
    (inside / "text.jpg").write_text("hello")
    save_png(image[:8], inside / "small.png")
    (inside / "notes.txt").write_text("not an image, not counted")
    out = tmp_path / "out"
    words = ["--indir", str(inside), str(tmp_path / "absent.png"), "--model", str(tiny("vq-f4")), "--no-psim"]
    assert reconstruct.main([*words, "--outdir", str(out)]) == 2
    captured = capsys.readouterr()
    assert "| good.png | 36 × 24 |" in captured.out and "| deeper/good.png |" in captured.out
    assert captured.err.splitlines()[-1] == "error: 4 of 6 failed; see above"
    errors = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert len(errors) == 4 and all("\n" not in error for error in errors)
    found = {path.relative_to(out).as_posix() for path in out.rglob("*.png")}
    assert found == {"grid.png", "images/good.png", "images/deeper/good.png"}


def test_result_names_are_unique():
    names = ["a.jpg", "a.png", "A.webp", "b/a.png", "a.jpg"]
    assert reconstruct.unique(names) == ["a.png", "a.png.png", "A.webp.png", "b/a.png", "a.jpg.png"]
    assert reconstruct.unique(["a.png"] * 4) == ["a.png", "a.png.png", "a.png-2.png", "a.png-3.png"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--indir", "{tmp}/absent"], "there is no folder"),
        (["--indir", "{tmp}/empty"], "there is no image in"),
        (["{tmp}/x/images/a.png", "--outdir", "{tmp}/x"], "would be overwritten"),
        (["--outdir", "{tmp}/file"], "is a file; name a folder"),
        (["--model", "kl-f9"], "there is no model"),
        (["--model", "kl-f8", "--ckpt", "a"], "leave out --config"),
        (["--config", "a"], "needs --ckpt"),
    ],
)
def test_mistakes_are_reported_in_one_line(tmp_path, capsys, words, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    assert reconstruct.main([word.format(tmp=tmp_path) for word in words]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_first_stage_without_weights_names_the_download(tmp_path, monkeypatch):
    folder = tmp_path / FIRST_STAGES / "kl-f8"
    folder.mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"contains no weights; .*download_weights"):
        named_model("kl-f8", (FIRST_STAGES,))


def test_grid_shows_originals_beside_reconstructions(tiny, tmp_path):
    for index in range(5):
        save_png(np.full((20, 20, 3), 40 * index, np.uint8), tmp_path / "in" / f"{index}.png")
    out = tmp_path / "out"
    words = ["--indir", str(tmp_path / "in"), "--model", str(tiny("kl-f4")), "--no-psim", "--outdir", str(out)]
    assert reconstruct.main(words) == 0
    with Image.open(out / "grid.png") as grid:
        pixels = np.asarray(grid)
    assert pixels.shape == (2 * 22 + 2, 8 * 22 + 2, 3)
    assert pixels[12, 12::44, 0].tolist() == [0, 40, 80, 120]
    with Image.open(out / "images" / "4.png") as last:
        assert np.array_equal(pixels[24:44, 24:44], np.asarray(last))


def test_image_that_overflows_in_every_precision_is_an_error(tiny, tmp_path, image, capsys, caplog):
    """The other images are reconstructed and scored; PSNR is never NaN."""
    weights = torch.load(tiny("kl-f4") / "model.ckpt", weights_only=True)["state_dict"]
    # The normalisation squares the values; those of the white image alone leave the range of float32.
    weights["encoder.conv_in.weight"].abs_().mul_(1e20)
    weights["encoder.conv_in.bias"].zero_()
    folder = tmp_path / "model"
    folder.mkdir()
    torch.save({"state_dict": weights}, folder / "model.ckpt")
    (folder / "config.yaml").write_bytes((tiny("kl-f4") / "config.yaml").read_bytes())
    save_png(np.full((32, 32, 3), 255, np.uint8), tmp_path / "white.png")
    save_png(np.full((32, 32, 3), 127, np.uint8), tmp_path / "grey.png")
    files = [str(tmp_path / name) for name in ("white.png", "grey.png")]
    options = ["--model", str(folder), "--outdir", str(tmp_path / "out"), "--no-psim"]
    assert reconstruct.main([*files, *options, "--json", str(tmp_path / "a.json")]) == 2
    printed = capsys.readouterr()
    assert "| grey.png |" in printed.out and "white" not in printed.out and "nan" not in printed.out
    assert printed.err.strip().endswith("error: 1 of 2 failed; see above")
    assert f'"{files[0]}": the latents of image 0 (seed 0) are not finite; check the weights' in caplog.text
    assert [path.name for path in (tmp_path / "out" / "images").iterdir()] == ["grey.png"]
    assert [row["image"] for row in json.loads((tmp_path / "a.json").read_text())["images"]] == ["grey.png"]
