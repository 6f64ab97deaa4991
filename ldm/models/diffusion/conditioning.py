"""Conditioning of the denoising network: its forms, and operations on every form.

A conditioning is None, a tensor, a list of tensors, or a dict with the lists `c_concat` (concatenated with the
input along channels), `c_crossattn` (concatenated along the sequence, or, for `adm`, the class labels) and `c_adm`
(class labels or a vector beside a context).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ldm.config.instantiate import instantiate_from_config
from ldm.errors import UserError, did_you_mean
from ldm.modules.cached import ResultCache

Conditioning = torch.Tensor | list[Any] | dict[str, Any] | None

CONDITIONING_KEYS = (None, "concat", "crossattn", "hybrid", "adm", "hybrid-adm", "crossattn-adm")
CONCAT_KEYS = ("concat", "hybrid", "hybrid-adm")  # with maps that are joined to the input


class DiffusionWrapper(nn.Module):
    """Denoising network that receives its conditioning according to `conditioning_key`.

    Args:
        diff_model_config: target and parameters of the network.
        conditioning_key: "concat" (with the input), "crossattn" (as context), "hybrid" (both), "adm" (class labels),
            "hybrid-adm" and "crossattn-adm" (with class labels or a vector), or None for an unconditional network.

    Raises:
        UserError: an unknown `conditioning_key`.
    """

    def __init__(self, diff_model_config: Mapping[str, Any], conditioning_key: str | None) -> None:
        super().__init__()
        if conditioning_key not in CONDITIONING_KEYS:
            names = [key for key in CONDITIONING_KEYS if key]
            hint = did_you_mean(str(conditioning_key), names)
            known = ", ".join(names)
            raise UserError(f'conditioning_key "{conditioning_key}" is not known{hint}; choose one of {known}')
        self.diffusion_model = instantiate_from_config(diff_model_config)
        self.conditioning_key = conditioning_key

    def forward(
        self,
        x: torch.Tensor,
        t: torch.Tensor,
        c_concat: list[torch.Tensor] | None = None,
        c_crossattn: list[torch.Tensor] | None = None,
        c_adm: list[torch.Tensor] | torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the network's prediction (B, C, H, W) for x (B, C, H, W) at timesteps t (B,)."""
        key = self.conditioning_key
        if key is None:
            return self.diffusion_model(x, t)
        if key in CONCAT_KEYS:
            x = torch.cat([x, *_require(c_concat, "c_concat", key)], dim=1)
        if key == "concat":
            return self.diffusion_model(x, t)
        crossattn = _require(c_crossattn, "c_crossattn", key)
        if key == "adm":
            return self.diffusion_model(x, t, y=crossattn[0])
        context = crossattn[0] if len(crossattn) == 1 else torch.cat(crossattn, dim=1)
        if key in ("hybrid-adm", "crossattn-adm"):
            labels = [c_adm] if isinstance(c_adm, torch.Tensor) else c_adm
            return self.diffusion_model(x, t, context=context, y=_require(labels, "c_adm", key)[0])
        return self.diffusion_model(x, t, context=context)


def _require(tensors: list[torch.Tensor] | None, name: str, key: str) -> list[torch.Tensor]:
    if not tensors:
        raise ValueError(f'conditioning_key "{key}" needs the entry "{name}" of the conditioning')
    return tensors


def as_dict(cond: Conditioning, conditioning_key: str | None) -> dict[str, list[torch.Tensor]]:
    """Convert any form of conditioning to the keyword arguments of `DiffusionWrapper.forward`."""
    if cond is None:
        return {}
    if isinstance(cond, Mapping):
        if conditioning_key == "adm" and not {"c_concat", "c_crossattn"} & cond.keys():
            return {"c_crossattn": list(cond.values())}  # labels under their key in the batch
        return {key: value if isinstance(value, list) else [value] for key, value in cond.items()}
    return {"c_concat" if conditioning_key == "concat" else "c_crossattn": cond if isinstance(cond, list) else [cond]}


def map_tensors(function: Any, *conds: Any) -> Any:
    """Apply `function` to the corresponding tensors of conditionings of the same structure."""
    first = conds[0]
    if isinstance(first, Mapping):
        return {key: map_tensors(function, *(cond[key] for cond in conds)) for key in first}
    if isinstance(first, list):
        return [map_tensors(function, *parts) for parts in zip(*conds, strict=True)]
    return None if first is None else function(*conds)


def slice_batch(cond: Conditioning, n: int) -> Conditioning:
    """Return the first `n` items of the batch."""
    return map_tensors(lambda c: c[:n], cond)


def pair(unconditional: Conditioning, cond: Conditioning) -> Conditioning:
    """Concatenate both conditionings to a batch of 2B for classifier-free guidance, the unconditional half first."""
    return map_tensors(lambda u, c: torch.cat([u, c]), unconditional, cond)


class Pairing:
    """Cache of `pair`, valid while both conditionings hold the same unmodified tensors.

    Guidance needs the same pair at every step. With identical tensors, results that depend on them can be cached too.
    """

    def __init__(self) -> None:
        self._cache: ResultCache[Conditioning] = ResultCache()

    def __call__(self, unconditional: Conditioning, cond: Conditioning) -> Conditioning:
        """Return the result of `pair`, from the cache if possible."""
        sources = [*tensors(unconditional), *tensors(cond)]
        return self._cache(lambda: pair(unconditional, cond), *sources)


def tensors(cond: Conditioning) -> Iterator[torch.Tensor]:
    """Iterate over the tensors of a conditioning, in order."""
    if isinstance(cond, (Mapping, list)):
        for part in cond.values() if isinstance(cond, Mapping) else cond:
            yield from tensors(part)
    elif cond is not None:
        yield cond


def batch_size_of(cond: Conditioning) -> int | None:
    """Return the batch size, or None if there is no conditioning."""
    while isinstance(cond, (Mapping, list)):
        cond = next(iter(cond.values() if isinstance(cond, Mapping) else cond), None)
    return None if cond is None else cond.shape[0]
