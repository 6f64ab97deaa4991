"""Classifiers of noisy latents, and classifier guidance of samplers (arXiv:2105.05233).

Shapes: x_t (B, C, h, w), noised latents (or pixels) of a diffusion model; timesteps t (B,) int64; K classes. Logits are
(B, K) for labels and (B, K, h, w) for segmentation maps, targets (B,) and (B, h, w) int64.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.compat import published_names
from ldm.config.assets import locate
from ldm.config.instantiate import instantiate_from_config
from ldm.config.model_config import read_config
from ldm.config.model_files import named_model
from ldm.errors import UserError, did_you_mean
from ldm.io.checkpoint.loading import load_weights
from ldm.io.checkpoint.reading import read_state_dict
from ldm.io.grids import log_txt_as_img
from ldm.io.pixels import batch_entry, batch_images, batch_integers, in_random_colours
from ldm.models.diffusion.batch_keys import CLASS_KEY, CLASS_NAME_KEY, SEGMENTATION_KEY
from ldm.models.shapes import check_sides
from ldm.modules.diffusionmodules.schedule import extract_into_tensor
from ldm.modules.frozen import freeze

__getattr__ = published_names(__name__)

# Network of the classifier for each entry of a batch that can be its label.
NETWORKS = {
    CLASS_KEY: "ldm.modules.diffusionmodules.openaimodel.EncoderUNetModel",
    SEGMENTATION_KEY: "ldm.modules.diffusionmodules.openaimodel.UNetModel",
}
# Options of the denoising U-Net that a classifier does not have: its conditioning and its output.
DENOISING_ONLY = (
    "use_spatial_transformer",
    "transformer_depth",
    "context_dim",
    "checkpoint_transformer",
    "num_classes",
    "n_embed",
    "legacy",
)


class NoisyLatentImageClassifier(nn.Module):
    """Classifier of the noisy latents of a diffusion model, for class labels or segmentation maps.

    The network has the architecture of the diffusion model's U-Net without cross-attention: its encoder with a pooling
    head for labels, the whole U-Net for segmentation maps. The diffusion model is frozen. It provides the latents and
    the noise schedule.

    Args:
        diffusion_path: folder of the diffusion model: a log folder, of which the latest `configs/*-project.yaml` is
            used, or a folder with `config.yaml`, or the name of a model in `models/ldm`.
        num_classes: number of classes K.
        ckpt_path: weights of a classifier to start from.
        pool: pooling for labels, see `EncoderUNetModel`.
        label_key: entry of a batch to predict, "class_label" or "segmentation"; by default the conditioning of the
            diffusion model.
        diffusion_ckpt_path: weights of the diffusion model; by default those in its folder.
        scheduler_config: learning rate schedule, for the trainer.
        weight_decay: weight decay of AdamW.
        log_steps: number of noise levels at which validation measures the accuracy.
        monitor: name of the logged value that selects the checkpoints to keep.

    Raises:
        UserError: a file is missing or belongs to another model, or the label has no network.
    """

    def __init__(
        self,
        diffusion_path: str,
        num_classes: int,
        ckpt_path: str | None = None,
        pool: str = "attention",
        label_key: str | None = None,
        diffusion_ckpt_path: str | None = None,
        scheduler_config: Mapping[str, Any] | None = None,
        weight_decay: float = 1e-2,
        log_steps: int = 10,
        monitor: str | None = "val/loss",
    ) -> None:
        super().__init__()
        self.diffusion_config = diffusion_config(diffusion_path, diffusion_ckpt_path)
        self.label_key = _label_key(label_key, self.diffusion_config["params"])
        unet = self.diffusion_config["params"]["unet_config"].get("params")
        if not isinstance(unet, Mapping) or "out_channels" not in unet:
            raise UserError(
                f'cannot build a classifier for "{diffusion_path}": its unet_config has no out_channels; '
                "choose a diffusion model with a UNetModel"
            )
        self.num_classes = num_classes
        self.scheduler_config = scheduler_config
        self.use_scheduler = scheduler_config is not None
        self.weight_decay = weight_decay
        self.monitor = monitor
        self.learning_rate = 1e-4
        self.log_steps = log_steps
        self.load_diffusion()
        self.log_time_interval = max(1, self.diffusion_model.num_timesteps // max(1, log_steps))
        self.load_classifier(ckpt_path, pool)

    def load_diffusion(self) -> None:
        """Build the diffusion model, with its weights, and freeze it."""
        self.diffusion_model = freeze(instantiate_from_config(self.diffusion_config))

    def load_classifier(self, ckpt_path: str | None, pool: str) -> None:
        """Build the classifier with the architecture of the diffusion model's U-Net, and load its weights if given."""
        unet = self.diffusion_config["params"]["unet_config"]["params"]
        params = {name: value for name, value in unet.items() if name not in DENOISING_ONLY}
        params |= {"in_channels": unet["out_channels"], "out_channels": self.num_classes}
        if self.label_key == CLASS_KEY:
            params["pool"] = pool
        self.model = instantiate_from_config({"target": NETWORKS[self.label_key], "params": params})
        if ckpt_path is not None:
            self.init_from_ckpt(ckpt_path)

    def init_from_ckpt(self, path: str, ignore_keys: Sequence[str] = (), only_model: bool = False) -> None:
        """Load the weights of the classifier, but not of its diffusion model, from a checkpoint.

        `only_model` has no effect: the other weights are those of the diffusion model, which is loaded already.

        Raises:
            UserError: the file cannot be read or holds another model.
        """
        weights = read_state_dict(path)
        own = {name[6:]: value for name, value in weights.items() if name.startswith("model.")}
        load_weights(self.model, own or weights, ignore_keys, source=f'"{path}"')

    def optimizer_parameters(self) -> list[nn.Parameter]:
        """Return the parameters that the optimizer trains: those of the classifier."""
        return list(self.model.parameters())

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        return self.diffusion_model.device

    # -- batches ---------------------------------------------------------------------------------------------

    @property
    def numd(self) -> int:
        """Number of times that the diffusion model's first stage halves the sides of an image."""
        return getattr(self.diffusion_model, "downsampling", 1).bit_length() - 1

    def get_input(self, batch: Mapping[str, Any], k: str) -> Tensor:
        """Return the images or maps `batch[k]`, (B, H, W, C) or (B, H, W), as float (B, C, H, W)."""
        return batch_images(batch, k)

    @torch.no_grad()
    def get_x_start(self, batch: Mapping[str, Any]) -> Tensor:
        """Return the clean x_0 (B, C, h, w) of a batch: scaled latents, or pixels for a diffusion model of pixels."""
        return self.diffusion_model.get_x_start(batch)

    @torch.no_grad()
    def get_conditioning(self, batch: Mapping[str, Any], k: str | None = None) -> Tensor:
        """Return the targets `batch[k]`, by default of `label_key`: labels, or maps (B, K, h, w) at latent size."""
        key = self.label_key if k is None else k
        if self.label_key != SEGMENTATION_KEY:
            return batch_entry(batch, key).to(self.device)
        maps = batch_images(batch, key).to(self.device)
        return F.interpolate(maps, size=tuple(side >> self.numd for side in maps.shape[2:]), mode="nearest")

    def get_targets(self, batch: Mapping[str, Any], size: Sequence[int]) -> Tensor:
        """Return the targets of a batch: labels (B,), or maps (B, *size), resized with the nearest pixel.

        The maps of a batch hold class indices (B, H, W), or one channel per class (B, H, W, K).
        """
        if self.label_key == CLASS_KEY:
            return batch_integers(batch, self.label_key).to(self.device, torch.int64)
        maps = batch_images(batch, self.label_key).to(self.device)
        maps = maps if maps.shape[1] == 1 else maps.argmax(dim=1, keepdim=True).float()
        return F.interpolate(maps, size=tuple(size), mode="nearest")[:, 0].long()

    def get_x_noisy(self, x: Tensor, t: Tensor, noise: Tensor | None = None) -> Tensor:
        """Return x noised to the timesteps t."""
        return self.diffusion_model.q_sample(x, t, noise)

    # -- training --------------------------------------------------------------------------------------------

    def forward(self, x_noisy: Tensor, t: Tensor) -> Tensor:
        """Return the logits of x_noisy (B, C, h, w) at timesteps t (B,)."""
        return self.model(x_noisy, t)

    def shared_step(
        self, batch: Mapping[str, Any], t: int | None = None, x: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the cross-entropy of a batch at random timesteps, or at timestep `t`, and the values to log.

        `x` is the x_0 of the batch, if it is known; the first stage is not run then.
        """
        x = self.get_x_start(batch) if x is None else x
        pixels = getattr(self.diffusion_model, "downsampling", 1)
        check_sides(x, getattr(self.model, "downsampling", 1), "the classifier", pixels)
        targets = self.get_targets(batch, x.shape[2:])
        if t is None:
            ts = torch.randint(self.diffusion_model.num_timesteps, (len(x),), device=x.device)
        else:
            ts = torch.full((len(x),), t).to(x.device)
        logits = self(self.get_x_noisy(x, ts), ts)
        loss = F.cross_entropy(logits, targets)
        prefix = "train" if self.training else "val"
        accuracies = {f"{prefix}/acc@{k}": self.compute_top_k(logits, targets, k) for k in (1, 5)}
        return loss, {f"{prefix}/loss": loss.detach(), **accuracies}

    def compute_top_k(self, logits: Tensor, labels: Tensor, k: int, reduction: str = "mean") -> Tensor:
        """Return the share of the labels that are among the k most likely classes.

        With the reduction "none" return 1 for each of these labels, and 0 for the others.
        """
        best = logits.topk(min(k, logits.shape[1]), dim=1).indices
        correct = (best == labels.unsqueeze(1)).any(dim=1).float()
        return correct if reduction == "none" else correct.mean()

    @torch.no_grad()
    def noise_accuracies(self, batch: Mapping[str, Any], x: Tensor | None = None) -> dict[str, Tensor]:
        """Return `val/acc@1_t<timestep>`, the accuracy at each of the `log_steps` noise levels.

        `x` is the x_0 of the batch, if it is known.
        """
        x = self.get_x_start(batch) if x is None else x
        timesteps = range(0, self.diffusion_model.num_timesteps, self.log_time_interval)
        return {f"val/acc@1_t{t:04}": self.shared_step(batch, t, x)[1]["val/acc@1"] for t in timesteps}

    # -- previews --------------------------------------------------------------------------------------------

    @torch.no_grad()
    def log_images(self, batch: Mapping[str, Any], N: int = 8, split: str = "train") -> dict[str, Tensor]:
        """Return images (B, C, H, W) that show the inputs and the predictions for a batch.

        Returns:
            `inputs`, `labels`, and for each noise level `inputs@t<timestep>` and `pred@t<timestep>`.
        """
        diffusion = self.diffusion_model
        inputs = batch_images(batch, diffusion.first_stage_key)[:N].to(self.device)
        x = self.get_x_start(batch)[:N]
        targets = self.get_targets(batch, x.shape[2:])[:N]
        names = _class_names(batch, N) if self.label_key == CLASS_KEY else {}
        log = {"inputs": inputs, "labels": self._as_images(targets, names, inputs)}
        noise = torch.randn_like(x)
        for t in range(0, diffusion.num_timesteps, self.log_time_interval):
            ts = torch.full((len(x),), t, device=x.device)
            x_noisy = self.get_x_noisy(x, ts, noise)
            decode = getattr(diffusion, "decode_first_stage", lambda z: z)
            log[f"inputs@t{t:04}"] = decode(x_noisy)
            log[f"pred@t{t:04}"] = self._as_images(self(x_noisy, ts).argmax(dim=1), names, inputs)
        return log

    def _as_images(self, classes: Tensor, names: Mapping[int, str], like: Tensor) -> Tensor:
        """Return labels as rendered text, by name if known, or maps in random colours that never change."""
        if classes.dim() == 1:
            texts = [str(names.get(label, label)) for label in classes.tolist()]
            return log_txt_as_img((like.shape[3], like.shape[2]), texts, size=max(like.shape[2] // 25, 8))
        return in_random_colours(rearrange(F.one_hot(classes, self.num_classes), "b h w k -> b k h w").float())


class ClassifierGuidance:
    """Classifier guidance, a `score_corrector` for samplers (arXiv:2105.05233, algorithm 2).

    ::

        ε̂' = ε̂ - √(1 - ᾱ_t) · scale · ∇ log p(y | x_t)

    With the exact classifier and scale 1, the result is the noise prediction conditional on y.

    Args:
        classifier: function of (x_t, t) that returns logits (B, K, ...), such as a `NoisyLatentImageClassifier`.
        labels: classes y (B, ...) int64 of the samples.
        scale: guidance scale; 0 does not change the prediction.
    """

    def __init__(self, classifier: Callable[[Tensor, Tensor], Tensor], labels: Tensor, scale: float = 1.0) -> None:
        self.classifier = classifier
        self.labels = labels
        self.scale = scale

    def modify_score(self, model: Any, e_t: Tensor, x: Tensor, t: Tensor, c: Any) -> Tensor:
        """Return the corrected noise prediction (B, C, h, w) for x at timesteps t (B,)."""
        alpha = extract_into_tensor(model.alphas_cumprod, t, x.shape).to(e_t)
        return e_t - (1 - alpha).sqrt() * self.scale * self.gradient(x, t).to(e_t)

    def gradient(self, x: Tensor, t: Tensor) -> Tensor:
        """Return the gradient of log p(y | x_t) with respect to x_t."""
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            log_p = self.classifier(x, t).to(x.dtype).log_softmax(dim=1)
            log_p_labels = log_p.gather(1, self.labels.to(x.device).unsqueeze(1))
            return torch.autograd.grad(log_p_labels.sum(), x)[0]


def diffusion_config(path: str, checkpoint: str | None = None) -> dict[str, Any]:
    """Return the configuration of the diffusion model in a folder, with the path of its weights.

    Args:
        path: see `NoisyLatentImageClassifier`.
        checkpoint: weights of the model, by default those in the folder. They include the first stage and the
            conditioning stage, whose own checkpoints are therefore not loaded.

    Raises:
        UserError: the folder, its configuration or its weights are missing, or the model is not a diffusion model.
    """
    folder = locate(path)
    projects = sorted(folder.glob("configs/*-project.yaml"))  # names begin with the time
    if projects:
        config, weights = projects[-1], checkpoint or folder / "checkpoints" / "last.ckpt"
    elif checkpoint is not None and (folder / "config.yaml").is_file():
        config, weights = folder / "config.yaml", checkpoint
    else:
        files = named_model(path)
        config, weights = files.config, checkpoint or files.checkpoint
    model = read_config(config)
    # These options select what the training of the model started from. Here all weights are loaded.
    params = {key: value for key, value in model["params"].items() if key not in ("load_only_unet", "ignore_keys")}
    params["ckpt_path"] = str(locate(Path(weights)))
    if not isinstance(params.get("unet_config"), Mapping):
        raise UserError(f'diffusion_path "{path}" is not a diffusion model: its configuration has no unet_config')
    for stage in ("first_stage_config", "cond_stage_config"):
        stage_config = params.get(stage)
        if isinstance(stage_config, Mapping) and isinstance(stage_config.get("params"), Mapping):
            stage_params = {key: value for key, value in stage_config["params"].items() if key != "ckpt_path"}
            params[stage] = {**stage_config, "params": stage_params}
    return {**model, "params": params}


def _label_key(label_key: str | None, diffusion_params: Mapping[str, Any]) -> str:
    key = label_key or diffusion_params.get("cond_stage_key")
    if key not in NETWORKS:
        hint = did_you_mean(str(key), NETWORKS)
        raise UserError(f'cannot classify "{key}"{hint}; set label_key to one of {", ".join(NETWORKS)}')
    return key


def _class_names(batch: Mapping[str, Any], n: int) -> dict[int, str]:
    """Return the names of the labels of the first `n` items, as far as the batch holds them."""
    labels = batch[CLASS_KEY][:n].tolist()
    return dict(zip(labels, batch[CLASS_NAME_KEY][:n], strict=True)) if CLASS_NAME_KEY in batch else {}
