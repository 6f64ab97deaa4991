"""Text to image with a retrieval-augmented model (arXiv:2204.11824)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Unpack

from ldm.config.model_info import ModelInfo
from ldm.errors import UserError
from ldm.pipelines.pipeline import Conditioned, SamplerPipeline, check_sides, image_size, latent_size

if TYPE_CHECKING:
    from ldm.pipelines.run import SamplerOptions
    from ldm.retrieval.contexts import Context


@dataclass(frozen=True, kw_only=True)
class RetrievalToImage(SamplerPipeline):
    """Pipeline from CLIP embeddings of prompts and their neighbours to images; a request is a `Context`.

    Args:
        height, width: image size in pixels; None is the size of the model.
        clip_type: the CLIP that the model was trained with: the name of OpenAI or of the hub, or a folder.
        database: name or folder of the database that neighbours come from; None samples from the prompts alone.
        knn: number of neighbours of a prompt.
    """

    scale: float = 5.0
    height: int | None = None
    width: int | None = None
    clip_type: str = "ViT-L/14"
    database: str | None = None
    knn: int | None = None

    def settings(self) -> dict[str, Any]:
        """See `Pipeline.settings`; without a database there is neither `database` nor `knn`."""
        settings = super().settings()
        if self.database is None:
            del settings["database"], settings["knn"]
        return settings

    def check(self, info: ModelInfo) -> None:
        """See `Pipeline.check`."""
        context_width(info)
        super().check(info)
        check_sides(info, self.height, self.width)

    def condition(self, model: Any, requests: Sequence[Context]) -> Conditioned:
        """See `Pipeline.condition`."""
        import torch

        from ldm.retrieval.conditioning import unconditional_conditioning

        cond = torch.stack([each.vectors for each in requests]).to(model.device, model.dtype)
        uncond = unconditional_conditioning(cond) if self.scale != 1 else None
        return Conditioned(latent_size(model, *image_size(model, self.height, self.width)), cond, uncond)


def retrieval_to_image(
    model: Any,
    prompts: str | Sequence[str],
    *,
    database: str | None = None,
    knn: int = 10,
    clip_type: str = "ViT-L/14",
    height: int | None = None,
    width: int | None = None,
    steps: int = 50,
    scale: float = 5.0,
    **options: Unpack[SamplerOptions],
) -> list[Any]:
    """Sample an image for each prompt from its CLIP embedding and those of similar images in a database.

    Args:
        model: a retrieval-augmented model, such as the published `rdm768x768`.
        prompts: one text, or one for each image.
        database: a name such as "artbench-surrealism", or a folder; None samples from the prompts alone.
        knn: number of neighbours of a prompt, at most 20.
        clip_type: the CLIP that the model was trained with: the name of OpenAI or of the hub, or a folder.
        height, width: image size in pixels; default: the size of the model.
        steps: number of sampler steps.
        scale: guidance scale; 1 samples without guidance.
        **options: `seed`, `sampler`, `eta`, `timestep_spacing`, `batch_size`, `latents`, `output_type`, `progress`,
            `callback`, `device`, `precision`; see `ldm.pipelines.run.SamplerOptions`.

    Returns:
        PIL images, or what `output_type` names.

    Raises:
        UserError: The model is not retrieval-augmented, or the CLIP or the database is missing or does not suit it.
    """
    from ldm.pipelines.run import run, split_options
    from ldm.retrieval.contexts import ContextEncoder

    sampler, rest = split_options(options)
    info = ModelInfo.of(model)
    pipeline = RetrievalToImage(
        height=height,
        width=width,
        clip_type=clip_type,
        database=database,
        knn=knn if database is not None else None,
        steps=steps,
        scale=scale,
        **sampler,
    )
    pipeline.check(info)
    contexts = ContextEncoder(clip_type, database, knn if database is not None else 0)
    contexts.check_width(context_width(info))
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    known = dict(zip(dict.fromkeys(texts), contexts.encode(list(dict.fromkeys(texts))), strict=True))
    return run(pipeline, model, [known[text] for text in texts], **rest)


def context_width(info: ModelInfo) -> int:
    """Return the width of the vectors that a retrieval-augmented model is conditioned on.

    Raises:
        UserError: The model is not conditioned on given vectors.
    """
    conditioning, unet = info.params.get("cond_stage_config"), info.params.get("unet_config")
    target = conditioning.get("target") if isinstance(conditioning, Mapping) else None
    width = (unet.get("params") or {}).get("context_dim") if isinstance(unet, Mapping) else None
    if target != "torch.nn.Identity" or not isinstance(width, int):
        raise UserError(
            f'the model "{info.name}" is not conditioned on CLIP embeddings; choose a retrieval-augmented one, such as '
            "the published rdm768x768"
        )
    return width
