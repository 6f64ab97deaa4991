"""An exponential moving average of a module's weights, kept as buffers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from ldm.errors import UserError
from ldm.modules.attention import keeps_contexts
from ldm.modules.packing import has_stand_ins


class LitEma(nn.Module):
    """Keeps a running average of every trainable parameter of `model`.

    The average of parameter `a.b.weight` is the buffer `abweight`: the published checkpoints name it without dots.

    Args:
        model: the module to follow.
        decay: weight of the past, in [0, 1].
        use_num_upates: warm up, with decay min(decay, (1 + n) / (10 + n)) at update n (published spelling).
    """

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
        live = [parameters[name] for name in self.m_name2s_name]
        return live, [getattr(self, buffer_name) for buffer_name in self.m_name2s_name.values()]

    @torch.no_grad()
    def forward(self, model: nn.Module) -> None:
        """Update the averages with the present weights: s ← s - (1 - decay) (s - w)."""
        # All on the device: an update never waits for it.
        counting = self.num_updates >= 0
        self.num_updates += counting.to(self.num_updates.dtype)
        warm_up = (1 + self.num_updates) / (10 + self.num_updates)
        decay = torch.where(counting, torch.minimum(self.decay, warm_up), self.decay)
        live, shadows = self._pairs(model)
        if not live:
            return
        if decay.device.type == "cpu":  # where a number costs no waiting, one pass over the memory does it
            torch._foreach_lerp_(shadows, [p.detach() for p in live], 1 - decay.item())
        else:
            difference = torch._foreach_sub(shadows, [p.detach() for p in live])
            torch._foreach_mul_(difference, 1 - decay)
            torch._foreach_sub_(shadows, difference)

    def restart(self, model: nn.Module) -> None:
        """Begin again, with averages equal to the present weights."""
        for parameter, shadow in zip(*self._pairs(model), strict=True):
            shadow.data.copy_(parameter.data)
        if self.num_updates >= 0:
            self.num_updates.zero_()

    def copy_to(self, model: nn.Module) -> None:
        """Overwrite the weights of `model` with the averages.

        Raises:
            UserError: as `swapped`.
        """
        _check_replaceable(model)
        for parameter, shadow in zip(*self._pairs(model), strict=True):
            parameter.data.copy_(shadow.data)

    def store(self, parameters: Iterable[nn.Parameter]) -> None:
        """Remember a copy of `parameters`, for `restore`."""
        self.collected_params = [parameter.detach().clone() for parameter in parameters]

    def restore(self, parameters: Iterable[nn.Parameter]) -> None:
        """Write back what `store` remembered."""
        for stored, parameter in zip(self.collected_params, parameters, strict=True):
            parameter.data.copy_(stored.data)

    @contextmanager
    def swapped(self, model: nn.Module) -> Iterator[None]:
        """Run with the averages in the place of the weights of `model`; nothing is copied.

        Raises:
            UserError: `model` is prepared for sampling, with its present weights; nothing has changed then.
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


def _check_replaceable(model: nn.Module) -> None:
    # Packed weights cannot be swapped, and what is packed inside would be put back as the model's own afterwards.
    if has_stand_ins(model) or keeps_contexts(model):
        raise UserError(
            "the weights of a model cannot be replaced while it is prepared for sampling; "
            "enter ema_scope first, and within it ldm.inference.prepared"
        )
