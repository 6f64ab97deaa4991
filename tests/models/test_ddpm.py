"""Tests of diffusion models: losses against recorded values, latents, conditioning, precision, previews."""

from __future__ import annotations

import pytest
import torch
from parity_cases import assert_close, relative_error
from parity_replay import assert_replayed, grad_norm
from tiny_models import layout_config, pixel_config, randomise, superresolution_config, text_config

from ldm.config.instantiate import instantiate_from_config
from ldm.errors import UserError
from ldm.io.grids import draw_boxes
from ldm.io.pixels import in_random_colours
from ldm.models.diffusion.batch_keys import LATENT_KEY
from ldm.models.diffusion.preview import as_rows
from ldm.modules.diffusionmodules.parameterization import interpret, training_target
from ldm.modules.encoders.layout import Box


def text_model(**params):
    torch.manual_seed(0)
    return randomise(instantiate_from_config(text_config(**params)))


def text_batch(n=2):
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(n, 16, 16, 3, generator=generator) * 2 - 1
    return {"image": image, "caption": ["rocket on a blue background", "fox"][:n]}


# -- losses ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["eps_l2", "eps_l1", "x0_l2", "eps_elbo", "eps_learned_logvar"])
def test_losses_and_gradients_match_record(kind):
    assert_replayed(f"train_loss_{kind}")


def test_v_target_and_its_interpretation_match_closed_form():
    """v = √ᾱ ε - √(1 - ᾱ) x_0 (arXiv:2202.00512), the derivative of x_t by the angle arccos √ᾱ."""
    x_start, noise = torch.randn(2, 3, 4, 4, 4).double()
    alpha = torch.tensor([0.2, 0.7, 0.99]).double().reshape(3, 1, 1, 1)
    x_t = alpha.sqrt() * x_start + (1 - alpha).sqrt() * noise
    v = training_target("v", x_start, noise, alpha)
    angle = alpha.sqrt().acos()
    assert_close(v, torch.cos(angle) * noise - torch.sin(angle) * x_start, 1e-12)
    eps, estimate = interpret("v", v, x_t, alpha)
    assert_close(eps, noise, 1e-12)
    assert_close(estimate, x_start, 1e-12)


@pytest.mark.parametrize("gamma", [5.0, 0.3])
@pytest.mark.parametrize("parameterization", ["eps", "x0", "v"])
def test_min_snr_weights_error_of_x_start(parameterization, gamma):
    """The loss is min(SNR, γ) ‖x_0 - x̂_0‖² for every parameterization."""
    model = text_model(parameterization=parameterization, min_snr_gamma=gamma)
    x_start, estimate, noise = torch.randn(3, 4, 3, 8, 8).unbind()
    t = torch.tensor([0, 20, 60, 99])
    alpha = model.alphas_cumprod[t].reshape(4, 1, 1, 1)
    implied = (model.q_sample(x_start, t, noise) - alpha.sqrt() * estimate) / (1 - alpha).sqrt()
    model.apply_model = lambda *_: training_target(parameterization, estimate, implied, alpha)
    snr = (alpha / (1 - alpha)).flatten()
    loss, log = model.p_losses(x_start, None, t, noise)
    assert_close(loss, (snr.clamp(max=gamma) * (x_start - estimate).square().mean(dim=(1, 2, 3))).mean(), 1e-4)
    plain = text_model(parameterization=parameterization)
    plain.apply_model = model.apply_model
    unweighted, _ = plain.p_losses(x_start, None, t, noise)
    assert_close(log["train/loss_simple"], unweighted, 1e-6)


def test_loss_weights_are_not_in_state_dict():
    assert text_model(min_snr_gamma=5.0).state_dict().keys() == text_model().state_dict().keys()


def test_text_conditional_loss_matches_record():
    assert_replayed("text_train_loss")


def test_schedule_buffers_match_record():
    assert_replayed("noise_schedule")


def test_predict_start_from_noise_inverts_q_sample():
    model = text_model()
    x, noise, t = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8), torch.tensor([3, 90])
    assert_close(model.predict_start_from_noise(model.q_sample(x, t, noise), t, noise), x, 1e-5)
    mean, variance, log_variance = model.q_mean_variance(x, t)
    assert_close(model.q_sample(x, t, torch.zeros_like(x)), mean, 1e-6)
    assert_close(variance.log(), log_variance, 1e-4)


# -- state -----------------------------------------------------------------------------------------------------


def test_scale_factor_is_a_buffer_only_with_scale_by_std():
    assert "scale_factor" not in text_model(scale_factor=0.5).state_dict()
    assert "scale_factor" in text_model(scale_by_std=True).state_dict()


def test_schedule_stays_in_float32():
    model = text_model(scale_by_std=True)
    before = model.alphas_cumprod.clone()
    model.to(torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert torch.equal(model.alphas_cumprod, before)
    assert model.scale_factor.dtype == torch.float32


def test_bfloat16_and_channels_last_match_float32():
    model = text_model().eval()
    options = {"verbose": False, "x_T": torch.ones(2, 3, 8, 8)}
    reference, _ = model.sample_log(empty_text_conditioning(model), 2, True, 3, **options)
    images = model.decode_first_stage(reference)
    model.to(torch.bfloat16).to(memory_format=torch.channels_last)
    sample, _ = model.sample_log(empty_text_conditioning(model), 2, True, 3, **options)
    assert sample.dtype == torch.float32
    assert_close(sample, reference, 5e-2)
    assert_close(model.decode_first_stage(sample).float(), images, 5e-2)


def empty_text_conditioning(model):
    return model.get_learned_conditioning(["", ""])


def test_update_ema_and_ema_scope():
    model = text_model(use_ema=True)
    weight = model.model.diffusion_model.out[2].weight
    average = model.model_ema.diffusion_modelout2weight
    model.model_ema.restart(model.model)
    old = weight.detach().clone()
    with torch.no_grad():
        weight += 1
    model.update_ema()
    assert_close(average, old + 9 / 11, 1e-5)  # the decay of the first update is 2/11
    with model.ema_scope():
        assert_close(weight, old + 9 / 11, 1e-5)
    assert_close(weight, old + 1, 1e-6)


def test_checkpoint_without_ema_restarts_it(tmp_path):
    path = tmp_path / "model.ckpt"
    source = text_model()
    torch.save({"state_dict": source.state_dict()}, path)
    model = instantiate_from_config(text_config(use_ema=True, ckpt_path=str(path)))
    live = dict(model.model.named_parameters())
    for name, buffer in model.model_ema.m_name2s_name.items():
        assert torch.equal(getattr(model.model_ema, buffer), live[name])


def test_ignore_keys_loads_part_of_another_model(tmp_path):
    """A model with another conditioning keeps the initial values of its own parts and loads the rest."""
    path, other = tmp_path / "model.ckpt", text_config()
    other["params"]["cond_stage_config"]["params"]["vocab_size"] = 2600
    source = randomise(instantiate_from_config(other))
    torch.save({"state_dict": source.state_dict()}, path)
    with pytest.raises(UserError, match=r"shapes differ.*cond_stage_model"):
        text_model(ckpt_path=str(path))
    model = instantiate_from_config(text_config(ckpt_path=str(path), ignore_keys=["cond_stage_model."]))
    assert torch.equal(model.model.diffusion_model.out[2].weight, source.model.diffusion_model.out[2].weight)
    assert not any(
        torch.equal(a, b)
        for a, b in zip(model.cond_stage_model.parameters(), source.cond_stage_model.parameters(), strict=True)
        if a.dim() > 1
    )


# -- latents and conditioning ----------------------------------------------------------------------------------


def test_scale_by_std_uses_first_batch():
    model = text_model(scale_by_std=True)
    batch = text_batch()
    torch.manual_seed(3)
    model.before_training_batch(batch, is_first=True)
    torch.manual_seed(3)
    z = model.get_input(batch, "image")[0]
    assert z.std().item() == pytest.approx(1, abs=1e-4)
    scale = model.scale_factor.clone()
    model.before_training_batch(text_batch(1), is_first=False)
    assert torch.equal(model.scale_factor, scale)


def test_moments_in_batch_replace_images():
    model = text_model(scale_factor=0.5)
    batch = text_batch()
    moments = model.first_stage_model.encode(batch["image"].movedim(-1, 1)).parameters
    torch.manual_seed(1)
    z, c = model.get_input(batch, "image")
    torch.manual_seed(1)
    cached, c2 = model.get_input({"caption": batch["caption"], LATENT_KEY: moments}, "image")
    assert_close(cached, z, 1e-6)
    assert c == c2 == batch["caption"]


def test_cond_dropout_drops_captions_in_training_only():
    model = text_model(cond_dropout=0.25)
    captions = ["fox"] * 4000
    torch.manual_seed(0)
    dropped = model.drop_conditioning(captions).count("")
    assert dropped == pytest.approx(1000, abs=110)  # four standard deviations
    batch = {**text_batch(), "caption": ["fox", "rocket"]}
    assert model.eval().get_input(batch, "image")[1] == ["fox", "rocket"]


def test_no_cond_dropout_uses_no_random_numbers():
    model = text_model().train()
    batch = text_batch()
    torch.manual_seed(0)
    model.get_input(batch, "image")
    after = torch.rand(1)
    torch.manual_seed(0)
    torch.randn(2, 3, 8, 8)  # the sample of the posterior
    assert torch.equal(after, torch.rand(1))


def test_batches_with_key_txt_equal_batches_with_caption():
    batch = text_batch()
    txt_batch = {"image": batch["image"], "txt": batch["caption"]}
    images = []
    for key, each in (("caption", batch), ("txt", txt_batch)):
        model = text_model(cond_stage_key=key, cond_dropout=0.5, log_every_t=50).train()
        assert model.raw_conditioning(each) == batch["caption"]
        torch.manual_seed(0)
        loss, _ = model.shared_step(each)
        torch.manual_seed(0)
        images.append({"loss": loss, **model.eval().log_images(each, N=2, n_row=1, ddim_steps=1)})
    assert images[0].keys() == images[1].keys() >= {"conditioning", "samples"}
    assert all(torch.equal(image, images[1][name]) for name, image in images[0].items())


@pytest.mark.parametrize("class_names", [["cat", "dog"], "imagenet", "names.txt", ()])
def test_class_names_are_stored_as_given(class_names):
    model = text_model(class_names=class_names)
    assert model.class_names == class_names and type(model.class_names) is type(class_names)
    assert model.state_dict().keys() == text_model().state_dict().keys()


def test_dropped_maps_are_zero():
    torch.manual_seed(0)
    maps = text_model(cond_dropout=0.5).drop_conditioning(torch.ones(8, 2, 4, 4))
    assert set(maps.sum(dim=(1, 2, 3)).tolist()) == {0.0, 32.0}


def test_missing_batch_entry_raises_user_error():
    batch = {"image": torch.zeros(1, 16, 16, 3), "captions": ["fox"]}
    with pytest.raises(UserError, match='returns no "caption" \\(did you mean "captions"'):
        text_model().get_input(batch, "image")


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"parameterization": "x_0"}, 'did you mean "x0"'),
        ({"loss_type": "l3"}, "choose one of l1, l2"),
        ({"min_snr_gamma": -5}, "min_snr_gamma must be above 0"),
        ({"conditioning_key": "crosattn"}, 'did you mean "crossattn"'),
        ({"beta_schedule": "cosin"}, 'did you mean "cosine"'),
        ({"cond_dropout": 1.5}, "cond_dropout must lie in"),
        ({"cond_stage_keys": "caption"}, 'no parameter "cond_stage_keys" \\(did you mean "cond_stage_key"'),
    ],
)
def test_wrong_parameters_raise_user_error(params, message):
    with pytest.raises(UserError, match=message):
        instantiate_from_config(text_config(**params))


def test_num_timesteps_cond_sets_cond_ids():
    model = text_model(num_timesteps_cond=5)
    assert model.shorten_cond_schedule
    assert model.cond_ids[:5].tolist() == [0, 25, 50, 74, 99]
    assert (model.cond_ids[5:] == 99).all()


@pytest.mark.parametrize("params", [{}, {"parameterization": "v", "min_snr_gamma": 5.0}])
def test_training_lowers_the_loss_of_a_batch(params):
    model = text_model(**params).train()
    batch = text_batch()
    optimizer = torch.optim.AdamW(model.optimizer_parameters(), lr=2e-3)
    losses = []
    for _ in range(30):
        torch.manual_seed(0)  # the same noise and timesteps, so that the loss must decrease
        loss, _ = model.shared_step(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


# -- shapes ----------------------------------------------------------------------------------------------------


def test_sides_that_the_unet_cannot_halve_raise_user_error():
    """Images of 18 pixels have latents of 9 positions."""
    batch = {"image": torch.zeros(1, 18, 16, 3), "caption": ["fox"]}
    with pytest.raises(UserError, match=r"images of 18 x 16 pixels do not fit the U-Net.* multiples of 4;"):
        text_model().shared_step(batch)
    pixels = instantiate_from_config(pixel_config())
    with pytest.raises(UserError, match=r"images of 8 x 9 pixels do not fit the U-Net.* multiples of 2;"):
        pixels.shared_step({"image": torch.zeros(1, 8, 9, 3)})


@pytest.mark.parametrize("channels", [1, 4])
def test_channels_that_a_network_does_not_take_raise_user_error(channels):
    batch = {"image": torch.zeros(1, 16, 16, channels), "caption": ["fox"]}
    with pytest.raises(UserError, match=rf"the first stage takes 3 channels and gets {channels}; change ddconfig.in_"):
        text_model().shared_step(batch)
    pixels = instantiate_from_config(pixel_config())
    with pytest.raises(UserError, match=rf"the U-Net takes 3 channels and gets {channels}; change in_channels"):
        pixels.shared_step({"image": torch.zeros(1, 8, 8, channels)})


def test_concatenated_conditioning_that_does_not_fit_raises_user_error():
    model = instantiate_from_config(superresolution_config())
    batch = {"image": torch.zeros(1, 16, 16, 3), "LR_image": torch.zeros(1, 8, 8, 3)}
    model.shared_step(batch)
    with pytest.raises(UserError, match="the conditioning is a map of 4 x 8 and the model works on 8 x 8; change"):
        model.shared_step({**batch, "LR_image": torch.zeros(1, 4, 8, 3)})
    with pytest.raises(UserError, match="the U-Net takes 2 channels and gets 3"):
        model.shared_step({**batch, "LR_image": torch.zeros(1, 8, 8, 4)})


# -- previews --------------------------------------------------------------------------------------------------


def test_log_images_returns_requested_previews():
    model = text_model(log_every_t=50).eval()
    images = model.log_images(
        text_batch(), N=2, n_row=2, ddim_steps=2, plot_denoise_rows=True, unconditional_guidance_scale=2.0
    )
    assert set(images) == {
        "inputs", "reconstruction", "conditioning", "diffusion_row", "samples", "samples_guided", "denoise_row",
        "mask", "samples_inpainting", "samples_outpainting", "progressive_row",
    }  # fmt: skip
    assert torch.equal(images["inputs"], text_batch()["image"].movedim(-1, 1))
    assert images["samples"].shape == (2, 3, 16, 16)
    assert images["diffusion_row"].shape == (3, 32, 48)  # 2 items × timesteps 0, 50, 99
    assert images["denoise_row"].shape == (3, 32, 48)  # 2 items × the start and grid indices 1, 0
    assert images["progressive_row"].shape == (3, 32, 48)  # 2 items × timesteps 99, 50, 0


def test_log_images_of_pixel_model_returns_rows():
    torch.manual_seed(0)
    model = randomise(instantiate_from_config(pixel_config(log_every_t=50))).eval()
    images = model.log_images({"image": torch.zeros(3, 8, 8, 3)}, N=3, n_row=2)
    assert {name: tuple(image.shape) for name, image in images.items()} == {
        "inputs": (3, 3, 8, 8),
        "diffusion_row": (3, 16, 24),
        "samples": (3, 3, 8, 8),
        "denoise_row": (3, 24, 32),
    }


def test_as_rows_puts_items_in_rows_and_batches_in_columns():
    columns = [torch.randn(2, 3, 4, 5) for _ in range(3)]
    expected = torch.cat([torch.cat([column[b] for column in columns], dim=2) for b in range(2)], dim=1)
    assert torch.equal(as_rows(columns), expected)


def test_return_keys_selects_previews():
    assert set(text_model().eval().log_images(text_batch(), return_keys=["inputs"], ddim_steps=1)) == {"inputs"}


def test_previews_use_at_most_the_timesteps_of_the_model(monkeypatch):
    """The default of 200 DDIM steps suits models of 1000 timesteps."""
    model = text_model(timesteps=3).eval()
    counts = []

    def sample_log(cond, batch_size, ddim, ddim_steps, **options):
        counts.append(ddim_steps)
        return torch.zeros(batch_size, 3, 8, 8), {}

    monkeypatch.setattr(model, "sample_log", sample_log)
    for options in ({}, {"ddim_steps": 2}, {"ddim_steps": None}):
        model.log_images(text_batch(), inpaint=False, plot_progressive_rows=False, **options)
    assert counts == [3, 2, None]


def test_previews_of_a_model_with_few_timesteps():
    images = text_model(timesteps=3).eval().log_images(text_batch(), N=1)
    assert images["samples"].shape == (1, 3, 16, 16)


@pytest.mark.parametrize("ddim_steps", [20, None])
def test_previews_inpaint_center_and_outpaint_border(ddim_steps):
    """An exact denoiser of pixels that are mostly 1 fills the masked region of an image of -1 with 1."""
    model = text_model().eval()
    log_odds = 3.5  # a share of exp(-7) of the pixels is -1

    def apply_model(x, t, cond=None):
        alpha = model.alphas_cumprod[t].reshape(-1, 1, 1, 1)
        x_start = torch.tanh(alpha.sqrt() * x / (1 - alpha) + log_odds)
        return (x - alpha.sqrt() * x_start) / (1 - alpha).sqrt()

    latents = -torch.ones(2, 3, 8, 8)
    model.apply_model, model.decode_first_stage = apply_model, lambda z: z
    model.get_input = lambda *_, **__: (latents, None, latents, latents, None)
    torch.manual_seed(0)
    images = model.log_images(
        {}, ddim_steps=ddim_steps, sample=False, plot_progressive_rows=False, plot_diffusion_rows=False
    )
    middle = torch.zeros(8, 8, dtype=torch.bool)
    middle[2:6, 2:6] = True
    inpainted, outpainted = images["samples_inpainting"], images["samples_outpainting"]
    for generated in (inpainted[..., middle], outpainted[..., ~middle]):
        assert (generated > 0.8).float().mean() > 0.95
    for known in (inpainted[..., ~middle], outpainted[..., middle]):
        assert (known < -0.8).all()
    assert (images["mask"][..., middle] == -1).all() and (images["mask"][..., ~middle] == 1).all()


def test_colours_of_maps_are_deterministic():
    maps = torch.rand(1, 7, 4, 4)
    torch.manual_seed(0)
    images, random = in_random_colours(maps), torch.rand(1)
    torch.manual_seed(0)
    assert torch.equal(torch.rand(1), random)  # the global generator is not used
    assert torch.equal(in_random_colours(maps), images)
    assert tuple(float(v) for v in images.aminmax()) == (-1, 1)


def test_class_model_drops_labels_in_training():
    classes = {"target": "ldm.modules.encoders.modules.ClassEmbedder", "params": {"embed_dim": 32, "n_classes": 11}}
    classes["params"]["key"] = "class_label"
    model = text_model(cond_stage_config=classes, cond_stage_key="class_label", cond_dropout=0.5).train()
    batch = {**text_batch(), "class_label": torch.tensor([2, 7])}
    loss, _ = model.shared_step(batch)
    assert loss.isfinite()
    labels = model.drop_conditioning({"class_label": torch.arange(10).repeat(40)})["class_label"]
    assert (labels == 10).float().mean().item() == pytest.approx(0.5, abs=0.1)


def test_load_only_unet_loads_denoising_network_only(tmp_path):
    source = text_model()
    torch.save({"state_dict": source.state_dict()}, tmp_path / "model.ckpt")
    torch.manual_seed(9)
    model = instantiate_from_config(text_config(ckpt_path=str(tmp_path / "model.ckpt"), load_only_unet=True))
    name = "model.diffusion_model.out.2.weight"
    assert torch.equal(model.state_dict()[name], source.state_dict()[name])
    name = "first_stage_model.quant_conv.weight"
    assert not torch.equal(model.state_dict()[name], source.state_dict()[name])


# -- layouts ---------------------------------------------------------------------------------------------------


def layout_model(**params):
    torch.manual_seed(0)
    config = layout_config()
    config = {"target": "ldm.models.diffusion.ddpm.Layout2ImgDiffusion", "params": {**config["params"], **params}}
    return randomise(instantiate_from_config(config))


def layout_batch(model):
    boxes = [[Box(1, (0.0, 0.0, 0.5, 1.0)), Box(7, (0.25, 0.5, 1.0, 1.0))], []]
    tokens = torch.stack([model.layout_tokens.encode(b, 11) for b in boxes])
    return {"image": text_batch()["image"], "coordinates_bbox": tokens}


def test_layout_model_trains_and_depends_on_boxes():
    model = layout_model(cond_dropout=0.1).train()
    batch = layout_batch(model)
    loss, _ = model.shared_step(batch)
    loss.backward()
    assert grad_norm(model.cond_stage_model) > 0
    model.eval()
    c = model.get_learned_conditioning(batch["coordinates_bbox"])
    assert c.shape == (2, 11, 32)
    noise = torch.randn(1, 3, 8, 8)
    with_boxes, without = (model.sample_log(c[i : i + 1], 1, True, 3, x_T=noise, verbose=False)[0] for i in (0, 1))
    assert relative_error(with_boxes, without) > 1e-3


def test_dropped_layouts_have_no_boxes():
    model = layout_model(cond_dropout=0.5).train()
    tokens = layout_batch(model)["coordinates_bbox"][:1].repeat(200, 1)
    torch.manual_seed(0)
    boxes = [len(model.layout_tokens.decode(layout)) for layout in model.drop_conditioning(tokens)]
    assert set(boxes) == {0, 2}
    assert boxes.count(0) == pytest.approx(100, abs=28)  # four standard deviations


def test_layout_previews_show_boxes_with_labels():
    model = layout_model(class_names=["cat", "dog"], log_every_t=50).eval()
    batch = layout_batch(model)
    assert [model.class_name(label) for label in (1, 7)] == ["dog", "7"]
    assert layout_model(class_names="names.txt").class_name(1) == "1"
    images = model.log_images(batch, N=2, n_row=1, ddim_steps=1, unconditional_guidance_scale=2.0)
    assert {"samples", "samples_guided", "bbox_image"} <= images.keys()
    expected = draw_boxes((16, 16), [(0, 0, 0.5, 1), (0.25, 0.5, 1, 1)], ["dog", "7"], 8)
    assert torch.equal(images["bbox_image"], torch.stack([expected, torch.ones(3, 16, 16)]))
    assert set(model.log_images(batch, N=1, ddim_steps=1, return_keys=["bbox_image"])) == {"bbox_image"}


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"cond_stage_key": "caption"}, 'needs the cond_stage_key "coordinates_bbox", not "caption"'),
        ({"cond_stage_config": "__is_unconditional__"}, "reads tokens"),
        ({"cond_stage_config": text_config()["params"]["cond_stage_config"]}, "reads tokens"),
    ],
)
def test_layout_model_requires_layouts(params, message):
    with pytest.raises(UserError, match=message):
        layout_model(**params)
