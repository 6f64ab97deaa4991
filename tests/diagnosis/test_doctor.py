"""Diagnosis of tiny trained models: healthy ones, and each of the common mistakes."""

from __future__ import annotations

import re

import pytest
import torch
from PIL import Image
from tiny_models import randomise
from torch import nn
from trained_models import (
    Run,
    batch_of,
    data_config,
    first_stage_config,
    train_diffusion,
    train_first_stage,
    write_images,
)

from ldm.cli.main import main
from ldm.config.instantiate import instantiate_from_config

FAST = ["-n", "4", "--batches", "2", "--steps", "5", "--ddim_steps", "2", "--device", "cpu"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Return healthy runs by name: two first stages and a diffusion model."""
    folder = tmp_path_factory.mktemp("runs")
    data = data_config(write_images(folder / "images"))
    batch = batch_of(data)
    kl, vq = (train_first_stage(first_stage_config(kind), batch, 50) for kind in ("AutoencoderKL", "VQModel"))
    config, diffusion = train_diffusion(kl, batch, 20)
    return {
        "kl": Run(folder / "kl", first_stage_config(), data, kl.state_dict()),
        "vq": Run(folder / "vq", first_stage_config("VQModel"), data, vq.state_dict()),
        "ldm": Run(folder / "ldm", config, data, diffusion.state_dict()),
    }


@pytest.fixture
def doctor(tmp_path, capsys):
    """Return `doctor(run, *words)`, which returns the exit status and the findings."""

    def diagnose(run, *words):
        status = main(["doctor", run.save(), *FAST, "-o", str(tmp_path / "sheet.png"), *words])
        findings = [
            line.removeprefix("finding: ") for line in capsys.readouterr().out.splitlines() if "finding: " in line
        ]
        assert status == (1 if findings else 0)
        return findings

    return diagnose


@pytest.mark.parametrize("name", ["kl", "vq", "ldm"])
def test_healthy_model_has_no_findings(name, runs, doctor, tmp_path):
    run = runs[name].copied(tmp_path / "run")
    before = {key: value.clone() for key, value in run.state.items()}
    assert doctor(run) == []
    columns = 3 if name == "ldm" else 2
    width, height = Image.open(tmp_path / "sheet.png").size
    grid = 2 * 18 + 2
    assert (width, height) == (columns * (grid + 2) + 2, grid + 4)
    saved = torch.load(run.folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(saved[key], before[key]) for key in before)


def replace_part(run, prefix, module):
    run.state.update(
        {prefix + name: value for name, value in module.state_dict().items() if prefix + name in run.state}
    )


def initial_first_stage(run):
    """The first stage was not loaded: `ckpt_path` was forgotten."""
    torch.manual_seed(1)
    replace_part(run, "first_stage_model.", instantiate_from_config(run.model_config["params"]["first_stage_config"]))


def wrong_scale(run):
    """The factor of Stable Diffusion, for latents of another first stage."""
    run.model_config["params"]["scale_factor"] *= 0.18215


def missing_weights(run):
    for name in [name for name in run.state if "output_blocks" in name and not name.startswith("model_ema")]:
        del run.state[name]


def constant_discriminator(run):
    last = max(int(m[1]) for name in run.state if (m := re.match(r"loss\.discriminator\.main\.(\d+)\.weight", name)))
    run.state[f"loss.discriminator.main.{last}.weight"].zero_()


def untrained_discriminator(run):
    for name in run.state:
        if name.endswith("num_batches_tracked"):
            run.state[name].zero_()


def collapsed_codebook(run):
    run.state["quantize.embedding.weight"][1:] += 1e3


def too_much_dropout(run):
    run.model_config["params"]["cond_dropout"] = 0.95


def ignored_conditioning(run):
    run.state["cond_stage_model.embedding.weight"][:] = run.state["cond_stage_model.embedding.weight"][:1].clone()


def frozen_average(run):
    """`update_ema` was never called: the averages are those of the initial weights."""
    torch.manual_seed(0)
    initial = instantiate_from_config(run.model_config)
    replace_part(run, "model_ema.", initial.model_ema)


def counted_but_frozen_average(run):
    """The averages are those of the initial weights, although their updates are counted."""
    torch.manual_seed(0)
    average = randomise(instantiate_from_config(run.model_config)).model_ema
    generator = torch.Generator().manual_seed(0)
    for name, value in average.state_dict().items():
        if value.dim() > 1:
            run.state[f"model_ema.{name}"] = 0.5 * torch.randn(value.shape, generator=generator)


PLANTED = [
    ("ldm", initial_first_stage, "the first stage has its initial random weights"),
    ("ldm", wrong_scale, r"standard deviation 0\.1\d+, .* set scale_factor: "),
    ("ldm", missing_weights, r"the checkpoint lacks \d+ of the \d+ weights"),
    ("kl", constant_discriminator, "the discriminator is dead: its logits are .* for every image"),
    ("kl", untrained_discriminator, "the discriminator is dead: it has not been trained by step 100"),
    ("vq", collapsed_codebook, "the codebook has collapsed: 1 of its 32 entries"),
    ("ldm", too_much_dropout, r"cond_dropout 0\.95 leaves the conditioning to 5 % of the items"),
    ("ldm", ignored_conditioning, "the model ignores its conditioning"),
    ("ldm", frozen_average, "the moving average was never updated in 100 steps"),
    ("ldm", counted_but_frozen_average, "the average is not updated, or lags far behind"),
]


@pytest.mark.parametrize(("name", "plant", "expected"), PLANTED, ids=[row[1].__name__ for row in PLANTED])
def test_planted_mistake_is_found(name, plant, expected, runs, doctor, tmp_path):
    run = runs[name].copied(tmp_path / "run")
    plant(run)
    findings = doctor(run)
    assert re.search(expected, findings[0]), findings
    assert all(";" in finding and "\n" not in finding for finding in findings), "each names a remedy in one line"


@pytest.mark.parametrize("name", ["kl", "ldm"])
def test_images_in_half_of_the_range_are_found(name, runs, doctor, tmp_path):
    run = runs[name].copied(tmp_path / "run")
    run.data["params"]["train"]["target"] = "trained_models.HalfRange"
    findings = doctor(run, "--allow-target", "trained_models")
    assert re.search(r"the images of the data lie in \[0, 1\] and the model expects \[-1, 1\]", findings[0]), findings


def test_random_first_stage_of_another_initialisation_is_found(runs, doctor, tmp_path):
    run = runs["ldm"].copied(tmp_path / "run")
    torch.manual_seed(1)
    stage = randomise(instantiate_from_config(run.model_config["params"]["first_stage_config"]))
    replace_part(run, "first_stage_model.", stage)
    assert re.search(r"reconstructs \d+ % of the variance .* as untrained weights do", doctor(run)[0])


def test_weights_that_are_not_finite_are_found(runs, doctor, tmp_path):
    run = runs["ldm"].copied(tmp_path / "run")
    for name in run.state:
        if "out.2.weight" in name or "out2weight" in name:
            run.state[name].fill_(float("nan"))
    findings = doctor(run)
    assert any("not finite" in finding for finding in findings), findings


def test_a_folder_of_images_is_the_data(runs, doctor, tmp_path):
    run = runs["kl"].copied(tmp_path / "run")
    images = run.data["params"]["train"]["params"]["data_root"]
    run.data = {}
    assert doctor(run, "--data", images) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], 'there is no model "nowhere"'),
        (["RUN", "--data", "nowhere.yaml"], 'there is no configuration "nowhere.yaml"'),
        (["RUN", "--base", "nowhere.yaml"], 'there is no configuration "nowhere.yaml"'),
        (["RUN", "-o", "nowhere/file.txt/sheet.png"], "--out"),
    ],
)
def test_invalid_input_is_an_error_of_one_line(words, message, runs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nowhere").mkdir(exist_ok=True) if "-o" in words else None
    if "-o" in words:
        (tmp_path / "nowhere" / "file.txt").write_text("")
    run = runs["kl"].copied(tmp_path / "run").save()
    assert main(["doctor", *(run if word == "RUN" else word for word in words), *FAST]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and message in errors[0]


def test_every_layer_of_a_trained_first_stage_differs_from_the_initial_one(runs):
    from ldm.diagnosis.checks import is_initial

    model = instantiate_from_config(runs["kl"].model_config)
    assert is_initial(model.encoder)
    model.load_state_dict(runs["kl"].state)
    assert not is_initial(model.encoder) and not is_initial(nn.Linear(2, 2))
