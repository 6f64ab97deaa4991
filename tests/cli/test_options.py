"""Tests of `ldm.cli.options`."""

from __future__ import annotations

import argparse

import pytest

from ldm.cli.options import (
    add_sampler,
    finite_float,
    image_side,
    non_negative_float,
    non_negative_int,
    positive_int,
    sampler_settings,
    seed,
    share,
)


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        (positive_int, {"1": 1, "50": 50}, ["0", "-1", "1.5", "", "x", str(2**63)]),
        (image_side, {"1": 1, "65536": 65536}, ["0", "65537", "1e3"]),
        (seed, {"0": 0, str(2**63 - 1): 2**63 - 1}, ["-1", str(2**63), "1e3"]),
        (finite_float, {"-1.5": -1.5, "5": 5.0}, ["nan", "inf", "", "x"]),
        (non_negative_int, {"0": 0, "7": 7}, ["-1", "1.5", ""]),
        (share, {"1e-6": 1e-6, "1": 1.0}, ["0", "1.01", "-1", "nan", "inf", "much"]),
        (non_negative_float, {"0": 0.0, "1e-3": 1e-3}, ["-0.1", "nan", "inf"]),
    ],
)
def test_types_check_their_values(kind, good, bad):
    assert {text: kind(text) for text in good} == good
    for text in bad:
        with pytest.raises(argparse.ArgumentTypeError):
            kind(text)


@pytest.mark.parametrize(
    ("words", "sampler", "eta"),
    [([], "ddim", 1.0), (["--plms"], "plms", 0.0), (["--dpm"], "dpm", 0.0), (["--eta", "0.5"], "ddim", 0.5)],
)
def test_default_eta_is_that_of_ddim_and_0_for_other_samplers(words, sampler, eta):
    parser = argparse.ArgumentParser()
    add_sampler(parser, 50, eta=1.0)
    assert sampler_settings(parser.parse_args(words)) == {"sampler": sampler, "steps": 50, "eta": eta}


def test_guidance_scale_is_a_setting_of_guided_tasks():
    parser = argparse.ArgumentParser()
    add_sampler(parser, 50, scale=5.0)
    assert sampler_settings(parser.parse_args(["--scale", "2"]))["scale"] == 2.0


def test_timestep_spacing_is_a_setting_if_it_is_given():
    parser = argparse.ArgumentParser()
    add_sampler(parser, 50)
    assert "timestep_spacing" not in sampler_settings(parser.parse_args([]))
    assert sampler_settings(parser.parse_args(["--timestep_spacing", "trailing"]))["timestep_spacing"] == "trailing"
    with pytest.raises(SystemExit):
        parser.parse_args(["--timestep_spacing", "leading"])
