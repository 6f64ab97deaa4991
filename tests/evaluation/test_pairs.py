"""Scores of pairs, reconstructions and restorations."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from feature_networks import FEATURES, random_images, write_images, write_network
from lpips_weights import random_lpips, write_lpips
from PIL import Image
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from ldm.config.instantiate import instantiate_from_config
from ldm.errors import UserError
from ldm.evaluation.image_sets import ImageFolder
from ldm.evaluation.moments import ChannelMoments
from ldm.evaluation.network import load_network
from ldm.evaluation.pairs import PairScores, as_tensor, load_lpips, lpips_protocol
from ldm.evaluation.reconstructions import CodebookUse, evaluate_first_stage, reconstruct_batch
from ldm.evaluation.restorations import blacken, enlarge, evaluate_restorations, fill_by_telea, find_items, read_mask
from ldm.evaluation.scores import Settings
from ldm.io.pixels import to_uint8
from ldm.modules.losses import lpips as lpips_module

DDCONFIG = {
    "z_channels": 3,
    "resolution": 16,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 32,
    "ch_mult": [1, 1],
    "num_res_blocks": 1,
    "attn_resolutions": [],
    "dropout": 0.0,
}
LOSS = {"target": "torch.nn.Identity"}


@pytest.fixture
def network(tmp_path):
    return load_network(write_network(tmp_path / "network.pt"))


def stage_of(target: str, **params):
    torch.manual_seed(0)
    ddconfig = {**DDCONFIG, "double_z": target.endswith("KL")}
    config = {
        "target": f"ldm.models.autoencoder.{target}",
        "params": {"lossconfig": LOSS, "ddconfig": ddconfig, **params},
    }
    return instantiate_from_config(config).eval()


# -- pairs -------------------------------------------------------------------------------------------------------


def test_scores_are_those_of_torchmetrics_for_each_image():
    originals, results = as_tensor(random_images(3, 0, 24)), as_tensor(random_images(3, 1, 24))
    scores = PairScores(None)
    scores.add(originals[:2], results[:2])
    scores.add(originals[2:], results[2:])
    for i in range(3):
        pair = results[i : i + 1], originals[i : i + 1]
        assert scores.values["psnr"][i] == pytest.approx(
            float(peak_signal_noise_ratio(*pair, data_range=2.0)), abs=1e-5
        )
        similarity = float(structural_similarity_index_measure(*pair, data_range=2.0))
        assert scores.values["ssim"][i] == pytest.approx(similarity, abs=1e-6)
    figures = scores.figures()
    assert figures["psnr"].value == pytest.approx(np.mean(scores.values["psnr"]))
    assert figures["psnr"].deviation == pytest.approx(np.std(scores.values["psnr"]))
    assert scores.figures(np.array([False, True, False]))["ssim"].value == pytest.approx(scores.values["ssim"][1])
    assert scores.figures(np.zeros(3, bool)) == {}


def test_lpips_is_that_of_the_network_for_each_pair():
    """Its agreement with torchmetrics is tested in tests/modules/test_losses.py."""
    network = random_lpips()
    originals, results = as_tensor(random_images(3, 0, 32)), as_tensor(random_images(3, 1, 32))
    scores = PairScores(network)
    scores.add(originals, results)
    with torch.inference_mode():
        expected = [float(network(originals[i : i + 1], results[i : i + 1])) for i in range(3)]
    assert scores.values["lpips"] == pytest.approx(expected, abs=1e-6)
    assert min(expected) > 0.01


def test_equal_images_have_the_largest_psnr():
    images = as_tensor(random_images(2))
    scores = PairScores(None)
    scores.add(images, images)
    assert scores.values == {"psnr": [100.0, 100.0], "ssim": pytest.approx([1.0, 1.0])}


def test_small_images_and_values_that_are_not_finite_raise_user_error():
    images = as_tensor(random_images(1, size=12))
    with pytest.raises(UserError, match="need images of at least 16 px; enlarge them with --size"):
        PairScores(None).add(images, images)
    images = as_tensor(random_images(1))
    with pytest.raises(UserError, match="have values that are not finite"):
        PairScores(None).add(images, images * float("nan"))


def test_lpips_weights_are_read_from_files(tmp_path):
    expected = lpips_protocol(load_lpips(write_lpips(tmp_path / "lpips.safetensors")))
    for form in ("vgg16", "checkpoint"):
        assert lpips_protocol(load_lpips(write_lpips(tmp_path / f"{form}.ckpt", form))) == expected
    torch.save({"fc.weight": torch.zeros(1)}, tmp_path / "other.ckpt")
    with pytest.raises(UserError, match=r"neither the weights of VGG16 nor of LPIPS: .* check --lpips-weights"):
        load_lpips(tmp_path / "other.ckpt")


def test_missing_lpips_weights_name_the_options(monkeypatch):
    def unavailable():
        raise lpips_module._unavailable("no network")

    monkeypatch.setattr(lpips_module, "_torchvision_weights", unavailable)
    with pytest.raises(UserError, match=r"no network, or name its weights with --lpips-weights, or use --no-lpips$"):
        load_lpips()


# -- reconstructions ---------------------------------------------------------------------------------------------


def test_reconstruction_of_kl_is_that_of_the_mode():
    stage = stage_of("AutoencoderKL", embed_dim=3)
    images = as_tensor(random_images(2))
    with torch.inference_mode():
        posterior = stage.encode(images)
        expected = stage.decode(posterior.mode()).clamp(-1, 1)
    found = reconstruct_batch(stage, images)
    torch.testing.assert_close(found.images, expected)
    torch.testing.assert_close(found.latents, posterior.mean)
    torch.testing.assert_close(found.variances, posterior.var)
    assert found.indices is None


@pytest.mark.parametrize("target", ["VQModel", "VQModelInterface"])
def test_reconstruction_of_vq_is_that_of_the_model(target):
    stage = stage_of(target, embed_dim=3, n_embed=16)
    images = as_tensor(random_images(2))
    with torch.inference_mode():
        expected, _, indices = stage(images, return_pred_indices=True)
    found = reconstruct_batch(stage, images)
    torch.testing.assert_close(found.images, expected.clamp(-1, 1))
    torch.testing.assert_close(found.indices, indices)
    torch.testing.assert_close(found.latents, stage.encode_to_prequant(images))


def test_first_stage_is_measured(tmp_path, network):
    stage = stage_of("AutoencoderKL", embed_dim=3)
    images = random_images(9)
    found = evaluate_first_stage(stage, ImageFolder(write_images(tmp_path / "f", images)), network, None, 4, 100, False)
    assert found.names == [f"{i:03}.png" for i in range(9)]
    assert (found.size, found.codebook) == ("16 × 16", None)
    results = to_uint8(reconstruct_batch(stage, as_tensor(images)).images)
    np.testing.assert_allclose(found.features[0].gaussian.mu, network(images).features.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(found.features[1].features, network(results).features, rtol=1e-3, atol=1e-3)
    assert found.features[1].dimension == FEATURES
    assert len(found.pairs.values["psnr"]) == 9


def test_scale_factor_makes_the_deviation_of_sampled_latents_one(tmp_path):
    stage = stage_of("AutoencoderKL", embed_dim=3)
    images = random_images(60, size=32)
    found = evaluate_first_stage(stage, ImageFolder(write_images(tmp_path, images)), None, None, 7, progress=False)
    with torch.inference_mode():
        posterior = stage.encode(as_tensor(images))
        torch.manual_seed(0)
        samples = posterior.sample()
    assert found.latents["mean"] == pytest.approx(posterior.mean.mean(dim=(0, 2, 3)).tolist(), abs=1e-5)
    assert found.latents["deviation"] == pytest.approx(samples.std(dim=(0, 2, 3)).tolist(), rel=0.01)
    assert float(samples.std()) * found.latents["scale_factor"] == pytest.approx(1.0, rel=0.01)


def test_moments_of_channels_are_those_of_numpy():
    latents = np.random.default_rng(0).normal(size=(9, 3, 4, 4)) * np.array([1.0, 2.0, 3.0])[:, None, None] + 5.0
    moments = ChannelMoments()
    for start in range(0, 9, 2):
        moments.add(latents[start : start + 2])
    np.testing.assert_allclose(moments.mean(), latents.mean(axis=(0, 2, 3)))
    np.testing.assert_allclose(moments.deviation(), latents.std(axis=(0, 2, 3)))
    assert moments.total_deviation() == pytest.approx(latents.std())


def test_use_of_a_codebook():
    use = CodebookUse(8)
    use.add(torch.tensor([[0, 1], [2, 3]]))
    assert use.findings() == {"entries": 8, "used": 4, "share": 0.5, "perplexity": pytest.approx(4.0)}
    use = CodebookUse(8)
    use.add(torch.full((10,), 7))
    assert use.findings() == {"entries": 8, "used": 1, "share": 0.125, "perplexity": pytest.approx(1.0)}


def test_sides_that_a_first_stage_cannot_halve_raise_user_error(tmp_path):
    stage = stage_of("AutoencoderKL", embed_dim=3)
    folder = write_images(tmp_path, random_images(1, size=17))
    with pytest.raises(UserError, match="multiples of 2, not 17 × 17; use --size"):
        evaluate_first_stage(stage, ImageFolder(folder), None, None, 4, progress=False)


# -- restorations ------------------------------------------------------------------------------------------------


@pytest.fixture
def folders(tmp_path):
    """Originals, results, masks of 25 % and 44 %, and small images."""
    originals = random_images(20)
    results = np.clip(originals.astype(int) + 4, 0, 255).astype(np.uint8)
    write_images(tmp_path / "originals", originals)
    write_images(tmp_path / "results", results)
    (tmp_path / "masks").mkdir()
    (tmp_path / "small").mkdir()
    for i in range(20):
        mask = np.zeros((16, 16), np.uint8)
        mask[:, : 4 if i < 10 else 7] = 255
        Image.fromarray(mask).save(tmp_path / "masks" / f"{i:03}_mask.png")
        Image.fromarray(originals[i]).resize((8, 8)).save(tmp_path / "small" / f"{i:03}.png")
    return tmp_path


def test_inpainting_is_measured_for_all_and_for_hard_masks(folders, network):
    items = find_items(folders / "results", folders / "originals", folders / "masks")
    settings = Settings(("fid",), allow_few=True)
    found = evaluate_restorations(items, network, random_lpips(), 6, settings, progress=False)
    assert list(found.figures) == ["", "Telea", "identity"]
    assert found.shares == [0.25] * 10 + [0.4375] * 10
    own = found.figures[""]
    assert own["lpips_40_50"].value == pytest.approx(np.mean(found.per_image[""]["lpips"][10:]))
    assert own["lpips"].value == pytest.approx(np.mean(found.per_image[""]["lpips"]))
    assert found.figures["identity"]["fid"].value > own["fid"].value
    assert found.figures["identity"]["psnr"].value < found.figures["Telea"]["psnr"].value < own["psnr"].value
    originals, results = random_images(20), np.clip(random_images(20).astype(int) + 4, 0, 255).astype(np.uint8)
    pairs = [network(each[10:]).features.astype(float) for each in (results, originals)]
    mean = pairs[0].mean(axis=0) - pairs[1].mean(axis=0)
    assert own["fid_40_50"].value >= float(mean @ mean) - 1e-6


def test_fid_of_few_hard_masks_is_left_out(folders, network):
    for path in sorted((folders / "masks").iterdir())[14:]:
        Image.fromarray(np.zeros((16, 16), np.uint8)).save(path)
    items = find_items(folders / "results", folders / "originals", folders / "masks")
    found = evaluate_restorations(items, network, None, 6, Settings(("fid",)), progress=False)
    assert "fid" in found.figures[""] and "fid_40_50" not in found.figures[""]


def test_super_resolution_is_measured_beside_bicubic(folders, network):
    items = find_items(folders / "results", folders / "originals", small=folders / "small")
    found = evaluate_restorations(items, network, None, 6, Settings(("fid", "is"), splits=2), progress=False)
    assert list(found.figures) == ["", "bicubic", "identity"]
    assert list(found.figures[""]) == ["fid", "is", "psnr", "ssim"]
    assert found.shares == []
    assert found.figures[""]["psnr"].value == pytest.approx(20 * np.log10(255 / 4), abs=0.2)


def test_restorations_of_one_kind_have_no_baselines(folders):
    items = find_items(folders / "results", folders / "originals")
    found = evaluate_restorations(items, None, None, 6, Settings(()), progress=False)
    assert list(found.figures) == [""]
    assert list(found.figures[""]) == ["psnr", "ssim"]


def test_simple_methods():
    image = np.full((16, 16, 3), 200, np.uint8)
    mask = np.zeros((16, 16), bool)
    mask[4:8, 4:8] = True
    filled = fill_by_telea(np.where(mask[..., None], np.uint8(0), image), mask)
    assert np.abs(filled.astype(int) - 200).max() <= 2
    assert (filled[~mask] == 200).all()
    assert (blacken(image, mask)[mask] == 0).all() and (blacken(image, mask)[~mask] == 200).all()
    small = random_images(1, size=8)[0]
    np.testing.assert_array_equal(enlarge(small, 16, 16, "nearest"), small.repeat(2, axis=0).repeat(2, axis=1))
    assert enlarge(small, 16, 24, "bicubic").shape == (16, 24, 3)


def test_missing_partners_raise_user_error(folders):
    (folders / "originals/003.png").unlink()
    with pytest.raises(UserError, match=r'originals" has no original for 1 of 20 results, such as "003"; give files'):
        find_items(folders / "results", folders / "originals")
    (folders / "masks/004_mask.png").unlink()
    (folders / "results/003.png").unlink()
    with pytest.raises(UserError, match=r'masks" has no mask for 1 of 19 results, such as "004"'):
        find_items(folders / "results", folders / "originals", folders / "masks")


def test_two_images_of_one_name_raise_user_error(folders):
    Image.new("RGB", (16, 16)).save(folders / "results/003.jpg")
    with pytest.raises(UserError, match='has two images called "003"'):
        find_items(folders / "results", folders / "originals")


def test_other_sizes_raise_user_error(folders):
    Image.new("RGB", (16, 20)).save(folders / "results/003.png")
    items = find_items(folders / "results", folders / "originals")
    with pytest.raises(UserError, match=r'003.png" is 16 × 20, others are 16 × 16; give images of one size'):
        evaluate_restorations(items, None, None, 6, Settings(()), progress=False)
    with pytest.raises(UserError, match=r"is 16 × 16, its image 8 × 8; give equal sizes"):
        read_mask(folders / "masks/000_mask.png", (8, 8, 3))
