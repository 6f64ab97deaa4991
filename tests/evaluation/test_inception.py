"""Inception-v3 of torch-fidelity with random weights, through files as users have them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from feature_networks import random_images, write_images
from torch_fidelity import calculate_metrics
from torch_fidelity import feature_extractor_inceptionv3 as inception

from ldm.evaluation.features import collect
from ldm.evaluation.image_sets import ImageFolder
from ldm.evaluation.network import load_network
from ldm.evaluation.scores import Settings, score


@pytest.fixture
def weights(tmp_path, monkeypatch):
    """Random weights in a file."""
    extractor = inception.FeatureExtractorInceptionV3
    with monkeypatch.context() as patch:
        patch.setattr(inception, "load_state_dict_from_url", lambda url, progress: {})
        patch.setattr(extractor, "load_state_dict", lambda self, weights: None)
        torch.manual_seed(0)
        torch.save(extractor("x", ["2048"]).state_dict(), tmp_path / "inception.pth")
    return tmp_path / "inception.pth"


@pytest.mark.slow
def test_figures_are_those_of_torch_fidelity_for_folders(tmp_path, weights):
    folders = [write_images(tmp_path / name, random_images(6, seed)) for seed, name in enumerate("ab")]
    network = load_network(weights)
    assert network.protocol()["network"] == "inception-v3-compat"
    assert network.protocol()["resize"] == "bilinear as in TensorFlow 1, to 299 px, in the network"
    assert network.dimension == 2048
    settings = Settings(splits=2, subsets=3, subset_size=4, allow_few=True)
    sets = [collect(ImageFolder(each), network, 4, most_kept=10, keep_logits=True, progress=False) for each in folders]
    found = score(*sets, settings)
    expected = calculate_metrics(
        input1=str(folders[0]),
        input2=str(folders[1]),
        feature_extractor="inception-v3-compat",  # its default for precision and recall is VGG16, unlike ADM's
        feature_extractor_weights_path=str(weights),
        cuda=False,
        cache=False,
        verbose=False,
        batch_size=4,
        **{"fid": True, "isc": True, "kid": True, "prc": True},
        isc_splits=2,
        kid_subsets=3,
        kid_subset_size=4,
    )
    assert found["fid"].value == pytest.approx(expected["frechet_inception_distance"], abs=1e-6)
    assert found["is"].value == pytest.approx(expected["inception_score_mean"], abs=1e-6)
    assert found["kid"].value == pytest.approx(expected["kernel_inception_distance_mean"], abs=1e-6)
    assert found["precision"].value == pytest.approx(expected["precision"], abs=1e-6)
    assert found["recall"].value == pytest.approx(expected["recall"], abs=1e-6)
    assert np.isfinite(found["fid"].value) and found["fid"].value > 0
