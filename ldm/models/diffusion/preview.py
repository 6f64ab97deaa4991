"""Previews: images that show the results of a diffusion model for a batch, for `log_images`.

An entry of the previews is a batch of images (B, C, H, W), or one image (C, H, W) with a grid of them, in [-1, 1].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cache, partial
from typing import Any, Protocol

import torch
from einops import rearrange

from ldm.config.assets import locate
from ldm.config.model_config import TEXT_KEYS
from ldm.errors import UserError
from ldm.io.grids import draw_boxes, log_txt_as_img
from ldm.io.pixels import batch_integers, in_random_colours
from ldm.io.text import read_lines
from ldm.models.autoencoder import VQModel
from ldm.models.diffusion.batch_keys import CLASS_KEY, CLASS_NAME_KEY, LAYOUT_KEY
from ldm.models.diffusion.conditioning import slice_batch
from ldm.modules.encoders.layout import LayoutTokens


class DiffusionModel(Protocol):
    """Interface of the models that previews show. Latent models have more methods, see `LatentDiffusion`."""

    first_stage_key: str
    num_timesteps: int
    log_every_t: int

    def get_input(self, batch: Mapping[str, Any], k: str) -> torch.Tensor:
        """Return entry `k` of a batch as (B, C, H, W)."""

    def q_sample(self, x_start: torch.Tensor, t: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
        """Return x_start noised to the timesteps t."""

    def sample(self, **options: Any) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Return samples and intermediates."""

    def ema_scope(self, context: str | None = None) -> AbstractContextManager[None]:
        """Run with the averaged weights."""


def pixel_previews(
    model: DiffusionModel,
    batch: Mapping[str, Any],
    N: int = 8,
    n_row: int = 2,
    sample: bool = True,
    return_keys: Sequence[str] | None = None,
    split: str = "train",
) -> dict[str, torch.Tensor]:
    """Return previews of a model of pixels.

    Args:
        model: the diffusion model.
        batch: the batch to show.
        N: number of items.
        n_row: number of items in the rows.
        sample: also show samples and their denoising.
        return_keys: return only these previews.
        split: split of the data, which the trainer passes; has no effect.

    Returns:
        `inputs`, `diffusion_row` (noising), `samples` and `denoise_row` (the steps of sampling).
    """
    x = model.get_input(batch, model.first_stage_key)[:N]
    log = {"inputs": x, "diffusion_row": diffusion_row(model, x[:n_row])}
    if sample:
        with model.ema_scope("Plotting"):
            log["samples"], steps = model.sample(batch_size=len(x), return_intermediates=True, verbose=False)
        log["denoise_row"] = as_rows(steps)
    return _select(log, return_keys)


def latent_previews(
    model: Any,
    batch: Mapping[str, Any],
    N: int = 8,
    n_row: int = 4,
    sample: bool = True,
    ddim_steps: int | None = 200,
    ddim_eta: float = 1.0,
    return_keys: Sequence[str] | None = None,
    quantize_denoised: bool = True,
    inpaint: bool = True,
    plot_denoise_rows: bool = False,
    plot_progressive_rows: bool = True,
    plot_diffusion_rows: bool = True,
    unconditional_guidance_scale: float = 1.0,
    split: str = "train",
) -> dict[str, torch.Tensor]:
    """Return previews of a latent diffusion model.

    Args:
        model: a `LatentDiffusion`.
        ddim_steps: number of DDIM steps, at most that of the model's timesteps; None samples ancestrally.
        ddim_eta: η of DDIM.
        unconditional_guidance_scale: scale of classifier-free guidance; other than 1 adds `samples_guided`.
        batch, N, n_row, return_keys, split: see `pixel_previews`.
        sample, quantize_denoised, inpaint, plot_denoise_rows, plot_progressive_rows, plot_diffusion_rows: the previews
            to return.

    Returns:
        `inputs`, `reconstruction` and `conditioning`; then `diffusion_row` (noising), `samples`, `denoise_row` (the
        steps of sampling), `samples_guided`, `samples_x0_quantized`, `mask`, `samples_inpainting` and
        `samples_outpainting` of the central square, and `progressive_row` (the estimates of x_0).
    """
    options = {"return_first_stage_outputs": True, "force_c_encode": True, "return_original_cond": True}
    z, c, x, reconstruction, xc = model.get_input(batch, model.first_stage_key, bs=N, **options)
    log = {"inputs": x, "reconstruction": reconstruction}
    ddim_steps = ddim_steps and min(ddim_steps, model.num_timesteps)
    if c is not None:
        log.update(_conditioning_preview(model, batch, xc, x))
    if plot_diffusion_rows:
        log["diffusion_row"] = diffusion_row(model, z[:n_row], model.decode_first_stage)
    generate = partial(_decoded_samples, model, c, len(x), ddim_steps, ddim_eta)
    if sample:
        log["samples"], steps = generate()
        if plot_denoise_rows:
            steps = steps["x_inter"] if isinstance(steps, dict) else steps
            log["denoise_row"] = as_rows([model.decode_first_stage(s[:n_row]) for s in steps])
        if unconditional_guidance_scale != 1.0 and c is not None:
            uc = model.get_learned_conditioning(model.empty_conditioning(xc))
            uc = {**c, "c_crossattn": [uc]} if isinstance(c, Mapping) and "c_crossattn" in c else uc
            log["samples_guided"], _ = generate(
                unconditional_guidance_scale=unconditional_guidance_scale, unconditional_conditioning=uc
            )
        if quantize_denoised and isinstance(model.first_stage_model, VQModel):
            log["samples_x0_quantized"], _ = generate(quantize_x0=True)
    if inpaint:
        mask = central_square_mask(z)
        log["mask"] = mask.expand(-1, 3, -1, -1) * 2 - 1
        log["samples_inpainting"], _ = generate(mask=mask, x0=z)
        log["samples_outpainting"], _ = generate(mask=1 - mask, x0=z)
    if plot_progressive_rows:
        log["progressive_row"] = _progressive_row(model, c, min(len(x), n_row))
    return _select(log, return_keys)


def layout_previews(
    model: Any,
    batch: Mapping[str, Any],
    N: int = 8,
    *args: Any,
    return_keys: Sequence[str] | None = None,
    **options: Any,
) -> dict[str, torch.Tensor]:
    """Return the previews of `latent_previews`, with the boxes and their labels as `bbox_image`.

    `model` is a `Layout2ImgDiffusion`; the other arguments are those of `latent_previews`.
    """
    log = latent_previews(model, batch, N, *args, **options)
    log["bbox_image"] = log.pop("conditioning")
    return _select(log, return_keys)


def layout_images(model: Any, tokens: torch.Tensor, width: int, height: int) -> torch.Tensor:
    """Return images (B, 3, H, W) in [-1, 1] of the boxes of layout tokens (B, L), with their labels."""
    coder = LayoutTokens(model.cond_stage_model.transformer.num_tokens)
    images = []
    for layout in tokens:
        boxes = coder.decode(layout)
        labels = [class_name(model.class_names, box.label) for box in boxes]
        images.append(draw_boxes((width, height), [box.position for box in boxes], labels, max(height // 25, 8)))
    return torch.stack(images)


def class_name(source: Sequence[str] | str, label: int) -> str:
    """Return the name of class `label`, or its number where there is no name.

    Args:
        source: the names, or the path of a file with one name a line; see `ldm.pipelines.class_names`.
        label: number of the class.
    """
    names = _names_in_file(source) if isinstance(source, str) else source
    return names[label] if label < len(names) else str(label)


@cache
def _names_in_file(path: str) -> Sequence[str]:
    """Return the first name in each line of a file; none if there is no such file, because previews only show names."""
    try:
        lines = read_lines(locate(path), "file of class names")
    except UserError:
        return ()
    return [line.split("\t")[0].strip() for line in lines if line.strip()]


def diffusion_row(
    model: DiffusionModel, x_start: torch.Tensor, decode: Callable[[torch.Tensor], torch.Tensor] = lambda x: x
) -> torch.Tensor:
    """Return a grid with a row for each item: x_start noised to every `log_every_t`-th timestep and the last."""
    steps = [t for t in range(model.num_timesteps) if t % model.log_every_t == 0 or t == model.num_timesteps - 1]
    noise = torch.randn_like(x_start)
    noised = [
        decode(model.q_sample(x_start, torch.full((len(x_start),), t, device=x_start.device), noise)) for t in steps
    ]
    return as_rows(noised)


def as_rows(columns: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return n batches (B, C, H, W) as one image (C, B·H, n·W), with a row for each item."""
    return rearrange(list(columns), "n b c h w -> c (b h) (n w)")


def central_square_mask(z: torch.Tensor) -> torch.Tensor:
    """Return a mask (B, 1, h, w) for inpainting: 0 in the central square, which is generated, and 1 around it."""
    mask = torch.ones_like(z[:, :1])
    h, w = z.shape[2:]
    mask[:, :, h // 4 : 3 * h // 4, w // 4 : 3 * w // 4] = 0
    return mask


def _decoded_samples(
    model: Any, c: Any, n: int, ddim_steps: int | None, ddim_eta: float, **options: Any
) -> tuple[torch.Tensor, Any]:
    """Return n decoded samples with the averaged weights, and the intermediates."""
    if ddim_steps is not None:
        options["eta"] = ddim_eta
    with model.ema_scope("Plotting"):
        latents, steps = model.sample_log(c, n, ddim_steps is not None, ddim_steps, verbose=False, **options)
    return model.decode_first_stage(latents), steps


def _progressive_row(model: Any, c: Any, n: int) -> torch.Tensor:
    """Return a grid with a row for each of n samples: the estimates of x_0 during ancestral sampling."""
    shape = (model.channels, model.image_size, model.image_size)
    with model.ema_scope("Plotting Progressives"):
        _, estimates = model.progressive_denoising(slice_batch(c, n), shape, batch_size=n, verbose=False)
    return as_rows([model.decode_first_stage(e) for e in estimates])


def _conditioning_preview(model: Any, batch: Mapping[str, Any], xc: Any, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the conditioning as images: rendered text, boxes, images, or maps in random colours that never change.

    Labels are rendered as their names if the batch holds these.
    """
    key = model.cond_stage_key
    if key in TEXT_KEYS or key == CLASS_KEY:
        texts = batch.get(CLASS_NAME_KEY, batch[key]) if key == CLASS_KEY else batch[key]
        texts = (texts.tolist() if isinstance(texts, torch.Tensor) else texts)[: len(x)]
        return {"conditioning": log_txt_as_img((x.shape[3], x.shape[2]), texts, size=max(x.shape[2] // 25, 8))}
    if key == LAYOUT_KEY and hasattr(model.cond_stage_model, "transformer"):
        return {"conditioning": layout_images(model, batch_integers(batch, key)[: len(x)], x.shape[3], x.shape[2])}
    xc = xc.get(key) if isinstance(xc, Mapping) else xc
    if not isinstance(xc, torch.Tensor) or xc.dim() != 4:
        return {}
    return {"conditioning": xc if xc.shape[1] in (1, 3) else in_random_colours(xc)}


def _select(log: dict[str, torch.Tensor], keys: Sequence[str] | None) -> dict[str, torch.Tensor]:
    """Return the named previews, or all of them if no name matches."""
    selected = [key for key in keys or () if key in log]
    return {key: log[key] for key in selected} if selected else log
