"""Tests of the examples in the docstrings of the models."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import ldm.models

MODULES = [module.name for module in pkgutil.walk_packages(ldm.models.__path__, "ldm.models.") if not module.ispkg]
SAMPLER, DDPM = "ldm.models.diffusion.sampler", "ldm.models.diffusion.ddpm"


def test_every_module_is_found():
    assert {SAMPLER, DDPM, "ldm.models.autoencoder"} <= {*MODULES}


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples_run(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0


@pytest.mark.parametrize(
    "name",
    [
        f"{DDPM}.LatentDiffusion",
        f"{SAMPLER}.Sampler",
        f"{SAMPLER}.GridSampler",
        "ldm.models.diffusion.ddim.DDIMSampler",
    ],
)
def test_class_shows_an_example_of_its_use(name):
    module, _, cls = name.rpartition(".")
    assert doctest.DocTestParser().get_examples(getattr(importlib.import_module(module), cls).__doc__)
