"""Recognise Stable Diffusion models, and their first stage alone, by names and shapes of weights. Needs no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ldm.errors import UserError
from ldm.io.checkpoint.kinds import check_not_foreign

CONFIGS = Path("configs/stable-diffusion")
UNET = "model.diffusion_model."
FIRST_LAYER, CLASSES = f"{UNET}input_blocks.0.0.weight", f"{UNET}label_emb.weight"
CONTEXT = re.compile(r"model\.diffusion_model\..*\.attn2\.to_k\.weight")
# Beginnings of the names of a text encoder, and its name.
TEXT_ENCODERS = {"cond_stage_model.model.": "OpenCLIP", "cond_stage_model.transformer.": "CLIP"}
V2 = "Stable Diffusion 2"
V2_CONFIGS = {"v": "v2-inference-v.yaml", "eps": "v2-inference.yaml"}
# Parts of file names, between separators, that state the prediction of a model of Stable Diffusion 2.
V2_WORDS = {"v": ("768", "v", "vpred", "vprediction"), "eps": ("512", "base", "eps", "epsilon")}
PREDICTION_KEY = "modelspec.prediction_type"  # of the metadata of safetensors files
PREDICTIONS = {"v": "v", "v_prediction": "v", "eps": "eps", "epsilon": "eps"}


@dataclass(frozen=True)
class Architecture:
    """Facts about a model that the shapes of its weights state.

    Attributes:
        width: channels of the first level of the U-Net.
        context: channels of the context.
        inputs: channels of the input.
        classes: number of classes, which are noise levels in an upscaler; 0 for none.
    """

    width: int
    context: int
    inputs: int
    classes: int = 0

    @classmethod
    def of(cls, shapes: Mapping[str, Sequence[int]]) -> Architecture | None:
        """Return the facts that weights state; None for weights without a U-Net with transformers."""
        context = next((shape[1] for name, shape in shapes.items() if CONTEXT.fullmatch(name)), None)
        if FIRST_LAYER not in shapes or context is None:
            return None
        width, inputs, *_ = shapes[FIRST_LAYER]
        return cls(width, context, inputs, shapes[CLASSES][0] if CLASSES in shapes else 0)


# Configuration and name of each model; that of Stable Diffusion 2 depends on its prediction.
KNOWN: dict[Architecture, tuple[str | None, str]] = {
    Architecture(320, 768, 4): ("v1-inference.yaml", "Stable Diffusion 1"),
    Architecture(320, 768, 9): ("v1-inpainting-inference.yaml", "Stable Diffusion 1 for in-painting"),
    Architecture(320, 1024, 4): (None, V2),
    Architecture(320, 1024, 9): ("v2-inpainting-inference.yaml", "Stable Diffusion 2 for in-painting"),
    Architecture(256, 1024, 7, 1000): ("x4-upscaling.yaml", "the upscaler of Stable Diffusion 2"),
}
# Relatives that this package does not implement.
RELATIVES = {
    Architecture(320, 768, 8): "an InstructPix2Pix model of Stable Diffusion 1",
    Architecture(320, 1024, 5): "the depth-to-image model of Stable Diffusion 2",
}


# First stage of Stable Diffusion: its configuration, and weights with their shapes.
FIRST_STAGE = Path("models/first_stage_models/kl-f8/config.yaml")
FIRST_STAGE_SHAPES = {
    "encoder.conv_in.weight": (128, 3, 3, 3),
    "decoder.conv_in.weight": (512, 4, 3, 3),
    "quant_conv.weight": (8, 8, 1, 1),
}
FIRST_STAGE_LEVELS = ("encoder.down.3.", "encoder.down_blocks.3.")  # the last of four, here and in diffusers


@dataclass(frozen=True)
class Recognition:
    """Recognised model.

    Attributes:
        config: its configuration, relative to the folders of this project.
        name: its name.
        reason: the facts that decided.
    """

    config: Path
    name: str
    reason: str


def recognise(
    shapes: Mapping[str, Sequence[int]], path: Path, metadata: Mapping[str, str] | None = None
) -> Recognition | None:
    """Return the Stable Diffusion model, or its first stage, that weights belong to; None for other weights.

    Args:
        shapes: names and shapes of the weights.
        path: their file; of models that predict the noise or v, its name states which.
        metadata: metadata of the file.

    Raises:
        UserError: the weights are of a kind that this package does not implement, or the prediction is not stated.
    """
    if _is_first_stage(shapes):
        return Recognition(FIRST_STAGE, "the first stage of Stable Diffusion", "latents of 4 channels, 4 levels")
    check_not_foreign(shapes, f'"{path}"')
    architecture = Architecture.of(shapes)
    if architecture in RELATIVES:
        raise UserError(f'"{path}" is {RELATIVES[architecture]}, which this package does not implement')
    if architecture is None or architecture not in KNOWN:
        return None
    config, name = KNOWN[architecture]
    reason = _describe(architecture, shapes)
    if config is None:
        prediction, origin = _prediction(path, metadata or {})
        config, name, reason = V2_CONFIGS[prediction], f"{name} that predicts {prediction}", f"{reason}, {origin}"
    return Recognition(CONFIGS / config, name, reason)


def _is_first_stage(shapes: Mapping[str, Sequence[int]]) -> bool:
    same = all(tuple(shapes.get(name, ())) == shape for name, shape in FIRST_STAGE_SHAPES.items())
    return same and any(_any(shapes, start) for start in FIRST_STAGE_LEVELS)


def _describe(architecture: Architecture, shapes: Mapping[str, Sequence[int]]) -> str:
    text = next((f"text encoder {name}, " for start, name in TEXT_ENCODERS.items() if _any(shapes, start)), "")
    classes = f", {architecture.classes} noise levels" if architecture.classes else ""
    return f"{text}{architecture.inputs} input channels, context of {architecture.context} channels{classes}"


def _any(names: Mapping[str, object], start: str) -> bool:
    return any(name.startswith(start) for name in names)


def _prediction(path: Path, metadata: Mapping[str, str]) -> tuple[str, str]:
    """Return the prediction of Stable Diffusion 2, "v" or "eps", and the fact that decides.

    Raises:
        UserError: neither the metadata nor the name of the file states it.
    """
    stated = PREDICTIONS.get(str(metadata.get(PREDICTION_KEY, "")).lower())
    if stated is not None:
        return stated, "prediction stated in its metadata"
    words = re.split(r"[^a-z0-9]+", path.stem.lower())
    found = {name: word for name, each in V2_WORDS.items() for word in each if word in words}
    if len(found) != 1:
        raise UserError(
            f'"{path}" is {V2}, and neither its weights nor its file name state its prediction; name '
            f"{CONFIGS / V2_CONFIGS['v']} (768 px, v) or {CONFIGS / V2_CONFIGS['eps']} (512 px, eps) with --config"
        )
    ((prediction, word),) = found.items()
    return prediction, f'prediction from "{word}" in its file name (--config decides otherwise)'
