"""Configurations of a first stage and of a diffusion model for a prepared folder of images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ldm.preparation.machine import Machine
from ldm.preparation.networks import DOWNSCALING, Denoiser, FirstStage
from ldm.preparation.sizing import Schedule
from ldm.preparation.vocabulary import Vocabulary
from ldm.preparation.yaml_text import Note

# Task → entry of a batch that conditions its model.
TASKS = {
    "text": "caption",
    "class": "class_label",
    "unconditional": None,
    "inpainting": "masked_image",
    "superres": "LR_image",
}
CONSTANT = 10_000_000_000_000  # steps of a cycle that never ends, as published
CACHE_SHARE = 8  # the cached latents use at most this part of the memory
CACHE_VARIANTS = 4  # crops and mirrored versions of each image in the cache
PREVIEWS = 8  # images in a preview


@dataclass(frozen=True)
class Data:
    """Prepared data.

    Attributes:
        root: folder of the images.
        train, validation: tables of the images; validation may be None.
        size: side of the images in pixels.
        task: one of `TASKS`.
        count: number of training images.
        class_names: file of the names of the classes.
        classes: number of classes.
        vocabulary: vocabulary of the captions.
        degradation: degradation of the small images for super-resolution.
    """

    root: Path
    train: Path
    validation: Path | None
    size: int
    task: str
    count: int
    class_names: Path | None = None
    classes: int = 0
    vocabulary: Vocabulary | None = None
    degradation: str = "pil_bicubic"

    def datasets(self, plain_images: bool = False) -> dict[str, Any]:
        """Return the data sets for a configuration.

        Args:
            plain_images: leave out what conditions the diffusion model.
        """
        sets = {"train": self._dataset("FolderTrain", self.train, plain_images)}
        if self.validation is not None:
            sets["validation"] = self._dataset("FolderValidation", self.validation, plain_images)
        return sets

    def _dataset(self, name: str, table: Path, plain_images: bool) -> dict[str, Any]:
        params: dict[str, Any] = {"data_root": str(self.root), "files": str(table), "size": self.size}
        dataset = {"target": f"ldm.data.folder.{name}", "params": params}
        if plain_images:
            return dataset
        if self.task == "text":
            params["caption"] = Note("caption", "column of the table")
        elif self.task == "class":
            params |= {"label": Note("label", "column of the table"), "class_names": str(self.class_names)}
        elif self.task == "inpainting":
            fixed = {"fixed": Note(True, "the same masks each time")} if name == "FolderValidation" else {}
            return {"target": "ldm.data.inpainting.MaskedPictures", "params": {**fixed, "dataset": dataset}}
        elif self.task == "superres":
            small = {"degradation": self.degradation, "downscale_f": DOWNSCALING}
            return {"target": "ldm.data.superresolution.SmallerPictures", "params": {**small, "dataset": dataset}}
        return dataset


@dataclass(frozen=True)
class Recipe:
    """Networks and plans of the two training runs.

    Attributes:
        data: the prepared data.
        stage: the first stage.
        denoiser: the denoising network.
        machine: the machine that trains.
        stage_plan: plan of the first stage's run; None uses its weights as they are.
        plan: plan of the diffusion model's run.
        stage_weights: weights of the trained first stage.
        cache: file of the cached latents; None encodes the images in every step.
        with_losses: train the first stage with a discriminator and LPIPS.
        workers: loader processes.
    """

    data: Data
    stage: FirstStage
    denoiser: Denoiser
    machine: Machine
    stage_plan: Schedule | None
    plan: Schedule
    stage_weights: str
    cache: Path | None
    with_losses: bool
    workers: int = field(default=1)

    # -- the first stage -------------------------------------------------------------------------------------------

    def first_stage(self) -> dict[str, Any]:
        """Return the configuration of the first stage."""
        assert self.stage_plan is not None
        plan = self.stage_plan
        params: dict[str, Any] = {"monitor": "val/rec_loss", **self.stage.params, "lossconfig": self._loss(plan)}
        if self.stage.weights is not None:
            params["ckpt_path"] = Note(str(self.stage.weights), "start from these weights")
            params["ignore_keys"] = Note(["loss"], "the discriminator starts from scratch")
        params["scheduler_config"] = _warm_up(plan)
        rate = Note(plan.base_learning_rate, f"times the items of a step: {plan.learning_rate:g}")
        model = {"base_learning_rate": rate, "target": self.stage.target, "params": params}
        return {"model": model, "data": self._data(plan, True), "lightning": self._lightning(plan, {})}

    def _loss(self, plan: Schedule) -> dict[str, Any]:
        weight = Note(float(self.with_losses), "1.0 sharpens details; downloads VGG16 on first use")
        discriminator = {
            "disc_start": Note(plan.steps // 2, "step from which the discriminator counts"),
            "disc_factor": Note(float(self.with_losses), "0.0 leaves the discriminator out, which saves time"),
            "disc_weight": 0.5,
            "disc_num_layers": 3 if self.data.size >= 128 else 2,
        }
        if self.stage.is_kl:
            params = {**discriminator, "kl_weight": 1e-6, "perceptual_weight": weight}
            return {"target": "ldm.modules.losses.LPIPSWithDiscriminator", "params": params}
        params = {**discriminator, "disc_in_channels": 3, "codebook_weight": 1.0, "perceptual_weight": weight}
        return {"target": "ldm.modules.losses.vqperceptual.VQLPIPSWithDiscriminator", "params": params}

    # -- the diffusion model ---------------------------------------------------------------------------------------

    def diffusion_model(self) -> dict[str, Any]:
        """Return the configuration of the diffusion model."""
        plan, task = self.plan, self.data.task
        key = TASKS[task]
        unet = {name: self._noted(name, value) for name, value in self.denoiser.params.items()}
        stage = {**self.stage.params, "ckpt_path": Note(self.stage_weights, self._origin)}
        params: dict[str, Any] = {
            "linear_start": 0.0015,
            "linear_end": 0.0195,
            "timesteps": 1000,
            "first_stage_key": "image",
            **({"cond_stage_key": key} if key else {}),
            **self._classes(),
            "image_size": Note(self.denoiser.params["image_size"], "side of the latents"),
            "channels": self.stage.channels,
            **({"cond_stage_trainable": True, "conditioning_key": "crossattn"} if self.denoiser.context else {}),
            **({"cond_dropout": Note(0.1, "for classifier-free guidance")} if self.denoiser.context else {}),
            "scale_by_std": Note(True, "measure the scale of the latents in the first batch"),
            **({"monitor": "val/loss_simple_ema"} if self.data.validation is not None else {}),
            "scheduler_config": _warm_up(plan),
            "unet_config": {"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": unet},
            "first_stage_config": {
                "target": self.stage.inner_target,
                "params": {**stage, "lossconfig": {"target": "torch.nn.Identity"}},
            },
            **self.denoiser.conditioning,
            **self._context_stage(),
        }
        rate = Note(plan.base_learning_rate, f"times the items of a step: {plan.learning_rate:g}")
        model = {
            "base_learning_rate": rate,
            "target": "ldm.models.diffusion.ddpm.LatentDiffusion",
            "params": params,
        }
        return {"model": model, "data": self._data(plan), "lightning": self._lightning(plan, self._previews())}

    @property
    def _origin(self) -> str:
        return "the newest trained first stage" if self.stage_plan is not None else f"of {self.stage.name}"

    def _noted(self, name: str, value: Any) -> Any:
        return Note(value, self.denoiser.notes[name]) if name in self.denoiser.notes else value

    def _classes(self) -> dict[str, Any]:
        if self.data.class_names is None:
            return {}
        return {"class_names": Note(self.data.class_names.name, "beside this file")}

    def _context_stage(self) -> dict[str, Any]:
        """Return the stage that maps captions or classes to a context."""
        if self.data.vocabulary is not None:
            return {"cond_stage_config": text_stage(self.data.vocabulary, self.denoiser, self.data.count)}
        if not self.data.classes:
            return {}
        count = Note(self.data.classes + 1, "the classes, and the null class for guidance")
        params = {"embed_dim": self.denoiser.context, "n_classes": count, "key": "class_label"}
        return {"cond_stage_config": {"target": "ldm.modules.encoders.modules.ClassEmbedder", "params": params}}

    def _previews(self) -> dict[str, Any]:
        options: dict[str, Any] = {"ddim_steps": 50, "ddim_eta": 0.0, "inpaint": False}
        options |= {"plot_progressive_rows": False, "plot_diffusion_rows": False}
        if self.denoiser.context:
            options["unconditional_guidance_scale"] = 3.0
        return {"log_images_kwargs": options}

    # -- both --------------------------------------------------------------------------------------------------------

    def _data(self, plan: Schedule, is_first_stage: bool = False) -> dict[str, Any]:
        params: dict[str, Any] = {"batch_size": plan.batch_size, "num_workers": self.workers}
        if not is_first_stage and self.cache is not None:
            params["latent_cache"] = Note(
                {"variants": CACHE_VARIANTS, "path": str(self.cache)},
                "encode the images once; remove it for more variety",
            )
        return {"target": "main.DataModuleFromConfig", "params": {**params, **self.data.datasets(is_first_stage)}}

    def _lightning(self, plan: Schedule, extra: Mapping[str, Any]) -> dict[str, Any]:
        frequency = max(50, min(plan.steps // 5, 5000))
        images = {"batch_frequency": frequency, "max_images": PREVIEWS, "increase_log_steps": False, **extra}
        trainer: dict[str, Any] = {
            "max_steps": plan.steps,
            "accelerator": Note("auto", "a GPU if there is one"),
            "devices": 1,
            "precision": Note("auto", "bfloat16 where the hardware has it"),
            "gradient_clip_val": 1.0,
            "log_every_n_steps": max(1, min(50, plan.steps // 10)),
        }
        if plan.accumulate > 1:
            trainer["accumulate_grad_batches"] = plan.accumulate
        if self.data.validation is not None:
            trainer["check_val_every_n_epoch"] = plan.validate_every
        return {
            "callbacks": {"image_logger": {"target": "main.ImageLogger", "params": images}},
            "trainer": trainer,
        }


def cached_variants(data: Data, stage: FirstStage, denoiser: Denoiser, machine: Machine) -> int:
    """Return the number of variants of each image whose latents are computed once; 0 if the memory is too small."""
    channels = 2 * stage.channels + denoiser.params["in_channels"]
    size = 2 * channels * denoiser.params["image_size"] ** 2 * CACHE_VARIANTS * data.count
    return CACHE_VARIANTS if stage.is_kl and size < machine.memory // CACHE_SHARE else 0


def text_weights(vocabulary: Vocabulary, denoiser: Denoiser, count: int) -> int:
    """Return the approximate number of weights of the text encoder."""
    width = denoiser.context
    return 2 * vocabulary.size * width + 12 * text_layers(count) * width**2


def text_layers(count: int) -> int:
    """Return the number of layers of the text encoder for a number of captions."""
    return 2 if count < 20_000 else 6 if count < 500_000 else 12


def text_stage(vocabulary: Vocabulary, denoiser: Denoiser, count: int) -> dict[str, Any]:
    """Return the text encoder for a number of captions."""
    where = "beside this file" if vocabulary.tokens else "on the Hugging Face hub"
    params = {
        "n_embed": denoiser.context,
        "n_layer": text_layers(count),
        "vocab": Note(vocabulary.name, where),
        "vocab_size": vocabulary.size,
        "max_seq_len": Note(vocabulary.length, f"tokens; the longest caption has {vocabulary.longest}"),
    }
    return {"target": "ldm.modules.encoders.modules.BERTEmbedder", "params": params}


def _warm_up(plan: Schedule) -> dict[str, Any]:
    """Return a schedule with a linear warm-up to a constant learning rate, which any number of steps may follow."""
    params = {
        "warm_up_steps": [max(1, min(1000, plan.steps // 50))],
        "cycle_lengths": [CONSTANT],
        "f_start": [0.01],
        "f_max": [1.0],
        "f_min": [1.0],
    }
    return {"target": "ldm.lr_scheduler.LambdaLinearScheduler", "params": params}
