"""Latent diffusion models with a text and an image as conditioning: in-painting and upscaling by Stable Diffusion.

Shapes: images x (B, 3, H, W) in [-1, 1]; latents z (B, c, h, w). Entries of a batch have their channels last.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ldm.config.instantiate import instantiate_from_config
from ldm.errors import UserError
from ldm.io.pixels import batch_images
from ldm.models.diffusion.batch_keys import MASK_KEY, MASKED_KEY
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.modules.frozen import freeze

FIRST_LAYER = ("model.diffusion_model.input_blocks.0.0.weight", "model_ema.diffusion_modelinput_blocks00weight")


class TextAndImageDiffusion(LatentDiffusion):
    """Base class of models whose conditioning is a text, as context, and images, joined to the input.

    Raises:
        UserError: `cond_stage_trainable`, because the text is encoded without gradients.
    """

    passes_texts = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if kwargs.get("cond_stage_trainable"):
            raise UserError(f"{type(self).__name__} encodes its text without gradients; leave out cond_stage_trainable")
        super().__init__(*args, **kwargs)

    @torch.no_grad()
    def get_input(  # type: ignore[override] # the published order differs from that of the base class
        self,
        batch: Mapping[str, Any],
        k: str,
        cond_key: str | None = None,
        bs: int | None = None,
        return_first_stage_outputs: bool = False,
        return_original_cond: bool = False,
        **options: Any,
    ) -> Any:
        """Return the scaled latents and the conditioning of a batch, a dict; see `LatentDiffusion.get_input`."""
        if k != self.first_stage_key:
            return super().get_input(batch, k)
        z, c, *rest = super().get_input(
            batch,
            k,
            cond_key=cond_key,
            bs=bs,
            return_first_stage_outputs=return_first_stage_outputs,
            return_original_cond=return_original_cond,
        )
        return [z, {"c_crossattn": [c], **self.image_conditioning(batch, z, bs)}, *rest]

    def image_conditioning(self, batch: Mapping[str, Any], z: Tensor, bs: int | None = None) -> dict[str, Any]:
        """Return the entries `c_concat`, and for some models `c_adm`, of the conditioning of a batch.

        Args:
            batch: see `get_input`.
            z: scaled latents of the batch.
            bs: use the first `bs` items.
        """
        raise NotImplementedError


class LatentFinetuneDiffusion(TextAndImageDiffusion):
    """Model that starts from the weights of a model whose input has fewer channels.

    Args:
        concat_keys: entries of a batch that are joined to the input.
        finetune_keys: names of the weights whose inputs have more channels than in the file. The new channels start at
            zero, so the model first predicts what the older one did. None loads the weights as they are.
        keep_finetune_dims: number of channels of the older model's input.
        **kwargs: parameters of `LatentDiffusion`.
    """

    def __init__(
        self,
        concat_keys: Sequence[str],
        *args: Any,
        finetune_keys: Sequence[str] | None = FIRST_LAYER,
        keep_finetune_dims: int = 4,
        **kwargs: Any,
    ) -> None:
        # The constructor of the base class reads the weights of `ckpt_path`, which needs these.
        self.finetune_keys = finetune_keys
        self.keep_dims = keep_finetune_dims
        self.concat_keys = concat_keys
        super().__init__(*args, **kwargs)

    def adapt_weights(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the weights of a file with more input channels where `finetune_keys` names them."""
        own = dict(self.state_dict())
        adapted = dict(weights)
        for name in self.finetune_keys or ():
            if name in own and name in weights and weights[name].shape != own[name].shape:
                adapted[name] = self._widened(name, weights[name], own[name])
        return adapted

    def _widened(self, name: str, given: Tensor, own: Tensor) -> Tensor:
        expected = (own.shape[0], self.keep_dims, *own.shape[2:])
        if tuple(given.shape) != expected:
            raise UserError(f"{name} of the file has the shape {tuple(given.shape)}, expected {expected}")
        wide = torch.zeros(own.shape, dtype=given.dtype)
        wide[:, : self.keep_dims] = given
        return wide


class LatentInpaintDiffusion(LatentFinetuneDiffusion):
    """In-painting model of a text, a mask and the masked image.

    Items have the entries `mask` (H, W, 1), 1 where the image is to be filled and else 0, and `masked_image` (H, W, 3)
    in [-1, 1], with 0 under the mask. The network's input is the noisy latents, the mask at their size, and the
    latents of the masked image.

    Args:
        concat_keys: the entries, in the order in which they are joined.
        masked_image_key: the entry that the first stage encodes.
        **kwargs: parameters of `LatentFinetuneDiffusion`.
    """

    def __init__(
        self,
        concat_keys: Sequence[str] = (MASK_KEY, MASKED_KEY),
        masked_image_key: str = MASKED_KEY,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        self.masked_image_key = masked_image_key
        super().__init__(concat_keys, *args, **kwargs)

    def image_conditioning(self, batch: Mapping[str, Any], z: Tensor, bs: int | None = None) -> dict[str, Any]:
        """Return `c_concat`: the mask, reduced to the size of the latents by nearest neighbour, and the latents."""
        parts = []
        for key in self.concat_keys:
            part = batch_images(batch, key)[:bs].to(z)
            if key == self.masked_image_key:
                part = self.get_first_stage_encoding(self.encode_first_stage(part.to(self.first_stage_dtype))).to(z)
            else:
                part = nn.functional.interpolate(part, size=z.shape[-2:])
            parts.append(part)
        return {"c_concat": [torch.cat(parts, dim=1)]}

    @property
    def first_stage_dtype(self) -> torch.dtype:
        """Data type of the first stage."""
        return next(self.first_stage_model.parameters()).dtype


class LatentUpscaleDiffusion(TextAndImageDiffusion):
    """Upscaler of a small image with noise, guided by a text (arXiv:2112.10752 with arXiv:2106.15282, section 4.2).

    The network's input is the noisy latents and the small image; the level of its noise is the class label.

    Args:
        low_scale_config: target and parameters of the model of the small image, such as
            `ImageConcatWithNoiseAugmentation`.
        low_scale_key: entry of a batch with the small image, (B, h, w, 3) in [-1, 1], at the size of the latents.
        noise_level_key: accepted for published configurations, which do not set it.
        **kwargs: parameters of `LatentDiffusion`.
    """

    def __init__(
        self,
        *args: Any,
        low_scale_config: Mapping[str, Any],
        low_scale_key: str = "LR",
        noise_level_key: str | None = None,
        ckpt_path: str | None = None,
        ignore_keys: Sequence[str] = (),
        load_only_unet: bool = False,
        **kwargs: Any,
    ) -> None:
        if noise_level_key is not None:
            raise UserError("LatentUpscaleDiffusion samples the noise levels; leave out noise_level_key")
        super().__init__(*args, **kwargs)
        self.low_scale_key = low_scale_key
        self.low_scale_model = freeze(instantiate_from_config(low_scale_config))
        self.restarted_from_ckpt = ckpt_path is not None
        if ckpt_path is not None:
            self.init_from_ckpt(ckpt_path, ignore_keys, load_only_unet)

    def image_conditioning(self, batch: Mapping[str, Any], z: Tensor, bs: int | None = None) -> dict[str, Any]:
        """Return `c_concat`, the small image with noise, and `c_adm`, the levels of the noise."""
        small = batch_images(batch, self.low_scale_key)[:bs].to(z)
        noisy, noise_level = self.low_scale_model(small)
        return {"c_concat": [noisy], "c_adm": noise_level}
