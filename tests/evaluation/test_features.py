"""Feature networks, streamed features, and cached references."""

from __future__ import annotations

import logging
import tracemalloc

import numpy as np
import pytest
import torch
from feature_networks import (
    FEATURES,
    LOGITS,
    NotANumber,
    TinyNetwork,
    WithoutLogits,
    random_images,
    write_images,
    write_network,
)
from torch import nn

from ldm.errors import UserError
from ldm.evaluation import features as features_module
from ldm.evaluation import network as networks
from ldm.evaluation.features import check_sizes, collect, kept_indices
from ldm.evaluation.image_sets import ImageArchive, ImageFolder
from ldm.evaluation.network import load_network
from ldm.evaluation.reference import cached_features, read_reference
from ldm.io.files import sha256


@pytest.fixture
def network(tmp_path):
    return load_network(write_network(tmp_path / "network.pt"))


@pytest.fixture
def archive(tmp_path):
    np.savez(tmp_path / "images.npz", arr_0=random_images(11))
    return ImageArchive(tmp_path / "images.npz")


def expected(images):
    with torch.inference_mode():
        return [each.numpy() for each in TinyNetwork()(torch.from_numpy(images).permute(0, 3, 1, 2))]


def test_script_returns_features_and_logits(tmp_path, network):
    images = random_images(3)
    found = network(images)
    np.testing.assert_allclose(found.features, expected(images)[0], rtol=1e-5)
    np.testing.assert_allclose(found.logits, expected(images)[1], rtol=1e-5, atol=1e-5)
    assert network.dimension == FEATURES
    assert network.protocol() == {
        "network": "TorchScript",
        "sha256": sha256(tmp_path / "network.pt"),
        "resize": "none",
    }


@pytest.mark.parametrize("batch_size", [1, 4, 11])
def test_streamed_features_are_those_of_all_images(archive, network, batch_size):
    images = random_images(11)
    features, logits = expected(images)
    found = collect(archive, network, batch_size, most_kept=100, keep_logits=True, progress=False)
    assert (found.count, found.size, found.dimension) == (11, "16 × 16", FEATURES)
    np.testing.assert_allclose(found.gaussian.sigma, np.cov(features.astype(float), rowvar=False), rtol=1e-4, atol=1e-8)
    np.testing.assert_allclose(found.features, features, rtol=1e-5)
    np.testing.assert_allclose(found.logits, logits, rtol=1e-5, atol=1e-5)
    assert found.logits.shape == (11, LOGITS)


def test_features_of_evenly_spaced_images_are_kept(archive, network):
    assert kept_indices(11, 3).tolist() == [0, 5, 10]
    assert kept_indices(2, 3).tolist() == [0, 1]
    found = collect(archive, network, 4, most_kept=3, progress=False)
    np.testing.assert_allclose(found.features, expected(random_images(11))[0][[0, 5, 10]], rtol=1e-5)
    assert found.gaussian.count == 11


def test_nothing_is_kept_for_fid(archive, network):
    found = collect(archive, network, 4, progress=False)
    assert found.features is None and found.logits is None


class Interrupted(Exception):
    """Interruption of a computation."""


@pytest.mark.parametrize("stop", [3, 4, 9, 10])
def test_interrupted_computation_goes_on_and_has_the_same_result(tmp_path, archive, network, monkeypatch, caplog, stop):
    monkeypatch.setattr(features_module, "PART", 4)
    options = {"most_kept": 5, "keep_logits": True, "progress": False}
    whole = collect(archive, network, 3, **options)
    computed = []

    def interrupted(images):
        computed.append(len(images))
        if sum(computed) > stop:
            raise Interrupted
        return network(images)

    with pytest.raises(Interrupted):
        collect(archive, interrupted, 3, folder=tmp_path / "parts", **options)
    assert len(list((tmp_path / "parts").glob("*"))) == stop // 4
    computed.clear()
    with caplog.at_level(logging.INFO, "ldm"):
        found = collect(archive, counting(network, computed), 3, folder=tmp_path / "parts", **options)
    assert sum(computed) == 11 - 4 * (stop // 4)
    assert ("going on after" in caplog.text) == (stop >= 4)
    assert not (tmp_path / "parts").exists()
    assert (found.count, found.size, found.digest) == (whole.count, whole.size, whole.digest)
    np.testing.assert_allclose(found.gaussian.sigma, whole.gaussian.sigma, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(found.features, whole.features, rtol=1e-6)
    np.testing.assert_allclose(found.logits, whole.logits, rtol=1e-5, atol=1e-5)


def counting(network, computed):
    """Return a network that counts its images."""

    def run(images):
        computed.append(len(images))
        return network(images)

    return run


def test_damaged_part_is_computed_again(tmp_path, archive, network, monkeypatch):
    monkeypatch.setattr(features_module, "PART", 4)
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts/0.npz").write_bytes(b"damaged")
    found = collect(archive, network, 3, progress=False, folder=tmp_path / "parts")
    assert found.digest == collect(archive, network, 11, progress=False).digest
    assert not (tmp_path / "parts").exists()


def test_memory_does_not_grow_with_the_number_of_images(tmp_path, network):
    peaks = []
    for count in (300, 3000):
        np.savez(tmp_path / "x.npz", arr_0=np.zeros((count, 16, 16, 3), np.uint8))
        tracemalloc.start()
        collect(ImageArchive(tmp_path / "x.npz"), network, 50, keep_logits=True, progress=False)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] - peaks[0] < 3000 * 150  # a digest of 32 bytes for each image, with the overhead of Python


def test_digest_depends_on_pixels_alone(tmp_path, archive, network):
    folder = ImageFolder(write_images(tmp_path / "f", random_images(11)))
    other = ImageFolder(write_images(tmp_path / "g", random_images(11, seed=1)))
    first, second, third = (collect(each, network, 4, progress=False).digest for each in (archive, folder, other))
    assert first == second != third


def test_values_that_are_not_finite_raise_user_error(tmp_path, archive):
    network = load_network(write_network(tmp_path / "nan.pt", NotANumber()))
    with pytest.raises(UserError, match="returns values that are not finite; check --features"):
        collect(archive, network, 4, progress=False)


def test_network_without_logits_has_no_inception_score(tmp_path, archive):
    network = load_network(write_network(tmp_path / "x.pt", WithoutLogits()))
    assert collect(archive, network, 4, progress=False).dimension == FEATURES
    with pytest.raises(UserError, match="IS needs logits, which the module of --features does not return"):
        collect(archive, network, 4, keep_logits=True, progress=False)


class Maps(nn.Module):
    """Module that returns maps instead of features."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.float()


class TooSmall(nn.Module):
    """Module that fails for images."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.float().view(1, 5)


def test_other_modules_raise_user_error(tmp_path, archive):
    for module, message in ((Maps(), r"must map \(B, 3, H, W\) uint8 to features"), (TooSmall(), "fails for a batch")):
        with pytest.raises(UserError, match=message) as caught:
            collect(archive, load_network(write_network(tmp_path / "x.pt", module)), 4, progress=False)
        assert "\n" not in str(caught.value)


def test_damaged_and_foreign_files_raise_user_error(tmp_path):
    with pytest.raises(UserError, match=r'there is no file ".*nothing.pt"; check --features'):
        load_network(tmp_path / "nothing.pt")
    (tmp_path / "text.pt").write_text("no weights")
    with pytest.raises(UserError):
        load_network(tmp_path / "text.pt")
    torch.save({"fc.weight": torch.zeros(3, 3)}, tmp_path / "other.pt")
    with pytest.raises(UserError, match=r"has no weights of torch-fidelity's Inception-v3 \(Missing key"):
        load_network(tmp_path / "other.pt")
    content = write_network(tmp_path / "cut.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError):
        load_network(tmp_path / "cut.pt")


def test_weights_that_cannot_be_downloaded_are_named_in_one_line(tmp_path, monkeypatch):
    def fetch(url, path, label):
        raise UserError(f"{url}: there is no such server, or no network; check the connection")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(networks.download, "fetch", fetch)
    with pytest.raises(
        UserError, match=r"6726825d.pth cannot be downloaded \(there is no such server.*--features$"
    ) as e:
        load_network()
    assert "\n" not in str(e.value)


def test_damaged_download_raises_user_error(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    path = tmp_path / "hub/checkpoints/weights-inception-2015-12-05-6726825d.pth"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"half")
    with pytest.raises(UserError, match="is damaged: its SHA-256 does not begin with 6726825d; delete it"):
        load_network()


def test_missing_package_names_the_extra(monkeypatch):
    message = r'"torch-fidelity" computes the metrics and is not installed; .*\[evaluation\]'
    monkeypatch.setattr("ldm.evaluation.libraries.find_spec", lambda name: None)
    with pytest.raises(UserError, match=message):
        load_network()


def test_sets_of_other_sizes_raise_user_error():
    check_sizes([("a", "8 × 8"), ("b", None), ("c", "8 × 8")])
    with pytest.raises(UserError, match="a has images of 8 × 8 and b of 9 × 8; figures of different sizes"):
        check_sizes([("a", "8 × 8"), ("b", "9 × 8")])


# -- references --------------------------------------------------------------------------------------------------


def test_cached_features_are_equal_and_read_no_image(tmp_path, archive, network, monkeypatch, caplog):
    first = cached_features(archive, network, 4, 100, tmp_path / "cache", progress=False)
    monkeypatch.setattr(ImageArchive, "images", None)
    with caplog.at_level(logging.INFO, "ldm"):
        second = cached_features(archive, network, 4, 100, tmp_path / "cache", progress=False)
    assert "using the cached features of" in caplog.text
    np.testing.assert_array_equal(first.gaussian.sigma, second.gaussian.sigma)
    np.testing.assert_array_equal(first.features, second.features)
    assert (first.count, first.size, first.digest) == (second.count, second.size, second.digest)


def test_cache_has_a_file_for_each_network_and_preparation(tmp_path, network):
    folder = write_images(tmp_path / "f", random_images(5))
    other = load_network(write_network(tmp_path / "other.pt", TinyNetwork(seed=1)))
    for images, each in (
        (ImageFolder(folder), network),
        (ImageFolder(folder), other),
        (ImageFolder(folder, 8), network),
    ):
        cached_features(images, each, 4, 0, tmp_path / "cache", progress=False)
    assert len(list((tmp_path / "cache").iterdir())) == 3


def test_damaged_cache_is_computed_again(tmp_path, archive, network, caplog):
    first = cached_features(archive, network, 4, 0, tmp_path / "cache", progress=False)
    (path,) = (tmp_path / "cache").iterdir()
    path.write_bytes(b"damaged")
    second = cached_features(archive, network, 4, 0, tmp_path / "cache", progress=False)
    assert "the cached ones are damaged" in caplog.text
    np.testing.assert_array_equal(first.gaussian.mu, second.gaussian.mu)
    assert len(path.read_bytes()) > 100


def test_statistics_of_adm_have_images_too(tmp_path, network):
    images = random_images(9)
    mu, sigma = np.arange(6.0), np.eye(6)
    np.savez(tmp_path / "adm.npz", arr_0=images, mu=mu, sigma=sigma, mu_s=mu, sigma_s=sigma)
    found = read_reference(tmp_path / "adm.npz", network, 4, 100, None)
    np.testing.assert_array_equal(found.gaussian.mu, mu)
    np.testing.assert_array_equal(found.gaussian.sigma, sigma)
    np.testing.assert_allclose(found.features, expected(images)[0], rtol=1e-5)
    assert (found.size, found.count, found.origin) == ("16 × 16", None, "statistics")
    assert found.digest == sha256(tmp_path / "adm.npz")


def test_statistics_of_clean_fid(tmp_path, network):
    np.savez(tmp_path / "fid.npz", mu=np.arange(6.0), sigma=np.eye(6))
    np.savez(tmp_path / "kid.npz", feats=np.ones((4, 6)))
    found = read_reference(tmp_path / "fid.npz", network, 4, 100, None)
    assert found.features is None and found.gaussian is not None
    found = read_reference(tmp_path / "kid.npz", network, 4, 100, None)
    assert found.features.shape == (4, 6) and found.gaussian is None


def test_images_are_no_statistics(tmp_path, archive, network):
    assert read_reference(archive.path, network, 4, 100, None) is None
    assert read_reference(tmp_path, network, 4, 100, None) is None


@pytest.mark.parametrize(
    ("mu", "sigma", "message"),
    [
        (np.full(6, np.nan), np.eye(6), 'array "mu" .* values that are not finite numbers'),
        (np.zeros(6), np.full((6, 6), np.inf), 'array "sigma" .* values that are not finite numbers'),
        (np.zeros(5), np.eye(6), r"have the shapes \(5,\) and \(6, 6\)"),
    ],
)
def test_bad_statistics_raise_user_error(tmp_path, network, mu, sigma, message):
    np.savez(tmp_path / "x.npz", mu=mu, sigma=sigma)
    with pytest.raises(UserError, match=message):
        read_reference(tmp_path / "x.npz", network, 4, 0, None)
