"""Tests of `ldm.pipelines.run`: the options and results that all public functions of the library share."""

from __future__ import annotations

import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from library_tasks import CALLS, Tasks
from PIL import Image
from tiny_models import make_model

import ldm
from ldm.errors import UserError
from ldm.io.pixels import to_uint8
from ldm.models.diffusion.noise import SeededNoise
from ldm.pipelines.run import make_seeds, split_options
from ldm.pipelines.sampling import decode

every_task = pytest.mark.parametrize("name", CALLS)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    return Tasks(tmp_path_factory.mktemp("files"))


def arrays(images) -> np.ndarray:
    return np.stack([np.asarray(image) for image in images]).astype(int)


# -- results ---------------------------------------------------------------------------------------------------


@every_task
def test_output_types_contain_the_same_images(tasks, name):
    height, width = CALLS[name].size
    pil, numpy, pt = (tasks(name, output_type=kind) for kind in ("pil", "numpy", "pt"))
    assert len(pil) == len(numpy) == len(pt) == 3
    for image, array, tensor in zip(pil, numpy, pt, strict=True):
        assert isinstance(image, Image.Image) and image.mode == "RGB" and image.size == (width, height)
        assert isinstance(array, np.ndarray) and array.dtype == np.uint8 and array.shape == (height, width, 3)
        assert isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float32
        assert tensor.shape == (3, height, width) and tensor.min() >= -1 and tensor.max() <= 1
        assert (np.asarray(image) == array).all() and (to_uint8(tensor) == array).all()
    assert (numpy[0] != numpy[1]).any()


@every_task
def test_latents_decode_to_the_images(tasks, name):
    latents = tasks(name, output_type="latent")
    assert len(latents) == 3 and all(each.shape == CALLS[name].latents for each in latents)
    decoded = to_uint8(decode(tasks.model(name), torch.stack(latents)))
    images = arrays(tasks(name))
    if CALLS[name].blends:
        half = images.shape[2] // 2
        decoded, images = decoded[:, :, :half], images[:, :, :half]
    assert (decoded == images).all()


@every_task
def test_same_start_noise_samples_the_same_image(tasks, name):
    noise = SeededNoise([5, 6, 7])((3, *CALLS[name].latents))
    given = arrays(tasks(name, latents=noise))
    assert (given == arrays(tasks(name, latents=noise, seed=99))).all(), "the seed has no effect"
    assert (given == arrays(tasks(name, seed=5))).all(), "the noise of a seed is the same"
    assert np.abs(given - arrays(tasks(name, latents=noise, batch_size=2))).max() <= 1, "up to rounding"
    assert (given != arrays(tasks(name, latents=noise + 1))).any()


# -- seeds and batches -----------------------------------------------------------------------------------------


@every_task
def test_image_i_uses_the_seed_plus_i(tasks, name):
    three = arrays(tasks(name, seed=4, batch_size=1))
    assert (three == arrays(tasks(name, seed=[4, 5, 6], batch_size=1))).all()
    assert (three == arrays(tasks(name, seed=np.array([4, 5, 6]), batch_size=1))).all()
    other = arrays(tasks(name, seed=[9, 5, 4], batch_size=1))
    assert (three[1] == other[1]).all() and (three[0] != other[0]).any()


@every_task
def test_images_do_not_depend_on_the_batch_size(tasks, name):
    alone, pairs, together = (arrays(tasks(name, batch_size=size)) for size in (1, 2, 8))
    assert np.abs(alone - pairs).max() <= 1 and np.abs(alone - together).max() <= 1


def test_random_seeds_differ(tasks):
    first, second = (arrays(tasks("unconditional", seed=None)) for _ in range(2))
    assert (first != second).any()


@pytest.mark.parametrize("name", ["text_to_image", "super_resolve", "inpaint"])
@pytest.mark.parametrize(
    "options", [{"eta": 1.0}, {"sampler": "plms"}, {"sampler": "dpm"}, {"sampler": "ddpm"}], ids=str
)
def test_samplers_do_not_depend_on_the_batch_size(tasks, name, options):
    if name == "super_resolve" and "sampler" in options:
        options = {**options, "eta": None}
    alone, together = (arrays(tasks(name, batch_size=size, **options)) for size in (1, 8))
    assert np.abs(alone - together).max() <= 1
    assert (alone != arrays(tasks(name))).any()


# -- options ---------------------------------------------------------------------------------------------------


@every_task
@pytest.mark.parametrize("size", [1, 2, 8])
def test_callback_counts_the_steps(tasks, name, size):
    calls = []
    tasks(name, batch_size=size, callback=lambda done, total: calls.append((done, total)))
    total = 3 * -(-3 // size)
    assert calls == [(done, total) for done in range(1, total + 1)]


def test_callback_of_the_ancestral_sampler_counts_every_timestep(tasks):
    calls = []
    tasks("unconditional", sampler="ddpm", callback=lambda done, total: calls.append((done, total)))
    assert calls[0] == (1, 100) and calls[-1] == (100, 100)


@every_task
def test_progress_is_printed_if_it_is_wanted(tasks, name, capfd):
    tasks(name)
    capfd.readouterr()
    tasks(name, progress=False)
    printed = capfd.readouterr()
    if name != "retrieval_to_image":  # transformers prints a bar of its own while CLIP loads
        assert (printed.out, printed.err) == ("", "")
    assert "sampling" not in printed.err
    tasks(name, progress=True)
    assert "sampling" in capfd.readouterr().err


@every_task
def test_no_file_is_written(tasks, name, tmp_path, monkeypatch):
    tasks(name)
    monkeypatch.chdir(tmp_path)
    tasks(name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["text_to_image", "inpaint", "super_resolve", "unconditional of pixels"])
def test_device_and_precision_move_the_model(name, tmp_path):
    call, model = CALLS[name], make_model(CALLS[name].config)
    full = arrays(call.function(model, tmp_path, seed=1, progress=False))
    half = arrays(call.function(model, tmp_path, seed=1, progress=False, device="cpu", precision="bfloat16"))
    assert model.dtype == torch.bfloat16 and model.device == CPU
    assert model.alphas_cumprod.dtype == torch.float32
    assert (full != half).any() and np.abs(full - half).mean() < 10
    call.function(model, tmp_path, seed=1, progress=False, precision="float32")
    assert model.dtype == torch.float32


@every_task
def test_unknown_option_raises_type_error(tasks, name):
    with pytest.raises(TypeError, match="stepz"):
        tasks(name, stepz=3)


@every_task
def test_invalid_options_raise_before_sampling(tasks, name, monkeypatch):
    monkeypatch.setattr(tasks.model(name), "apply_model", None)
    noise = torch.zeros(2, *CALLS[name].latents)
    for options, error, message in (
        ({"seed": [1, 2]}, ValueError, "3 images need 3 seeds, got 2"),
        ({"seed": -1}, ValueError, r"seeds lie in \[0, 2\*\*63\), got -1"),
        ({"seed": [1, 2, 2**63]}, ValueError, "seeds lie in"),
        ({"latents": noise}, ValueError, "3 images need 3 latents, got 2"),
        ({"seed": "1"}, ValueError, "a seed is a whole number, got '1'"),
        ({"seed": 1.5}, ValueError, "a seed is a whole number, got 1.5"),
        ({"output_type": "jpeg"}, ValueError, 'unknown output_type "jpeg"; choose one of pil, numpy, pt, latent'),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1, got 0"),
        ({"device": "toaster"}, UserError, 'the device "toaster" is not available here'),
        ({"precision": "int8"}, UserError, 'there is no precision "int8"'),
        ({"sampler": "dmp"}, UserError, r'there is no sampler "dmp" \(did you mean "dpm"\?\); choose ddim, plms, dpm'),
        ({"eta": float("nan")}, UserError, "eta must be a finite number, got nan"),
        ({"eta": -1.0}, UserError, "eta must be at least 0, got -1"),
        ({"sampler": "plms", "eta": 0.5}, UserError, 'the sampler "plms" is deterministic; eta must be 0, got 0.5'),
    ):
        with pytest.raises(error, match=message):
            tasks(name, **options)


@every_task
def test_latents_of_another_shape_raise_value_error(tasks, name):
    channels, height, width = CALLS[name].latents
    for shape in ((channels + 1, height, width), (channels, height + 4, width), (channels, height)):
        with pytest.raises(ValueError, match=r"latents must have the shape \(N, 3, 8, 8\), got \(3, "):
            tasks(name, latents=torch.zeros(3, *shape))


def test_threads_share_a_model(tasks):
    """Each of them waits for the run of the other, whose weights are packed."""
    model = tasks.model("text_to_image")

    def sample(prompt):
        return arrays(ldm.text_to_image(model, [prompt], steps=14, seed=1, progress=False))

    prompts = ["fox", "rocket", "red heart", "pizza"]
    expected = [sample(prompt) for prompt in prompts]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(sample, prompts))
    assert all((a == b).all() for a, b in zip(expected, found, strict=True))


def test_number_of_steps_is_checked(tasks):
    for model, function in (
        (tasks.model("text_to_image"), lambda model, **o: ldm.text_to_image(model, "fox", **o)),
        (tasks.model("unconditional"), ldm.unconditional),
    ):
        with pytest.raises(UserError, match="101 steps are more than the model's 100"):
            function(model, steps=101)
        with pytest.raises(UserError, match="steps must be a whole number of at least 1, got 0"):
            function(model, steps=0)


@every_task
def test_model_without_a_configuration_raises_user_error(tasks, name):
    with pytest.raises(UserError, match=r"this Linear does not know its configuration; load it with ldm\.load"):
        CALLS[name].function(torch.nn.Linear(1, 1), tasks.folder, seed=1, progress=False)


def test_models_of_other_tasks_raise_user_error(tasks):
    """Each function names the conditioning of the model, and what it needs instead."""
    conditionings = {name: tasks.model(name) for name in ("text_to_image", "unconditional", "inpaint")}
    for name, call in CALLS.items():
        for other, model in conditionings.items():
            if name == other or (name, other) == ("image_to_image", "text_to_image"):
                continue
            if other == "unconditional" and name == "unconditional of pixels":
                continue
            with pytest.raises(UserError, match=r'the model "tiny" (is|has)'):
                call.function(model, tasks.folder, seed=1, progress=False)


# -- helpers ---------------------------------------------------------------------------------------------------


def test_seeds_wrap_around_at_the_end_of_their_range():
    assert make_seeds(2**63 - 2, 3) == [2**63 - 2, 2**63 - 1, 0]
    assert make_seeds((3, 1), 2) == [3, 1]
    assert len(set(make_seeds(None, 4))) == 4
    assert make_seeds(torch.tensor([3, 1]), 2) == [3, 1]


def test_options_are_split_between_the_sampler_and_the_run():
    assert split_options({"sampler": "dpm", "eta": 0.0, "seed": 1}) == ({"sampler": "dpm", "eta": 0.0}, {"seed": 1})
    with pytest.raises(TypeError, match="unknown option 'stepz'; options are batch_size, callback, device, eta"):
        split_options({"stepz": 1})


# -- images that could not be computed -------------------------------------------------------------------------


@every_task
@pytest.mark.parametrize("kind", ["pil", "latent"])
def test_good_images_are_in_the_error(tasks, name, kind):
    noise = SeededNoise([5, 6, 7])((3, *CALLS[name].latents))
    options = {"output_type": kind, "seed": 40, "batch_size": 3}
    expected = tasks(name, latents=noise, **options)
    noise[1, 0, 0, 0] = torch.nan
    with pytest.raises(ldm.PartialResultError, match=r"1 of 3 images failed: 1 \(seed 41\); the latents") as caught:
        tasks(name, latents=noise, **options)
    images = caught.value.images
    assert isinstance(caught.value, ldm.UserError) and len(images) == 3 and images[1] is None
    assert list(caught.value.errors) == [1] and "(seed 41) are not finite" in str(caught.value.errors[1])
    if kind == "latent":
        assert all(torch.equal(images[i], expected[i]) for i in (0, 2))
    else:
        assert all((np.asarray(images[i]) == np.asarray(expected[i])).all() for i in (0, 2))


def test_error_names_eight_images_at_most(tasks):
    model = tasks.model("text_to_image")
    noise = torch.full((11, *CALLS["text_to_image"].latents), torch.nan)
    with pytest.raises(ldm.PartialResultError) as caught:
        ldm.text_to_image(model, 11 * ["fox"], steps=1, latents=noise, seed=1, batch_size=11, progress=False)
    named = ", ".join(f"{i} (seed {i + 1})" for i in range(8))
    assert str(caught.value).startswith(f"11 of 11 images failed: {named}, 3 more; the latents of image 0 (seed 1)")
    assert caught.value.images == [None] * 11 and "\n" not in str(caught.value)
    copy = pickle.loads(pickle.dumps(caught.value))
    assert str(copy) == str(caught.value) and copy.images == caught.value.images and len(copy.errors) == 11
