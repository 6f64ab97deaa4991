"""Weights in the layout that the CPU computes in.

oneDNN, which holds torch's convolutions for the CPU, multiplies blocks. Of a plain weight it makes a blocked copy at
every call; in the small maps and wide layers of a U-Net the copy takes longer than the product. Packed, a weight is
copied once. A packed convolution also gives its result channels-last, which spares the next one a copy of its input.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear


@contextmanager
def packed_weights(*modules: nn.Module) -> Iterator[None]:
    """Run with the convolutions and linear layers of `modules` packed, each from its first call on.

    For running a frozen network many times on the CPU. Inside, the packed weights cannot be trained, cast, moved or
    saved; names and shapes stay, and no second copy is in memory. Afterwards the weights are the same objects with
    the same bits. Results are those of plain weights up to rounding, and what leaves `modules` is contiguous.

    Changes nothing for layers that cannot be packed: those that require gradients, share their weight, lie on another
    device or hold another type of number, and all of them where torch has no oneDNN; nor for layers packed already.
    """
    parts = dict.fromkeys(part for module in modules for part in module.modules())
    owners = Counter(id(parameter) for part in parts for parameter in part._parameters.values())
    layers = [part for part in parts if _can_pack(part) and owners[id(part.weight)] == 1]
    stand_ins = [_PACKED[type(layer)](layer) for layer in layers]
    hooks = [module.register_forward_hook(_contiguous) for module in modules] if stand_ins else []
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for stand_in in stand_ins:
            stand_in.remove()


def _can_pack(layer: nn.Module) -> bool:
    # Only torch's own layers, without a subclass's or a parametrization's ideas about the weight, and not packed yet.
    weight = layer._parameters.get("weight")
    if type(layer) not in _PACKED or "forward" in vars(layer) or weight is None:
        return False
    if weight.requires_grad or weight.device.type != "cpu" or weight.layout != torch.strided:
        return False
    if isinstance(layer, nn.Conv2d) and (layer.groups != 1 or layer.padding_mode != "zeros" or layer.padding == "same"):
        return False
    return weight.dtype in _packable_dtypes()


def _packable_dtypes() -> tuple[torch.dtype, ...]:
    if not torch.backends.mkldnn.is_available() or not torch.backends.mkldnn.enabled:
        return ()
    half = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return (torch.float32, torch.bfloat16) if half else (torch.float32,)


def _contiguous(module: nn.Module, inputs: Any, output: Any) -> Any:
    """A forward hook. Noise drawn like a channels-last tensor would be another noise."""
    return output.contiguous() if isinstance(output, Tensor) else None


class _PackedLayer:
    """Stands in for the `forward` of one layer."""

    dims: range

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer
        self.parameter = layer.weight
        self.dtype = layer.weight.dtype
        self.strides = layer.weight.stride()
        self.packed: Tensor | None = None
        layer.forward = self

    def __call__(self, x: Tensor) -> Tensor:
        recorded = torch.is_grad_enabled() and x.requires_grad
        unusual = x.dtype != self.dtype or x.device.type != "cpu" or x.dim() not in self.dims or x.numel() == 0
        if recorded or unusual or torch.is_autocast_enabled("cpu"):
            return self.plain(x, self.parameter if self.packed is None else self.unpacked())
        if self.packed is None:
            self.packed = self.pack(x)
            self.layer._parameters["weight"] = nn.Parameter(self.packed, requires_grad=False)
            self.parameter.data = torch.empty(0, dtype=self.dtype)
        return self.compute(x)

    def unpacked(self) -> Tensor:
        """The weight as it was, bit for bit."""
        dense = self.packed.to_dense()
        if dense.stride() == self.strides:
            return dense
        return torch.empty_strided(dense.shape, self.strides, dtype=self.dtype).copy_(dense)

    def remove(self) -> None:
        del self.layer.forward
        if self.packed is not None:
            self.parameter.data = self.unpacked()
            self.layer._parameters["weight"] = self.parameter

    def pack(self, x: Tensor) -> Tensor:
        """The weight, blocked as suits inputs of the size of `x`; others are computed too."""
        raise NotImplementedError

    def compute(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def plain(self, x: Tensor, weight: Tensor) -> Tensor:
        raise NotImplementedError


class _PackedConv2d(_PackedLayer):
    dims = range(4, 5)

    def __init__(self, layer: nn.Conv2d) -> None:
        super().__init__(layer)
        padding = [0, 0] if layer.padding == "valid" else list(layer.padding)
        self.geometry = (padding, list(layer.stride), list(layer.dilation), layer.groups)

    def pack(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._reorder_convolution_weight(self.parameter, *self.geometry, list(x.shape))

    def compute(self, x: Tensor) -> Tensor:
        operator = torch.ops.mkldnn._convolution_pointwise
        return operator(x, self.packed, self.layer.bias, *self.geometry, "none", [], "")

    def plain(self, x: Tensor, weight: Tensor) -> Tensor:
        return self.layer._conv_forward(x, weight, self.layer.bias)


class _PackedLinear(_PackedLayer):
    dims = range(2, 65)

    def pack(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._reorder_linear_weight(self.parameter, x.numel() // x.shape[-1])

    def compute(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.layer.bias, "none", [], "")

    def plain(self, x: Tensor, weight: Tensor) -> Tensor:
        return linear(x, weight, self.layer.bias)


_PACKED = {nn.Conv2d: _PackedConv2d, nn.Linear: _PackedLinear}
