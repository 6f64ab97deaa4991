"""Programs in the shape of published ones that train: a control network and textual inversion, in both trainers."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from tiny_models import class_config, randomise, text_config
from torch import nn
from torch.utils.data import DataLoader

import ldm
from ldm.errors import UserError
from ldm.models.autoencoder import AutoencoderKL
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.models.lightning import plain_models
from ldm.modules.attention import SpatialTransformer
from ldm.modules.diffusionmodules.openaimodel import Downsample, ResBlock, TimestepEmbedSequential, UNetModel
from ldm.modules.diffusionmodules.util import conv_nd, linear, timestep_embedding, zero_module
from ldm.training.modules import DiffusionTraining, lightning_module
from ldm.util import default, exists, instantiate_from_config, log_txt_as_img

QUIET = {
    "accelerator": "cpu",
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
    "log_every_n_steps": 1,
}


class ControlledUnetModel(UNetModel):
    """Client: a U-Net that adds the outputs of a control network to its skip connections."""

    def forward(self, x, timesteps=None, context=None, control=None, only_mid_control=False, **kwargs):
        hs = []
        with torch.no_grad():
            t_emb = timestep_embedding(timesteps, self.model_channels, repeat_only=False)
            emb = self.time_embed(t_emb)
            h = x.type(self.dtype)
            for module in self.input_blocks:
                h = module(h, emb, context)
                hs.append(h)
            h = self.middle_block(h, emb, context)
        if control is not None:
            h += control.pop()
        for module in self.output_blocks:
            skip = hs.pop() if only_mid_control or control is None else hs.pop() + control.pop()
            h = module(torch.cat([h, skip], dim=1), emb, context)
        return self.out(h.type(x.dtype))


class ControlNet(nn.Module):
    """Client: a copy of the encoder of the U-Net, built from its blocks, with a hint image as input."""

    def __init__(self, in_channels, model_channels, hint_channels, context_dim):
        super().__init__()
        self.model_channels = model_channels
        embed_dim = 4 * model_channels
        self.time_embed = nn.Sequential(linear(model_channels, embed_dim), nn.SiLU(), linear(embed_dim, embed_dim))
        ch, heads = model_channels, 2

        def block(attention):
            layers = [ResBlock(ch, embed_dim, 0, out_channels=ch, dims=2, use_checkpoint=True)]
            if attention:
                layers.append(
                    SpatialTransformer(
                        ch,
                        heads,
                        ch // heads,
                        depth=1,
                        context_dim=context_dim,
                        disable_self_attn=False,
                        use_linear=False,
                        use_checkpoint=True,
                    )
                )
            return TimestepEmbedSequential(*layers)

        self.input_blocks = nn.ModuleList(
            [
                TimestepEmbedSequential(conv_nd(2, in_channels, ch, 3, padding=1)),
                block(False),
                TimestepEmbedSequential(Downsample(ch, True, dims=2, out_channels=ch)),
                block(True),
            ]
        )
        self.zero_convs = nn.ModuleList(
            TimestepEmbedSequential(zero_module(conv_nd(2, ch, ch, 1))) for _ in self.input_blocks
        )
        self.input_hint_block = TimestepEmbedSequential(
            conv_nd(2, hint_channels, 16, 3, padding=1, stride=2),
            nn.SiLU(),
            zero_module(conv_nd(2, 16, ch, 3, padding=1)),
        )
        self.middle_block_out = TimestepEmbedSequential(zero_module(conv_nd(2, ch, ch, 1)))
        self.middle_block = block(True)

    def forward(self, x, hint, timesteps, context, **kwargs):
        emb = self.time_embed(timestep_embedding(timesteps, self.model_channels, repeat_only=False))
        guided_hint = self.input_hint_block(hint, emb, context)
        outs, h = [], x
        for module, zero_conv in zip(self.input_blocks, self.zero_convs, strict=True):
            h = module(h, emb, context)
            if guided_hint is not None:
                h += guided_hint
                guided_hint = None
            outs.append(zero_conv(h, emb, context))
        outs.append(self.middle_block_out(self.middle_block(h, emb, context), emb, context))
        return outs


class ControlLDM(LatentDiffusion):
    """Client: a latent diffusion model of which only the control network is trained."""

    def __init__(self, control_stage_config, control_key, only_mid_control, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.control_model = instantiate_from_config(control_stage_config)
        self.control_key = control_key
        self.only_mid_control = only_mid_control
        self.sd_locked = True

    @torch.no_grad()
    def get_input(self, batch, k, bs=None, *args, **kwargs):
        x, c = super().get_input(batch, self.first_stage_key, *args, **kwargs)
        control = batch[self.control_key]
        if bs is not None:
            control = control[:bs]
        control = control.to(self.device).permute(0, 3, 1, 2).float()
        return x, {"c_crossattn": [c], "c_concat": [control]}

    def apply_model(self, x_noisy, t, cond, *args, **kwargs):
        assert isinstance(cond, dict)
        diffusion_model = self.model.diffusion_model
        cond_txt = torch.cat(cond["c_crossattn"], 1)
        control = self.control_model(x=x_noisy, hint=torch.cat(cond["c_concat"], 1), timesteps=t, context=cond_txt)
        return diffusion_model(
            x=x_noisy, timesteps=t, context=cond_txt, control=control, only_mid_control=self.only_mid_control
        )

    @torch.no_grad()
    def log_images(self, batch, N=4, n_row=2, sample=False, **kwargs):
        z, c = self.get_input(batch, self.first_stage_key, bs=N)
        texts = [str(label) for label in batch[self.cond_stage_key][:N].tolist()]
        log = {"reconstruction": self.decode_first_stage(z[:N]), "control": c["c_concat"][0][:N] * 2.0 - 1.0}
        return {**log, "conditioning": log_txt_as_img((64, 64), texts, size=16)}

    def configure_optimizers(self):
        lr = self.learning_rate
        params = list(self.control_model.parameters())
        if not self.sd_locked:
            params += list(self.model.diffusion_model.output_blocks.parameters())
        return torch.optim.AdamW(params, lr=lr)


def control_config(**params):
    config = class_config(cond_stage_trainable=False, timesteps=50, **params)
    unet = config["params"]["unet_config"]
    unet["target"] = f"{__name__}.ControlledUnetModel"
    # The blocks of the control network are those of this U-Net.
    unet["params"]["attention_resolutions"] = [2]
    stage = {"in_channels": 3, "model_channels": 32, "hint_channels": 3, "context_dim": 32}
    own = {"control_stage_config": {"target": f"{__name__}.ControlNet", "params": stage}, "control_key": "hint"}
    return {
        "target": f"{__name__}.ControlLDM",
        "params": {**config["params"], **own, "only_mid_control": False},
    }


class Items(torch.utils.data.Dataset):
    """Random images with a label, a caption and a hint."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        image = torch.rand(16, 16, 3, generator=generator)
        return {"image": image * 2 - 1, "class_label": index, "hint": 1 - image, "caption": "a rocket on blue"}


@pytest.fixture
def allowed(monkeypatch):
    from ldm.config.targets import allowing

    with allowing(__name__):
        yield


def build(config):
    torch.manual_seed(0)
    model = instantiate_from_config(config)
    randomise(model.model)  # a new U-Net predicts zero, without gradients
    return model


def fit(module, data=None, **options):
    trainer = pl.Trainer(**{**QUIET, "logger": False, "enable_checkpointing": False, "max_steps": 3, **options})
    trainer.fit(module, data or DataLoader(Items(), batch_size=2))
    return trainer


def changes(before, model):
    """Return the names of the parts of a model whose weights have changed."""
    return {
        name.partition(".")[0] for name, value in model.state_dict().items() if not torch.equal(value, before[name])
    }


def snapshot(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


# -- a control network ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("through", ["Trainer.fit(model)", "ldm.lightning_module(model)"])
def test_only_the_control_network_is_trained(allowed, through):
    model = build(control_config(use_ema=False))
    assert isinstance(model, pl.LightningModule) and isinstance(model, ControlLDM)
    model.learning_rate = 1e-2
    before = snapshot(model)
    trainer = fit(model if through == "Trainer.fit(model)" else ldm.lightning_module(model))
    assert trainer.global_step == 3
    assert changes(before, model) == {"control_model"}
    assert {"train/loss", "train/loss_simple"} <= set(trainer.callback_metrics)


def test_control_network_samples_with_guidance(allowed):
    from ldm.models.diffusion.ddim import DDIMSampler

    model = build(control_config(use_ema=False)).eval()
    batch = next(iter(DataLoader(Items(), batch_size=2)))
    z, cond = model.get_input(batch, "image")
    uncond = {"c_concat": cond["c_concat"], "c_crossattn": [torch.zeros_like(cond["c_crossattn"][0])]}
    guidance = {"unconditional_guidance_scale": 3.0, "unconditional_conditioning": uncond}
    samples, _ = DDIMSampler(model).sample(3, 2, tuple(z.shape[1:]), cond, verbose=False, **guidance)
    assert samples.shape == z.shape and samples.isfinite().all()


@pytest.mark.slow
def test_main_trains_the_control_network_and_resumes(tmp_path, monkeypatch, allowed):
    """The trainer's own features work with the hooks of a subclass: checkpoints, resuming, previews."""
    from omegaconf import OmegaConf

    import main

    monkeypatch.chdir(tmp_path)
    items = {"target": f"{__name__}.Items"}
    config = {
        "model": {"base_learning_rate": 1e-2, **control_config(use_ema=True)},
        "data": {
            "target": "main.DataModuleFromConfig",
            "params": {"batch_size": 2, "num_workers": 0, "train": items, "validation": items},
        },
        "lightning": {
            "callbacks": {"image_logger": {"params": {"batch_frequency": 2, "max_images": 2}}},
            "trainer": {"log_every_n_steps": 1, "max_epochs": 1},
        },
    }
    OmegaConf.save(OmegaConf.create(config), "control.yaml")
    words = ["--enable_progress_bar", "false", "--enable_model_summary", "false", "--accelerator", "cpu"]
    allow = ["--allow-target", __name__]
    assert main.main(["-b", "control.yaml", "-t", "--no-test", *allow, *words]) == 0
    (run,) = (tmp_path / "logs").iterdir()
    first = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert any(name.startswith("control_model.") for name in first)
    assert sorted(path.name[:7] for path in (run / "images" / "train").iterdir())[0] == "conditi"
    resumed = ["-r", str(run), "-t", "--no-test", "--max_epochs", "2", *allow, *words]
    assert main.main(resumed) == 0
    state = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert state["global_step"] == 4
    changed = {
        name.partition(".")[0] for name, value in state["state_dict"].items() if not torch.equal(value, first[name])
    }
    assert changed - {"model_ema"} == {"control_model"}


# -- textual inversion ------------------------------------------------------------------------------------------


class EmbeddingManager(nn.Module):
    """Client: one learned vector, added to the context."""

    def __init__(self, dim):
        super().__init__()
        self.vector = nn.Parameter(torch.zeros(dim))

    def forward(self, context):
        return context + self.vector

    def save(self, path):
        torch.save({"vector": self.vector.detach()}, path)


class TextualInversion(LatentDiffusion):
    """Client: a model of which only one vector of the context is trained, saved in files of its own."""

    def __init__(self, personalization_dim, embedding_path=None, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.embedding_manager = EmbeddingManager(personalization_dim)
        for parameter in self.model.parameters():
            parameter.requires_grad = False
        self.embedding_path, self.seen = embedding_path, []

    def get_learned_conditioning(self, c):
        return self.embedding_manager(super().get_learned_conditioning(c))

    @torch.no_grad()
    def get_input(self, batch, k, *args, **kwargs):
        z, _ = super().get_input(batch, k, *args, **kwargs)
        return z, self.raw_conditioning(batch)

    def forward(self, x, c, *args, **kwargs):
        t = torch.randint(0, self.num_timesteps, (x.shape[0],), device=self.device).long()
        return self.p_losses(x, self.get_learned_conditioning(c), t, *args, **kwargs)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.embedding_manager.parameters(), lr=self.learning_rate)

    def training_step(self, batch, batch_idx):
        loss, loss_dict = self.shared_step(batch)
        self.log_dict(loss_dict, prog_bar=True, logger=True, on_step=True, on_epoch=True)
        self.log("global_step", float(self.global_step), prog_bar=True, logger=True, on_step=True, on_epoch=False)
        return loss

    def on_train_batch_start(self, batch, batch_idx, dataloader_idx):
        self.seen.append((batch_idx, dataloader_idx, self.current_epoch))

    def on_train_epoch_end(self):
        self.seen.append("epoch end")

    def on_save_checkpoint(self, checkpoint):
        checkpoint.clear() if exists(default(None, self.embedding_path)) else None
        if self.embedding_path is not None:
            self.embedding_manager.save(self.embedding_path)


def inversion_model(**params):
    config = text_config(cond_stage_trainable=False, timesteps=50, use_ema=True)
    torch.manual_seed(0)
    model = TextualInversion(32, **params, **config["params"])
    randomise(model.model)
    return model


def test_hooks_of_a_subclass_are_called_by_our_trainer(tmp_path):
    model = inversion_model()
    model.learning_rate = 1e-2
    before = snapshot(model)
    module = lightning_module(model)
    assert module.model is model and isinstance(module, DiffusionTraining)
    trainer = fit(module, max_epochs=1, max_steps=-1, default_root_dir=tmp_path)
    assert changes(before, model) == {"embedding_manager", "model_ema"}, "the average counts its updates"
    assert model.seen == [(0, 0, 0), (1, 0, 0), "epoch end"]
    assert {"train/loss_epoch", "global_step"} <= set(trainer.callback_metrics)
    trainer.save_checkpoint(tmp_path / "plain.ckpt")
    saved = torch.load(tmp_path / "plain.ckpt", weights_only=True)
    assert set(saved["state_dict"]) == set(model.state_dict()) and "rng" in saved


def test_model_saves_files_of_its_own(tmp_path):
    model = inversion_model(embedding_path=tmp_path / "embedding.pt")
    trainer = fit(lightning_module(model), max_steps=1)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    vector = torch.load(tmp_path / "embedding.pt", weights_only=True)["vector"]
    assert torch.equal(vector, model.embedding_manager.vector) and vector.any()


# -- rules ------------------------------------------------------------------------------------------------------


def hooked(base, **hooks):
    return type("Client", (base,), hooks)


@pytest.mark.parametrize(
    ("hooks", "message"),
    [
        ({"training_epoch_end": lambda self, outputs: None}, "Lightning 2 has no such hook; use on_train_epoch_end"),
        ({"on_train_batch_begin": lambda self: None}, "Lightning has no such hook; rename it"),
        ({"training_step": lambda self, batch, batch_idx, optimizer_idx: None}, "takes optimizer_idx, which Lightning"),
    ],
)
def test_hook_that_is_never_called_is_refused(hooks, message):
    model = hooked(LatentDiffusion, **hooks)(**class_config()["params"])
    with pytest.raises(UserError, match=f"Client.{next(iter(hooks))} .*{message}") as raised:
        lightning_module(model)
    assert "\n" not in str(raised.value)


def test_hook_of_a_first_stage_is_refused():
    config = text_config()["params"]["first_stage_config"]["params"]
    model = hooked(AutoencoderKL, training_step=lambda self, batch, batch_idx: None)(**config)
    with pytest.raises(UserError, match="Client defines training_step, which is never called"):
        lightning_module(model)


def test_models_without_hooks_train_as_before():
    with plain_models():
        plain = LatentDiffusion(**class_config()["params"])
        own = hooked(LatentDiffusion, configure_optimizers=lambda self: None)(**class_config()["params"])
    assert type(plain) is LatentDiffusion and not isinstance(plain, pl.LightningModule)
    with pytest.raises(RuntimeError, match="training hooks need Lightning: import it before the model is built"):
        plain.training_step({}, 0)
    assert isinstance(own, pl.LightningModule)
    assert type(lightning_module(plain)) is DiffusionTraining
    model = LatentDiffusion(**class_config()["params"])
    assert isinstance(model, pl.LightningModule) and type(model).__name__ == "LatentDiffusion"
    assert type(lightning_module(model)) is DiffusionTraining


def test_published_hooks_train_and_validate_a_model(tmp_path):
    torch.manual_seed(0)
    schedule = {"target": "ldm.lr_scheduler.LambdaLinearScheduler"}
    schedule["params"] = {
        "warm_up_steps": [1], "cycle_lengths": [100], "f_start": [0.5], "f_max": [1.0], "f_min": [1.0]
    }  # fmt: skip
    model = LatentDiffusion(**class_config(use_ema=True, scale_by_std=True, scheduler_config=schedule)["params"])
    before = snapshot(model)
    loader = DataLoader(Items(), batch_size=2)
    trainer = pl.Trainer(**QUIET, logger=False, max_epochs=1, default_root_dir=tmp_path, enable_checkpointing=False)
    trainer.fit(model, loader, loader)
    assert {"val/loss", "val/loss_ema", "train/loss_epoch", "lr_abs"} <= set(trainer.callback_metrics)
    assert model.scale_factor != 1.0 and model.model_ema.num_updates == 2
    assert {"model", "model_ema", "cond_stage_model", "scale_factor"} <= changes(before, model)
    assert "first_stage_model" not in changes(before, model)


def test_model_with_lightning_is_pickled_by_its_own_class():
    model = LatentDiffusion(**class_config()["params"])
    again = pickle.loads(pickle.dumps(model))
    assert type(again) is type(model)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())


CODE = """
import sys
import torch
from tiny_models import class_config
from ldm.models.diffusion.ddpm import LatentDiffusion

class Client(LatentDiffusion):
    def configure_optimizers(self):
        return torch.optim.SGD(self.model.parameters(), lr=1e-3)

model, own = (cls(**class_config()["params"]) for cls in (LatentDiffusion, Client))
assert type(model) is LatentDiffusion and type(own) is Client and "pytorch_lightning" not in sys.modules
import pytorch_lightning as pl
import ldm
before = {name: value.clone() for name, value in own.state_dict().items()}
assert ldm.lightning_module(model).model is model and type(model) is LatentDiffusion
assert ldm.lightning_module(own).model is own and isinstance(own, pl.LightningModule) and isinstance(own, Client)
assert all(torch.equal(value, before[name]) for name, value in own.state_dict().items())
assert own.learning_rate == 1e-4 and own.training
"""


@pytest.mark.slow
def test_models_that_were_built_before_the_import_of_lightning():
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    subprocess.run([sys.executable, "-c", CODE], check=True, timeout=120, env=environment)
