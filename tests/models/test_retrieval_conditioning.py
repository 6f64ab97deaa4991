"""Training of retrieval-augmented models, whose conditioning is a set of given vectors."""

from __future__ import annotations

import pytest
import torch
from tiny_models import make_model, retrieval_config

from ldm.training.batch_check import BatchCheck


@pytest.fixture
def model():
    return make_model(retrieval_config(width=10, cond_dropout=0.5))


def test_vectors_are_the_context_of_the_network(model):
    batch = {"image": torch.zeros(2, 16, 16, 3), "nix": torch.randn(2, 4, 10, dtype=torch.float64)}
    BatchCheck(model)(batch, "train")
    _, context = model.eval().get_input(batch, "image")
    assert context.shape == (2, 4, 10) and context.dtype == torch.float32
    torch.testing.assert_close(context, batch["nix"].float(), rtol=0, atol=0)


def test_the_loss_depends_on_the_vectors(model):
    image = torch.zeros(2, 16, 16, 3)
    losses = []
    for vectors in (torch.zeros(2, 4, 10), torch.ones(2, 4, 10)):
        torch.manual_seed(0)
        losses.append(model.eval().shared_step({"image": image, "nix": vectors})[0])
    assert losses[0] != losses[1]


def test_dropped_vectors_are_zero(model):
    torch.manual_seed(0)
    dropped = model.drop_conditioning(torch.ones(400, 4, 10))
    zero = (dropped == 0).flatten(1).all(dim=1)
    assert zero.float().mean().item() == pytest.approx(0.5, abs=0.1)
    assert (dropped[~zero] == 1).all()


def test_previews_have_guided_samples(model):
    batch = {"image": torch.zeros(2, 16, 16, 3), "nix": torch.randn(2, 4, 10)}
    options = {"plot_progressive_rows": False, "inpaint": False, "plot_diffusion_rows": False, "ddim_steps": 2}
    images = model.log_images(batch, N=2, unconditional_guidance_scale=2.0, **options)
    assert images["samples_guided"].shape == (2, 3, 16, 16) and "conditioning" not in images
