"""Programs in the shape of published ones that sample: image to image, an inverse problem, attention control."""

from __future__ import annotations

import pytest
import torch
from tiny_models import class_config, randomise

from ldm.models.diffusion.ddim import DDIMSampler
from ldm.util import default, instantiate_from_config


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = class_config(timesteps=50)
    config["params"]["unet_config"]["params"]["attention_resolutions"] = [1]
    return randomise(instantiate_from_config(config)).eval()


def conditioning(model, *labels):
    return model.get_learned_conditioning({"class_label": torch.tensor(labels)}).detach()


# -- a script for image to image -------------------------------------------------------------------------------


def img2img(model, init_image, c, uc, strength, ddim_steps, scale, ddim_eta=0.0):
    sampler = DDIMSampler(model)
    batch_size = init_image.shape[0]
    init_latent = model.get_first_stage_encoding(model.encode_first_stage(init_image))
    sampler.make_schedule(ddim_num_steps=ddim_steps, ddim_eta=ddim_eta, verbose=False)
    t_enc = int(strength * ddim_steps)
    with torch.no_grad(), model.ema_scope():
        z_enc = sampler.stochastic_encode(init_latent, torch.tensor([t_enc] * batch_size))
        samples = sampler.decode(z_enc, c, t_enc, unconditional_guidance_scale=scale, unconditional_conditioning=uc)
        x_samples = model.decode_first_stage(samples)
    return init_latent, torch.clamp((x_samples + 1.0) / 2.0, min=0.0, max=1.0)


def test_image_to_image_script(model):
    image = torch.rand(2, 3, 16, 16) * 2 - 1
    c, uc = conditioning(model, 1, 2), conditioning(model, 10, 10)
    torch.manual_seed(5)
    _, images = img2img(model, image, c, uc, strength=0.5, ddim_steps=10, scale=3.0)
    assert images.shape == (2, 3, 16, 16) and images.min() >= 0.0 and images.max() <= 1.0
    torch.manual_seed(5)
    _, again = img2img(model, image, c, uc, strength=0.5, ddim_steps=10, scale=3.0)
    assert torch.equal(again, images)
    _, kept = img2img(model, image, c, uc, strength=0.0, ddim_steps=10, scale=3.0)
    assert kept.shape == images.shape


# -- a solver of inverse problems ------------------------------------------------------------------------------


class PosteriorSampler(DDIMSampler):
    """Client that pulls every step towards a measurement of the image: the mean of its pixels."""

    def __init__(self, model, measured, strength, **kwargs):
        super().__init__(model, **kwargs)
        self.measured, self.strength, self.errors = measured, strength, []

    def p_sample_ddim(self, x, c, t, index, **kwargs):
        with torch.enable_grad():
            z_t = torch.clone(x.detach()).requires_grad_()
            b, device = z_t.shape[0], z_t.device
            e_t = self.model.apply_model(z_t, t, c)
            a_t = torch.full((b, 1, 1, 1), self.ddim_alphas[index], device=device)
            a_prev = torch.full((b, 1, 1, 1), self.ddim_alphas_prev[index], device=device)
            sqrt_one_minus_at = torch.full((b, 1, 1, 1), self.ddim_sqrt_one_minus_alphas[index], device=device)
            pred_z_0 = (z_t - sqrt_one_minus_at * e_t) / a_t.sqrt()
            image = self.model.differentiable_decode_first_stage(pred_z_0)
            error = torch.linalg.norm(image.mean(dim=(2, 3)) - self.measured)
            gradient = torch.autograd.grad(error, z_t)[0]
        z_prev = a_prev.sqrt() * pred_z_0 + (1.0 - a_prev).sqrt() * e_t
        self.errors.append(error.item())
        return (z_prev - self.strength * gradient).detach(), pred_z_0.detach()


def test_solver_of_an_inverse_problem(model):
    c, x_T = conditioning(model, 3), torch.randn(1, 3, 8, 8)
    measured = torch.tensor([[0.3, 0.2, -0.3]])
    options = {"S": 8, "batch_size": 1, "shape": (3, 8, 8), "conditioning": c, "x_T": x_T, "verbose": False}
    free = PosteriorSampler(model, measured, strength=0.0)
    plain, _ = free.sample(**options)
    torch.testing.assert_close(plain, DDIMSampler(model).sample(**options)[0], rtol=0, atol=1e-4)
    solver = PosteriorSampler(model, measured, strength=200.0, schedule="linear")
    solver.sample(**options)
    assert len(solver.errors) == 8
    assert solver.errors[-1] < 0.95 * free.errors[-1]


# -- control of the attention ----------------------------------------------------------------------------------


class AttentionStore:
    """Client that records the attention maps, and replaces those of chosen tokens."""

    def __init__(self, weights=None):
        self.maps, self.weights = [], weights

    def __call__(self, attention, is_cross):
        self.maps.append((tuple(attention.shape), is_cross))
        return attention if self.weights is None or not is_cross else attention * self.weights


def register_attention_control(model, controller):
    def ca_forward(self):
        def forward(x, context=None, mask=None):
            h = self.heads
            q = self.to_q(x)
            is_cross = context is not None
            context_ = default(context, x)
            k, v = self.to_k(context_), self.to_v(context_)
            split = lambda y: y.reshape(y.shape[0], y.shape[1], h, -1).permute(0, 2, 1, 3).flatten(0, 1)  # noqa: E731
            q, k, v = split(q), split(k), split(v)
            sim = torch.einsum("b i d, b j d -> b i j", q, k) * self.scale
            attention = controller(sim.softmax(dim=-1), is_cross)
            out = torch.einsum("b i j, b j d -> b i d", attention, v)
            out = out.reshape(-1, h, *out.shape[1:]).permute(0, 2, 1, 3).flatten(2)
            return self.to_out(out)

        return forward

    count = 0
    for module in model.model.diffusion_model.modules():
        if module.__class__.__name__ == "CrossAttention":
            module.forward = ca_forward(module)
            count += 1
    return count


def test_attention_is_controlled(model):
    c, x_T = conditioning(model, 3, 4), torch.randn(2, 3, 8, 8)

    def sample():
        with torch.no_grad():
            return DDIMSampler(model).sample(3, 2, (3, 8, 8), c, x_T=x_T, verbose=False)[0]

    expected = sample()
    try:
        store = AttentionStore()
        assert register_attention_control(model, store) == 8
        torch.testing.assert_close(sample(), expected, rtol=0, atol=1e-4)
        assert len(store.maps) == 3 * 8, "one map for each layer and step"
        assert {shape[1:] for shape, is_cross in store.maps if is_cross} == {(64, 1), (16, 1)}
        assert {shape for shape, is_cross in store.maps if not is_cross} == {(4, 64, 64), (4, 16, 16)}
        register_attention_control(model, AttentionStore(weights=0.0))
        assert not torch.allclose(sample(), expected, atol=1e-3)
    finally:
        for module in model.model.diffusion_model.modules():
            vars(module).pop("forward", None)
    assert torch.equal(sample(), expected)
