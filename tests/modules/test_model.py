"""Tests of the layers of the encoder and the decoder against closed forms."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ldm.errors import UserError
from ldm.modules.diffusionmodules.model import (
    AttnBlock,
    Decoder,
    Downsample,
    Encoder,
    LinAttnBlock,
    Normalize,
    ResnetBlock,
    Upsample,
    make_attn,
    nonlinearity,
)

SMALL = {
    "ch": 32,
    "out_ch": 3,
    "ch_mult": (1, 2, 2),
    "num_res_blocks": 1,
    "attn_resolutions": [8],
    "in_channels": 3,
    "resolution": 16,
    "z_channels": 4,
}


def test_nonlinearity_is_swish():
    x = torch.linspace(-5, 5, 11)
    torch.testing.assert_close(nonlinearity(x), x * torch.sigmoid(x))


def test_normalize_has_the_published_options():
    norm = Normalize(64)
    assert (norm.num_groups, norm.eps, norm.affine) == (32, 1e-6, True)
    assert Normalize(64, num_groups=4).num_groups == 4


def test_channels_that_are_no_multiple_of_the_groups_raise_user_error():
    with pytest.raises(UserError, match=r"48 channels.*multiple of 32"):
        Encoder(**{**SMALL, "ch": 48})


def test_upsample_repeats_pixels(seed):
    x = torch.randn(1, 2, 3, 4)
    up = Upsample(2, with_conv=False)
    torch.testing.assert_close(up(x), x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3))
    with_conv = Upsample(2, with_conv=True)
    torch.testing.assert_close(with_conv(x), with_conv.conv(up(x)))


def test_downsample_pads_on_the_right_and_below(seed):
    x = torch.randn(1, 2, 6, 8)
    down = Downsample(2, with_conv=True)
    with torch.no_grad():
        # The kernel copies one corner of its window: output (i, j) is input (2i, 2j) or (2i + 2, 2j + 2).
        for corner, expected in ((0, x), (2, F.pad(x, (0, 2, 0, 2))[:, :, 2:, 2:])):
            nn.init.dirac_(down.conv.weight)
            down.conv.weight.copy_(down.conv.weight.roll((corner - 1, corner - 1), (2, 3)))
            down.conv.bias.zero_()
            torch.testing.assert_close(down(x), expected[:, :, ::2, ::2])


def test_downsample_without_convolution_averages(seed):
    x = torch.randn(1, 2, 4, 6)
    torch.testing.assert_close(Downsample(2, with_conv=False)(x), x.unfold(2, 2, 2).unfold(3, 2, 2).mean((-1, -2)))


def test_resnet_block_has_a_residual_connection(seed):
    x = torch.randn(2, 32, 4, 4)
    block = ResnetBlock(in_channels=32, dropout=0.0, temb_channels=0)
    expected = x + block.conv2(F.silu(block.norm2(block.conv1(F.silu(block.norm1(x))))))
    torch.testing.assert_close(block(x), expected)
    assert not any("shortcut" in name or "temb" in name for name in block.state_dict())


@pytest.mark.parametrize(("conv_shortcut", "name", "kernel"), [(False, "nin_shortcut", 1), (True, "conv_shortcut", 3)])
def test_resnet_block_projects_the_shortcut(conv_shortcut, name, kernel, seed):
    block = ResnetBlock(in_channels=32, out_channels=64, conv_shortcut=conv_shortcut, dropout=0.0, temb_channels=0)
    nn.init.zeros_(block.conv2.weight)
    nn.init.zeros_(block.conv2.bias)
    x = torch.randn(1, 32, 4, 4)
    assert getattr(block, name).kernel_size == (kernel, kernel)
    torch.testing.assert_close(block(x), getattr(block, name)(x))


def test_resnet_block_adds_the_embedding_between_the_convolutions(seed):
    block = ResnetBlock(in_channels=32, out_channels=64, dropout=0.0, temb_channels=5)
    x, temb = torch.randn(2, 32, 4, 4), torch.randn(2, 5)
    h = block.conv1(F.silu(block.norm1(x))) + block.temb_proj(F.silu(temb))[..., None, None]
    expected = block.nin_shortcut(x) + block.conv2(F.silu(block.norm2(h)))
    torch.testing.assert_close(block(x, temb), expected)


def test_dropout_is_active_in_training_only(seed):
    block = ResnetBlock(in_channels=32, dropout=0.5, temb_channels=0)
    x = torch.randn(1, 32, 4, 4)
    assert not torch.equal(block(x), block(x))
    block.eval()
    assert torch.equal(block(x), block(x))


def test_attention_matches_its_formula(seed):
    block = AttnBlock(32)
    x = torch.randn(2, 32, 3, 5)
    h = block.norm(x)
    q, k, v = (project(h).flatten(2) for project in (block.q, block.k, block.v))
    weights = torch.softmax(torch.einsum("bcn,bcm->bnm", q, k) / 32**0.5, dim=-1)
    h = torch.einsum("bnm,bcm->bcn", weights, v).unflatten(2, (3, 5))
    torch.testing.assert_close(block(x), x + block.proj_out(h))


def test_linear_attention_matches_its_formula(seed):
    block = make_attn(32, "linear")
    assert isinstance(block, LinAttnBlock)
    x = torch.randn(2, 32, 3, 5)
    q, k, v = block.to_qkv(x).flatten(2).chunk(3, dim=1)
    context = torch.einsum("bdn,ben->bde", k.softmax(-1), v)
    expected = block.to_out(torch.einsum("bde,bdn->ben", context, q).unflatten(2, (3, 5)))
    torch.testing.assert_close(block(x), expected)


def test_attention_types():
    assert isinstance(make_attn(32), AttnBlock)
    assert isinstance(make_attn(32, "none"), nn.Identity)
    with pytest.raises(UserError, match=r'"flash".*vanilla, linear, none'):
        make_attn(32, "flash")


def test_use_linear_attn_equals_attn_type_linear():
    for cls in (Encoder, Decoder):
        assert list(cls(**SMALL, use_linear_attn=True).state_dict()) == list(
            cls(**SMALL, attn_type="linear").state_dict()
        )


def test_attention_is_at_its_resolutions():
    encoder, decoder = Encoder(**SMALL), Decoder(**SMALL)
    assert [len(level.attn) for level in encoder.down] == [0, 1, 0]
    assert [len(level.attn) for level in decoder.up] == [0, 2, 0]


@pytest.mark.parametrize("resamp_with_conv", [True, False])
@pytest.mark.parametrize("size", [(16, 16), (8, 24)])
def test_output_shapes(resamp_with_conv, size, seed):
    encoder = Encoder(**SMALL, resamp_with_conv=resamp_with_conv, double_z=False)
    decoder = Decoder(**SMALL, resamp_with_conv=resamp_with_conv)
    x = torch.randn(2, 3, *size)
    z = encoder(x)
    assert z.shape == (2, 4, size[0] // 4, size[1] // 4)
    assert decoder(z).shape == x.shape
    assert any("sample.conv" in name for name in encoder.state_dict()) is resamp_with_conv


def test_double_z_doubles_the_channels():
    assert Encoder(**SMALL).conv_out.out_channels == 8
    assert Encoder(**SMALL, double_z=False).conv_out.out_channels == 4


def test_tanh_out_and_give_pre_end_of_the_decoder(seed):
    decoder = Decoder(**SMALL)
    z = torch.randn(1, 4, 4, 4)
    image = decoder(z)
    decoder.tanh_out = True
    torch.testing.assert_close(decoder(z), torch.tanh(image))
    decoder.give_pre_end = True
    features = decoder(z)
    torch.testing.assert_close(decoder.conv_out(F.silu(decoder.norm_out(features))), image)


def test_channels_last_changes_only_the_memory_format(seed):
    encoder, decoder = Encoder(**SMALL), Decoder(**SMALL)
    x = torch.randn(2, 3, 16, 16)
    expected = decoder(encoder(x)[:, :4])
    encoder.to(memory_format=torch.channels_last)
    decoder.to(memory_format=torch.channels_last)
    actual = decoder(encoder(x)[:, :4])
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    assert actual.is_contiguous(memory_format=torch.channels_last)


def test_bfloat16_is_preserved(seed):
    encoder, decoder = Encoder(**SMALL).to(torch.bfloat16), Decoder(**SMALL).to(torch.bfloat16)
    image = decoder(encoder(torch.randn(1, 3, 16, 16, dtype=torch.bfloat16))[:, :4])
    assert image.dtype is torch.bfloat16
    assert image.isfinite().all()


def test_taming_names_are_the_same_classes():
    from taming.modules.diffusionmodules import model

    assert model.Encoder is Encoder
    assert model.Decoder is Decoder
