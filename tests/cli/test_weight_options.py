"""Tests of the options of commands for weights of other programs: --ckpt without --config, --vae and --lora."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from diffusers_folders import make_vae, write_stable_diffusion, write_unconditional
from PIL import Image
from safetensors.torch import save_file
from tiny_models import write_model
from tiny_stable_diffusion import lora_factors, v1_config, write_lora

from ldm.cli.options import lora
from ldm.cli.replay import main as replay
from ldm.cli.txt2img import main as txt2img

RUN = [
    "--prompt",
    "a cat",
    "--ddim_steps",
    "2",
    "--n_samples",
    "1",
    "--seed",
    "1",
    "--skip_grid",
    "--H",
    "16",
    "--W",
    "16",
]


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("v1")
    model = write_model(folder / "m", v1_config(folder))
    vae = {name: value + 0.05 for name, value in model.first_stage_model.state_dict().items()}
    save_file(vae, folder / "vae.safetensors")
    names = (
        "lora_unet_mid_block_attentions_0_proj_in.lora_down.weight",
        "lora_unet_mid_block_attentions_0_proj_in.lora_up.weight",
    )
    down, up, _ = lora_factors(32, 32, (1, 1))
    write_lora(folder / "style.safetensors", dict(zip(names, (down, up), strict=True)))
    write_lora(folder / "wide.safetensors", dict(zip(names, (torch.zeros(2, 64), torch.zeros(64, 2)), strict=True)))
    return folder


@pytest.fixture
def run(shared, tmp_path, monkeypatch):
    """Return a function that runs txt2img and returns its image, in a folder with the files."""
    for file in shared.iterdir():
        (shutil.copytree if file.is_dir() else shutil.copy)(file, tmp_path / file.name)
    monkeypatch.chdir(tmp_path)

    def sample(*options, model="m"):
        out = tmp_path / f"out{len(list(tmp_path.glob('out*')))}"
        assert txt2img(["--model", model, *RUN, "--outdir", str(out), *options]) == 0
        return out / "samples/0000.png"

    return sample


def pixels(path):
    return torch.frombuffer(bytearray(Image.open(path).tobytes()), dtype=torch.uint8)


def test_first_stage_and_loras_change_the_image(run):
    plain = pixels(run())
    changed = [
        run("--vae", "vae.safetensors"),
        run("--lora", "style.safetensors:0.8"),
        run("--lora", "style.safetensors"),
    ]
    assert all(not torch.equal(pixels(path), plain) for path in changed)
    assert torch.equal(pixels(run("--lora", "style.safetensors:0")), plain)
    twice = run("--lora", "style.safetensors:0.5", "--lora", "style.safetensors:0.5")
    assert (pixels(twice).int() - pixels(changed[2]).int()).abs().max() <= 1


def test_metadata_names_the_files_and_replay_uses_them(run, tmp_path, capsys):
    path = run("--vae", "vae.safetensors", "--lora", "style.safetensors:0.8", "--lora", "style.safetensors:-0.5")
    text = Image.open(path).text
    assert text["vae"] == "vae.safetensors" and text["loras"] == "style.safetensors:0.8, style.safetensors:-0.5"
    record = json.loads(text["ldm"])
    assert record["vae"] == "vae.safetensors"
    assert record["loras"] == [["style.safetensors", 0.8], ["style.safetensors", -0.5]]
    assert replay([str(path)]) == 0 and "identical" in capsys.readouterr().out
    (tmp_path / "style.safetensors").unlink()
    assert replay([str(path)]) == 2
    assert 'there is no LoRA "style.safetensors"' in capsys.readouterr().err


def test_record_without_additions_is_as_before(run):
    record = json.loads(Image.open(run()).text["ldm"])
    assert not {"vae", "loras"} & record.keys()


@pytest.mark.parametrize(
    ("vae", "loras"), [(3, []), (None, [["x"]]), (None, [["x", "y"]]), (None, "x"), (None, [[1, 2]])]
)
def test_damaged_record_raises_user_error(run, vae, loras, capsys):
    from ldm.cli.metadata import Record

    text = json.loads(Image.open(run()).text["ldm"])
    with pytest.raises((TypeError, ValueError)):
        Record._parsed({**text, "vae": vae, "loras": loras})


def test_folder_of_diffusers_is_sampled_and_replayed(run, tmp_path, capsys):
    write_stable_diffusion(tmp_path / "theirs", vae=make_vae(block_out_channels=(32, 64)))
    path = run(model="theirs")
    record = json.loads(Image.open(path).text["ldm"])
    assert record["checkpoint"] == "theirs" and record["config"] == "theirs/model_index.json"
    assert replay([str(path)]) == 0 and "identical" in capsys.readouterr().out


def test_first_stage_of_diffusers_reconstructs_images(tmp_path, capsys):
    from ldm.cli.reconstruct import main as reconstruct

    make_vae(block_out_channels=(32, 64)).save_pretrained(tmp_path / "vae")
    Image.new("RGB", (16, 16), "red").save(tmp_path / "red.png")
    options = ["--outdir", str(tmp_path / "out"), "--no-psim"]
    assert reconstruct(["--model", str(tmp_path / "vae"), str(tmp_path / "red.png"), *options]) == 0
    assert list((tmp_path / "out").rglob("*.png"))


def test_folder_of_diffusers_is_sampled_to_outputs_and_continued(tmp_path, monkeypatch, capsys):
    from ldm.cli.sample_diffusion import main as sample_diffusion

    write_unconditional(tmp_path / "theirs")
    monkeypatch.chdir(tmp_path)
    assert sample_diffusion(["-r", "theirs", "-n", "2", "-c", "2", "--batch_size", "2", "--seed", "1"]) == 0
    (run,) = (tmp_path / "outputs/theirs/samples/00000000").iterdir()
    assert len(list((run / "img").glob("*.png"))) == 2
    assert sample_diffusion(["--continue", str(run), "-n", "4"]) == 0
    assert len(list((run / "img").glob("*.png"))) == 4


BAD = {
    "another width": (["--lora", "wide.safetensors"], 'LoRA "wide.safetensors" belongs to another model'),
    "no LoRA": (["--lora", "none.safetensors:0.5"], 'there is no LoRA "none.safetensors"'),
    "a model as LoRA": (["--lora", "m/model.ckpt"], "is not a LoRA"),
    "a LoRA as first stage": (
        ["--vae", "style.safetensors"],
        '"style.safetensors" is a LoRA; give the weights of a first',
    ),
    "other channels": (["--vae", "sixteen.safetensors"], "has latents of 16 channels, that of the model 4"),
    "a truncated file": (["--vae", "short.safetensors"], '"short.safetensors" is truncated or damaged'),
    "no first stage": (["--vae", "none.ckpt"], 'there is no first stage "none.ckpt"'),
}


@pytest.mark.parametrize(("options", "message"), BAD.values(), ids=BAD)
def test_bad_file_is_one_line_and_exit_status_2(run, tmp_path, options, message, capsys):
    save_file({"decoder.conv_in.weight": torch.zeros(32, 16, 3, 3)}, "sixteen.safetensors")
    whole = (tmp_path / "vae.safetensors").read_bytes()
    (tmp_path / "short.safetensors").write_bytes(whole[:-8])
    assert txt2img(["--model", "m", *RUN, "--outdir", "out", *options]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert message in line
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").rglob("*.png"))


def test_missing_vocabulary_without_a_network_is_one_line(run, tmp_path, capsys):
    write_stable_diffusion(tmp_path / "theirs", vae=make_vae(block_out_channels=(32, 64)))
    shutil.rmtree(tmp_path / "theirs/tokenizer")
    assert txt2img(["--model", "theirs", *RUN, "--outdir", "out"]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert len(errors) == 1 and 'tokenizer "openai/clip-vit-large-patch14" is not on this machine' in errors[0]
    assert 'a local folder with its vocab.json and merges.txt in the configuration ("tokenizer" of' in errors[0]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.safetensors", ("a.safetensors", 1.0)),
        ("a.safetensors:0.8", ("a.safetensors", 0.8)),
        ("a:b.safetensors:-1", ("a:b.safetensors", -1.0)),
        ("a:b.safetensors", ("a:b.safetensors", 1.0)),
        ("a.safetensors:inf", ("a.safetensors:inf", 1.0)),
    ],
)
def test_file_and_factor_are_parsed(text, expected):
    assert lora(text) == expected


@pytest.mark.parametrize("factor", ["nan", "strong", "", "1,5"])
def test_text_for_the_factor_of_an_existing_lora_is_refused(run, factor, capsys):
    with pytest.raises(SystemExit) as caught:
        txt2img(["--model", "m", *RUN, "--lora", f"style.safetensors:{factor}"])
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f'"{factor}" after "style.safetensors:" is not a factor; give a number such as 0.8' in line
