"""Weights in the blocked memory layout of oneDNN, for inference on the CPU.

The CPU convolutions of torch use oneDNN, which multiplies blocks. For a plain weight it creates a blocked copy at every
call. In the small maps and wide layers of a U-Net the copy takes longer than the product. A packed weight is copied
once. A packed convolution also returns channels-last results, which saves a copy of the next convolution's input.
The group normalisation of small channels-last maps in torch is slow in bfloat16, so it is computed in float32.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import group_norm, linear

# Below this number of pixels torch 2.14 uses another kernel, up to ten times slower in bfloat16 for small groups.
SLOW_NORM_PIXELS = 1024


@contextmanager
def packed_weights(*modules: nn.Module, keep_originals: bool = False) -> Iterator[None]:
    """Pack the convolutions and linear layers of `modules` while the context manager is active.

    Packing speeds up repeated inference of a frozen network on the CPU. Each layer is packed at its first call. Inside,
    the packed weights cannot be trained, cast, moved or saved. Their names and shapes are unchanged. Afterwards the
    weights are the same objects with the same bits. The results equal those of plain weights up to rounding, and the
    outputs of `modules` are contiguous.

    Layers that cannot be packed are unchanged: layers that require gradients, share their weight, are on another device
    or have another dtype, and packed layers. Without oneDNN no layer is packed.

    Args:
        *modules: modules to pack.
        keep_originals: keep the plain weights beside the packed ones. The end is then immediate, but the weights take
            twice the memory. By default the plain weights are freed, and computed from the packed ones at the end.
    """
    parts = dict.fromkeys(part for module in modules for part in module.modules())
    owners = Counter(id(parameter) for part in parts for parameter in part._parameters.values())
    layers = [part for part in parts if _can_pack(part) and owners[id(part._parameters["weight"])] == 1]
    replacements: list[_Replacement] = [_PACKED[type(layer)](layer, keep_originals) for layer in layers]
    if replacements:
        norms = (part for part in parts if isinstance(part, nn.GroupNorm))
        replacements += [_NormInFloat32(norm) for norm in norms if _is_slow_norm(norm)]
    hooks = [module.register_forward_hook(_contiguous) for module in modules] if replacements else []
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for replacement in replacements:
            replacement.remove()


@contextmanager
def plain_weights(*modules: nn.Module) -> Iterator[None]:
    """Compute with plain weights while the context manager is active, inside `packed_weights` too.

    Inside, the weights may be cast if the cast is undone. Afterwards the packed weights are the same objects.
    """
    parts = dict.fromkeys(part for module in modules for part in module.modules())
    forwards = (vars(part).get("forward") for part in parts)
    replacements = [forward for forward in forwards if isinstance(forward, _Replacement)]
    weights = [(each.layer, each.layer._parameters.get("weight")) for each in replacements]
    try:
        for replacement in replacements:
            replacement.suspend()
        yield
    finally:
        for replacement, (layer, weight) in zip(replacements, weights, strict=True):
            layer._parameters["weight"] = weight
            layer.forward = replacement


def has_packed_weights(module: nn.Module) -> bool:
    """Return whether `packed_weights` is active for a layer of `module`."""
    return any(isinstance(vars(part).get("forward"), _Replacement) for part in module.modules())


def _can_pack(layer: nn.Module) -> bool:
    # Subclasses and parametrizations may compute with the weight in other ways. Packed layers are not packed again.
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


def _is_slow_norm(layer: nn.GroupNorm) -> bool:
    if type(layer).forward is not nn.GroupNorm.forward:
        return False
    weight = layer.weight
    if weight is None or weight.requires_grad or "forward" in vars(layer):
        return False
    return weight.device.type == "cpu" and weight.dtype == torch.bfloat16


def _is_recorded(x: Tensor) -> bool:
    return torch.is_grad_enabled() and x.requires_grad


def _contiguous(module: nn.Module, inputs: Any, output: Any) -> Any:
    """Forward hook that returns a contiguous output, because noise sampled like a channels-last tensor differs."""
    return output.contiguous() if isinstance(output, Tensor) else None


class _Replacement:
    """Replacement of the `forward` of one layer."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer: Any = layer
        layer.forward = self  # type: ignore[assignment] # a layer calls any function of this name

    def suspend(self) -> None:
        """Let the layer compute with its plain weight until its `forward` is this object again."""
        del self.layer.forward

    def remove(self) -> None:
        del self.layer.forward


class _PackedLayer(_Replacement):
    dims: range

    def __init__(self, layer: Any, keep_original: bool = False) -> None:
        super().__init__(layer)
        self.keep_original = keep_original
        self.parameter: nn.Parameter = layer.weight
        self.dtype: torch.dtype = layer.weight.dtype
        self.strides = layer.weight.stride()
        self.packed: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        unusual = x.dtype != self.dtype or x.device.type != "cpu" or x.dim() not in self.dims or x.numel() == 0
        if unusual or _is_recorded(x) or torch.is_autocast_enabled("cpu"):
            return self.plain(x, self.unpacked())
        if self.packed is None:
            self.packed = self.pack(x)
            self.layer._parameters["weight"] = nn.Parameter(self.packed, requires_grad=False)
            if not self.keep_original:
                self.parameter.data = torch.empty(0, dtype=self.dtype)
        return self.compute(x)

    def unpacked(self) -> Tensor:
        """Return the original weight, bit for bit."""
        if self.packed is None or self.keep_original:
            return self.parameter.data
        dense = self.packed.to_dense()
        if dense.stride() == self.strides:
            return dense
        return torch.empty_strided(dense.shape, self.strides, dtype=self.dtype).copy_(dense)

    def suspend(self) -> None:
        super().suspend()
        if self.packed is not None:
            self.layer._parameters["weight"] = nn.Parameter(self.unpacked(), requires_grad=False)

    def remove(self) -> None:
        super().remove()
        if self.packed is not None:
            self.parameter.data = self.unpacked()
            self.layer._parameters["weight"] = self.parameter

    def pack(self, x: Tensor) -> Tensor:
        """Return the blocked weight for inputs of the size of `x`; other sizes are also supported."""
        raise NotImplementedError

    def compute(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def plain(self, x: Tensor, weight: Tensor) -> Tensor:
        raise NotImplementedError


class _PackedConv2d(_PackedLayer):
    dims = range(4, 5)

    def __init__(self, layer: nn.Conv2d, keep_original: bool = False) -> None:
        super().__init__(layer, keep_original)
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


class _NormInFloat32(_Replacement):
    def __init__(self, layer: nn.GroupNorm) -> None:
        super().__init__(layer)
        self.weight, self.bias = layer.weight.float(), layer.bias.float()

    def __call__(self, x: Tensor) -> Tensor:
        layer = self.layer
        small = x.dim() == 4 and x.shape[2] * x.shape[3] < SLOW_NORM_PIXELS and not x.is_contiguous()
        if not small or x.dtype != torch.bfloat16 or _is_recorded(x):
            return type(layer).forward(layer, x)
        return group_norm(x.float(), layer.num_groups, self.weight, self.bias, layer.eps).to(x.dtype)


_PACKED: dict[type[nn.Module], type[_PackedLayer]] = {nn.Conv2d: _PackedConv2d, nn.Linear: _PackedLinear}
