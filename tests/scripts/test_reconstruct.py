"""Pictures through first stages and back: sizes, scores, and what cannot be read."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from tiny_models import write_model

from ldm.config.assets import ROOT
from ldm.config.instantiate import instantiate_from_config
from ldm.config.model_config import read_config
from ldm.config.model_files import FIRST_STAGES, named_model
from ldm.errors import UserError
from ldm.io.images import save_png
from ldm.modules.losses import lpips
from ldm.pipelines.loading import load_first_stage, load_model

PUBLISHED = sorted(folder.name for folder in (ROOT / FIRST_STAGES).iterdir())
FACTORS = {name: int(name.partition("-f")[2].partition("-")[0]) for name in PUBLISHED}


@pytest.fixture(scope="module")
def script(load_script):
    return load_script("reconstruct")


@pytest.fixture
def picture() -> np.ndarray:
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


def test_there_are_nine():
    assert len(PUBLISHED) == 9 and set(FACTORS.values()) == {4, 8, 16, 32}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_first_stages_take_pictures_of_any_size(script, tiny, tmp_path, picture, name):
    save_png(picture, tmp_path / "in.png")
    out = tmp_path / "out"
    assert script.main([str(tmp_path / "in.png"), "--model", str(tiny(name)), "--outdir", str(out), "--no-psim"]) == 0
    with Image.open(out / "pictures" / "in.png") as result:
        assert result.size == (36, 24)
    assert 2 ** (len(published(name)["params"]["ddconfig"]["ch_mult"]) - 1) == FACTORS[name]


def test_the_bundled_model_draws_out_of_the_box(script, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(script, "DRAWINGS", 2)
    options = ["--outdir", str(tmp_path), "--no-psim", "--json", str(tmp_path / "a.json")]
    assert script.main(options) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[0] == "| picture | size | PSNR, dB | SSIM |" and table[4].startswith("| mean |")
    told = json.loads((tmp_path / "a.json").read_text())
    assert told["settings"]["model"] == "emoji64" and len(told["pictures"]) == 2
    assert all(20 < score["psnr"] < 35 and 0.6 < score["ssim"] < 1 for score in told["pictures"])
    assert told["mean"]["psnr"] == pytest.approx(sum(score["psnr"] for score in told["pictures"]) / 2)
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (2 * 64 + 6, 2 * 64 + 6)
    # The files tell the same.
    names = [score["picture"] for score in told["pictures"]]
    assert sorted(names) == sorted(path.name for path in (tmp_path / "pictures").iterdir())


def test_the_first_stage_in_a_diffusion_model_is_the_same(tmp_path):
    write_model(tmp_path / "text")
    files = named_model(str(tmp_path / "text"))
    whole, stage = load_model(files.config, files.checkpoint), load_first_stage(files.config, files.checkpoint)
    wanted = whole.first_stage_model.state_dict()
    assert wanted.keys() == stage.state_dict().keys()
    assert all(torch.equal(wanted[key], value) for key, value in stage.state_dict().items())


def test_what_is_no_first_stage_is_told(tmp_path, picture):
    write_model(tmp_path / "text")
    files = named_model(str(tmp_path / "text"))
    config = OmegaConf.load(files.config)
    config.model.params.first_stage_config.target = "ldm.models.autoencoder.IdentityFirstStage"
    OmegaConf.save(config, tmp_path / "pixels.yaml")
    with pytest.raises(UserError, match=r"no first stage|another model|no autoencoder|not belong|does not fit"):
        load_first_stage(tmp_path / "pixels.yaml", files.checkpoint)


@pytest.mark.parametrize("shape", [(24, 36), (17, 16), (32, 64)])
def test_odd_sizes_are_mirrored_and_cut_back(script, shape):
    seen = []

    def model(x):
        seen.append(x)
        return x, None

    model.device, model.get_last_layer = torch.device("cpu"), lambda: torch.zeros(1)
    pictures = [np.random.RandomState(i).randint(0, 256, (*shape, 3), dtype=np.uint8) for i in range(2)]
    outputs = script.reconstruct(model, pictures, 32)
    assert all(np.allclose(out, p / 127.5 - 1, atol=1e-6) for out, p in zip(outputs, pictures, strict=True))
    height, width = seen[0].shape[2:]
    assert height % 32 == width % 32 == 0 and height - shape[0] < 32 and width - shape[1] < 32
    if height > shape[0]:
        assert torch.equal(seen[0][:, :, shape[0]], seen[0][:, :, shape[0] - 2])


def test_neighbours_of_one_padded_size_go_together(script):
    shapes = [(24, 24), (25, 32), (32, 32), (32, 32), (33, 32), (8, 8)]
    sources = [script.Source(f"{i}", lambda s=shape: np.zeros((*s, 3), np.uint8)) for i, shape in enumerate(shapes)]
    groups = [[name for name, _ in batch] for batch in script.batches(sources, 2, 16, [])]
    assert groups == [["0", "1"], ["2", "3"], ["4"], ["5"]]


def test_scores_have_their_closed_forms(script, picture):
    exact = picture / 127.5 - 1
    off = (exact + 0.2).astype(np.float32)
    score = script.measure("a", picture, off, None)
    assert score.psnr == pytest.approx(20, abs=1e-4) and (score.width, score.height) == (36, 24)
    assert script.measure("a", picture, exact.astype(np.float32), None).ssim == pytest.approx(1, abs=1e-6)
    # Of two flat pictures SSIM compares means alone: (2 m n + c) / (m² + n² + c), with c = (0.01 · range)².
    flat = np.full((32, 32, 3), 255, np.uint8)
    ssim = script.measure("a", flat, np.full((32, 32, 3), 0.5, np.float32), None).ssim
    assert ssim == pytest.approx((2 * 0.5 + 0.02**2) / (1 + 0.25 + 0.02**2), abs=1e-4)


def test_psim_is_measured_or_left_out_with_a_line(script, tiny, tmp_path, picture, monkeypatch, capsys, caplog):
    save_png(picture, tmp_path / "in.png")
    words = [str(tmp_path / "in.png"), "--model", str(tiny("kl-f4")), "--outdir", str(tmp_path / "out")]

    def absent():
        raise UserError("LPIPS has no weights: no network")

    with monkeypatch.context() as patch:
        patch.setattr(lpips, "pretrained_weights", absent)
        assert script.main(words) == 0
    assert "PSIM" not in capsys.readouterr().out
    assert [r.getMessage() for r in caplog.records if "PSIM" in r.getMessage()] == [
        "PSIM is left out: LPIPS has no weights: no network"
    ]
    torch.manual_seed(0)
    weights = {name: 0.01 * torch.rand_like(value) for name, value in lpips.LPIPS().named_parameters()}
    monkeypatch.setattr(lpips, "pretrained_weights", lambda: weights)
    assert script.main(words) == 0
    assert "| PSIM |" in capsys.readouterr().out


def test_bad_pictures_are_told_and_the_others_done(script, tiny, tmp_path, picture, capsys, caplog):
    inside = tmp_path / "in"
    save_png(picture, inside / "good.png")
    save_png(picture, inside / "deeper" / "good.png")
    whole = (inside / "good.png").read_bytes()
    (inside / "cut.png").write_bytes(whole[: len(whole) // 2])
    (inside / "text.jpg").write_text("hello")
    save_png(picture[:8], inside / "small.png")
    (inside / "notes.txt").write_text("not a picture, not counted")
    out = tmp_path / "out"
    words = ["--indir", str(inside), str(tmp_path / "absent.png"), "--model", str(tiny("vq-f4")), "--no-psim"]
    assert script.main([*words, "--outdir", str(out)]) == 2
    told = capsys.readouterr()
    assert "| good.png | 36 × 24 |" in told.out and "| deeper/good.png |" in told.out
    assert told.err.splitlines()[-1] == "error: 4 of 6 pictures could not be read; the lines above say why"
    errors = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert len(errors) == 4 and all("\n" not in error for error in errors)
    found = {path.relative_to(out).as_posix() for path in out.rglob("*.png")}
    assert found == {"sheet.png", "pictures/good.png", "pictures/deeper/good.png"}


def test_names_are_not_taken_twice(script):
    names = ["a.jpg", "a.png", "A.webp", "b/a.png", "a.jpg"]
    assert script.unique(names) == ["a.png", "a.png.png", "A.webp.png", "b/a.png", "a.jpg.png"]
    assert script.unique(["a.png"] * 4) == ["a.png", "a.png.png", "a.png-2.png", "a.png-3.png"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--indir", "{tmp}/absent"], "there is no folder"),
        (["--indir", "{tmp}/empty"], "there is no picture in"),
        (["{tmp}/x/pictures/a.png", "--outdir", "{tmp}/x"], "would be written over"),
        (["--outdir", "{tmp}/file"], "is a file; name a folder"),
        (["--model", "kl-f9"], "there is no model"),
        (["--model", "kl-f8", "--ckpt", "a"], "leave out --config"),
        (["--config", "a"], "needs --ckpt"),
    ],
)
def test_mistakes_are_one_line(script, tmp_path, capsys, words, told):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    assert script.main([word.format(tmp=tmp_path) for word in words]) == 2
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1


def test_a_first_stage_without_weights_says_how_to_get_them(tmp_path, monkeypatch):
    folder = tmp_path / FIRST_STAGES / "kl-f8"
    folder.mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"contains no weights; .*download_weights"):
        named_model("kl-f8", (FIRST_STAGES,))


def test_the_sheet_shows_originals_above_reconstructions(script):
    def flat(value, height=20, width=20):
        return np.full((height, width, 3), value, np.uint8)

    pairs = [(flat(i + 1), flat(i + 101)) for i in range(9)]
    sheet = script.sheet(pairs)
    assert sheet.shape == (4 * 22 + 2, 8 * 22 + 2, 3)
    middle = sheet[12::22, 12::22, 0]
    assert middle.tolist() == [
        [*range(1, 9)], [*range(101, 109)], [9, *7 * [0]], [109, *7 * [0]]
    ]  # fmt: skip
    assert script.sheet([(flat(9, 600, 300), flat(8, 600, 300))]).shape == (2 * 258 + 2, 258 + 2, 3)
