"""Published functions, layers and networks that the package itself does not use."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from ldm.models.autoencoder import AutoencoderKL
from ldm.modules import attention
from ldm.modules.attention import CrossAttention, MemoryEfficientCrossAttention, SpatialTransformer
from ldm.modules.diffusionmodules import model, openaimodel, unet_blocks
from ldm.modules.diffusionmodules.openaimodel import EncoderUNetModel, ResBlock, UNetModel
from ldm.modules.diffusionmodules.util import CheckpointFunction, timestep_embedding

PLAIN = {"num_res_blocks": 1, "attn_resolutions": [8], "ch": 32, "resolution": 16}
TINY_UNET = {"image_size": 8, "in_channels": 3, "model_channels": 32, "out_channels": 3, "num_res_blocks": 1}
TINY_UNET |= {"attention_resolutions": [2], "channel_mult": [1, 2], "num_heads": 4, "dropout": 0.1}


def test_helpers_of_attention_compute_what_their_names_say():
    assert attention.exists(0) and not attention.exists(None)
    assert attention.default(None, 3) == 3 and attention.default(2, 3) == 2 and attention.default(None, lambda: 4) == 4
    assert list(attention.uniq([3, 1, 3, 2, 1])) == [3, 1, 2]
    assert attention.max_neg_value(torch.zeros((), dtype=torch.float16)) == -65504.0
    torch.manual_seed(0)
    weight = attention.init_(torch.zeros(400, 100))
    assert weight.abs().max() <= 0.1 and abs(weight.std().item() - 0.1 / math.sqrt(3)) < 1e-3


def test_scale_of_attention_is_read_and_used():
    torch.manual_seed(0)
    layer = CrossAttention(16, context_dim=8, heads=2, dim_head=4)
    assert isinstance(layer, MemoryEfficientCrossAttention) and layer.scale == 0.5
    x, context = torch.randn(2, 5, 16), torch.randn(2, 3, 8)
    q, k, v = (
        part.view(2, -1, 2, 4).transpose(1, 2) for part in (layer.to_q(x), layer.to_k(context), layer.to_v(context))
    )
    for layer.scale in (0.5, 2.0):
        expected = (q @ k.transpose(-1, -2) * layer.scale).softmax(-1) @ v
        expected = layer.to_out(expected.transpose(1, 2).flatten(2))
        torch.testing.assert_close(layer(x, context), expected, rtol=0, atol=1e-5)


def test_spatial_transformer_takes_the_published_arguments():
    by_name = SpatialTransformer(
        32, 2, 16, context_dim=8, disable_self_attn=True, use_linear=True, use_checkpoint=False
    )
    by_position = SpatialTransformer(32, 2, 16, 1, 0.0, 8, True, True, False)
    for layer in (by_name, by_position):
        block = layer.transformer_blocks[0]
        assert isinstance(layer.proj_in, nn.Linear)
        assert block.disable_self_attn and not block.checkpoint and block.attn1.to_k.in_features == 8


@pytest.mark.parametrize("network", [UNetModel, EncoderUNetModel])
def test_networks_have_their_options_as_attributes(network):
    net = network(**TINY_UNET, num_heads_upsample=-1)
    options = {name: getattr(net, name) for name in TINY_UNET}
    assert options == TINY_UNET and net.num_heads_upsample == 4 and net.num_head_channels == -1
    assert net.dtype == torch.float32 and net.conv_resample and not net.use_checkpoint


def test_residual_blocks_have_published_attributes():
    block = ResBlock(32, 64, 0.1, out_channels=64, use_conv=True, down=True)
    assert (block.channels, block.emb_channels, block.out_channels, block.dropout) == (32, 64, 64, 0.1)
    assert block.updown and block.use_conv and isinstance(block.h_upd, unet_blocks.Downsample)
    assert isinstance(ResBlock(32, 64, 0.1).h_upd, nn.Identity) and not ResBlock(32, 64, 0.1).updown
    resize = openaimodel.Upsample(32, use_conv=True, out_channels=64)
    assert (resize.channels, resize.out_channels, resize.use_conv, resize.dims) == (32, 64, True, 2)


def test_timestep_layer_and_embedding():
    t = torch.tensor([0, 3, 999])
    assert torch.equal(openaimodel.Timestep(8)(t), timestep_embedding(t, 8))
    embedding = model.get_timestep_embedding(t, 7)
    assert embedding.shape == (3, 7) and embedding[:, 6].eq(0).all()
    torch.testing.assert_close(embedding[:, 0], t.float().sin())
    torch.testing.assert_close(embedding[:, 3], t.float().cos())
    torch.testing.assert_close(embedding[:, 2], (t / 10000).sin())


def test_modules_are_converted_to_half_precision_and_back():
    net = UNetModel(**TINY_UNET)
    net.input_blocks.apply(openaimodel.convert_module_to_f16)
    dtypes = {type(m): m.weight.dtype for m in net.input_blocks.modules() if isinstance(m, nn.Conv2d | nn.GroupNorm)}
    assert dtypes[nn.Conv2d] == torch.float16 and dtypes[next(t for t in dtypes if t is not nn.Conv2d)] == torch.float32
    net.input_blocks.apply(openaimodel.convert_module_to_f32)
    assert {parameter.dtype for parameter in net.parameters()} == {torch.float32}


def test_operations_of_attention_are_counted():
    layer = nn.Module()
    layer.total_ops = torch.DoubleTensor([5])
    output = torch.zeros(2, 3, 4, 4)
    openaimodel.QKVAttention.count_flops(layer, None, (output,))
    assert layer.total_ops.item() == 5 + 2 * 2 * 16**2 * 3
    openaimodel.count_flops_attn(layer, None, (output,))
    assert layer.total_ops.item() == 5 + 2 * 2 * 2 * 16**2 * 3


def test_checkpoint_function_has_the_gradients_of_the_function():
    torch.manual_seed(0)
    layer, frozen = nn.Linear(3, 3), nn.Parameter(torch.randn(3), requires_grad=False)
    x, steps = torch.randn(2, 3, requires_grad=True), torch.tensor([1, 2])

    def run(x, steps):
        return torch.nn.functional.relu(layer(x)) * frozen * steps[:, None]

    run(x, steps).square().sum().backward()
    expected = [x.grad.clone(), *(p.grad.clone() for p in layer.parameters())]
    for tensor in (x, *layer.parameters()):
        tensor.grad = None
    CheckpointFunction.apply(run, 2, x, steps, *layer.parameters(), frozen).square().sum().backward()
    for found, wanted in zip([x.grad, *(p.grad for p in layer.parameters())], expected, strict=True):
        assert torch.equal(found, wanted)


def test_encoder_and_decoder_have_published_attributes():
    shared = {**PLAIN, "ch_mult": [1, 2], "in_channels": 3, "out_ch": 3, "z_channels": 4}
    encoder, decoder = model.Encoder(**shared), model.Decoder(**shared)
    for net in (encoder, decoder):
        assert (net.ch, net.temb_ch, net.num_resolutions, net.num_res_blocks) == (32, 0, 2, 1)
        assert (net.resolution, net.in_channels) == (16, 3)
    assert encoder.in_ch_mult == (1, 1, 2) and decoder.z_shape == (1, 4, 8, 8) and decoder.last_z_shape is None
    decoder(torch.zeros(2, 4, 4, 4))
    assert decoder.last_z_shape == (2, 4, 4, 4)


def test_unet_of_images_depends_on_time_and_context():
    torch.manual_seed(0)
    net = model.Model(**PLAIN, out_ch=2, in_channels=5, ch_mult=[1, 2])
    x, context, t = torch.randn(2, 3, 16, 16), torch.randn(2, 2, 16, 16), torch.tensor([1, 900])
    out = net(x, t, context)
    assert out.shape == (2, 2, 16, 16) and net.get_last_layer() is net.conv_out.weight
    assert not torch.allclose(out, net(x, t + 1, context)) and not torch.allclose(out, net(x, t, context + 1))
    assert torch.equal(out, net(torch.cat([x, context], dim=1), t))
    names = {name.rpartition(".")[0] for name in net.state_dict()}
    assert {"temb.dense.1", "down.0.downsample.conv", "down.1.attn.0.q", "mid.attn_1.k", "up.1.upsample.conv"} <= names
    with pytest.raises(ValueError, match="needs the timesteps"):
        net(x, context=context)
    assert model.Model(**PLAIN, out_ch=2, in_channels=3, ch_mult=[1, 1], use_timestep=False)(x).shape == (2, 2, 16, 16)


def decoders():
    shared = {"num_res_blocks": 1, "attn_resolutions": [], "ch": 32, "ch_mult": [1, 2], "resolution": 16}
    return {
        "SimpleDecoder": (model.SimpleDecoder(32, 3), (32, 4, 4), (3, 8, 8)),
        "UpsampleDecoder": (model.UpsampleDecoder(32, 3, 32, 1, 16, ch_mult=(2, 1)), (32, 4, 4), (3, 8, 8)),
        "LatentRescaler": (model.LatentRescaler(1.5, 3, 32, 5), (3, 5, 4), (5, 8, 6)),
        "MergedRescaleEncoder": (
            model.MergedRescaleEncoder(3, out_ch=5, rescale_factor=0.5, **shared),
            (3, 16, 16),
            (5, 4, 4),
        ),
        "MergedRescaleDecoder": (
            model.MergedRescaleDecoder(32, out_ch=3, rescale_factor=2.0, **shared),
            (32, 4, 4),
            (3, 16, 16),
        ),
        "Upsampler": (model.Upsampler(4, 16, 32, 3), (32, 4, 4), (3, 16, 16)),
        "Resize": (model.Resize(3, learned=True), (3, 8, 8), (3, 4, 4)),
    }


@pytest.mark.parametrize("name", decoders())
def test_decoders_and_rescalers_have_their_sizes_and_gradients(name):
    net, size, expected = decoders()[name]
    out = net(torch.randn(2, *size))
    assert out.shape == (2, *expected)
    out.sum().backward()
    assert all(parameter.grad is not None for parameter in net.parameters())


def test_resize_interpolates():
    x = torch.randn(2, 3, 8, 8)
    assert model.Resize()(x) is x
    halved = nn.functional.interpolate(x, scale_factor=0.5, mode="bilinear", align_corners=False)
    assert torch.equal(model.Resize()(x, 0.5), halved)
    assert model.Resize(mode="nearest")(x, 2.0).shape == (2, 3, 16, 16)


@pytest.mark.parametrize("reshape", [False, True])
def test_processor_encodes_with_a_frozen_first_stage(reshape):
    ddconfig = {**PLAIN, "ch_mult": [1, 2], "in_channels": 3, "out_ch": 3, "z_channels": 4, "double_z": True}
    params = {"ddconfig": ddconfig, "lossconfig": {"target": "torch.nn.Identity"}, "embed_dim": 4}
    config = {"target": "ldm.models.autoencoder.AutoencoderKL", "params": params}
    net = model.FirstStagePostProcessor([1, 2], 4, reshape=reshape, pretrained_config=config)
    assert isinstance(net.pretrained_model, AutoencoderKL) and not net.pretrained_model.training
    out = net(torch.randn(2, 3, 16, 16))
    assert out.shape == ((2, 4, 64) if reshape else (2, 64, 2, 2))
    out.sum().backward()
    assert all(parameter.grad is None for parameter in net.pretrained_model.parameters())
    assert torch.equal(net(torch.ones(1, 3, 16, 16)), net(torch.ones(1, 3, 16, 16))), "the mode of the posterior"
    with pytest.raises(ValueError, match="pretrained_model or a pretrained_config"):
        model.FirstStagePostProcessor([1], 4)


def test_losses_take_the_published_arguments_by_position():
    from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
    from ldm.modules.losses import LPIPSWithDiscriminator

    loss = LPIPSWithDiscriminator(0, perceptual_weight=0.0, disc_num_layers=1)
    layer = nn.Conv2d(3, 3, 1)
    images, posterior = torch.rand(2, 3, 16, 16), DiagonalGaussianDistribution(torch.zeros(2, 2, 4, 4))
    value, log = loss(images, layer(images), posterior, 0, 1, layer.weight, None, "val")
    assert value.requires_grad and "val/d_weight" in log and log["val/d_weight"] > 0
    with pytest.raises(ValueError, match="needs last_layer"):
        loss.calculate_adaptive_weight(value, value)


def test_encoders_know_the_device_of_their_weights():
    from ldm.modules.encoders.modules import BERTEmbedder, SpatialRescaler, TransformerEmbedder

    encoder = BERTEmbedder(8, 1, vocab_size=10, max_seq_len=4, use_tokenizer=False, device="cuda")
    assert encoder.device == torch.device("cpu") == TransformerEmbedder(8, 1, 10).device
    assert encoder.to("meta").device == torch.device("meta")
    encoder.device = "elsewhere"
    assert encoder.device == "elsewhere"
    rescaler = SpatialRescaler(2, out_channels=5)
    x = torch.rand(1, 3, 8, 8)
    assert rescaler.remap_output and not SpatialRescaler().remap_output
    assert rescaler.interpolator(x, scale_factor=0.5).shape == (1, 3, 4, 4)
