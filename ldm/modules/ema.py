"""Exponential moving average of a module's weights, stored as buffers."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from ldm.errors import UserError
from ldm.modules.attention import has_cached_contexts
from ldm.modules.packing import has_packed_weights

logger = logging.getLogger(__name__)


class LitEma(nn.Module):
    """Exponential moving average of every trainable parameter of `model`.

    The average of parameter `a.b.weight` is the buffer `abweight`: published checkpoints use names without dots.

    Args:
        model: module whose parameters are averaged.
        decay: weight of the previous average, in [0, 1].
        use_num_upates: warm up, with decay min(decay, (1 + n) / (10 + n)) at update n (published spelling).
    """

    decay: torch.Tensor
    num_updates: torch.Tensor

    def __init__(self, model: nn.Module, decay: float = 0.9999, use_num_upates: bool = True) -> None:
        super().__init__()
        if not 0.0 <= decay <= 1.0:
            raise ValueError(f"decay must lie in [0, 1], got {decay}")
        self.m_name2s_name: dict[str, str] = {}
        self.register_buffer("decay", torch.tensor(decay, dtype=torch.float32))
        self.register_buffer("num_updates", torch.tensor(0 if use_num_upates else -1, dtype=torch.int))
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                buffer_name = name.replace(".", "")
                self.m_name2s_name[name] = buffer_name
                self.register_buffer(buffer_name, parameter.detach().clone())
        self.collected_params: list[torch.Tensor] = []

    def _pairs(self, model: nn.Module) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        parameters = dict(model.named_parameters())
        live: list[torch.Tensor] = [parameters[name] for name in self.m_name2s_name]
        return live, [getattr(self, buffer_name) for buffer_name in self.m_name2s_name.values()]

    @torch.no_grad()
    def forward(self, model: nn.Module) -> None:
        """Update the averages with the current weights: s ← s - (1 - decay) (s - w)."""
        # The computation stays on the device, so an update does not synchronise.
        has_warm_up = self.num_updates >= 0
        self.num_updates += has_warm_up.to(self.num_updates.dtype)
        warm_up = (1 + self.num_updates) / (10 + self.num_updates)
        decay = torch.where(has_warm_up, torch.minimum(self.decay, warm_up), self.decay)
        live, shadows = self._pairs(model)
        if not live:
            return
        if decay.device.type == "cpu":  # reading the decay needs no synchronisation; lerp is a single pass over memory
            torch._foreach_lerp_(shadows, [p.detach() for p in live], 1 - decay.item())
        else:
            difference = torch._foreach_sub(shadows, [p.detach() for p in live])
            torch._foreach_mul_(difference, 1 - decay)
            torch._foreach_sub_(shadows, difference)

    def restart(self, model: nn.Module) -> None:
        """Reset the averages to the current weights and the update count to zero."""
        for parameter, shadow in zip(*self._pairs(model), strict=True):
            shadow.data.copy_(parameter.data)
        if self.num_updates >= 0:
            self.num_updates.zero_()

    def copy_to(self, model: nn.Module) -> None:
        """Overwrite the weights of `model` with the averages.

        Raises:
            UserError: `model` is prepared for sampling; its weights stay unchanged.
        """
        _check_replaceable(model)
        for parameter, shadow in zip(*self._pairs(model), strict=True):
            parameter.data.copy_(shadow.data)

    def store(self, parameters: Iterable[nn.Parameter]) -> None:
        """Store a copy of `parameters` for `restore`."""
        self.collected_params = [parameter.detach().clone() for parameter in parameters]

    def restore(self, parameters: Iterable[nn.Parameter]) -> None:
        """Copy the parameters saved by `store` back into `parameters`."""
        for stored, parameter in zip(self.collected_params, parameters, strict=True):
            parameter.data.copy_(stored.data)

    @contextmanager
    def swapped(self, model: nn.Module) -> Iterator[None]:
        """Use the averages as the weights of `model` while the context manager is active, without copying.

        Raises:
            UserError: `model` is prepared for sampling; its weights stay unchanged.
        """
        self._swap(model)
        try:
            yield
        finally:
            self._swap(model)

    def _swap(self, model: nn.Module) -> None:
        _check_replaceable(model)
        for parameter, shadow in zip(*self._pairs(model), strict=True):
            parameter.data, shadow.data = shadow.data, parameter.data


class EmaMixin(nn.Module):
    """Mixin for a model that keeps a moving average of its weights in `model_ema` if `use_ema` is set.

    The average covers the whole model. A subclass that averages a part of it overrides `averaged_module`.
    """

    use_ema: bool
    model_ema: LitEma

    @property
    def averaged_module(self) -> nn.Module:
        """Module whose weights are averaged."""
        return self

    @contextmanager
    def ema_scope(self, context: str | None = None) -> Iterator[None]:
        """Run with the averaged weights if the model keeps them; `context` names the purpose in the log."""
        if not self.use_ema:
            yield
            return
        if context is not None:
            logger.debug("%s: using the averaged weights", context)
        with self.model_ema.swapped(self.averaged_module):
            yield

    def update_ema(self) -> None:
        """Update the average with the current weights. Call it after every optimizer step."""
        if self.use_ema:
            self.model_ema(self.averaged_module)

    def restart_ema(self) -> None:
        """Set the average to the current weights."""
        if self.use_ema:
            self.model_ema.restart(self.averaged_module)


def _check_replaceable(model: nn.Module) -> None:
    # Packed weights cannot be swapped. Weights packed inside would be restored as the model's own afterwards.
    if has_packed_weights(model) or has_cached_contexts(model):
        raise UserError(
            "the weights of a model cannot be replaced while it is prepared for sampling; "
            "enter ema_scope first, then ldm.pipelines.preparation.prepared"
        )
