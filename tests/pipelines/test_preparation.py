"""Tests of `ldm.pipelines.preparation`: packed weights and cached contexts."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch
from parity_cases import assert_close
from text_images import sample_text
from tiny_models import randomise, text_config, write_model

from ldm.config.instantiate import instantiate_from_config
from ldm.errors import UserError
from ldm.modules.attention import BasicTransformerBlock
from ldm.modules.packing import has_packed_weights, packed_weights
from ldm.pipelines import preparation
from ldm.pipelines.generation import Item, generate
from ldm.pipelines.loading import load_model
from ldm.pipelines.preparation import PAYS_FROM, packing_pays, prepared
from ldm.pipelines.sampling import make_sampler
from ldm.pipelines.text import TextToImage


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    write_model(folder)
    return load_model(folder / "config.yaml", folder / "model.ckpt")


def sample(model, prompts, seed=0, **options):
    torch.manual_seed(seed)
    return sample_text(model, prompts, steps=4, **options)


def assert_unchanged(model, before):
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def copied_weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_packing_pays_from_four_evaluations():
    assert PAYS_FROM == 4
    assert not packing_pays(3) and packing_pays(4)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("sampler", ["ddim", "plms", "dpm"])
def test_prepared_model_samples_the_same_images(model, sampler, packed):
    """Packed weights and cached keys change results only by rounding."""
    noise = torch.randn(2, 3, 8, 8)

    def images():
        return sample_text(model, ["a", "b"], sampler=sampler, steps=6, scale=3.0, x_T=noise)

    with prepared(model, packed):
        together = [images(), images()]
    with prepared(model, packed):
        alone = images()
    plain = images()
    for sampled in (alone, *together):
        assert_close(sampled, plain, 1e-4)
    assert torch.equal(alone, together[0]) and torch.equal(*together)


class HalvedNoise:
    """Score corrector that halves the predicted noise."""

    def modify_score(self, model, e_t, x, t, c, strength=1.0):
        return e_t * (1 - 0.5 * strength)


def test_prepared_model_with_mask_guidance_and_score_corrector(model):
    """Batches that are joined and split must not use the cached keys of other batches."""
    noise, known, mask = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8), torch.zeros(2, 1, 8, 8)
    mask[..., :4] = 1
    options = {"score_corrector": HalvedNoise(), "corrector_kwargs": {"strength": 0.5}, "x0": known, "mask": mask}

    def latents():
        torch.manual_seed(5)
        both = model.get_learned_conditioning(["a", "b"]), model.get_learned_conditioning(["", ""])
        guided = {"unconditional_guidance_scale": 3.0, "unconditional_conditioning": both[1]}
        sampler = make_sampler("ddim", model)
        return sampler.sample(4, 2, (3, 8, 8), both[0], x_T=noise, verbose=False, **guided, **options)[0]

    with torch.no_grad():
        plain = latents()
        with prepared(model, packed=True):
            assert_close(latents(), plain, 1e-4)
            assert_close(latents(), plain, 1e-4)


def averaged_model():
    model = instantiate_from_config(text_config(use_ema=True)).eval()
    for index, shadow in enumerate(randomise(model).model_ema.buffers()):
        if shadow.is_floating_point() and shadow.dim():
            shadow.add_(0.02 * (index % 3))
    return model.requires_grad_(False)


@pytest.mark.parametrize("runs_before", [0, 1], ids=["before the first run", "after a run"])
def test_averages_do_not_replace_prepared_weights(runs_before):
    """Swapping would lose packed weights: the averages would be restored as the weights of the model."""
    model = averaged_model()
    before = copied_weights(model)
    with prepared(model, packed=True):
        for _ in range(runs_before):
            sample(model, ["a"])
        with pytest.raises(UserError, match="enter ema_scope first"), model.ema_scope():
            sample(model, ["a"])
        with pytest.raises(UserError, match="enter ema_scope first"):
            model.model_ema.copy_to(model.model)
        sample(model, ["a"])
    assert_unchanged(model, before)


def test_model_is_prepared_with_its_averages():
    model = averaged_model()
    before = copied_weights(model)
    live = sample(model, ["a"])
    with model.ema_scope(), prepared(model, packed=True):
        averaged = sample(model, ["a"])
    with model.ema_scope():
        assert_close(averaged, sample(model, ["a"]), 1e-4)
    assert not torch.equal(averaged, live)
    assert_unchanged(model, before)


def test_run_computes_the_keys_of_its_context_once(model):
    """With guidance too, which joins both conditionings; every run computes them again."""
    layer = next(m for m in model.model.modules() if isinstance(m, BasicTransformerBlock)).attn2
    batches = []
    hook = layer.to_k.register_forward_hook(lambda module, inputs, output: batches.append(len(output)))
    for prompts, scale in ((["a", "b", "c"], 2.0), (["a"], 1.0)):
        items = [Item(i, i, prompt) for i, prompt in enumerate(prompts)]
        pipeline = TextToImage(steps=4, scale=scale)
        list(generate(pipeline, model, items, count=len(items), batch_size=3, progress=False))
    hook.remove()
    assert batches == [6, 1]
    assert layer.cache is None


@pytest.mark.parametrize("packed", [True, False])
def test_model_is_restored_afterwards(model, packed):
    before = copied_weights(model)
    with prepared(model, packed):
        sample(model, ["a"])
        assert model.state_dict().keys() == before.keys()
    assert_unchanged(model, before)
    assert not has_packed_weights(model)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
def test_network_and_decoder_are_packed(model):
    layers = model.model.diffusion_model.input_blocks[0][0], model.first_stage_model.decoder.conv_out
    with prepared(model, packed=True):
        sample(model, ["a"])
        for layer in layers:
            assert layer.weight.layout == torch._mkldnn
    with prepared(model, packed=False):
        sample(model, ["a"])
        for layer in layers:
            assert layer.weight.layout == torch.strided


def test_autoencoder_is_prepared(model):
    """It has no network of its own; all of its parts are packed."""
    stage, images = model.first_stage_model, torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        plain = stage.decode(stage.encode(images).mode())
        with prepared(stage, packed=True):
            assert_close(stage.decode(stage.encode(images).mode()), plain, 1e-5)


def importers(name: str) -> set[str]:
    """Return the modules of the package that import `name`."""
    root = Path(__file__).parents[2]
    found = set()
    for path in (root / "ldm").glob("**/*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and name in {alias.name for alias in node.names}:
                found.add(str(path.relative_to(root)))
    return found


def test_one_module_packs_weights_and_one_enters_it():
    assert importers("packed_weights") == {"ldm/pipelines/preparation.py"}
    assert importers("prepared") == {"ldm/pipelines/generation.py"}


@pytest.mark.parametrize(("available", "kept"), [("100 kB", False), ("1000000000 kB", True)])
def test_plain_weights_are_kept_if_the_memory_suffices(model, monkeypatch, available, kept):
    """Both choices return the same results and restore the same weights."""
    options = []

    def packed(*parts, keep_originals):
        options.append(keep_originals)
        return packed_weights(*parts, keep_originals=keep_originals)

    monkeypatch.setattr(preparation, "packed_weights", packed)
    monkeypatch.setattr(preparation.Path, "read_text", lambda path, **_: f"MemFree: 1 kB\nMemAvailable: {available}\n")
    before = copied_weights(model)
    with prepared(model, packed=True):
        inside = sample_text(model, ["a"], steps=2, scale=1.0, x_T=torch.ones(1, 3, 8, 8))
    assert options == [kept]
    assert_unchanged(model, before)
    assert_close(inside, sample_text(model, ["a"], steps=2, scale=1.0, x_T=torch.ones(1, 3, 8, 8)), 1e-4)
