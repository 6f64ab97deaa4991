"""Frozen modules."""

import copy
import pickle

import torch
from tiny_models import text_config
from torch import nn

from ldm.config.instantiate import instantiate_from_config
from ldm.modules.frozen import freeze


def copies(module):
    return [module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))]


def test_copies_stay_frozen():
    """Training in new processes sends a pickled model to them."""
    for module in copies(nn.Sequential(freeze(nn.Linear(2, 2)), nn.Linear(2, 2))):
        frozen, other = module.train()
        assert not frozen.training and other.training
        assert not any(parameter.requires_grad for parameter in frozen.parameters())
        assert frozen.train() is frozen


def test_model_with_frozen_stages_can_be_sent_to_another_process():
    torch.manual_seed(0)
    model = instantiate_from_config(text_config())
    copied = pickle.loads(pickle.dumps(model)).train()
    assert not copied.first_stage_model.training and copied.model.training
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), copied.parameters(), strict=True))
