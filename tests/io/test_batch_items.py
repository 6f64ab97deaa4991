"""Names of the items of a batch, and their values that are not finite."""

import pytest
import torch

from ldm.io.batch_items import describe_items, finite_items, item_names


def test_names_come_from_the_entries_with_paths():
    batch = {"caption": ["x", "y"], "relative_file_path_": ["a.png", "b.png"]}
    assert item_names(batch) == ["a.png", "b.png"]
    assert item_names({**batch, "file_path_": ("/data/a.png", "/data/b.png")}) == ["/data/a.png", "/data/b.png"]


@pytest.mark.parametrize("batch", [{"caption": ["x"]}, {"path": torch.zeros(2)}, {"path": []}, torch.zeros(2), None])
def test_batches_without_paths_have_no_names(batch):
    assert item_names(batch) == []


def test_items_are_named_or_numbered():
    names = [f"{i}.png" for i in range(6)]
    assert describe_items(names, [1, 4]) == '"1.png", "4.png"'
    assert describe_items(names, range(6)) == '"0.png", "1.png", "2.png" and 3 more'
    assert describe_items([], [0, 2]) == "item 0, item 2"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_found(value):
    images, latents = torch.zeros(3, 4, 4, 3), torch.full((3, 2, 2), 3e38)
    images[1, 3, 2, 1] = value
    scores, labels = torch.full((3,), float("nan")), torch.zeros(3, 2, dtype=torch.int64)
    batch = {"image": images, "latents": latents, "score": scores, "tokens": labels, "caption": ["x"] * 3}
    flags = finite_items(batch)
    assert {key: value.tolist() for key, value in flags.items()} == {
        "image": [True, False, True],
        "latents": [True, True, True],
    }
    assert finite_items(images) == {}
