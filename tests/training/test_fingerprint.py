"""Fingerprint of data sets."""

import functools
import logging
import os
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from images_on_disk import write

from ldm.config.instantiate import instantiate_from_config
from ldm.training.fingerprint import fingerprint


@pytest.fixture
def folder(tmp_path):
    for seed, name in enumerate(("a", "b", "c")):
        write(tmp_path / "images" / f"{name}.png", seed=seed)
    return tmp_path / "images"


def of_target(target, **params):
    return fingerprint(instantiate_from_config({"target": target, "params": params}))


FACES = "ldm.data.faceshq.FacesBase"
TARGETS = [
    (FACES, {"size": 16}),
    ("ldm.data.lsun.LSUNBase", {"size": 16}),
    ("ldm.data.openimages.FullOpenImagesTrain", {"size": 20, "crop_size": 16}),
    ("ldm.data.openimages.SuperresOpenImagesAdvancedTrain", {"size": 16, "degradation": "pil_bicubic"}),
]


@pytest.mark.parametrize(("target", "params"), TARGETS, ids=[target.rpartition(".")[2] for target, _ in TARGETS])
def test_changes_of_files_and_settings_are_noticed(target, params, folder):
    first = of_target(target, data_root=str(folder), **params)
    assert of_target(target, data_root=str(folder), **params) == first
    seen = {first, of_target(target, data_root=str(folder), **{**params, "size": 24})}
    write(folder / "b.png", seed=7)
    seen.add(of_target(target, data_root=str(folder), **params))
    (folder / "b.png").rename(folder / "d.png")
    seen.add(of_target(target, data_root=str(folder), **params))
    write(folder / "e.png", seed=4)
    seen.add(of_target(target, data_root=str(folder), **params))
    (folder / "a.png").unlink()
    seen.add(of_target(target, data_root=str(folder), **params))
    assert len(seen) == 6


def test_files_that_no_probe_reads_are_noticed(tmp_path):
    """Only some items are read, but the size and the time of change of every file count."""
    for number in range(40):
        write(tmp_path / "images" / f"{number:02}.png", height=8, width=8, seed=number)
    first = of_target(FACES, size=8, data_root=str(tmp_path / "images"))
    path = tmp_path / "images" / "01.png"
    os.utime(path, ns=(0, 0))
    assert of_target(FACES, size=8, data_root=str(tmp_path / "images")) != first


class Names:
    """Data set that holds a folder and the names of its files, and opens them later."""

    def __init__(self, folder, transform=None):
        self.folder, self.transform = str(folder), transform
        self.names = sorted(os.listdir(folder))
        self.log = logging.getLogger("names")
        self.torch = torch

    def __len__(self):
        return len(self.names)

    def __getitem__(self, index):
        return {"name": self.names[index]}


def test_names_are_looked_up_in_the_folders_of_a_data_set(folder):
    first = fingerprint(Names(folder))
    assert fingerprint(Names(folder)) == first
    os.utime(folder / "a.png", ns=(0, 0))
    assert fingerprint(Names(folder)) != first


class Scale:
    def __init__(self, factor):
        self.factor = factor

    def __call__(self, x):
        return x * self.factor


def test_settings_of_transforms_are_noticed(folder):
    transforms = [None, Scale(1), Scale(2), [Scale(1)], np.ones(2), np.zeros(2), torch.zeros(2), {"a": 1}, {"a": 2}]
    transforms += [functools.partial(Scale, 1), functools.partial(Scale, 2), Scale(3).__call__, Scale(4).__call__]
    assert len({fingerprint(Names(folder, transform)) for transform in transforms}) == len(transforms)


class Items:
    """Data set of the items that a function computes."""

    def __init__(self, function):
        self.function = function

    def __len__(self):
        return 3

    def __getitem__(self, index):
        return self.function(index)


def test_content_of_items_is_noticed():
    """It changes with the code of a data set."""
    one, two = (Items(lambda index, factor=factor: {"image": np.full(2, factor * index)}) for factor in (1, 2))
    assert fingerprint(one) != fingerprint(two)


def test_global_generators_are_seeded_for_items_and_stay_the_same():
    def item(index):
        return [float(torch.rand(())), np.random.rand(), random.random()]

    states = [torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()]
    assert fingerprint(Items(item)) == fingerprint(Items(item))
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1:] == [np.random.get_state()[1].tolist(), random.getstate()]


def test_items_with_a_generator_of_their_own_are_left_out():
    def data():
        generator = np.random.default_rng()
        return Items(lambda index: generator.random())

    assert fingerprint(data()) == fingerprint(data())


def test_data_set_that_refers_to_itself_has_a_fingerprint(folder):
    data = Names(folder)
    data.parent = {"data": data}
    assert fingerprint(data) == fingerprint(data)


def test_fingerprint_is_the_same_in_every_process(repo_root):
    code = """if True:
        from ldm.data.emoji import EmojiTrain
        from ldm.training.fingerprint import fingerprint
        print(fingerprint(EmojiTrain(size=16, names=["fox"])))"""
    command, environment = [sys.executable, "-c", code], {**os.environ, "PYTHONHASHSEED": "1"}
    done = subprocess.run(command, cwd=repo_root, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == of_target("ldm.data.emoji.EmojiTrain", size=16, names=["fox"])
