"""Tests of packed weights: agreement with plain weights, and restoration."""

from __future__ import annotations

import copy

import pytest
import torch
from parity_cases import assert_close
from tiny_models import randomise, text_config
from torch import nn

from ldm.config.instantiate import instantiate_from_config
from ldm.modules.diffusionmodules.util import GroupNorm32
from ldm.modules.packing import packed_weights

pytestmark = [
    pytest.mark.usefixtures("seed"),
    pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN"),
]

needs_bfloat16 = pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="oneDNN has no bfloat16 on this CPU"
)
DTYPES = [torch.float32, pytest.param(torch.bfloat16, marks=needs_bfloat16)]
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
CONVOLUTIONS = {
    "3 x 3": {"kernel_size": 3, "padding": 1},
    "halving": {"kernel_size": 3, "stride": 2, "padding": 1},
    "without padding": {"kernel_size": 3, "stride": 2},
    "valid": {"kernel_size": 3, "padding": "valid"},
    "1 x 1": {"kernel_size": 1},
    "dilated": {"kernel_size": 3, "dilation": 2, "padding": (2, 1)},
    "without bias": {"kernel_size": 3, "bias": False},
}


def frozen(module, dtype=torch.float32):
    return module.to(dtype).eval().requires_grad_(False)


def is_packed(layer):
    return layer.weight.layout == torch._mkldnn


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_packed_convolutions_match_plain_ones(options, dtype):
    layer = frozen(nn.Conv2d(20, 36, **options), dtype)
    x, other_size = torch.randn(2, 20, 10, 12).to(dtype), torch.randn(3, 20, 7, 5).to(dtype)
    expected = [layer(x), layer(other_size)]
    with packed_weights(layer):
        outputs = [layer(x), layer(other_size)]
        assert is_packed(layer)
    for output, plain in zip(outputs, expected, strict=True):
        assert output.dtype == dtype
        assert_close(output.float(), plain.float(), TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_packed_linear_layers_match_plain_ones(bias, dtype):
    layer = frozen(nn.Linear(20, 36, bias=bias), dtype)
    inputs = [torch.randn(shape).to(dtype) for shape in ((2, 20), (3, 5, 20), (2, 3, 4, 20))]
    expected = [layer(x) for x in inputs]
    with packed_weights(layer):
        outputs = [layer(x) for x in inputs]
        assert is_packed(layer)
    for output, plain in zip(outputs, expected, strict=True):
        assert_close(output.float(), plain.float(), TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packed_models_match_plain_ones(dtype):
    """Run the denoising network and the decoder: most layers are packed, and the outputs are contiguous."""
    model = frozen(randomise(instantiate_from_config(text_config())), dtype)
    unet, decoder = model.model.diffusion_model, model.first_stage_model.decoder
    x, t, context = torch.randn(2, 3, 8, 8).to(dtype), torch.tensor([3, 70]), torch.randn(2, 5, 32).to(dtype)
    expected = unet(x, t, context), decoder(x)
    with packed_weights(unet, decoder):
        outputs = unet(x, t, context), decoder(x)
        assert is_packed(unet.input_blocks[0][0]) and is_packed(decoder.conv_out)
    for output, plain in zip(outputs, expected, strict=True):
        assert output.is_contiguous()
        assert_close(output.float(), plain.float(), 1e-5 if dtype == torch.float32 else 0.03)


@pytest.mark.parametrize("size", [8, 32], ids=["small", "large"])
def test_normalisations_between_bfloat16_convolutions(size):
    """Normalise small channels-last maps in float32; large maps use torch's kernel, which also sums in float32."""
    model = nn.Sequential(nn.Conv2d(3, 64, 1), GroupNorm32(32, 64), nn.Conv2d(64, 64, 1))
    nn.init.normal_(model[1].weight)
    nn.init.normal_(model[1].bias)
    model, x = frozen(model, torch.bfloat16), torch.randn(2, 3, size, size).bfloat16()
    expected, types = model(x), []
    model[1].register_forward_hook(lambda module, inputs, output: types.append(output.dtype))
    with packed_weights(model):
        assert_close(model(x).float(), expected.float(), 0.01)
    assert types == [torch.bfloat16]
    assert "forward" not in vars(model[1]) and torch.equal(model(x), expected)


def test_non_contiguous_inputs_are_supported():
    convolution, layer = frozen(nn.Conv2d(4, 6, 3)), frozen(nn.Linear(4, 6))
    image, rows = torch.randn(2, 8, 9, 9)[:, ::2].transpose(2, 3), torch.randn(5, 1, 4).expand(5, 3, 4).transpose(0, 1)
    expected = convolution(image), layer(rows)
    with packed_weights(convolution, layer):
        for output, plain in zip((convolution(image), layer(rows)), expected, strict=True):
            assert_close(output, plain, 1e-5)


def test_weights_are_restored_as_the_same_objects_with_the_same_bits():
    model = frozen(nn.Sequential(nn.Conv2d(3, 5, 3), nn.Conv2d(5, 5, 1).to(memory_format=torch.channels_last)))
    model.append(nn.Flatten()).append(nn.Linear(5 * 6 * 6, 4))
    before, parameters = copy.deepcopy(model.state_dict()), dict(model.named_parameters())
    with pytest.raises(KeyError), packed_weights(model):
        model(torch.randn(2, 3, 8, 8))
        inside = model.state_dict()
        assert [(name, value.shape, value.dtype) for name, value in inside.items()] == [
            (name, value.shape, value.dtype) for name, value in before.items()
        ]
        assert inside["0.weight"].layout == torch._mkldnn
        raise KeyError
    for name, parameter in model.named_parameters():
        assert parameter is parameters[name]
        assert torch.equal(parameter, before[name]) and parameter.stride() == before[name].stride(), name
    assert not any("forward" in vars(layer) for layer in model)


def test_packed_weight_has_no_second_copy():
    layer = frozen(nn.Linear(64, 64))
    plain = layer.weight
    with packed_weights(layer):
        layer(torch.randn(2, 64))
        assert plain.untyped_storage().nbytes() == 0


def test_layer_is_packed_at_its_first_call():
    layer = frozen(nn.Linear(4, 4))
    with packed_weights(layer):
        assert not is_packed(layer)


def test_nested_packing_has_no_effect():
    layer, x = frozen(nn.Linear(4, 4)), torch.randn(2, 4)
    with packed_weights(layer):
        with packed_weights(layer):
            layer(x)
        assert is_packed(layer)
    assert not is_packed(layer)


@pytest.mark.parametrize("packed_first", [True, False])
def test_unsupported_inputs_use_the_plain_layer(packed_first):
    """Run with gradients, autocast, another dtype, unbatched inputs and empty inputs."""
    convolution, layer = frozen(nn.Conv2d(3, 4, 3)), frozen(nn.Linear(6, 5))
    plain_convolution, plain = copy.deepcopy(convolution), copy.deepcopy(layer)
    x = torch.randn(2, 6)
    with packed_weights(convolution, layer):
        if packed_first:
            layer(x), convolution(torch.randn(1, 3, 6, 6))
        recorded = [x.clone().requires_grad_() for _ in range(2)]
        layer(recorded[0]).sum().backward()
        plain(recorded[1]).sum().backward()
        assert torch.equal(recorded[0].grad, recorded[1].grad)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(layer(x), plain(x)) and layer(x).dtype == torch.bfloat16
        assert torch.equal(layer(x[0]), plain(x[0]))
        assert layer(x[:0]).shape == (0, 5)
        assert torch.equal(convolution(torch.ones(3, 6, 6)), plain_convolution(torch.ones(3, 6, 6)))
        with pytest.raises(RuntimeError, match="dtype"):
            layer(x.double())


def test_inference_mode_is_supported():
    layer, x = frozen(nn.Linear(4, 4)), torch.randn(2, 4)
    before = layer.weight.clone()
    with packed_weights(layer), torch.inference_mode():
        layer(x)
        assert is_packed(layer)
    assert torch.equal(layer.weight, before) and not layer.weight.is_inference()


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def tied():
    first, second = frozen(nn.Linear(4, 4)), frozen(nn.Linear(4, 4))
    second.weight = first.weight
    return nn.Sequential(first, second)


UNPACKABLE = {
    "trainable weight": lambda: nn.Linear(4, 4),
    "subclass": lambda: frozen(Doubled(4, 4)),
    "parametrized weight": lambda: frozen(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))),
    "shared weight": tied,
    "double precision": lambda: frozen(nn.Linear(4, 4), torch.double),
}


@pytest.mark.parametrize("make", UNPACKABLE.values(), ids=UNPACKABLE)
def test_unpackable_layers_are_unchanged(make):
    module = make()
    x = torch.randn(2, 4, dtype=next(module.parameters()).dtype)
    expected = module(x)
    with packed_weights(module):
        assert torch.equal(module(x), expected)
        assert all(parameter.layout == torch.strided for parameter in module.parameters())


@pytest.mark.parametrize("options", [{"groups": 2}, {"padding_mode": "reflect", "padding": 1}, {"padding": "same"}])
def test_unpackable_convolutions_are_unchanged(options):
    layer, x = frozen(nn.Conv2d(4, 4, 3, **options)), torch.randn(1, 4, 6, 6)
    expected = layer(x)
    with packed_weights(layer):
        assert torch.equal(layer(x), expected) and not is_packed(layer)


def test_nothing_is_packed_without_onednn(monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    layer, x = frozen(nn.Linear(4, 4)), torch.randn(2, 4)
    with packed_weights(layer):
        layer(x)
        assert not is_packed(layer) and "forward" not in vars(layer)


@pytest.mark.parametrize("layer", [nn.Linear(64, 64), nn.Conv2d(32, 32, 3)], ids=["linear", "convolution"])
def test_kept_originals_stay_in_memory(layer):
    """The result is the same, and the weight at the end is the memory of the start."""
    layer.requires_grad_(False)
    parameter, pointer, before = layer.weight, layer.weight.data_ptr(), layer.weight.clone()
    x = torch.randn(3, 64) if isinstance(layer, nn.Linear) else torch.randn(1, 32, 8, 8)
    with packed_weights(layer, keep_originals=True):
        kept = layer(x)
        assert layer.weight is not parameter and parameter.data_ptr() == pointer
    assert layer.weight is parameter and parameter.data_ptr() == pointer and torch.equal(parameter, before)
    with packed_weights(layer):
        freed = layer(x)
        assert parameter.numel() == 0
    assert torch.equal(freed, kept) and torch.equal(layer.weight, before)
