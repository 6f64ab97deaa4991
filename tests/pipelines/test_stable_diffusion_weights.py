"""Weights of Stable Diffusion as people have them: files of many forms, and another first stage."""

from __future__ import annotations

import pytest
import torch
from diffusers_folders import make_vae
from safetensors.torch import save_file
from tiny_models import make_model, text_config, unconditional_config, write_model
from tiny_stable_diffusion import v1_config, v2_config

import ldm
from ldm.errors import UserError
from ldm.io.diffusers import autoencoder
from ldm.io.diffusers.translation import Translation
from ldm.pipelines.loading import load_model, read_first_stage

PREFIX = "first_stage_model."


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """Return a tiny Stable Diffusion 1, and the folder of its files."""
    folder = tmp_path_factory.mktemp("v1")
    return write_model(folder, v1_config(folder)), folder


def save(weights, path, top_level=False):
    if path.suffix == ".safetensors":
        save_file({name: value.clone() for name, value in weights.items()}, path)
    else:
        torch.save(weights if top_level else {"state_dict": weights}, path)
    return path


def published(weights):
    """Add the entries that published files hold, and no model."""
    positions = {"cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(77)[None]}
    averages = {
        f"model_ema.{name[6:].replace('.', '')}": value * 0 for name, value in weights.items() if "model.d" in name
    }
    return {**weights, **positions, **averages, "model_ema.decay": torch.tensor(0.99)}


def short(weights):
    """Return the weights with the names of newer versions of transformers."""
    return {name.replace("text_model.", ""): value for name, value in published(weights).items()}


@pytest.mark.parametrize("change", [dict, published, short], ids=["as here", "as published", "without text_model"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("file", "top_level"), [("x.ckpt", False), ("x.ckpt", True), ("x.safetensors", True)])
def test_files_of_every_form_are_loaded(tmp_path, original, change, dtype, file, top_level, caplog):
    model, folder = original
    weights = {
        name: value.to(dtype) if value.dtype == torch.float32 else value
        for name, value in change(model.state_dict()).items()
    }
    loaded = load_model(folder / "config.yaml", save(weights, tmp_path / file, top_level))
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        # The tables of the noise schedule are those of the configuration, not their rounded copies.
        expected = value if name in model.computed_buffers else value.to(dtype).to(value.dtype)
        assert torch.equal(loaded.state_dict()[name], expected), name
    assert loaded.cond_stage_model.has_weights and not caplog.records


@pytest.mark.parametrize("change", [published, short])
def test_both_spellings_load_into_a_module(original, change):
    model, _ = original
    weights = {name: value for name, value in change(model.state_dict()).items() if not name.startswith("model_ema.")}
    with torch.no_grad():
        for parameter in (fresh := make_model(model.config)).parameters():
            parameter.zero_()
    fresh.load_state_dict(weights, strict=True)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in fresh.state_dict().items())
    assert any(".text_model." in name for name in fresh.state_dict()), "the published names are written"


def test_file_without_tables_loads_without_a_warning(tmp_path, original, caplog):
    model, folder = original
    weights = {name: value for name, value in model.state_dict().items() if "." in name}
    assert len(weights) < len(model.state_dict())
    loaded = load_model(folder / "config.yaml", save(weights, tmp_path / "x.ckpt"))
    assert torch.equal(loaded.alphas_cumprod, model.alphas_cumprod) and not caplog.records


def test_half_precision_in_the_configuration_does_not_round_weights(tmp_path):
    model = write_model(tmp_path, v2_config(tmp_path))
    exact = {name: value.float() + 1e-5 for name, value in model.state_dict().items() if name.startswith("model.")}
    weights = {**model.state_dict(), **exact}
    save(weights, tmp_path / "model.ckpt")
    loaded = ldm.load(tmp_path, device="cpu")
    assert {value.dtype for value in loaded.parameters()} == {torch.float32}
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in exact.items())
    half = ldm.load(tmp_path, device="cpu", precision="bfloat16")
    assert {value.dtype for value in half.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_model_is_converted_before_it_receives_weights(original, monkeypatch, precision):
    """The weights in the precision of the file are in memory at most one at a time."""
    from ldm.pipelines import loading

    model, folder = original
    seen = []
    load = loading.load_weights

    def recorded(module, *args):
        seen.extend(parameter.dtype for parameter in module.parameters())
        return load(module, *args)

    monkeypatch.setattr(loading, "load_weights", recorded)
    loaded = ldm.load(folder, device="cpu", precision=precision)
    dtype = getattr(torch, precision)
    assert set(seen) == {dtype} == {value.dtype for value in loaded.parameters()}
    assert loaded.alphas_cumprod.dtype == torch.float32
    for name, value in model.named_parameters():
        assert torch.equal(loaded.get_parameter(name), value.to(dtype)), name


# -- another first stage ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tuned(original):
    """Return the weights of a first stage that was trained further."""
    model, _ = original
    weights = model.first_stage_model.state_dict()
    return {name: value + 0.01 * torch.randn_like(value) for name, value in weights.items()}


def theirs(weights, model):
    ddconfig = model.config["params"]["first_stage_config"]["params"]["ddconfig"]
    return Translation(autoencoder.layers(ddconfig)).to_theirs(weights)


@pytest.mark.parametrize("file", ["vae.ckpt", "vae.safetensors"])
@pytest.mark.parametrize("form", ["alone", "with the prefix", "in a whole model", "diffusers", "with a loss"])
def test_first_stage_is_replaced(tmp_path, original, tuned, form, file):
    model, folder = original
    prefixed = {PREFIX + name: value for name, value in tuned.items()}
    weights = {
        "alone": tuned,
        "with the prefix": prefixed,
        "in a whole model": {**model.state_dict(), **prefixed},
        "diffusers": theirs(tuned, model),
        "with a loss": {**tuned, "loss.logvar": torch.zeros(1)},
    }[form]
    loaded = ldm.load(folder, vae=save(weights, tmp_path / file), device="cpu")
    for name, value in loaded.state_dict().items():
        part = name.removeprefix(PREFIX)
        assert torch.equal(value, tuned[part] if name.startswith(PREFIX) else model.state_dict()[name]), name


def test_first_stage_of_a_folder_of_diffusers_replaces_that_of_a_model(tmp_path, original):
    _model, folder = original
    vae = make_vae(block_out_channels=(32, 32), layers_per_block=1)
    vae.save_pretrained(tmp_path / "vae")
    loaded = ldm.load(folder, vae=tmp_path / "vae", device="cpu")
    z = torch.randn(1, 4, 8, 8)
    torch.testing.assert_close(loaded.first_stage_model.decode(z), vae.decode(z).sample, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("factor", "warned"), [(0.18215, False), (0.13025, True)])
def test_first_stage_of_another_scale_is_logged(tmp_path, original, factor, warned, caplog):
    """The first stages of Stable Diffusion XL have the same shapes."""
    vae = make_vae(block_out_channels=(32, 32), layers_per_block=1, scaling_factor=factor)
    vae.save_pretrained(tmp_path / "vae")
    ldm.load(original[1], vae=tmp_path / "vae", device="cpu")
    message = f'"{tmp_path}/vae" states the factor 0.13025 for its latents, and the model has 0.18215; images may'
    assert (message in caplog.text) == warned and ("states the factor" in caplog.text) == warned


def test_model_without_weights_of_a_first_stage_takes_them_from_the_file(tmp_path, original, tuned):
    model, folder = original
    pruned = {name: value for name, value in model.state_dict().items() if not name.startswith(PREFIX)}
    file = save(pruned, tmp_path / "pruned.ckpt")
    vae = save(tuned, tmp_path / "vae.safetensors")
    loaded = ldm.load(checkpoint=file, config=folder / "config.yaml", vae=vae, device="cpu")
    assert torch.equal(loaded.first_stage_model.decoder.conv_out.bias, tuned["decoder.conv_out.bias"])


@pytest.mark.parametrize(
    "name", ["decoder.conv_in.weight", "decoder.up.1.block.0.conv1.weight", "encoder.conv_in.bias"]
)
def test_other_or_missing_weights_raise_user_error(tmp_path, original, tuned, name):
    _, folder = original
    channels = name == "decoder.conv_in.weight"
    other = torch.zeros(tuned[name].shape[0], 16, 3, 3) if channels else torch.zeros(7)
    match = (
        "has latents of 16 channels, that of the model 4" if channels else f"another model: 1 weights .* first {name}"
    )
    with pytest.raises(UserError, match=match) as caught:
        ldm.load(folder, vae=save({**tuned, name: other}, tmp_path / "vae.ckpt"))
    assert "\n" not in str(caught.value)
    rest = {key: value for key, value in tuned.items() if key != name}
    with pytest.raises(UserError, match=f"belongs to another model: 1 weights .* first {name}: missing"):
        ldm.load(folder, vae=save(rest, tmp_path / "vae.ckpt"))


def test_file_of_another_kind_as_first_stage_raises_user_error(tmp_path, original):
    _, folder = original
    lora = {"lora_unet_x.lora_down.weight": torch.zeros(2, 2), "lora_unet_x.lora_up.weight": torch.zeros(2, 2)}
    for weights, match in (
        (lora, "is a LoRA; give the weights of a first stage"),
        ({"x": torch.ones(1)}, "is not a first"),
    ):
        with pytest.raises(UserError, match=match):
            ldm.load(folder, vae=save(weights, tmp_path / "x.safetensors"))
    with pytest.raises(UserError, match=r'there is no first stage "none.ckpt"'):
        ldm.load(folder, vae="none.ckpt")


def test_models_without_a_first_stage_refuse_another_one(tmp_path, tuned):
    config = unconditional_config()
    config["params"]["first_stage_config"] = {"target": "ldm.models.autoencoder.IdentityFirstStage"}
    vae = save(tuned, tmp_path / "vae.ckpt")
    for refused in (config, text_config()["params"]["first_stage_config"]):
        with pytest.raises(UserError, match=r"the model has no first stage that the weights of .* could replace"):
            read_first_stage(vae, {"params": dict(refused["params"]) if "params" in refused else {}})


def test_first_stage_alone_with_names_of_diffusers_is_loaded(tmp_path, original, tuned):
    """Both functions that load a first stage know its names in diffusers."""
    from omegaconf import OmegaConf

    from ldm.pipelines.loading import load_first_stage

    model, _ = original
    config = tmp_path / "config.yaml"
    OmegaConf.save(OmegaConf.create({"model": model.config["params"]["first_stage_config"]}), config)
    file = save(theirs(tuned, model), tmp_path / "vae.safetensors")
    for loaded in (load_first_stage(config, file), ldm.load(checkpoint=file, config=config, device="cpu")):
        assert torch.equal(loaded.decoder.conv_out.bias, tuned["decoder.conv_out.bias"])
        assert torch.equal(loaded.encoder.mid.attn_1.q.weight, tuned["encoder.mid.attn_1.q.weight"])
