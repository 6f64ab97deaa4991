"""Classifiers of noisy latents, and the guidance that they give a sampler (arXiv:2105.05233).

Shapes: x_t (B, C, h, w), noised latents (or pixels) of a diffusion model; steps t (B,) int64; K classes. Logits are
(B, K) for labels and (B, K, h, w) for segmentation maps, targets (B,) and (B, h, w) int64.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.config.assets import locate
from ldm.config.instantiate import instantiate_from_config
from ldm.config.model_config import read_config
from ldm.config.model_files import named_model
from ldm.errors import UserError, did_you_mean
from ldm.io.checkpoint.loading import load_weights
from ldm.io.checkpoint.reading import read_state_dict
from ldm.io.grids import log_txt_as_img
from ldm.io.pixels import batch_entry, batch_images, in_random_colours
from ldm.modules.diffusionmodules.schedule import extract_into_tensor
from ldm.modules.frozen import freeze

# What a label is, by its entry of the batch, decides the network that tells it.
NETWORKS = {
    "class_label": "ldm.modules.diffusionmodules.openaimodel.EncoderUNetModel",
    "segmentation": "ldm.modules.diffusionmodules.openaimodel.UNetModel",
}
# Options of the denoising U-Net about its conditioning and its own output, which a classifier has not.
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
    """Tells the class, or the segmentation, of a diffusion model's latents at every level of noise.

    The network is built after the diffusion model's own U-Net: its way down with a pooling head for labels, the
    whole of it for segmentation maps, without cross-attention. The diffusion model is frozen and gives latents and
    noise schedule.

    Args:
        diffusion_path: folder of the diffusion model: a log folder, whose latest `configs/*-project.yaml` counts,
            or one with `config.yaml`, or the name of a model in `models/ldm`.
        num_classes: K.
        ckpt_path: weights of a classifier to start from.
        pool: pooling for labels, see `EncoderUNetModel`.
        label_key: entry of the batch that is told, "class_label" or "segmentation"; by default what the diffusion
            model is conditioned on.
        diffusion_ckpt_path: weights of the diffusion model; by default those in its folder.
        scheduler_config: learning rate over time.
        weight_decay: of AdamW.
        log_steps: at so many levels of noise, evenly spread, validation tells the accuracy.
        monitor: what the best checkpoints are chosen by.

    Raises:
        UserError: a file is missing, belongs to another model, or there is no network for the label.
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
        config = diffusion_config(diffusion_path, diffusion_ckpt_path)
        self.label_key = _label_key(label_key, config["params"])
        unet = config["params"]["unet_config"].get("params")
        if not isinstance(unet, Mapping) or "out_channels" not in unet:
            raise UserError(
                f'there is no classifier of what "{diffusion_path}" makes: its unet_config gives no out_channels; '
                "choose a diffusion model with a UNetModel"
            )
        self.diffusion_model = freeze(instantiate_from_config(config))
        self.num_classes = num_classes
        self.scheduler_config = scheduler_config
        self.weight_decay = weight_decay
        self.log_time_interval = max(1, self.diffusion_model.num_timesteps // max(1, log_steps))
        self.monitor = monitor
        self.learning_rate = 1e-4
        params = {name: value for name, value in unet.items() if name not in DENOISING_ONLY}
        params |= {"in_channels": unet["out_channels"], "out_channels": num_classes}
        if self.label_key == "class_label":
            params["pool"] = pool
        self.model = instantiate_from_config({"target": NETWORKS[self.label_key], "params": params})
        if ckpt_path is not None:
            self.init_from_ckpt(ckpt_path)

    def init_from_ckpt(self, path: str, ignore_keys: Sequence[str] = ()) -> None:
        """Load the classifier's weights from a checkpoint, not those of the diffusion model in it.

        Raises:
            UserError: the file cannot be read or holds another model.
        """
        weights = read_state_dict(path)
        own = {name[6:]: value for name, value in weights.items() if name.startswith("model.")}
        load_weights(self.model, own or weights, ignore_keys, source=f'"{path}"')

    def optimizer_parameters(self) -> list[nn.Parameter]:
        """What the optimizer trains: the classifier alone."""
        return list(self.model.parameters())

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.diffusion_model.device

    # -- batches ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def get_input(self, batch: Mapping[str, Any]) -> Tensor:
        """The clean x_0 (B, C, h, w) of a batch: scaled latents, or pixels where the diffusion model has no others."""
        return self.diffusion_model.get_x_start(batch)

    def get_targets(self, batch: Mapping[str, Any], size: Sequence[int]) -> Tensor:
        """The targets of a batch: labels (B,), or maps (B, *size), of which nearest pixels are taken.

        Maps come as one number a pixel, (B, H, W), or one channel a class, (B, H, W, K).
        """
        if self.label_key == "class_label":
            return batch_entry(batch, self.label_key).to(self.device, torch.int64)
        maps = batch_images(batch, self.label_key).to(self.device)
        maps = maps if maps.shape[1] == 1 else maps.argmax(dim=1, keepdim=True).float()
        return F.interpolate(maps, size=tuple(size), mode="nearest")[:, 0].long()

    def get_x_noisy(self, x: Tensor, t: Tensor, noise: Tensor | None = None) -> Tensor:
        """x noised to the steps t."""
        return self.diffusion_model.q_sample(x, t, noise)

    # -- training --------------------------------------------------------------------------------------------

    def forward(self, x_noisy: Tensor, t: Tensor) -> Tensor:
        """Logits of x_noisy (B, C, h, w) at steps t (B,)."""
        return self.model(x_noisy, t)

    def shared_step(
        self, batch: Mapping[str, Any], t: int | None = None, x: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy of a batch at random steps, or all of it at step `t`, and what to log of it.

        `x` is the batch's x_0 where it is known already, which spares the first stage.
        """
        x = self.get_input(batch) if x is None else x
        targets = self.get_targets(batch, x.shape[2:])
        steps = self.diffusion_model.num_timesteps
        ts = torch.randint(steps, (len(x),), device=x.device) if t is None else torch.full((len(x),), t).to(x.device)
        logits = self(self.get_x_noisy(x, ts), ts)
        loss = F.cross_entropy(logits, targets)
        prefix = "train" if self.training else "val"
        accuracies = {f"{prefix}/acc@{k}": self.compute_top_k(logits, targets, k) for k in (1, 5)}
        return loss, {f"{prefix}/loss": loss.detach(), **accuracies}

    @staticmethod
    def compute_top_k(logits: Tensor, targets: Tensor, k: int) -> Tensor:
        """Share of the targets that are among the k likeliest classes."""
        best = logits.topk(min(k, logits.shape[1]), dim=1).indices
        return (best == targets.unsqueeze(1)).any(dim=1).float().mean()

    @torch.no_grad()
    def noise_accuracies(self, batch: Mapping[str, Any], x: Tensor | None = None) -> dict[str, Tensor]:
        """`val/acc@1_t<step>`: the accuracy at each of the `log_steps` levels of noise; `x` as in `shared_step`."""
        x = self.get_input(batch) if x is None else x
        steps = range(0, self.diffusion_model.num_timesteps, self.log_time_interval)
        return {f"val/acc@1_t{t:04}": self.shared_step(batch, t, x)[1]["val/acc@1"] for t in steps}

    # -- previews --------------------------------------------------------------------------------------------

    @torch.no_grad()
    def log_images(self, batch: Mapping[str, Any], N: int = 8, split: str = "train") -> dict[str, Tensor]:
        """Pictures (B, C, H, W): `inputs`, `labels`, and at each level of noise `inputs@t<step>`, `pred@t<step>`."""
        diffusion = self.diffusion_model
        inputs = batch_images(batch, diffusion.first_stage_key)[:N].to(self.device)
        x = self.get_input(batch)[:N]
        targets = self.get_targets(batch, x.shape[2:])[:N]
        names = _names(batch, N) if self.label_key == "class_label" else {}
        log = {"inputs": inputs, "labels": self._picture(targets, names, inputs)}
        noise = torch.randn_like(x)
        for t in range(0, diffusion.num_timesteps, self.log_time_interval):
            ts = torch.full((len(x),), t, device=x.device)
            x_noisy = self.get_x_noisy(x, ts, noise)
            decode = getattr(diffusion, "decode_first_stage", lambda z: z)
            log[f"inputs@t{t:04}"] = decode(x_noisy)
            log[f"pred@t{t:04}"] = self._picture(self(x_noisy, ts).argmax(dim=1), names, inputs)
        return log

    def _picture(self, classes: Tensor, names: Mapping[int, str], like: Tensor) -> Tensor:
        """Classes written out, with the names known; or maps in fixed random colours."""
        if classes.dim() == 1:
            texts = [str(names.get(label, label)) for label in classes.tolist()]
            return log_txt_as_img((like.shape[3], like.shape[2]), texts, size=max(like.shape[2] // 25, 8))
        return in_random_colours(F.one_hot(classes, self.num_classes).movedim(-1, 1).float())


class ClassifierGuidance:
    """A `score_corrector` for samplers that leads towards what a classifier calls `labels`.

    eps - √(1 - ᾱ_t) · scale · ∇ log p(y | x_t), algorithm 2 of arXiv:2105.05233. With the exact classifier and scale
    1 the result is the noise prediction conditioned on y.

    Args:
        classifier: (x_t, t) to logits (B, K, ...), such as a `NoisyLatentImageClassifier`.
        labels: y, (B, ...) int64, for the batch that is sampled.
        scale: how strongly; 0 leaves the prediction as it is.
    """

    def __init__(self, classifier: Callable[[Tensor, Tensor], Tensor], labels: Tensor, scale: float = 1.0) -> None:
        self.classifier = classifier
        self.labels = labels
        self.scale = scale

    def modify_score(self, model: Any, e_t: Tensor, x: Tensor, t: Tensor, c: Any) -> Tensor:
        """The corrected noise prediction (B, C, h, w) for x at steps t (B,)."""
        alpha = extract_into_tensor(model.alphas_cumprod, t, x.shape).to(e_t)
        return e_t - (1 - alpha).sqrt() * self.scale * self.gradient(x, t).to(e_t)

    def gradient(self, x: Tensor, t: Tensor) -> Tensor:
        """∇ log p(y | x_t) with respect to x_t, like x."""
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            log_p = self.classifier(x, t).to(x.dtype).log_softmax(dim=1)
            chosen = log_p.gather(1, self.labels.to(x.device).unsqueeze(1))
            return torch.autograd.grad(chosen.sum(), x)[0]


def diffusion_config(path: str, checkpoint: str | None = None) -> dict[str, Any]:
    """The configuration of the diffusion model in a folder, to be built with its weights.

    Args:
        path: see `NoisyLatentImageClassifier`.
        checkpoint: its weights, by default the folder's own. They hold the first stage and the conditioning stage
            too, which therefore need no files of theirs.

    Raises:
        UserError: the folder, its configuration or its weights are not there, or it holds no diffusion model.
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
    # Which part of a checkpoint the model's own training started from has no say in what is loaded here: all of it.
    params = {key: value for key, value in model["params"].items() if key not in ("load_only_unet", "ignore_keys")}
    params["ckpt_path"] = str(locate(Path(weights)))
    if not isinstance(params.get("unet_config"), Mapping):
        raise UserError(f'diffusion_path "{path}" is not a diffusion model: its configuration has no unet_config')
    for stage in ("first_stage_config", "cond_stage_config"):
        inner = params.get(stage)
        if isinstance(inner, Mapping) and isinstance(inner.get("params"), Mapping):
            params[stage] = {**inner, "params": {k: v for k, v in inner["params"].items() if k != "ckpt_path"}}
    return {**model, "params": params}


def _label_key(given: str | None, diffusion_params: Mapping[str, Any]) -> str:
    key = given or diffusion_params.get("cond_stage_key")
    if key not in NETWORKS:
        hint = did_you_mean(str(key), NETWORKS)
        raise UserError(f'there is no classifier of "{key}"{hint}; set label_key to one of {", ".join(NETWORKS)}')
    return key


def _names(batch: Mapping[str, Any], count: int) -> dict[int, str]:
    """Label → name, for the classes in a batch that names them."""
    labels = batch["class_label"][:count].tolist()
    return dict(zip(labels, batch["human_label"][:count], strict=True)) if "human_label" in batch else {}
