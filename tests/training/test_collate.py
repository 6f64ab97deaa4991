"""Batches from the items of data sets, and errors that name what cannot be batched."""

from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.errors import UserError
from ldm.training.collate import Collate, describe

COLLATE = Collate("data.params.train")


def image(height=4, width=4):
    return np.zeros((height, width, 3), np.float32)


def test_items_are_batched_as_by_pytorch():
    batch = COLLATE([{"image": image(), "caption": "a", "label": 1}, {"image": image(), "caption": "b", "label": 2}])
    assert batch["image"].shape == (2, 4, 4, 3)
    assert batch["caption"] == ["a", "b"]
    assert batch["label"].tolist() == [1, 2]


PIL = Image.new("L", (5, 4))
FAULTS = [
    ("item of None", [None, {"image": image()}], "an item is None; return a value in every item"),
    ("entry of None", [{"caption": None}, {"caption": None}], '"caption" of an item is None; return a value'),
    ("PIL image", [{"image": PIL}, {"image": PIL}], '"image" of an item is a PIL image (L, 5 × 4 pixels); return np.'),
    (
        "PIL image in a tuple",
        [(PIL, 1), (PIL, 2)],
        "value 0 of an item is a PIL image (L, 5 × 4 pixels); return np.asarray(image, dtype=np.float32) / 127.5 - 1",
    ),
    (
        "unequal sizes",
        [{"image": image()}, {"image": image(6)}],
        '"image" of an item has the shape (4, 4, 3), and that of another item in the batch (6, 4, 3); resize or crop',
    ),
    ("unequal keys", [{"image": image(), "a": 1}, {"image": image()}], 'some items have no "a", which others have'),
    (
        "unequal types",
        [{"label": 1}, {"label": "one"}],
        '"label" of an item is a number, and that of another item a text; return the same type in all',
    ),
    (
        "unequal lists",
        [{"boxes": [1, 2]}, {"boxes": [1]}],
        '"boxes" of an item has 2 values, and that of another item 1; return the same number in all',
    ),
    ("array of text", [{"caption": np.array(["a"])}] * 2, "which cannot be batched; return numbers"),
    (
        "another class",
        [{"image": object()}] * 2,
        '"image" of an item is an object of type object, which cannot be batched',
    ),
    ("key that is not a text", [{1: None}] * 2, "the key of type int of an item is None"),
]


@pytest.mark.parametrize(("items", "message"), [row[1:] for row in FAULTS], ids=[row[0] for row in FAULTS])
def test_items_that_cannot_be_batched_raise_user_error_of_one_line(items, message):
    with pytest.raises(UserError) as error:
        COLLATE(items)
    assert str(error.value).startswith("data.params.train: ") and message in str(error.value)
    assert "\n" not in str(error.value)


def test_other_errors_are_not_hidden(monkeypatch):
    def fail(items):
        raise RuntimeError("unable to allocate shared memory")

    monkeypatch.setattr("ldm.training.collate.default_collate", fail)
    with pytest.raises(RuntimeError, match="shared memory"):
        COLLATE([{"image": image()}])


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (torch.zeros(2, 3), "a tensor (2, 3) of float32"),
        (np.zeros(2, np.uint8), "an array (2,) of uint8"),
        ([1, 2], "a list of 2"),
        (None, "None"),
        (b"", "bytes"),
    ],
)
def test_values_are_described(value, text):
    assert describe(value) == text


class Box(NamedTuple):
    """Record of a box."""

    label: int
    name: str | None = None


def test_lists_of_named_tuples_stay_lists():
    items = [{"image": torch.zeros(2), "boxes": [Box(1)]}, {"image": torch.ones(2), "boxes": [Box(2), Box(3, "c")]}]
    batch = Collate("data.params.train")(items)
    assert batch["boxes"] == [[Box(1)], [Box(2), Box(3, "c")]] and batch["image"].tolist() == [[0, 0], [1, 1]]
    assert Collate("x")([{"boxes": [Box(1)]}] * 2) == {"boxes": [[Box(1)], [Box(1)]]}
    with pytest.raises(UserError, match='x: some items have no "boxes"'):
        Collate("x")([{"image": 1, "boxes": [Box(1)]}, {"image": 1}])
