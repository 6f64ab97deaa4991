"""Tests of the first stages: recorded outputs, state-dict names, training and previews."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from parity_replay import assert_replayed

from ldm.errors import UserError
from ldm.models.autoencoder import AutoencoderKL, IdentityFirstStage, VQModel, VQModelInterface

ROOT = Path(__file__).resolve().parents[2]
DDCONFIG = {
    "z_channels": 3,
    "resolution": 16,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 32,
    "ch_mult": [1, 1],
    "num_res_blocks": 1,
    "attn_resolutions": [],
    "double_z": False,
}
NO_LOSS = {"target": "torch.nn.Identity"}
BARE = {"disc_start": 0, "perceptual_weight": 0.0, "disc_factor": 0.0}


def kl_model(lossconfig=NO_LOSS, ddconfig=DDCONFIG, **options) -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL({**ddconfig, "double_z": True}, lossconfig, embed_dim=2, **options)


def vq_model(cls=VQModel, lossconfig=NO_LOSS, ddconfig=DDCONFIG, **options) -> VQModel:
    torch.manual_seed(0)
    model = cls(ddconfig=ddconfig, lossconfig=lossconfig, n_embed=16, embed_dim=2, **options)
    if "ckpt_path" not in options:
        torch.nn.init.normal_(model.quantize.embedding.weight)  # wide enough to use every entry
    return model


def kl_loss(**options) -> dict:
    return {"target": "ldm.modules.losses.LPIPSWithDiscriminator", "params": {**BARE, **options}}


def vq_loss(**options) -> dict:
    params = {**BARE, "n_classes": 16, **options}
    return {"target": "ldm.modules.losses.vqperceptual.VQLPIPSWithDiscriminator", "params": params}


def batch(size: int = 16, channels: int = 3) -> dict[str, torch.Tensor]:
    return {"image": torch.rand(2, size, size, channels, generator=torch.Generator().manual_seed(1)) * 2 - 1}


# Recorded outputs


def test_autoencoder_kl_matches_record():
    assert_replayed("autoencoder_kl")


@pytest.mark.parametrize("name", ["vq_interface", "vq_interface_no_attention", "vq_interface_linear_attention"])
def test_vq_interface_matches_record(name):
    assert_replayed(name)


def test_vq_model_matches_record():
    assert_replayed("vq_model")


# Building


def test_unknown_ddconfig_key_raises_user_error():
    with pytest.raises(UserError, match='"attn_typ" \\(did you mean "attn_type"'):
        kl_model(ddconfig={**DDCONFIG, "attn_typ": "none"})


def test_autoencoder_kl_requires_double_z():
    with pytest.raises(UserError, match="double_z: true"):
        AutoencoderKL(DDCONFIG, NO_LOSS, embed_dim=2)


def test_defaults_match_published_ones():
    model = vq_model(lr_g_factor=2.0, scheduler_config={"target": "x"}, monitor="val/rec_loss")
    assert (model.learning_rate, model.lr_g_factor, model.monitor) == (4.5e-6, 2.0, "val/rec_loss")
    assert model.scheduler_config == {"target": "x"}
    model = kl_model()
    assert (model.learning_rate, model.lr_g_factor, model.scheduler_config) == (4.5e-6, 1.0, None)
    assert model.image_key == "image"
    assert model.device == torch.device("cpu")


@pytest.mark.parametrize("make", [kl_model, vq_model])
def test_checkpoint_loads_weights_except_ignored_keys(make, tmp_path):
    source = make()
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.add_(0.1)
    path = tmp_path / "model.ckpt"
    torch.save({"state_dict": source.state_dict()}, path)
    loaded = make(ckpt_path=path)
    for name, value in source.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], value)
    partial = make(ckpt_path=path, ignore_keys=["decoder"])
    assert torch.equal(partial.encoder.conv_in.weight, source.encoder.conv_in.weight)
    assert torch.equal(partial.decoder.conv_in.weight, make().decoder.conv_in.weight)


def test_missing_checkpoint_raises_user_error(tmp_path):
    with pytest.raises(UserError, match=r"absent.ckpt"):
        kl_model(ckpt_path=tmp_path / "absent.ckpt")


# Encoding and decoding


def test_kl_forward_samples_the_posterior():
    model, x = kl_model().eval(), torch.rand(2, 3, 16, 16)
    torch.manual_seed(3)
    reconstruction, posterior = model(x)
    torch.manual_seed(3)
    torch.testing.assert_close(reconstruction, model.decode(posterior.sample()))
    torch.testing.assert_close(model(x, sample_posterior=False)[0], model.decode(posterior.mode()))
    assert posterior.mean.shape == (2, 2, 8, 8)


def test_vq_encode_decode_and_decode_code_agree():
    model, x = vq_model(sane_index_shape=True).eval(), torch.rand(2, 3, 16, 16)
    reconstruction, loss, indices = model(x, return_pred_indices=True)
    quantized, same_loss, (_, _, same_indices) = model.encode(x)
    torch.testing.assert_close(loss, same_loss)
    assert torch.equal(indices, same_indices)
    torch.testing.assert_close(model.decode(quantized), reconstruction)
    torch.testing.assert_close(model.decode_code(indices), reconstruction)
    torch.testing.assert_close(model.quantize(model.encode_to_prequant(x))[0], quantized)
    assert len(model(x)) == 2
    with pytest.raises(ValueError, match=r"\(B, h, w\)"):
        model.decode_code(indices.flatten())


def test_vq_interface_matches_vq_model():
    x = torch.rand(2, 3, 16, 16)
    model, interface = vq_model().eval(), vq_model(VQModelInterface).eval()
    torch.testing.assert_close(interface.encode(x), model.encode_to_prequant(x))
    torch.testing.assert_close(interface.decode(interface.encode(x)), model(x)[0])
    torch.testing.assert_close(interface(x)[0], model(x)[0])
    quantized = interface.quantize(interface.encode(x))[0]
    torch.testing.assert_close(interface.decode(quantized, force_not_quantize=True), model(x)[0])


@pytest.mark.parametrize("make", [kl_model, vq_model])
def test_half_precision_and_channels_last_match_float32(make):
    model, x = make().eval(), torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        torch.manual_seed(0)
        expected = model(x)[0]
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16):
            assert F.mse_loss(model(x)[0].float(), expected) < 5e-2
        torch.manual_seed(0)
        model.to(memory_format=torch.channels_last)
        last = model(x.to(memory_format=torch.channels_last))[0]
        torch.testing.assert_close(last, expected, rtol=1e-4, atol=1e-4)
        assert last.is_contiguous(memory_format=torch.channels_last)
        assert model.to(torch.bfloat16)(x.to(torch.bfloat16))[0].dtype is torch.bfloat16


def test_identity_first_stage_returns_its_input():
    x = torch.rand(1, 3, 4, 4)
    identity = IdentityFirstStage(embed_dim=3, ddconfig={})
    assert identity.encode(x) is identity.decode(x, True) is identity.quantize(x) is identity(x) is x
    assert IdentityFirstStage(vq_interface=True).quantize(x) == (x, None, [None, None, None])


# Batches


def test_get_input_returns_float32_channels_first():
    model = kl_model()
    images = batch()["image"]
    x = model.get_input({"image": images.double()}, "image")
    torch.testing.assert_close(x, images.permute(0, 3, 1, 2).contiguous())
    assert x.dtype is torch.float32
    assert x.is_contiguous()
    assert model.get_input({"mask": images[..., 0]}, "mask").shape == (2, 1, 16, 16)


def test_batches_are_resized_within_batch_resize_range():
    model = vq_model(batch_resize_range=(16, 48))
    np.random.seed(0)
    sizes = [model.get_input(batch(), "image").shape[2:] for _ in range(60)]
    assert all(height == width for height, width in sizes)
    assert sizes[:5] == [(48, 48)] * 5  # the largest first
    assert {height for height, _ in sizes[5:]} == {16, 32, 48}


def test_to_rgb_converts_segmentation_maps_to_colours():
    model = kl_model(ddconfig={**DDCONFIG, "in_channels": 5, "out_ch": 5}, colorize_nlabels=5, image_key="segmentation")
    labels = F.one_hot(torch.arange(16).view(1, 4, 4) % 5, 5).permute(0, 3, 1, 2).float()
    colours = model.to_rgb(labels)
    assert colours.shape == (1, 3, 4, 4)
    assert colours.aminmax() == (-1.0, 1.0)
    assert model.to_rgb(labels[:, :, :1, :1]).isfinite().all()
    assert torch.equal(colours[0, :, 0, 0], colours[0, :, 1, 1])  # labels 0 and 5 % 5
    assert "colorize" in model.state_dict()
    log = model.log_images({"segmentation": torch.rand(1, 16, 16, 5)})
    assert {image.shape for image in log.values()} == {(1, 3, 16, 16)}
    del model.colorize
    assert torch.equal(model.to_rgb(labels), model.to_rgb(labels))  # fixed colours


def test_log_images_returns_inputs_and_reconstructions():
    model = kl_model().eval()
    assert list(model.log_images(batch(), only_inputs=True)) == ["inputs"]
    torch.manual_seed(4)
    log = model.log_images(batch(), split="val")
    assert list(log) == ["samples", "reconstructions", "inputs"]
    torch.testing.assert_close(log["inputs"], batch()["image"].permute(0, 3, 1, 2))
    torch.manual_seed(4)
    torch.testing.assert_close(log["reconstructions"], model(log["inputs"])[0])

    model = vq_model().eval()
    assert list(model.log_images(batch(), only_inputs=True)) == ["inputs"]
    log = model.log_images(batch())
    assert list(log) == ["inputs", "reconstructions"]
    torch.testing.assert_close(log["reconstructions"], model(log["inputs"])[0])
    assert not log["reconstructions"].requires_grad


# Training


def names_of(model, parameters) -> set[str]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(parameter)].split(".")[0] for parameter in parameters}


def test_optimizer_parameters_of_autoencoder_and_discriminator():
    for model, own in (
        (kl_model(kl_loss(disc_factor=1.0)), {"encoder", "decoder", "quant_conv", "post_quant_conv"}),
        (
            vq_model(lossconfig=vq_loss(disc_factor=1.0)),
            {"encoder", "decoder", "quantize", "quant_conv", "post_quant_conv"},
        ),
    ):
        generator, discriminator = model.optimizer_parameters()
        assert names_of(model, generator) == own
        everything = [name for name, _ in model.named_parameters() if name.split(".")[0] in own]
        assert len(generator) == len(everything)
        assert {id(p) for p in discriminator} == {id(p) for p in model.loss.discriminator.parameters()}
    assert kl_model(kl_loss()).optimizer_parameters()[1] == []
    assert kl_model().optimizer_parameters()[1] == []


def test_freeze_encoder_trains_decoder_and_keeps_latents():
    model = kl_model(kl_loss(), freeze_encoder=True)
    assert list(model.state_dict()) == list(kl_model(kl_loss()).state_dict())
    generator, _ = model.optimizer_parameters()
    assert names_of(model, generator) == {"decoder", "post_quant_conv"}
    x = model.get_input(batch(), "image")
    latents, images = model.encode(x).mode(), model(x, sample_posterior=False)[0]
    optimizer = torch.optim.Adam(generator, lr=3e-3)
    model.adversarial_loss(model.reconstruct(batch()), 0, 0)[0].backward()
    optimizer.step()
    assert torch.equal(model.encode(x).mode(), latents)
    assert not torch.equal(model(x, sample_posterior=False)[0], images)


def test_training_without_loss_raises_user_error():
    for lossconfig in (NO_LOSS, {"target": "ldm.modules.losses.contperceptual.DummyLoss"}):
        model = kl_model(lossconfig)
        rec = model.reconstruct(batch())
        with pytest.raises(UserError, match="lossconfig"):
            model.adversarial_loss(rec, 0, 0)


@pytest.mark.parametrize("make", [kl_model, vq_model])
def test_images_that_the_first_stage_cannot_reconstruct_raise_user_error(make):
    model = make()
    with pytest.raises(UserError, match=r"images of 17 x 17 pixels do not fit the first stage.* multiples of 2;"):
        model.reconstruct(batch(17))
    with pytest.raises(UserError, match=r"the first stage takes 3 channels and gets 1; change ddconfig\.in_channels"):
        model.reconstruct(batch(channels=1))


@pytest.mark.parametrize(("make", "loss"), [(kl_model, kl_loss), (vq_model, vq_loss)], ids=["kl", "vq"])
@pytest.mark.parametrize(
    ("channels", "options", "message"),
    [
        ((1, 1), {"disc_factor": 1.0}, "the discriminator takes 3 channels, .* have 1; set disc_in_channels: 1 in"),
        ((3, 1), {}, r"the first stage maps 3 channels to 1; set ddconfig\.out_ch"),
        ((2, 2), {"perceptual_weight": 1.0}, "takes 1 or 3 channels, and the images have 2; set perceptual_weight: 0"),
        ((3, 3), {"disc_factor": 1.0, "disc_conditional": True}, "set disc_conditional: false"),
    ],
)
def test_loss_for_other_images_raises_user_error(make, loss, channels, options, message):
    ddconfig = {**DDCONFIG, "in_channels": channels[0], "out_ch": channels[1]}
    model = make(lossconfig=loss(**options), ddconfig=ddconfig)
    with pytest.raises(UserError, match=message):
        model.adversarial_loss(model.reconstruct(batch(channels=channels[0])), 0, 0)


def test_images_too_small_for_the_perceptual_network_raise_user_error():
    model = kl_model(kl_loss(perceptual_weight=1.0))
    with pytest.raises(UserError, match=r"images of 8 x 8 pixels are too small .* needs 16 x 16; set perceptual"):
        model.adversarial_loss(model.reconstruct(batch(8)), 0, 0)


def test_images_of_one_channel_are_trained_with_their_discriminator():
    options = {"disc_factor": 1.0, "disc_in_channels": 1, "disc_num_layers": 1}
    model = kl_model(kl_loss(**options), ddconfig={**DDCONFIG, "in_channels": 1, "out_ch": 1})
    rec = model.reconstruct(batch(channels=1))
    assert all(model.adversarial_loss(rec, index, 0)[0].isfinite() for index in (0, 1))


@pytest.mark.parametrize(("make", "loss"), [(kl_model, kl_loss), (vq_model, vq_loss)], ids=["kl", "vq"])
def test_training_lowers_the_loss(make, loss):
    model = make(lossconfig=loss(disc_factor=1.0, disc_start=15, disc_num_layers=1))
    generator, discriminator = model.optimizer_parameters()
    optimizers = [torch.optim.Adam(group, lr=3e-3, betas=(0.5, 0.9)) for group in (generator, discriminator)]
    history = []
    for step in range(20):
        rec = model.reconstruct(batch())
        for index, optimizer in enumerate(optimizers):
            value, log = model.adversarial_loss(rec, index, step)
            model.zero_grad()
            value.backward()
            optimizer.step()
            if index == 0:
                history.append(float(log["train/rec_loss"]))
    assert history[-1] < 0.8 * history[0]


def test_log_keys_start_with_split():
    model = vq_model(lossconfig=vq_loss()).eval()
    with torch.no_grad():
        _, log = model.adversarial_loss(model.reconstruct(batch()), 0, 0, split="val")
    assert all(key.startswith("val/") for key in log)
    assert {"val/perplexity", "val/rec_loss"} <= set(log)


def test_same_seed_gives_same_loss():
    values = []
    for _ in range(2):
        model = kl_model(kl_loss())
        torch.manual_seed(9)
        values.append(model.adversarial_loss(model.reconstruct(batch()), 0, 0)[0])
    assert torch.equal(*values)


def test_ema_scope_uses_averaged_weights(caplog):
    caplog.set_level("DEBUG", logger="ldm.modules.ema")
    model = vq_model(use_ema=True).eval()
    assert "model_ema.decoderconv_outweight" in model.state_dict()
    x = batch()["image"].permute(0, 3, 1, 2)
    with torch.no_grad():
        averaged = copy.deepcopy(model.decoder.conv_out.weight)
        model.decoder.conv_out.weight.add_(1.0)
        after = model(x)[0]
        with model.ema_scope("a test"):
            before = model(x)[0]
            assert torch.equal(model.decoder.conv_out.weight, averaged)
        assert caplog.messages == ["a test: using the averaged weights"]
        torch.testing.assert_close(model(x)[0], after)
        log = model.log_images(batch(), plot_ema=True)
    assert list(log) == ["inputs", "reconstructions", "reconstructions_ema"]
    torch.testing.assert_close(log["reconstructions"], after, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(log["reconstructions_ema"], before, rtol=1e-4, atol=1e-4)
    model.update_ema()
    moved = dict(model.model_ema.named_buffers())["decoderconv_outweight"]
    # The first update has the decay (1 + 1) / (10 + 1).
    torch.testing.assert_close(moved, averaged + (1 - 2 / 11))


def test_ema_scope_without_ema_does_nothing():
    model = vq_model()
    weight = model.decoder.conv_out.weight.clone()
    model.update_ema()
    with model.ema_scope():
        assert torch.equal(model.decoder.conv_out.weight, weight)
    assert not any(name.startswith("model_ema") for name in model.state_dict())
