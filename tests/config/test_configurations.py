"""Every `target:` of the published configurations exists, and missing data raise an error of one line."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from test_state_dict_keys import recorded

from ldm.config.instantiate import get_obj_from_str, instantiate_from_config
from ldm.errors import UserError

ROOT = Path(__file__).parents[2]
CONFIGURATIONS = sorted(recorded()["models"])
WITH_DATA = [path for path in CONFIGURATIONS if re.search("^data:", (ROOT / path).read_text(), flags=re.M)]


def targets(config: Any) -> Iterator[str]:
    """Yield every target in a configuration, at any depth."""
    if isinstance(config, dict):
        if isinstance(config.get("target"), str):
            yield config["target"]
        for value in config.values():
            yield from targets(value)
    elif isinstance(config, list):
        for value in config:
            yield from targets(value)


@pytest.mark.parametrize("path", CONFIGURATIONS)
def test_every_target_resolves(path):
    config = OmegaConf.to_container(OmegaConf.load(ROOT / path), resolve=True)
    names = set(targets(config))
    assert names >= {config["model"]["target"]}
    for name in names:
        assert callable(get_obj_from_str(name)), name


@pytest.mark.parametrize("path", WITH_DATA)
def test_missing_data_raise_user_error(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    config = OmegaConf.to_container(OmegaConf.load(ROOT / path), resolve=True)
    data = instantiate_from_config(config["data"])
    assert set(data.dataset_configs) == {"train", "validation"}
    for dataset in data.dataset_configs.values():
        with pytest.raises(UserError, match=r"there is no folder|there are no synset") as raised:
            instantiate_from_config(dataset)
        assert "\n" not in str(raised.value)


def test_a_misspelt_target_or_parameter_gets_a_hint():
    for target, meant in [
        ("ldm.data.lsun.LSUNBedroomTrain", "LSUNBedroomsTrain"),
        ("ldm.data.imagnet.ImageNetTrain", "imagenet"),
        ("taming.data.facehq.FFHQTrain", "faceshq"),
    ]:
        with pytest.raises(UserError, match=f'did you mean "{meant}"'):
            get_obj_from_str(target)
    with pytest.raises(UserError, match='no parameter "interpolatoin" \\(did you mean "interpolation"'):
        instantiate_from_config({"target": "ldm.data.lsun.LSUNChurchesTrain", "params": {"interpolatoin": "nearest"}})


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ([1], '"params" must hold names and values'),
        (3, '"params" must hold names and values'),
        ("abc", '"params" must hold names and values'),
        ({1: 2}, 'has no parameter "1"'),
        ({"min_snr_gamma": "5"}, "needs a number as \"min_snr_gamma\", got: '5'"),
        ({"min_snr_gamma": [5]}, 'needs a number as "min_snr_gamma"'),
        ({"use_ema": "no"}, 'needs true or false as "use_ema"'),
        ({"beta_schedule": 3}, 'needs text as "beta_schedule"'),
    ],
    ids=str,
)
def test_values_of_a_wrong_type_raise_user_error(params, message):
    with pytest.raises(UserError, match=re.escape(message)) as error:
        instantiate_from_config({"target": "ldm.models.diffusion.ddpm.DDPM", "params": with_network(params)})
    assert "\n" not in str(error.value)


def with_network(params):
    network = {"target": "torch.nn.Identity"}
    return {"unet_config": network, "timesteps": 5, **params} if isinstance(params, dict) else params


def test_a_key_that_is_not_text_raises_user_error_for_classes_with_any_parameter():
    with pytest.raises(UserError, match=r'torch\.nn\.Identity has no parameter "None"'):
        instantiate_from_config({"target": "torch.nn.Identity", "params": {None: 1}})
