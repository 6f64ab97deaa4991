"""Tasks by the name that their pictures carry."""

from __future__ import annotations

from functools import cache
from importlib import import_module

from ldm.errors import UserError, did_you_mean
from ldm.tasks.task import Task

TASKS = {
    "knn2img": "ldm.tasks.knn2img.RetrievalToImage",
    "img2img": "ldm.tasks.img2img.ImageToImage",
    "layout2img": "ldm.tasks.layout2img.LayoutToImage",
    "semantic2img": "ldm.tasks.semantic2img.SemanticToImage",
    "class2img": "ldm.tasks.class2img.ClassToImage",
    "sample_diffusion": "ldm.tasks.sample_diffusion.SampleDiffusion",
    "inpaint": "ldm.tasks.inpainting.Inpainting",
    "superres": "ldm.tasks.superresolution.SuperResolution",
    "txt2img": "ldm.tasks.text2img.TextToImage",
}


@cache
def find_task(name: str) -> Task:
    """The task called `name`, always the same: it may keep what several pictures need.

    Raises:
        UserError: there is none.
    """
    if name not in TASKS:
        raise UserError(f'there is no task "{name}"{did_you_mean(name, TASKS)}; this picture needs a newer version')
    module, _, cls = TASKS[name].rpartition(".")
    return getattr(import_module(module), cls)()
