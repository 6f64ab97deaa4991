"""Tests of `ldm.config.model_config`: reading configurations, and image sizes."""

from __future__ import annotations

import pytest

from ldm.config.model_config import ImageSize, read_config
from ldm.errors import UserError


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (None, "there is no configuration"),
        ("model: [", "cannot read"),
        ("a: 1", "describes no model"),
        ("- 1", "describes no model"),
        ("model: {params: {}}", "describes no model"),
        ("model: {target: a.B, params: {x: '${gone}'}}", "cannot read"),
        ("model: {target: a.B, params: [1]}", "is damaged: .* names and values"),
        ("model: {target: a.B, params: 3}", "is damaged: .* names and values"),
        ("model: {target: a.B, params: abc}", "is damaged: .* names and values"),
        ("\x00", "cannot read"),
    ],
)
def test_invalid_configuration_is_one_line(tmp_path, text, match):
    path = tmp_path / "config.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=match) as error:
        read_config(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "params",
    [
        {"image_size": "x"},
        {"image_size": [8]},
        {"unet_config": {"params": [1]}},
        {"unet_config": {"params": {"channel_mult": 3}}},
        {"first_stage_config": {"params": {"ddconfig": 3}}},
    ],
    ids=str,
)
def test_invalid_sizes_raise_user_error(params):
    with pytest.raises(UserError, match="does not state its size"):
        ImageSize.of({"params": params})


def test_sizes_follow_from_the_configuration(repo_root):
    published = ImageSize.of(read_config(repo_root / "configs/latent-diffusion/txt2img-1p4B-eval.yaml"))
    assert published == ImageSize(256, 256, factor=8, multiple=64)
    assert published.check("--H", 320) == 320
    with pytest.raises(UserError, match=r"--H 100 .*multiple of 64.*nearest: 64 or 128"):
        published.check("--H", 100)
    with pytest.raises(UserError, match=r"nearest: 64$"):
        published.check("--W", 8)
