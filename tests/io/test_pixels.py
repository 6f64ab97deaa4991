"""Entries of batches: images and integers, and errors about other values."""

import pytest
import torch
from tiny_models import class_config

from ldm.config.instantiate import instantiate_from_config
from ldm.errors import UserError
from ldm.io.pixels import batch_entry, batch_images, batch_integers


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ([torch.zeros(1)], 'the dataset returns a list; return {"image": …} for each item'),
        (torch.zeros(1), "the dataset returns a Tensor; return"),
        ({1: 2, "imgae": 3}, 'the dataset returns no "image" (did you mean "imgae"?); it returns imgae'),
        ({}, 'the dataset returns no "image"; it returns '),
    ],
)
def test_missing_entry_raises_user_error(batch, message):
    """The message itself does not fail, whatever the batch is."""
    with pytest.raises(UserError) as error:
        batch_entry(batch, "image")
    assert message in str(error.value)


def test_values_that_are_not_tensors_raise_user_error():
    with pytest.raises(UserError, match='returns a list as "image"; return an array'):
        batch_images({"image": [torch.zeros(2, 2, 3)]}, "image")
    with pytest.raises(UserError, match='returns a list as "class_label"; return integers'):
        batch_integers({"class_label": ["cat"]}, "class_label")


def test_integers_of_any_type_become_int64():
    labels = batch_integers({"class_label": torch.tensor([1, 2], dtype=torch.uint8)}, "class_label")
    assert labels.dtype == torch.int64 and labels.tolist() == [1, 2]
    assert batch_integers({"class_label": torch.tensor([1.5])}, "class_label").dtype == torch.float32


def test_model_trains_with_labels_of_a_small_type():
    torch.manual_seed(0)
    model = instantiate_from_config(class_config(cond_stage_trainable=False))
    batch = {"image": torch.zeros(2, 16, 16, 3), "class_label": torch.tensor([0, 3])}
    states = torch.get_rng_state()
    loss, _ = model.shared_step(batch)
    torch.set_rng_state(states)
    assert torch.equal(model.shared_step({**batch, "class_label": batch["class_label"].to(torch.uint8)})[0], loss)
