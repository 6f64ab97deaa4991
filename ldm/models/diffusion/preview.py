"""Pictures that show what a model does with a batch: the `log_images` of diffusion models.

Every entry is (B, C, H, W) in [-1, 1], or a ready grid of such pictures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ldm.io.grids import draw_boxes, log_txt_as_img
from ldm.io.pixels import in_random_colours
from ldm.models.autoencoder import VQModel
from ldm.models.diffusion.conditioning import slice_batch

if TYPE_CHECKING:
    from ldm.models.diffusion.ddpm import DDPM, LatentDiffusion, Layout2ImgDiffusion


def pixel_previews(
    model: DDPM,
    batch: Mapping[str, Any],
    N: int = 8,
    n_row: int = 2,
    sample: bool = True,
    return_keys: Sequence[str] | None = None,
    split: str = "train",
) -> dict[str, torch.Tensor]:
    """Previews of a model of pixels: the inputs, their noising, samples and their denoising."""
    x = model.get_input(batch, model.first_stage_key)[:N]
    log = {"inputs": x, "diffusion_row": diffusion_rows(model, x[:n_row])}
    if sample:
        with model.ema_scope("Plotting"):
            log["samples"], steps = model.sample(batch_size=len(x), return_intermediates=True, verbose=False)
        log["denoise_row"] = as_rows(steps)
    return _only(log, return_keys)


def latent_previews(
    model: LatentDiffusion,
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
    """Previews of a latent model.

    `inputs`, `reconstruction`, `conditioning`; then as asked `diffusion_row` (noising), `samples` by DDIM in
    `ddim_steps` (ancestrally for None), `samples_guided`, `denoise_row`, `samples_x0_quantized`,
    `samples_inpainting` and `samples_outpainting` of the middle square, and `progressive_row`.
    """
    z, c, x, reconstruction, xc = model.get_input(
        batch, model.first_stage_key, True, force_c_encode=True, return_original_cond=True, bs=N
    )
    n, size = len(x), {"x_T": None, "verbose": False}
    log = {"inputs": x, "reconstruction": reconstruction}
    if c is not None:
        log.update(_conditioning(model, batch, xc, x))
    if plot_diffusion_rows:
        log["diffusion_row"] = diffusion_rows(model, z[:n_row], model.decode_first_stage)

    def draw(**options: Any) -> tuple[torch.Tensor, Any]:
        eta = {"eta": ddim_eta} if ddim_steps is not None else {}
        with model.ema_scope("Plotting"):
            latents, steps = model.sample_log(c, n, ddim_steps is not None, ddim_steps, **eta, **size, **options)
        return model.decode_first_stage(latents), steps

    if sample:
        log["samples"], steps = draw()
        if plot_denoise_rows:
            steps = steps["x_inter"] if isinstance(steps, dict) else steps
            log["denoise_row"] = as_rows([model.decode_first_stage(s[:n_row]) for s in steps])
        if unconditional_guidance_scale != 1.0 and c is not None:
            empty = model.get_learned_conditioning(model.empty_conditioning(xc))
            log["samples_guided"], _ = draw(
                unconditional_guidance_scale=unconditional_guidance_scale, unconditional_conditioning=empty
            )
        if quantize_denoised and isinstance(model.first_stage_model, VQModel):
            log["samples_x0_quantized"], _ = draw(quantize_x0=True)
    if inpaint:
        kept = middle_square(z)
        log["mask"] = kept.expand(-1, 3, -1, -1) * 2 - 1
        log["samples_inpainting"], _ = draw(mask=kept, x0=z)
        log["samples_outpainting"], _ = draw(mask=1 - kept, x0=z)
    if plot_progressive_rows:
        with model.ema_scope("Plotting Progressives"):
            shape = (model.channels, model.image_size, model.image_size)
            _, estimates = model.progressive_denoising(slice_batch(c, n_row), shape, min(n, n_row), verbose=False)
        log["progressive_row"] = as_rows([model.decode_first_stage(e) for e in estimates])
    return _only(log, return_keys)


def layout_previews(
    model: Layout2ImgDiffusion,
    batch: Mapping[str, Any],
    N: int = 8,
    return_keys: Sequence[str] | None = None,
    **options: Any,
) -> dict[str, torch.Tensor]:
    """Those of `latent_previews`, and `bbox_image`: the boxes with their labels, where the picture has them."""
    log = latent_previews(model, batch, N, **options)
    height, width = log["inputs"].shape[2:]
    pictures = []
    for tokens in batch[model.cond_stage_key][:N]:
        boxes = model.layout_tokens.decode(tokens)
        labels = [model.class_name(box.label) for box in boxes]
        pictures.append(draw_boxes((width, height), [box.position for box in boxes], labels, max(height // 25, 8)))
    log["bbox_image"] = torch.stack(pictures)
    return _only(log, return_keys)


def diffusion_rows(model: DDPM, x_start: torch.Tensor, decode: Any = lambda x: x) -> torch.Tensor:
    """A grid: each row one item, noised further and further, at the steps that `log_every_t` names."""
    steps = [t for t in range(model.num_timesteps) if t % model.log_every_t == 0 or t == model.num_timesteps - 1]
    noise = torch.randn_like(x_start)
    noised = [
        decode(model.q_sample(x_start, torch.full((len(x_start),), t, device=x_start.device), noise)) for t in steps
    ]
    return as_rows(noised)


def as_rows(columns: Sequence[torch.Tensor]) -> torch.Tensor:
    """One picture (1, C, B·H, n·W) from n batches (B, C, H, W): a row for each item, a column for each batch."""
    stacked = torch.stack(list(columns), dim=3)  # (B, C, H, n, W)
    b, c, h, n, w = stacked.shape
    return stacked.permute(1, 0, 2, 3, 4).reshape(1, c, b * h, n * w)


def middle_square(z: torch.Tensor) -> torch.Tensor:
    """A mask (B, 1, h, w): 1 around, 0 in the middle square, which in-painting fills."""
    mask = torch.ones_like(z[:, :1])
    h, w = z.shape[2:]
    mask[:, :, h // 4 : 3 * h // 4, w // 4 : 3 * w // 4] = 0
    return mask


def _conditioning(
    model: LatentDiffusion, batch: Mapping[str, Any], xc: Any, x: torch.Tensor
) -> dict[str, torch.Tensor]:
    """The conditioning as a picture: text written out, images as they are, maps in three fixed random colours.

    Labels are written as their names, where the batch has them.
    """
    key = model.cond_stage_key
    if key in ("caption", "class_label"):
        words = batch.get("human_label", batch[key]) if key == "class_label" else batch[key]
        words = (words.tolist() if isinstance(words, torch.Tensor) else words)[: len(x)]
        return {"conditioning": log_txt_as_img((x.shape[3], x.shape[2]), words, size=max(x.shape[2] // 25, 8))}
    xc = xc.get(key) if isinstance(xc, Mapping) else xc
    if not isinstance(xc, torch.Tensor) or xc.dim() != 4:
        return {}
    return {"conditioning": xc if xc.shape[1] in (1, 3) else in_random_colours(xc)}


def _only(log: dict[str, torch.Tensor], keys: Sequence[str] | None) -> dict[str, torch.Tensor]:
    chosen = [key for key in keys or () if key in log]
    return {key: log[key] for key in chosen} if chosen else log
