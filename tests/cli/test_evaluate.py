"""The command `evaluate`: its results, its protocol, comparison, tables, and errors."""

from __future__ import annotations

import json
import socket
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from feature_networks import TinyNetwork, WithoutLogits, random_images, write_images, write_network
from lpips_weights import write_lpips
from PIL import Image
from tiny_models import class_config, unconditional_config, write_model

from ldm.cli.main import main as ldm
from ldm.evaluation.network import load_network
from ldm.io.files import sha256


def evaluate(*words: object) -> int:
    return ldm(["evaluate", *map(str, words)])


def read(path: Path) -> dict:
    return json.loads(path.read_text())


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Run in a folder with a network, samples and a reference; cached references go there too."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LDM_HOME", str(tmp_path / "home"))
    write_network(tmp_path / "net.pt")
    write_images(tmp_path / "a", random_images(40, 1))
    write_images(tmp_path / "b", random_images(30, 2))
    np.savez(tmp_path / "b.npz", arr_0=random_images(30, 2))
    return tmp_path


FEATURES = ("--features", "net.pt", "--device", "cpu")
FID = ("--reference", "b", "--metrics", "fid", *FEATURES)
SMALL = (*FEATURES, "--kid-subset-size", 20, "--kid-subsets", 4)


def one_line(capsys) -> str:
    """Return the error, which is the last line on stderr."""
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and captured.err.endswith(f"{lines[0]}\n")
    return lines[0]


# -- samples -----------------------------------------------------------------------------------------------------


@pytest.fixture
def torch_fidelity_figures(folder):
    """Figures of torch-fidelity's own command for the two folders, with the same network."""
    from torch_fidelity import calculate_metrics, register_feature_extractor
    from torch_fidelity.feature_extractor_base import FeatureExtractorBase
    from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

    class Extractor(FeatureExtractorBase):
        def __init__(self, name, features_list, **kwargs):
            super().__init__(name, features_list)
            self.network = TinyNetwork()

        @staticmethod
        def get_provided_features_list():
            return "features", "logits"

        @staticmethod
        def get_default_feature_layer_for_metric(metric):
            return "logits" if metric == "isc" else "features"

        def forward(self, images):
            features, logits = self.network(images)
            return tuple({"features": features, "logits": logits}[name] for name in self.features_list)

    register_feature_extractor("tiny", Extractor)
    options = {"feature_extractor": "tiny", "cuda": False, "cache": False, "verbose": False}
    names = {"isc": True, "fid": True, "kid": True, "prc": True, "kid_subset_size": 20, "kid_subsets": 4}
    yield calculate_metrics(input1=str(folder / "a"), input2=str(folder / "b"), **options, **names)
    del FEATURE_EXTRACTORS_REGISTRY["tiny"]


def test_samples_have_the_figures_of_torch_fidelity(capsys, folder, torch_fidelity_figures):
    assert evaluate("samples", "a", "--reference", "b", *SMALL, "--json", "r.json", "--batch_size", 7) == 0
    expected = torch_fidelity_figures
    figures = read(folder / "r.json")["figures"][""]
    assert figures["fid"]["value"] == pytest.approx(expected["frechet_inception_distance"], abs=1e-6)
    assert figures["is"]["value"] == pytest.approx(expected["inception_score_mean"], abs=1e-6)
    assert figures["is"]["deviation"] == pytest.approx(expected["inception_score_std"], abs=1e-6)
    assert figures["kid"]["value"] == pytest.approx(expected["kernel_inception_distance_mean"], rel=1e-4)
    assert figures["precision"]["value"] == pytest.approx(expected["precision"], abs=1e-6)
    assert figures["recall"]["value"] == pytest.approx(expected["recall"], abs=1e-6)
    out = capsys.readouterr().out
    assert f"| a | {figures['fid']['value']:.2f} | {figures['kid']['value']:.4f} ± " in out
    assert out.endswith("result: r.json\n")


def test_protocol_of_samples(folder):
    assert evaluate("samples", "a", "--reference", "b", *SMALL, "--json", "r.json") == 0
    found = read(folder / "r.json")
    assert found["task"] == "samples"
    assert found["protocol"] == {
        "features": {"network": "TorchScript", "sha256": sha256(folder / "net.pt"), "resize": "none"},
        "metrics": {
            "kid": {"subsets": 4, "subset_size": 20, "seed": 2020},
            "is": {"splits": 10, "seed": 2020},
            "prc": {"neighbours": 3},
        },
        "images": 40,
        "size": "16 × 16",
        "preparation": "none",
        "reference": {
            "origin": "images",
            "preparation": "none",
            "images": 30,
            "sha256": found["protocol"]["reference"]["sha256"],
        },
        "most_features": 50_000,
    }
    assert found["sampling"] is None
    assert found["subject"]["samples"] == "a" and found["subject"]["reference"] == "b"


def test_folder_and_archive_of_equal_images_have_equal_protocols(capsys, folder):
    for name, reference in (("x", "b"), ("y", "b.npz")):
        assert evaluate("samples", "a", "--reference", reference, *SMALL, "--json", f"{name}.json") == 0
    first, second = read(folder / "x.json"), read(folder / "y.json")
    assert first["protocol"] == second["protocol"]
    assert first["figures"] == second["figures"]
    assert evaluate("compare", "x.json", "y.json") == 0


def test_reference_is_cached_below_the_download_folder(caplog, folder):
    for _ in range(2):
        assert evaluate("samples", "a", "--reference", "b", "--metrics", "fid", *FEATURES) == 0
    assert caplog.text.count("using the cached features") == 1
    caplog.clear()
    assert len(list((folder / "home/.cache/evaluation").iterdir())) == 1
    assert len(list((folder / "outputs/evaluation").iterdir())) == 2
    assert evaluate("samples", "a", "--reference", "b", "--metrics", "fid", *FEATURES, "--no-cache") == 0
    assert "using the cached features" not in caplog.text


def test_published_statistics_are_a_reference(folder):
    features = load_network(folder / "net.pt")(random_images(30, 2)).features.astype(np.float64)
    np.savez(folder / "stats.npz", mu=features.mean(axis=0), sigma=np.cov(features, rowvar=False))
    assert evaluate("samples", "a", "--reference", "b", "--metrics", "fid,is", *FEATURES, "--json", "x.json") == 0
    assert (
        evaluate("samples", "a", "--reference", "stats.npz", "--metrics", "fid,is", *FEATURES, "--json", "y.json") == 0
    )
    first, second = (read(folder / f"{name}.json") for name in "xy")
    assert first["figures"][""]["fid"]["value"] == pytest.approx(second["figures"][""]["fid"]["value"], abs=1e-5)
    assert second["protocol"]["reference"] == {
        "origin": "statistics",
        "preparation": "not stated",
        "images": None,
        "sha256": sha256(folder / "stats.npz"),
    }


def test_reference_of_a_training_configuration_uses_its_data_loader(folder):
    write_images(folder / "photos", random_images(12, 3, size=24))
    target = "ldm.data.folder.FolderValidation"
    (folder / "c.yaml").write_text(
        f"data:\n  params:\n    validation:\n      target: {target}\n      params: {{data_root: photos, size: 16}}\n"
    )
    words = ("--metrics", "fid", *FEATURES, "--json", "r.json")
    assert evaluate("samples", "a", "--reference-config", "c.yaml", "--split", "validation", *words) == 0
    reference = read(folder / "r.json")["protocol"]["reference"]
    assert reference["images"] == 12
    assert json.loads(reference["preparation"]) == {"target": target, "params": {"data_root": "photos", "size": 16}}


def test_is_needs_no_reference(folder):
    assert evaluate("samples", "a", "--metrics", "is", *FEATURES, "--json", "r.json") == 0
    found = read(folder / "r.json")
    assert list(found["figures"][""]) == ["is"] and found["protocol"]["reference"] is None


def test_kept_features_serve_the_interval_of_fid(capsys, folder):
    assert evaluate("samples", "a", "--reference", "b", *SMALL, "--json", "r.json", "--keep-features") == 0
    archive = np.load(folder / "r.features.npz")
    np.testing.assert_allclose(archive["features"], load_network("net.pt")(random_images(40, 1)).features, rtol=1e-4)
    capsys.readouterr()
    assert evaluate("compare", "r.json", "r.json", "--fid-resamples", 5) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("| FID"))
    assert " … " in row


# -- a model -----------------------------------------------------------------------------------------------------


def test_model_is_sampled_and_its_sampler_recorded(caplog, folder):
    write_model(folder / "tiny", class_config())
    model = ("--model", "tiny", "--n", 8, "--steps", 2, "--eta", 0.5, "--seed", 3, "--classes", "1", "2")
    words = (*model, *FID)
    assert evaluate("samples", *words, "--json", "r.json") == 0
    found = read(folder / "r.json")
    assert found["name"] == "tiny"
    assert found["sampling"] == {
        "sampler": "ddim",
        "steps": 2,
        "eta": 0.5,
        "timestep_spacing": None,
        "vanilla_sample": False,
        "guidance": 1.0,
        "classes": ["1", "2"],
        "precision": "float32",
        "weights": "as stored",
    }
    assert found["subject"]["model"]["weights_sha256"] == sha256(folder / "tiny/model.ckpt")
    assert found["subject"]["model"]["seed"] == 3
    assert found["protocol"]["images"] == 8
    (images,) = (folder / "outputs/evaluation/samples").glob("*/tiny/samples/*/*/img")
    before = {path.name: path.stat().st_mtime_ns for path in images.iterdir()}
    (images / "sample_000005.png").unlink()
    assert evaluate("samples", *words, "--json", "again.json") == 0
    assert "continuing the samples in" in caplog.text
    after = {path.name: path.stat().st_mtime_ns for path in images.iterdir()}
    assert {name for name in before if before[name] != after[name]} == {"sample_000005.png"}
    assert read(folder / "again.json")["figures"] == found["figures"]


def test_folder_of_sample_diffusion_states_its_sampler(folder):
    write_model(folder / "tiny", unconditional_config(use_ema=True))
    run = ["sample_diffusion", "-r", "tiny", "-l", "out", "-n", "8", "-c", "2", "--seed", "1", "--device", "cpu"]
    assert ldm(run) == 0
    (samples,) = (folder / "out").glob("tiny/samples/*/*")
    (archive,) = samples.glob("numpy/*.npz")
    for number, path in enumerate((samples, archive)):
        assert (
            evaluate("samples", path, "--reference", "b", "--metrics", "fid", *FEATURES, "--json", f"{number}.json")
            == 0
        )
    first, second = read(folder / "0.json"), read(folder / "1.json")
    assert first["sampling"] == second["sampling"]
    assert first["sampling"]["weights"] == "moving averages" and first["sampling"]["eta"] == 1.0
    assert first["figures"] == second["figures"]


# -- pairs -------------------------------------------------------------------------------------------------------


def test_reconstructions_of_a_first_stage(capsys, folder):
    write_model(folder / "tiny")
    lpips = ("--lpips-weights", write_lpips(folder / "lpips.safetensors"))
    words = ("--model", "tiny", *FEATURES, *lpips, "--json", "r.json", "--batch_size", 16)
    assert evaluate("reconstructions", "a", *words) == 0
    found = read(folder / "r.json")
    assert list(found["figures"][""]) == ["rfid", "psnr", "ssim", "lpips"]
    assert {name: len(values) for name, values in found["per_image"][""].items()} == dict.fromkeys(
        ("psnr", "ssim", "lpips"), 40
    )
    assert found["figures"][""]["psnr"]["value"] == pytest.approx(np.mean(found["per_image"][""]["psnr"]))
    assert len(found["extra"]["latents"]["mean"]) == 3 and found["extra"]["codebook"] is None
    assert found["subject"]["weights_sha256"] == sha256(folder / "tiny/model.ckpt")
    out = capsys.readouterr().out
    factor = found["extra"]["latents"]["scale_factor"]
    assert f"scale factor that makes their deviation 1: {factor:.5f}" in out
    assert "| tiny |" in out


def test_reconstructions_without_fid_need_no_network(folder):
    write_model(folder / "tiny")
    words = ("--model", "tiny", "--device", "cpu", "--no-fid", "--no-lpips", "--json", "r.json", "--n", 3)
    assert evaluate("reconstructions", "b.npz", *words) == 0
    found = read(folder / "r.json")
    assert list(found["figures"][""]) == ["psnr", "ssim"]
    assert found["protocol"]["features"] is None and found["protocol"]["images"] == 3
    assert len(found["protocol"]["originals"]["sha256"]) == 64


@pytest.fixture
def restored(folder):
    (folder / "masks").mkdir()
    for number, image in enumerate(random_images(40, 1)):
        mask = np.zeros((16, 16), np.uint8)
        mask[:, :7] = 255
        Image.fromarray(mask).save(folder / "masks" / f"{number:03}.png")
        (folder / "small").mkdir(exist_ok=True)
        Image.fromarray(image).resize((8, 8)).save(folder / "small" / f"{number:03}.png")
    return write_images(folder / "restored", np.clip(random_images(40, 1).astype(int) + 5, 0, 255).astype(np.uint8))


def test_restorations_of_both_kinds(capsys, folder, restored):
    common = ("restored", "a", *FEATURES)
    lpips = ("--lpips-weights", write_lpips(folder / "lpips.safetensors"))
    assert evaluate("restorations", *common, "--masks", "masks", *lpips, "--json", "i.json") == 0
    found = read(folder / "i.json")
    assert list(found["figures"]) == ["", "Telea", "identity"]
    assert {"fid", "lpips", "fid_40_50", "lpips_40_50"} <= {*found["figures"][""]}
    assert evaluate("restorations", *common, "--small", "small", "--no-lpips", "--json", "s.json") == 0
    found = read(folder / "s.json")
    assert list(found["figures"]) == ["", "bicubic", "identity"]
    assert {*found["figures"][""]} == {"fid", "is", "psnr", "ssim"}
    capsys.readouterr()
    assert evaluate("table", "i.json", "s.json", "--output", "t.md") == 0
    out = capsys.readouterr().out
    assert (folder / "t.md").read_text() == out
    assert "### In-painting" in out and "### Super-resolution" in out
    assert (
        "| LaMa | Places 512 |" in out
        and "| SR3 | ImageNet 64 to 256 |" in out
        and "| **restored** | a, 40 images" in out
    )


# -- comparison --------------------------------------------------------------------------------------------------


def test_comparison_refuses_other_protocols_unless_forced(capsys, folder):
    for name, words in (("x", ()), ("y", ("--n", 35))):
        assert (
            evaluate(
                "samples", "a", "--reference", "b", "--metrics", "fid", *FEATURES, *words, "--json", f"{name}.json"
            )
            == 0
        )
    capsys.readouterr()
    assert evaluate("compare", "x.json", "y.json") == 2
    message = one_line(capsys)
    assert message.startswith(
        'error: "x.json" and "y.json" were made in different ways: images: 40 and 35; evaluate both'
    )
    assert evaluate("compare", "x.json", "y.json", "--force") == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "different protocol: images: 40 and 35"
    assert out[3].startswith("| FID |")


# -- errors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("samples",), "give either SAMPLES, or a model with --model"),
        (("samples", "a", "--model", "x"), "give either SAMPLES, or a model with --model"),
        (("samples", "--model", "x"), "--model needs --n"),
        (("samples", "a"), "FID, KID, precision and recall need --reference or --reference-config"),
        (
            ("samples", "a", "--reference", "b", "--reference-config", "c"),
            "give either --reference or --reference-config",
        ),
        (("samples", "a", "--reference", "b", "--metrics", "fdi"), 'there is no metric "fdi" (did you mean "fid"?)'),
        (("samples", "a", "--reference", "nothing", *FEATURES), '"nothing" is neither a folder of images nor an NPZ'),
        (("samples", "a", "--reference", "b", "--features", "nothing"), 'there is no file "nothing"; check --features'),
        (("samples", "a", "--reference", "b", *FEATURES), "KID uses subsets of 1000 images"),
        (("samples", "a", "--reference", "b", *FEATURES, "--json", "a"), '--json "a" is a folder; name a file'),
        (
            ("samples", "a", "--reference", "b.npz", *FEATURES, "--n", "3", "--metrics", "fid"),
            "FID needs more images than the 6 features",
        ),
        (("samples", "--model", "x", "--n", "3", "--reference", "b", *FEATURES), "FID needs more images than the 6"),
        (("reconstructions", "a", "--no-fid"), "name the first stage with --model"),
        (("reconstructions", "--model", "x"), "give either IMAGES or --data"),
        (("restorations", "a", "nothing"), 'there is no folder "nothing"'),
        (("restorations", "a", "b", "--masks", "b", "--small", "b"), "not allowed with argument"),
        (("compare", "a.json", "b.json"), 'there is no file "a.json"; check the path'),
        (("table", "net.pt"), '"net.pt" is not a result of ldm evaluate'),
        ((), "the following arguments are required: TASK"),
    ],
)
def test_mistakes_are_one_line(capsys, words, message):
    try:
        status = evaluate(*words)
    except SystemExit as end:
        status = end.code
    assert status == 2
    assert message in one_line(capsys)


@pytest.mark.parametrize("kind", ["grey", "deep", "size", "empty", "resolution", "corrupt", "nan"])
def test_bad_input_is_one_line(capsys, folder, kind):
    words = ["samples", "a", "--reference", "b", *SMALL]
    expected = {
        "grey": 'the image "a/zz.png" is grey; convert it to RGB, or use --size',
        "deep": 'the image "a/zz.png" has 16 or 32 bits; convert it to RGB with 8 bits, or use --size',
        "size": 'the images of "a" have different sizes: 16 × 16 (000.png) and 20 × 20 (zz.png)',
        "empty": 'there is no image in "empty"',
        "resolution": '"a" has images of 16 × 16 and "c" of 20 × 20; figures of different sizes cannot be compared',
        "corrupt": 'cannot read the archive "b.npz"',
        "nan": "the feature network returns values that are not finite; check --features",
    }
    if kind in ("grey", "deep", "size"):
        pixels = {"grey": np.zeros((16, 16), np.uint8), "deep": np.zeros((16, 16), np.uint16)}
        Image.fromarray(pixels.get(kind, np.zeros((20, 20, 3), np.uint8))).save(folder / "a/zz.png")
    elif kind == "empty":
        (folder / "empty").mkdir()
        words[1] = "empty"
    elif kind == "resolution":
        write_images(folder / "c", random_images(30, size=20))
        words[3] = "c"
    elif kind == "corrupt":
        (folder / "b.npz").write_bytes((folder / "b.npz").read_bytes()[:3000])
        words[3] = "b.npz"
    else:
        module = WithoutLogits()
        module.first[0, 0, 0, 0] = torch.nan
        write_network(folder / "net.pt", module)
    assert evaluate(*words) == 2
    assert expected[kind] in one_line(capsys)
    assert not (folder / "outputs").exists()


def test_few_images_are_computed_on_request(folder):
    words = ("samples", "a", "--n", 4, "--reference", "b", "--metrics", "fid", *FEATURES, "--json", "r.json")
    assert evaluate(*words) == 2
    assert evaluate(*words, "--allow-few") == 0
    assert read(folder / "r.json")["figures"][""]["fid"]["value"] > 0


def test_network_that_is_not_there_is_named_offline(capsys, folder, monkeypatch):
    def no_network(*args, **kwargs):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setenv("TORCH_HOME", str(folder / "torch"))
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    assert evaluate("samples", "a", "--reference", "b", "--device", "cpu") == 2
    message = one_line(capsys)
    assert "weights-inception-2015-12-05-6726825d.pth cannot be downloaded" in message
    assert message.endswith("name a copy of the file with --features")


def test_help_shows_the_options_of_every_task(capsys):
    with pytest.raises(SystemExit):
        ldm(["evaluate", "--help"])
    out = capsys.readouterr().out
    for option in ("--reference-config", "--lpips-weights", "--masks", "--force", "--output"):
        assert option in out


def test_the_script_runs_the_command(load_script, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["evaluate.py"])
    assert load_script("evaluate").main(["compare", "a.json", "b.json"]) == 2
    assert 'there is no file "a.json"' in capsys.readouterr().err
