"""Tests of `ldm.pipelines.text_inpainting`, and of the recorded in-painting by a text."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from library_tasks import half_mask, random_images
from parity_cases import assert_close, build, load_case
from tiny_models import inpainting_config, make_model, write_clip
from tiny_stable_diffusion import stable_diffusion_config, text_inpainting_config

import ldm
from ldm.config.instantiate import instantiate_from_config
from ldm.config.model_config import read_config
from ldm.config.model_info import ModelInfo
from ldm.errors import UserError
from ldm.io.pixels import to_batch
from ldm.pipelines import sampling
from ldm.pipelines.inpainting import MaskedImage
from ldm.pipelines.loading import for_inference, skip_init
from ldm.pipelines.text_inpainting import TextInpainting

IMAGES = random_images(3, 16, 16)
MASK = half_mask(16, 16)


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    pytest.importorskip("transformers")
    return write_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module", params=[1, 2], ids=["CLIP", "OpenCLIP"])
def model(request, vocabulary):
    return make_model(text_inpainting_config(request.param, vocabulary))


def fill(model, images, masks, prompts="", **options):
    options = {"steps": 3, "seed": 1, "progress": False, "output_type": "numpy", **options}
    return ldm.inpaint(model, images, masks, prompts, **options)


def test_recorded_samples_are_reproduced(monkeypatch):
    """The record is the published chain, from the masked image to pixels; its prompts were token ids."""
    case = load_case("sd_inpainting_sample")
    model, inputs = build(case), case.inputs
    image, mask, masked = (inputs[name].movedim(-1, 1) for name in ("jpg", "mask", "masked_image"))
    assert torch.equal(masked, image * (mask < 0.5))
    encode, learned = model.encode_first_stage, type(model).get_learned_conditioning

    def sampled_latents(model, x):
        """The published chain samples the latents of the image, then those of the masked image."""
        torch.manual_seed(42)
        model.get_first_stage_encoding(encode(image))
        latents = model.get_first_stage_encoding(encode(x))
        torch.manual_seed(42)  # of the run
        return latents

    monkeypatch.setattr(sampling, "encode", sampled_latents)
    monkeypatch.setattr(TextInpainting, "padded", lambda *_: (image, mask))
    tokens = {"a": inputs["caption"], "": inputs["uncond_tokens"]}
    monkeypatch.setattr(model, "get_learned_conditioning", lambda texts: learned(model, tokens[texts[0]]))
    pipeline = TextInpainting(steps=10, eta=1.0, timestep_spacing="uniform")
    request = MaskedImage(IMAGES[0], MASK, "a")
    with torch.no_grad():
        latent = pipeline.sample(model, [request, request], torch.randn, inputs["x_T"])
        assert_close(latent, case.outputs["latent"])
        assert_close(model.decode_first_stage(latent), case.outputs["decoded"])


def test_conditioning_is_the_text_the_mask_and_the_masked_image(model, monkeypatch):
    seen = {}

    def sample(model, shape, **options):
        seen.update(options)
        return torch.zeros(shape)

    monkeypatch.setattr(sampling, "sample_latents", sample)
    fill(model, IMAGES[0], MASK, "cat", negative_prompt="dog")
    masked = to_batch(IMAGES[:1])
    masked[..., :8] = 0
    mode = 0.18215 * model.first_stage_model.encode(masked).mode()
    (maps,), (text,) = seen["cond"]["c_concat"], seen["cond"]["c_crossattn"]
    torch.testing.assert_close(maps[:, 1:], mode, rtol=1e-5, atol=1e-5)
    assert maps[0, 0].tolist() == 8 * [[1.0] * 4 + [0.0] * 4]
    assert torch.equal(text, model.get_learned_conditioning(["cat"]))
    assert seen["uncond"]["c_concat"][0] is maps
    assert torch.equal(seen["uncond"]["c_crossattn"][0], model.get_learned_conditioning(["dog"]))
    assert seen["scale"] == 7.5


@pytest.mark.parametrize("size", [(16, 16), (12, 10), (1, 7), (33, 5)])
def test_unmasked_pixels_are_returned_bit_for_bit(model, size):
    image, mask = random_images(1, *size)[0], half_mask(*size)
    (result,) = fill(model, image, mask, "cat")
    assert result.shape == image.shape and (result[~mask] == image[~mask]).all()
    assert (result[mask] != image[mask]).mean() > 0.5


def test_prompts_are_one_for_all_or_one_for_each(model):
    together = fill(model, IMAGES, MASK, ["cat", "dog", ""], batch_size=1)
    for i, prompt in enumerate(("cat", "dog", "")):
        alone = fill(model, IMAGES[i], MASK, prompt, seed=1 + i)[0]
        assert np.abs(alone.astype(int) - together[i]).max() <= 1, "up to rounding: a longer run is packed"
    assert len(fill(model, IMAGES, MASK, "cat")) == 3
    cat, dog = fill(model, IMAGES[0], MASK, ["cat", "dog"], seed=[1, 1])
    assert (cat != dog).any(), "one image with several prompts"
    with pytest.raises(ValueError, match="3 images and 2 prompts do not match"):
        fill(model, IMAGES, MASK, ["cat", "dog"])


@pytest.mark.parametrize("options", [{"eta": 1.0}, {"sampler": "plms"}, {"sampler": "dpm"}, {"tile": 8}], ids=str)
def test_image_does_not_depend_on_the_batch_size(model, options):
    images = random_images(3, 12, 20)
    runs = [fill(model, images, half_mask(12, 20), "cat", batch_size=size, **options) for size in (1, 3)]
    for alone, together in zip(*runs, strict=True):
        assert np.abs(alone.astype(int) - together).max() <= 1


def test_mask_mode_max_hides_whole_latents(model, monkeypatch):
    mask, seen = np.zeros((16, 16), bool), {}
    mask[5:6, 2:14] = True
    encode = model.first_stage_model.encode
    monkeypatch.setattr(model.first_stage_model, "encode", lambda x: seen.update(images=x) or encode(x))
    (result,) = fill(model, IMAGES[0], mask, mask_mode="max")
    hidden = (seen["images"][0] == 0).all(dim=0).numpy()
    assert hidden[4:6, 2:14].all() and hidden.sum() == 24
    assert (result[~mask] == IMAGES[0][~mask]).all() and (result[mask] != IMAGES[0][mask]).any()


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_half_precision(vocabulary, precision):
    model = make_model(text_inpainting_config(1, vocabulary))
    (expected,) = fill(model, IMAGES[0], MASK, "cat")
    (image,) = fill(model, IMAGES[0], MASK, "cat", precision=precision)
    assert np.abs(image.astype(int) - expected).mean() < 4


def test_cut_prompts_log_a_warning(model, caplog):
    fill(model, IMAGES[:2], MASK, "cat " * 80, negative_prompt="dog " * 80)
    first, second = (record.getMessage() for record in caplog.records)
    assert first.startswith('the prompt "cat cat') and "and the model reads 77" in first and "82 tokens" in first
    assert second.startswith('the negative prompt "dog')


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"negative_prompt": "x", "scale": 1}, "the negative prompt has no effect without guidance"),
        ({"tile": 4}, "tile 4 is too small for this model; give 8 or more, or 0 for none"),
    ],
    ids=str,
)
def test_invalid_options_raise_user_error(model, options, message):
    with pytest.raises(UserError, match=message):
        fill(model, IMAGES[0], MASK, **options)


@pytest.mark.parametrize("options", [{"prompts": "cat"}, {"negative_prompt": "cat"}, {"scale": 3.0}], ids=str)
def test_model_without_a_text_refuses_one(options):
    with pytest.raises(UserError, match='the model "tiny" reads no text; leave out the prompt, the negative prompt'):
        ldm.inpaint(make_model(inpainting_config()), IMAGES, MASK, progress=False, **options)


def test_models_of_other_tasks_are_refused(model, vocabulary):
    text = make_model(stable_diffusion_config(1, vocabulary))
    with pytest.raises(UserError, match='is conditioned on "txt", not on "masked_image"; choose an in-painting model'):
        fill(text, IMAGES[0], MASK)
    with pytest.raises(UserError, match='is conditioned on "txt", not on "masked_image"; choose an in-painting model'):
        ldm.inpaint(text, IMAGES, MASK, prompts=["cat", "cat"], progress=False)
    message = 'the model "tiny" is conditioned on a masked image beside its text; use ldm inpaint, or choose'
    with pytest.raises(UserError, match=message):
        ldm.text_to_image(model, "cat")
    with pytest.raises(UserError, match='the model "tiny" does not fill images by a text; choose an in-painting model'):
        TextInpainting().check(ModelInfo.of(text))


@pytest.mark.parametrize(("name", "width"), [("v1-inpainting-inference", 768), ("v2-inpainting-inference", 1024)])
def test_shipped_configurations_suit_the_task(repo_root, name, width):
    config = read_config(repo_root / f"configs/stable-diffusion/{name}.yaml")
    TextInpainting().check(ModelInfo("m", config))
    with torch.device("meta"), skip_init():
        model = instantiate_from_config(for_inference(config))
        cond = {"c_concat": [torch.zeros(2, 5, 64, 64)], "c_crossattn": [torch.zeros(2, 77, width)]}
        latents = torch.zeros(2, 4, 64, 64)
        assert model.apply_model(latents, torch.zeros(2), cond).shape == latents.shape
    assert model.downsampling == 8 and list(model.concat_keys) == ["mask", "masked_image"]
