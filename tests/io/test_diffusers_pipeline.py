"""Tests of `ldm.io.diffusers`: folders that diffusers writes compute the same here."""

from __future__ import annotations

import json
import logging
import shutil

import diffusers
import pytest
import torch
from diffusers_folders import (
    BETAS,
    GRID,
    make_conditional_unet,
    make_text_encoder,
    make_unet,
    make_vae,
    make_vqvae,
    write_inpainting,
    write_stable_diffusion,
    write_super_resolution,
    write_text_ldm,
    write_unconditional,
    write_upscaler,
)

import ldm
from ldm.config.model_config import read_config
from ldm.config.model_files import available_models, find_model
from ldm.errors import UserError
from ldm.io.diffusers import autoencoder, scheduler, unet
from ldm.io.diffusers.pipeline import model_config
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.modules.diffusionmodules.schedule import make_beta_schedule

TOLERANCE = {"rtol": 0, "atol": 1e-5}

WRITERS = {
    "stable diffusion": write_stable_diffusion,
    "in-painting": write_inpainting,
    "upscaler": write_upscaler,
    "unconditional": write_unconditional,
    "super-resolution": write_super_resolution,
    "text": write_text_ldm,
}
CLASSES = {"in-painting": "LatentInpaintDiffusion", "upscaler": "LatentUpscaleDiffusion"}


@pytest.fixture(scope="module", params=WRITERS)
def pair(request, tmp_path_factory):
    """Return the name of a kind of model, the pipeline of diffusers, and the model that is loaded from its folder."""
    folder = tmp_path_factory.mktemp("diffusers") / "mine"
    pipeline = WRITERS[request.param](folder)
    return request.param, pipeline, ldm.load(folder, device="cpu")


def test_class_and_name_follow_from_the_parts(pair):
    kind, _, model = pair
    assert type(model).__name__ == CLASSES.get(kind, "LatentDiffusion") and model.name == "mine"


@torch.no_grad()
def test_networks_agree(pair):
    _, pipeline, model = pair
    ours, theirs = model.model.diffusion_model, pipeline.unet
    x, t = torch.randn(2, ours.in_channels, 8, 8), torch.tensor([1, 500])
    labels = torch.tensor([3, 20]) if ours.num_classes else None
    context = torch.randn(2, 5, 16)
    if isinstance(theirs, diffusers.UNet2DModel):
        expected, found = theirs(x, t).sample, ours(x, t)
    else:
        expected, found = theirs(x, t, context, class_labels=labels).sample, ours(x, t, context, labels)
        assert (expected - theirs(x, t, -context, class_labels=labels).sample).abs().max() > 0.01
    torch.testing.assert_close(found, expected, **TOLERANCE)


@torch.no_grad()
def test_first_stages_agree(pair):
    _, pipeline, model = pair
    theirs = getattr(pipeline, "vae", None) or pipeline.vqvae
    x = torch.rand(2, 3, 16, 24) * 2 - 1
    if isinstance(theirs, diffusers.AutoencoderKL):
        expected, found = theirs.encode(x).latent_dist.mode(), model.first_stage_model.encode(x).mode()
    else:
        expected, found = theirs.encode(x).latents, model.first_stage_model.encode(x)
    torch.testing.assert_close(found, expected, **TOLERANCE)
    scale = 1.0 if isinstance(pipeline, diffusers.LDMSuperResolutionPipeline) else theirs.config.scaling_factor
    assert float(model.scale_factor) == pytest.approx(scale, rel=1e-6)
    images = theirs.decode(expected / scale).sample
    torch.testing.assert_close(model.decode_first_stage(expected), images, **TOLERANCE)


@torch.no_grad()
def test_text_encoders_agree(pair):
    kind, pipeline, model = pair
    if kind in ("unconditional", "super-resolution"):
        assert model.cond_stage_model is None or not list(model.cond_stage_model.parameters())
        return
    texts = ["red heart", "a"] if kind == "text" else ["a cat", "cat b c"]
    theirs = pipeline.bert if kind == "text" else pipeline.text_encoder
    length = 12 if kind == "text" else 77
    ids = pipeline.tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    expected = ids.input_ids
    if kind == "upscaler":  # OpenCLIP pads with 0, as the published folders say
        expected = expected.masked_fill(ids.attention_mask == 0, 0)
    torch.testing.assert_close(model.get_learned_conditioning(texts), theirs(expected)[0], **TOLERANCE)


def test_schedules_agree(pair):
    kind, pipeline, model = pair
    torch.testing.assert_close(model.alphas_cumprod, pipeline.scheduler.alphas_cumprod, rtol=1e-5, atol=0)
    assert model.parameterization == ("v" if kind == "upscaler" else "eps")
    if kind == "upscaler":
        small = pipeline.low_res_scheduler.alphas_cumprod
        torch.testing.assert_close(model.low_scale_model.alphas_cumprod, small, rtol=1e-5, atol=0)
        assert model.low_scale_model.max_noise_level == 30


@torch.no_grad()
def test_sampled_latents_agree(tmp_path):
    """Both sample the same latents from the same noise, with guidance."""
    pipeline = write_stable_diffusion(tmp_path / "m", scheduler=diffusers.DDIMScheduler(**BETAS, **GRID))
    pipeline.set_progress_bar_config(disable=True)
    model = ldm.load(tmp_path / "m", device="cpu")
    noise = torch.randn(1, 4, 4, 4)
    options = {"num_inference_steps": 5, "guidance_scale": 3.0, "latents": noise, "output_type": "latent"}
    expected = pipeline("a cat", height=16, width=16, **options).images
    cond, uncond = model.get_learned_conditioning(["a cat"]), model.get_learned_conditioning([""])
    found, _ = DDIMSampler(model).sample(
        5,
        1,
        (4, 4, 4),
        cond,
        x_T=noise,
        ddim_discretize="uniform",
        unconditional_guidance_scale=3.0,
        unconditional_conditioning=uncond,
        verbose=False,
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


# -- parts of other form ---------------------------------------------------------------------------------------

UNETS = {
    "heads of one size": {"attention_head_dim": (2, 4), "use_linear_projection": True},
    "two transformers": {"transformer_layers_per_block": 2, "layers_per_block": 2},
    "another number of blocks a level": {"layers_per_block": (1, 2)},
    "scale and shift": {"resnet_time_scale_shift": "scale_shift"},
    "no self-attention at all": {"only_cross_attention": True},
    "attention on both levels": {
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    },
}


@pytest.mark.parametrize("options", UNETS.values(), ids=UNETS)
@torch.no_grad()
def test_transformer_networks_of_other_form_agree(tmp_path, options):
    pipeline = write_stable_diffusion(tmp_path / "m", unet=make_conditional_unet(**options))
    model = ldm.load(tmp_path / "m", device="cpu")
    x, t, context = torch.randn(2, 4, 8, 8), torch.tensor([1, 500]), torch.randn(2, 5, 16)
    expected = pipeline.unet(x, t, context).sample
    torch.testing.assert_close(model.model.diffusion_model(x, t, context), expected, **TOLERANCE)


@pytest.mark.parametrize("options", [{"attention_head_dim": None}, {"num_class_embeds": 7}, {"layers_per_block": 1}])
@torch.no_grad()
def test_self_attention_networks_of_other_form_agree(options):
    theirs = make_unet(**options)
    params = unet.ours({"_class_name": "UNet2DModel", **theirs.config}, "the test")
    from ldm.io.diffusers.translation import Translation
    from ldm.modules.diffusionmodules.openaimodel import UNetModel

    ours = UNetModel(**params).eval()
    ours.load_state_dict(Translation(unet.layers(params)).to_ours(theirs.state_dict()))
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([1, 500])
    y = torch.tensor([3, 5]) if "num_class_embeds" in options else None
    torch.testing.assert_close(ours(x, t, y=y), theirs(x, t, class_labels=y).sample, **TOLERANCE)


@pytest.mark.parametrize(
    "make",
    [
        lambda: make_vae(down_block_types=["AttnDownEncoderBlock2D"] * 3, up_block_types=["AttnUpDecoderBlock2D"] * 3),
        lambda: make_vae(mid_block_add_attention=False, layers_per_block=2),
        make_vqvae,
        lambda: make_vqvae(vq_embed_dim=5, latent_channels=4),
    ],
    ids=["KL with attention", "KL without attention", "VQ", "VQ with another width of the codebook"],
)
@torch.no_grad()
def test_first_stages_alone_agree(tmp_path, make):
    theirs = make()
    theirs.save_pretrained(tmp_path / "vae")
    ours = ldm.load(tmp_path / "vae", device="cpu")
    x = torch.rand(2, 3, 16, 24) * 2 - 1
    if isinstance(theirs, diffusers.AutoencoderKL):
        z = theirs.encode(x).latent_dist.mode()
        torch.testing.assert_close(ours.encode(x).mode(), z, **TOLERANCE)
        torch.testing.assert_close(ours.decode(z), theirs.decode(z).sample, **TOLERANCE)
        return
    z = theirs.encode(x).latents
    torch.testing.assert_close(ours.encode_to_prequant(x), z, **TOLERANCE)
    torch.testing.assert_close(ours.decode(ours.quantize(z)[0]), theirs.decode(z).sample, **TOLERANCE)


@torch.no_grad()
def test_names_of_older_versions_are_read(tmp_path):
    """Before version 0.15 the projections of attention had other names."""
    pipeline = write_unconditional(tmp_path / "m")
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for part in ("unet", "vqvae"):
        file = tmp_path / "m" / part / "diffusion_pytorch_model.safetensors"
        weights = getattr(pipeline, part).state_dict()
        for new, name in old.items():
            weights = {key.replace(f".{new}.", f".{name}."): value for key, value in weights.items()}
        file.unlink()
        torch.save(weights, file.with_suffix(".bin"))
    model = ldm.load(tmp_path / "m", device="cpu")
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([1, 500])
    torch.testing.assert_close(model.model.diffusion_model(x, t), pipeline.unet(x, t).sample, **TOLERANCE)
    image = torch.rand(1, 3, 16, 16)
    torch.testing.assert_close(model.first_stage_model.encode(image), pipeline.vqvae.encode(image).latents, **TOLERANCE)


def test_shards_and_half_precision_are_read(tmp_path):
    pipeline = write_stable_diffusion(tmp_path / "m")
    folder = tmp_path / "m/unet"
    weights = pipeline.unet.state_dict()
    for file in folder.glob("*.safetensors"):
        file.unlink()
    pipeline.unet.save_pretrained(folder, max_shard_size="100KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    model = ldm.load(tmp_path / "m", device="cpu")
    assert torch.equal(model.model.diffusion_model.out[2].weight, weights["conv_out.weight"])
    shutil.rmtree(folder)
    pipeline.unet.half().save_pretrained(folder, variant="fp16")
    model = ldm.load(tmp_path / "m", device="cpu")
    assert torch.equal(model.model.diffusion_model.out[2].weight, weights["conv_out.weight"].half().float())


def test_scheduler_states_prediction_and_betas():
    def params(**options):
        return scheduler.ours({**diffusers.DDIMScheduler(**options).config}, "the test")

    assert params(**BETAS) == {"timesteps": 1000, "linear_start": 0.00085, "linear_end": 0.012}
    assert params(prediction_type="v_prediction")["parameterization"] == "v"
    assert params(prediction_type="sample")["parameterization"] == "x0"
    zero = params(rescale_betas_zero_snr=True, timestep_spacing="trailing")
    assert zero["rescale_betas_zero_snr"] and zero["timestep_spacing"] == "trailing"
    for options in ({}, {"beta_schedule": "squaredcos_cap_v2"}, {"num_train_timesteps": 50}):
        own = {"beta_schedule": "linear", **params(**options)}
        betas = make_beta_schedule(own["beta_schedule"], own["timesteps"], own["linear_start"], own["linear_end"])
        expected = diffusers.DDIMScheduler(**options).betas.double()
        torch.testing.assert_close(torch.as_tensor(betas), expected, rtol=1e-4, atol=1e-7)
    assert params(trained_betas=[0.1, 0.2])["given_betas"] == [0.1, 0.2]
    with pytest.raises(UserError, match='"prediction_type" is "flow"; supported are epsilon, v_prediction, sample'):
        scheduler.ours({"prediction_type": "flow"}, "the test")
    with pytest.raises(UserError, match='"beta_schedule" is "sigmoid"; supported are'):
        scheduler.ours({"beta_schedule": "sigmoid"}, "the test")


# -- finding folders -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("folders") / "m"
    write_stable_diffusion(path)
    return path


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "models/ldm/m")


def test_folders_are_found_as_models_and_checkpoints(copy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "m" in available_models()
    for files in (find_model("m"), find_model(str(copy)), find_model(ckpt=str(copy))):
        assert files.checkpoint.name == "m" and files.config.name == "model_index.json" and files.name == "m"
    assert read_config(copy / "model_index.json", ["model.params.scale_factor=2"])["params"]["scale_factor"] == 2
    (copy / "config.yaml").write_text("model: {target: x}")
    torch.save({}, copy / "model.ckpt")
    assert find_model("m").config.name == "config.yaml", "a model in the form of this package comes first"


def test_weights_of_a_folder_start_a_training(copy):
    """A `ckpt_path` may name a folder."""
    from ldm.config.instantiate import instantiate_from_config

    config = model_config(copy)
    config["params"]["ckpt_path"] = str(copy)
    trained = instantiate_from_config(config)
    expected = ldm.load(copy, device="cpu").state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in trained.state_dict().items() if name in expected)


def edit(path, **entries):
    content = json.loads(path.read_text())
    content |= entries
    path.write_text(json.dumps({key: value for key, value in content.items() if value != "remove"}))


UNET, VAE, TEXT = "unet/config.json", "vae/config.json", "text_encoder/config.json"
BAD = {
    "SDXL": (
        "model_index.json",
        {"text_encoder_2": ["transformers", "x"], "_class_name": "StableDiffusionXLPipeline"},
        "is a StableDiffusionXLPipeline of diffusers, which this package does not implement; it implements Stable",
    ),
    "SD 3": ("model_index.json", {"unet": "remove", "transformer": ["diffusers", "x"]}, "does not implement"),
    "ControlNet": ("model_index.json", {"controlnet": ["diffusers", "ControlNetModel"]}, "does not implement"),
    "InstructPix2Pix": (UNET, {"in_channels": 8}, "does not implement"),
    "another activation": (
        UNET,
        {"act_fn": "mish"},
        r"unet/config\.json\": \"act_fn\" is 'mish'; only models with 'silu'",
    ),
    "another block": (UNET, {"down_block_types": ["KDownBlock2D"] * 2}, 'the block "KDownBlock2D" is not supported'),
    "other directions": (
        UNET,
        {"up_block_types": ["UpBlock2D", "UpBlock2D"]},
        "of the encoder and of the decoder differ",
    ),
    "heads of many sizes": (UNET, {"attention_head_dim": [1, 4]}, "heads of different sizes"),
    "no channels": (UNET, {"block_out_channels": "remove"}, '"block_out_channels" is missing'),
    "a shift": (VAE, {"shift_factor": 0.1}, r"\"shift_factor\" is 0\.1; only models with None"),
    "another first stage": (VAE, {"_class_name": "AutoencoderTiny"}, '"AutoencoderTiny" is not supported; supported'),
    "latents of another width": (
        VAE,
        {"latent_channels": 3},
        r'm": vae has 3 channels of latents, and unet expects 4; choose parts of the same model',
    ),
    "context of another width": (UNET, {"cross_attention_dim": 24}, "has 16 channels of context, and unet expects 24"),
    "text for a number": (
        UNET,
        {"in_channels": "x"},
        r"unet/config.json\": \"in_channels\" is 'x', not a whole number",
    ),
    "no levels": (VAE, {"block_out_channels": []}, r'"block_out_channels" is \[\], not a whole number above 0'),
    "an infinite factor": (VAE, {"scaling_factor": float("inf")}, '"scaling_factor" is inf, not a number; download'),
    "no steps": ("scheduler/scheduler_config.json", {"num_train_timesteps": 0}, '"num_train_timesteps" is 0, not a'),
    "another text encoder": (TEXT, {"architectures": ["T5EncoderModel"]}, '"T5EncoderModel" is not supported'),
}


@pytest.mark.parametrize(("file", "entries", "match"), BAD.values(), ids=BAD)
def test_unsupported_folder_raises_user_error_of_one_line(copy, file, entries, match):
    edit(copy / file, **entries)
    with pytest.raises(UserError, match=match) as caught:
        ldm.load(copy)
    assert "\n" not in str(caught.value)


def test_another_epsilon_of_the_normalization_is_logged(copy, caplog):
    edit(copy / UNET, norm_eps=1e-6)
    assert ldm.load(copy, device="cpu")
    assert 'unet/config.json": "norm_eps" is 1e-06; this package computes with 1e-05' in caplog.text


def test_missing_or_damaged_files_raise_user_error_of_one_line(copy):
    file = copy / "unet/diffusion_pytorch_model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-10])
    with pytest.raises(UserError, match=r'unet/diffusion_pytorch_model.safetensors" is truncated or damaged'):
        ldm.load(copy)
    file.unlink()
    with pytest.raises(UserError, match=r'm/unet" has no weights such as diffusion_pytorch_model.safetensors'):
        ldm.load(copy)
    (copy / "unet/diffusion_pytorch_model.safetensors.index.json").write_text('{"weight_map": {"a": "../x"}}')
    with pytest.raises(UserError, match="names files that are missing"):
        ldm.load(copy)
    (copy / VAE).write_text("{")
    with pytest.raises(UserError, match=r'vae/config.json" is damaged \(.*; download or copy it again'):
        ldm.load(copy)
    (copy / VAE).unlink()
    with pytest.raises(UserError, match=r'there is no ".*vae/config.json"; copy or download the whole folder'):
        ldm.load(copy)


def test_part_of_a_folder_raises_user_error_that_names_it(copy):
    for part, kind in (("unet", "UNet2DConditionModel"), ("text_encoder", "CLIPTextModel")):
        with pytest.raises(UserError, match=f'{part}" is a {kind}, only a part of a model; give the folder with'):
            ldm.load(copy / part)


def test_weights_that_the_network_lacks_are_logged(copy, caplog):
    from safetensors.torch import load_file, save_file

    file = copy / "unet/diffusion_pytorch_model.safetensors"
    save_file({**load_file(file), "extra.weight": torch.ones(1)}, file)
    with caplog.at_level(logging.WARNING):
        ldm.load(copy, device="cpu")
    assert "1 names not used" in caplog.text and "model.diffusion_model.extra.weight" in caplog.text


def test_vocabulary_of_the_folder_is_used(copy):
    model = ldm.load(copy, device="cpu")
    assert model.cond_stage_model.tokenizer_name == str(copy / "tokenizer")
    shutil.rmtree(copy / "tokenizer")
    assert ldm.load(copy, device="cpu").cond_stage_model.tokenizer_name == "openai/clip-vit-large-patch14"


def test_first_stage_with_the_whole_text_model_is_read(tmp_path):
    """Files of CLIP's text model hold a projection that conditions nothing, and earlier ones positions."""
    pipeline = write_stable_diffusion(tmp_path / "m", text_encoder=make_text_encoder("gelu", 3))
    file = tmp_path / "m/text_encoder/model.safetensors"
    from safetensors.torch import load_file, save_file

    extra = {"text_projection.weight": torch.ones(16, 16), "text_model.embeddings.position_ids": torch.arange(77)[None]}
    save_file({**load_file(file), **extra}, file)
    model = ldm.load(tmp_path / "m", device="cpu")
    assert type(model.cond_stage_model).__name__ == "FrozenOpenCLIPEmbedder"
    ids = torch.tensor([[0, 5, 1, 1]])
    torch.testing.assert_close(model.cond_stage_model(ids), pipeline.text_encoder(ids)[0], **TOLERANCE)


def test_scale_factor_of_an_autoencoder_has_the_default_of_diffusers():
    assert autoencoder.scale_factor({}) == make_vae().config.scaling_factor == diffusers.VQModel().config.scaling_factor
