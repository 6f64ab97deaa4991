"""Tests of `ldm.config.layers`: layers of a configuration that set and remove keys."""

from __future__ import annotations

import pytest
from omegaconf import OmegaConf

from ldm.config.layers import assignment, merge_layer
from ldm.config.model_config import read_config
from ldm.errors import UserError

BASE = {"data": {"params": {"latent_cache": {"variants": 2, "path": "a.pt"}, "batch_size": 8, "size": "???"}}, "x": 1}


def merged(layer):
    return OmegaConf.to_container(merge_layer(OmegaConf.create(BASE), OmegaConf.create(layer)))


def test_a_layer_without_removals_is_merged():
    assert merged({"data": {"params": {"batch_size": 4}}})["data"]["params"]["batch_size"] == 4


@pytest.mark.parametrize(
    ("layer", "remaining"),
    [
        ("data: {params: {~latent_cache: }}", {"batch_size": 8, "size": "???"}),
        ("data: {params: {latent_cache: {~path: }}}", {**BASE["data"]["params"], "latent_cache": {"variants": 2}}),
        ("data: {params: {~size: }}", {"latent_cache": {"variants": 2, "path": "a.pt"}, "batch_size": 8}),
        ("data: {~params: , params: {batch_size: 2}}", {"batch_size": 2}),
        ("data: {params: {~latent_cache: , latent_cache: {variants: 1}}}",
         {"batch_size": 8, "size": "???", "latent_cache": {"variants": 1}}),
    ],
)  # fmt: skip
def test_keys_are_removed_before_the_values_of_the_layer(layer, remaining):
    result = merged(OmegaConf.to_container(OmegaConf.create(layer)))
    assert result == {"data": {"params": remaining}, "x": 1}


def test_a_key_set_to_null_stays():
    assert merged({"data": {"params": {"latent_cache": None}}})["data"]["params"]["latent_cache"] is None


def test_a_section_is_removed():
    assert merged({"~data": None}) == {"x": 1}


def test_references_to_other_keys_are_kept():
    base = OmegaConf.create({"a": {"b": 1, "c": "${d}"}, "d": 5})
    assert OmegaConf.to_container(merge_layer(base, OmegaConf.create({"a": {"~b": None}}))) == {
        "a": {"c": "${d}"},
        "d": 5,
    }


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ({"data": {"params": {"~latent_cash": None}}}, r'~data.params.latent_cash: .*"data.params.latent_cache"\?'),
        ({"data": {"param": {"~x": None}}}, r'there is no key "data.param" \(did you mean "data.params"\?\)'),
        ({"data": {"params": {"batch_size": {"~x": None}}}}, 'there is no key "data.params.batch_size.x"'),
        ({"~y": None}, 'cannot remove ~y: there is no key "y"'),
        ({"data": {"~params": 3}}, r'"data.~params" removes a key and takes no value; write "~params:" alone'),
    ],
)
def test_mistakes_in_removals_are_one_line(layer, message):
    with pytest.raises(UserError, match=message) as caught:
        merged(layer)
    assert "\n" not in str(caught.value)


def test_words_of_the_command_line_are_assignments():
    assert assignment("a.b=1") == "a.b=1"
    assert assignment("~a.b.c") == "a.b.~c=null"
    assert assignment("~a") == "~a=null"


def test_overrides_remove_keys_of_a_model(tmp_path):
    (tmp_path / "model.yaml").write_text("model: {target: a.B, params: {x: 1, y: {z: 2, w: 3}}}")
    config = read_config(tmp_path / "model.yaml", ["~model.params.x", "~model.params.y.z", "model.params.v=4"])
    assert config["params"] == {"y": {"w": 3}, "v": 4}
    with pytest.raises(UserError, match=r'"~data.params" does not belong to the model'):
        read_config(tmp_path / "model.yaml", ["~data.params"])
