"""Latent diffusion models (arXiv:2112.10752): load a model, and sample from it.

    import ldm

    model = ldm.load("emoji64")
    images = ldm.text_to_image(model, ["rocket on a blue background"], steps=50, scale=3, seed=1)
    images[0].save("rocket.png")

Importing this package imports nothing else; each name below is imported when it is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ldm.errors import PartialResultError, UserError
    from ldm.pipelines.classes import class_to_image, unconditional
    from ldm.pipelines.image import image_to_image
    from ldm.pipelines.inpainting import inpaint
    from ldm.pipelines.layout import layout_to_image
    from ldm.pipelines.loading import load
    from ldm.pipelines.reconstruction import reconstruct
    from ldm.pipelines.retrieval import retrieval_to_image
    from ldm.pipelines.semantic import semantic_to_image
    from ldm.pipelines.super_resolution import super_resolve
    from ldm.pipelines.text import text_to_image
    from ldm.training.modules import lightning_module

_HOMES = {
    "PartialResultError": "ldm.errors",
    "UserError": "ldm.errors",
    "load": "ldm.pipelines.loading",
    "lightning_module": "ldm.training.modules",
    "text_to_image": "ldm.pipelines.text",
    "image_to_image": "ldm.pipelines.image",
    "class_to_image": "ldm.pipelines.classes",
    "unconditional": "ldm.pipelines.classes",
    "inpaint": "ldm.pipelines.inpainting",
    "super_resolve": "ldm.pipelines.super_resolution",
    "layout_to_image": "ldm.pipelines.layout",
    "semantic_to_image": "ldm.pipelines.semantic",
    "retrieval_to_image": "ldm.pipelines.retrieval",
    "reconstruct": "ldm.pipelines.reconstruction",
}

__all__ = [
    "PartialResultError",
    "UserError",
    "class_to_image",
    "image_to_image",
    "inpaint",
    "layout_to_image",
    "lightning_module",
    "load",
    "reconstruct",
    "retrieval_to_image",
    "semantic_to_image",
    "super_resolve",
    "text_to_image",
    "unconditional",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
