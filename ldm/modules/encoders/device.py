"""Device of an encoder, under the published name `device`."""

from __future__ import annotations

from typing import Any

import torch


class DeviceOfWeights:
    """Attribute `device` of a module: the device of its weights, unless a program assigns another value."""

    def __get__(self, module: Any, owner: type | None = None) -> Any:
        if module is None:
            return self
        return next(getattr(module, "_clip", module).parameters(), torch.zeros(())).device
