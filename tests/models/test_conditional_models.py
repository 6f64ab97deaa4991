"""Tests of hybrid models (concatenation and cross-attention) and adm models (class labels): sampling and training."""

from __future__ import annotations

import pytest
import torch
from parity_cases import assert_close
from tiny_models import randomise, text_config
from torch import nn

from ldm.config.instantiate import instantiate_from_config
from ldm.models.diffusion import preview
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.plms import PLMSSampler

SHAPE = (3, 8, 8)
SCALE = 3.0


def model_of(unet, **params):
    torch.manual_seed(0)
    config = text_config(**params)
    unet = {**config["params"]["unet_config"]["params"], **unet}
    config["params"]["unet_config"]["params"] = {name: value for name, value in unet.items() if value is not None}
    return randomise(instantiate_from_config(config)).eval()


@pytest.fixture(scope="module")
def hybrid():
    """Return a model whose conditioning is a concatenated image and a text with cross-attention."""
    return model_of({"in_channels": 6}, conditioning_key="hybrid")


@pytest.fixture(scope="module")
def adm():
    """Return a model whose network embeds the labels; the last label is the empty conditioning."""
    unet = {"num_classes": 11, "use_spatial_transformer": False, "context_dim": None, "transformer_depth": None}
    identity = {"target": "ldm.modules.encoders.modules.IdentityEncoder"}
    stage = {"cond_stage_config": identity, "cond_stage_key": "class_label", "cond_stage_trainable": False}
    return model_of(unet, conditioning_key="adm", **stage)


def random_conditioning(n, seed):
    """Return an image (n, 3, 8, 8) and a context (n, 5, 32)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, *SHAPE, generator=generator), torch.randn(n, 5, 32, generator=generator)


def guidance_pair(n=2):
    """Return a conditional and an unconditional conditioning: the same image with two texts."""
    (image, text), (_, empty) = random_conditioning(n, 1), random_conditioning(n, 2)
    return {"c_concat": [image], "c_crossattn": [text]}, {"c_concat": [image], "c_crossattn": [empty]}


def guided_step(model, sampler, x_T, predictions):
    """Return the only DDIM step of S = 1 for two predictions (unconditional, conditional) with guidance."""
    unconditional, conditional = predictions
    eps = unconditional + SCALE * (conditional - unconditional)
    alpha, alpha_prev = (float(table[0]) for table in (sampler.ddim_alphas, sampler.ddim_alphas_prev))
    x_start = (x_T - (1 - alpha) ** 0.5 * eps) / alpha**0.5
    return alpha_prev**0.5 * x_start + (1 - alpha_prev) ** 0.5 * eps


def sample(model, S, cond, empty, sampler=DDIMSampler, n=2, x_T=None):
    guidance = {"unconditional_guidance_scale": SCALE, "unconditional_conditioning": empty}
    x_T = torch.ones(n, *SHAPE) if x_T is None else x_T
    return sampler(model).sample(S, n, SHAPE, cond, x_T=x_T, **guidance, verbose=False)[0]


# -- hybrid ----------------------------------------------------------------------------------------------------


def test_hybrid_guided_step_matches_ddim_formula(hybrid):
    cond, empty = guidance_pair()
    x_T, sampler = torch.ones(2, *SHAPE), DDIMSampler(hybrid)
    sampler.make_schedule(1)
    t = torch.full((2,), int(sampler.ddim_timesteps[0]))
    network = hybrid.model.diffusion_model
    with torch.no_grad():
        joined = torch.cat([x_T, cond["c_concat"][0]], dim=1)
        predictions = [network(joined, t, context=each["c_crossattn"][0]) for each in (empty, cond)]
    assert_close(sample(hybrid, 1, cond, empty), guided_step(hybrid, sampler, x_T, predictions), 1e-5)
    assert (predictions[0] - predictions[1]).norm() > 0.01 * predictions[0].norm(), "the prediction depends on the text"


@pytest.mark.parametrize("sampler", [DDIMSampler, PLMSSampler])
def test_hybrid_samples_do_not_depend_on_batch(hybrid, sampler):
    cond, empty = guidance_pair()
    together = sample(hybrid, 4, cond, empty, sampler)
    for i in range(2):
        one, none = ({key: [value[i : i + 1] for value in each[key]] for key in each} for each in (cond, empty))
        assert_close(sample(hybrid, 4, one, none, sampler, n=1), together[i : i + 1], 1e-4)
    assert (together[0] - together[1]).norm() > 0.01 * together.norm()


def test_hybrid_conditioning_accepts_lists_and_tensors(hybrid):
    cond, empty = guidance_pair()
    bare, none = ({key: value[0] for key, value in each.items()} for each in (cond, empty))
    assert torch.equal(sample(hybrid, 3, bare, none), sample(hybrid, 3, cond, empty))
    halves = {**cond, "c_crossattn": list(cond["c_crossattn"][0].split([2, 3], dim=1))}
    plain = [
        DDIMSampler(hybrid).sample(3, 2, SHAPE, c, x_T=torch.ones(2, *SHAPE), verbose=False)[0] for c in (halves, cond)
    ]
    assert_close(*plain, 1e-6)


def test_ancestral_sampling_uses_first_items_of_hybrid_conditioning(hybrid):
    cond, _ = guidance_pair(3)
    one = {key: [value[0][:1]] for key, value in cond.items()}
    torch.manual_seed(0)
    x = hybrid.sample(cond, 1, timesteps=3, verbose=False)
    torch.manual_seed(0)
    assert torch.equal(hybrid.sample(one, 1, timesteps=3, verbose=False), x)


def test_hybrid_loss_matches_formula(hybrid):
    cond, _ = guidance_pair()
    z, noise, t = torch.randn(2, *SHAPE), torch.randn(2, *SHAPE), torch.tensor([5, 60])
    loss, log = hybrid.p_losses(z, cond, t, noise)
    x = torch.cat([hybrid.q_sample(z, t, noise), cond["c_concat"][0]], dim=1)
    prediction = hybrid.model.diffusion_model(x, t, context=cond["c_crossattn"][0])
    assert_close(loss, (prediction - noise).square().mean().detach(), 1e-5)
    assert_close(log["val/loss_simple"], loss.detach(), 1e-5)


def test_hybrid_training_step_has_gradients_for_both_conditionings():
    """The conditioning stage returns both parts of the conditioning, and both have gradients."""

    class Stage(nn.Module):
        def encode(self, captions):
            image, text = random_conditioning(len(captions), 3)
            return {"c_concat": [image], "c_crossattn": [text]}

    model = model_of({"in_channels": 6}, conditioning_key="hybrid", cond_stage_trainable=False).train()
    model.cond_stage_model = Stage()
    loss, _ = model.shared_step({"image": torch.zeros(2, 16, 16, 3), "caption": ["fox", "ship"]})
    loss.backward()
    gradients = {name: p.grad for name, p in model.model.diffusion_model.named_parameters()}
    assert gradients["input_blocks.0.0.weight"][:, 3:].norm() > 0
    assert gradients["middle_block.1.transformer_blocks.0.attn2.to_k.weight"].norm() > 0


# -- adm -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "form", [lambda y: y, lambda y: [y], lambda y: {"c_crossattn": [y]}, lambda y: {"class_label": y}]
)
def test_adm_guided_step_matches_ddim_formula(adm, form):
    labels, none = torch.tensor([2, 7]), torch.tensor([10, 10])
    x_T, sampler = torch.ones(2, *SHAPE), DDIMSampler(adm)
    sampler.make_schedule(1)
    t = torch.full((2,), int(sampler.ddim_timesteps[0]))
    with torch.no_grad():
        predictions = [adm.model.diffusion_model(x_T, t, y=y) for y in (none, labels)]
    expected = guided_step(adm, sampler, x_T, predictions)
    assert_close(sample(adm, 1, form(labels), form(none)), expected, 1e-5)
    assert (predictions[0] - predictions[1]).norm() > 0


@pytest.mark.parametrize("sampler", [DDIMSampler, PLMSSampler])
def test_adm_samples_do_not_depend_on_batch(adm, sampler):
    labels, none = torch.tensor([2, 7]), torch.tensor([10, 10])
    together = sample(adm, 4, labels, none, sampler)
    for i in range(2):
        assert_close(sample(adm, 4, labels[i : i + 1], none[:1], sampler, n=1), together[i : i + 1], 1e-4)


def test_adm_training_step_has_gradients_for_its_labels(adm):
    batch = {"image": torch.zeros(2, 16, 16, 3), "class_label": torch.tensor([2, 7])}
    adm.zero_grad()
    loss, _ = adm.shared_step(batch)
    loss.backward()
    trained = adm.model.diffusion_model.label_emb.weight.grad.norm(dim=1).nonzero().flatten()
    assert trained.tolist() == [2, 7]


def test_adm_dropped_labels_are_the_last_class(adm):
    adm.cond_dropout = 0.5
    torch.manual_seed(0)
    dropped = adm.drop_conditioning({"class_label": torch.arange(10).repeat(40)})["class_label"]
    adm.cond_dropout = 0.0
    assert (dropped == 10).float().mean().item() == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize("names", [{"human_label": ["fox", "ship"]}, {}])
def test_adm_previews_show_class_names(adm, names, monkeypatch):
    texts = []
    monkeypatch.setattr(preview, "log_txt_as_img", lambda wh, xc, size: texts.extend(xc) or torch.zeros(2, 3, *wh))
    batch = {"image": torch.zeros(2, 16, 16, 3), "class_label": torch.tensor([2, 7]), **names}
    options = {"plot_progressive_rows": False, "inpaint": False, "plot_diffusion_rows": False, "ddim_steps": 2}
    images = adm.log_images(batch, N=2, unconditional_guidance_scale=SCALE, **options)
    assert images["samples_guided"].shape == images["conditioning"].shape == (2, 3, 16, 16)
    assert texts == names.get("human_label", [2, 7])
