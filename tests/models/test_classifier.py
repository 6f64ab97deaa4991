"""Tests of classifiers of noisy latents, and of classifier guidance against closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from omegaconf import OmegaConf
from parity_cases import assert_close
from tiny_models import text_config, write_model
from torch.nn.functional import cross_entropy

import main
from ldm.errors import UserError
from ldm.io.checkpoint.reading import read_state_dict
from ldm.models.diffusion.classifier import ClassifierGuidance, NoisyLatentImageClassifier
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.modules.diffusionmodules.openaimodel import EncoderUNetModel, UNetModel
from ldm.modules.diffusionmodules.schedule import diffusion_tables, extract_into_tensor, make_beta_schedule
from ldm.training.modules import lightning_module

TARGET = "ldm.models.diffusion.classifier.NoisyLatentImageClassifier"


@pytest.fixture(scope="module")
def diffusion(tmp_path_factory):
    """Return the folder of a tiny diffusion model, and the model."""
    folder = tmp_path_factory.mktemp("diffusion")
    return folder, write_model(folder)


def classifier(diffusion, **params):
    torch.manual_seed(1)
    options = {"num_classes": 6, "label_key": "class_label", "pool": "adaptive", **params}
    model = NoisyLatentImageClassifier(str(diffusion[0]), **options)
    with torch.no_grad():
        for parameter in model.model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def label_batch(n=4):
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(n, 16, 16, 3, generator=generator) * 2 - 1
    names = ["fox", "rocket", "ship", "star"]
    return {"image": image, "class_label": torch.arange(n), "human_label": names[:n]}


# -- the model -------------------------------------------------------------------------------------------------


def test_images_that_the_network_cannot_halve_raise_user_error(diffusion):
    maps = classifier(diffusion, label_key="segmentation")
    batch = {"image": torch.zeros(1, 18, 16, 3), "segmentation": torch.zeros(1, 18, 16, 6)}
    with pytest.raises(UserError, match=r"images of 18 x 16 pixels do not fit the classifier.* multiples of 4;"):
        maps.shared_step(batch)


def test_network_follows_unet_of_diffusion_model(diffusion):
    labels = classifier(diffusion)
    assert type(labels.model) is EncoderUNetModel
    assert (labels.model.in_channels, labels.model.out_channels, labels.model.pool) == (3, 6, "adaptive")
    maps = classifier(diffusion, label_key="segmentation")
    assert type(maps.model) is UNetModel
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([0, 99])
    assert labels(x, t).shape == (2, 6)
    assert maps(x, t).shape == (2, 6, 8, 8)


def test_diffusion_model_is_loaded_and_frozen(diffusion):
    source = diffusion[1]
    model = classifier(diffusion).train()
    loaded = model.diffusion_model.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in source.state_dict().items())
    assert not model.diffusion_model.training and model.model.training
    assert not any(p.requires_grad for p in model.diffusion_model.parameters())
    assert {id(p) for p in model.optimizer_parameters()} == {id(p) for p in model.model.parameters()}
    prefixes = {name.partition(".")[0] for name in model.state_dict()}
    assert prefixes == {"model", "diffusion_model"}


@pytest.mark.parametrize("part", [{"load_only_unet": True}, {"ignore_keys": ["first_stage_model."]}])
def test_partial_loading_options_of_diffusion_model_are_ignored(part, tmp_path):
    source = write_model(tmp_path, text_config(**part))
    loaded = classifier((tmp_path, source)).diffusion_model.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in source.state_dict().items())


def test_log_folder_uses_latest_configuration_and_weights(diffusion, tmp_path):
    folder, source = diffusion
    config = OmegaConf.load(folder / "config.yaml")
    (tmp_path / "configs").mkdir()
    (tmp_path / "checkpoints").mkdir()
    OmegaConf.save(config, tmp_path / "configs" / "2024-05-02T00-00-00-project.yaml")
    config.model.params.timesteps = 7
    OmegaConf.save(config, tmp_path / "configs" / "2024-05-01T00-00-00-project.yaml")
    torch.save({"state_dict": source.state_dict()}, tmp_path / "checkpoints" / "last.ckpt")
    model = classifier((tmp_path, source))
    assert model.diffusion_model.num_timesteps == 100
    name = "model.diffusion_model.out.2.bias"
    assert torch.equal(model.diffusion_model.state_dict()[name], source.state_dict()[name])


def test_diffusion_ckpt_path_overrides_weights(diffusion, tmp_path):
    source = diffusion[1]
    weights = {name: value + 1 if value.is_floating_point() else value for name, value in source.state_dict().items()}
    torch.save({"state_dict": weights}, tmp_path / "other.ckpt")
    model = classifier(diffusion, diffusion_ckpt_path=str(tmp_path / "other.ckpt"))
    name = "model.diffusion_model.out.2.bias"
    assert torch.equal(model.diffusion_model.state_dict()[name], weights[name])


def test_ckpt_path_loads_classifier_and_rejects_other_models(diffusion, tmp_path):
    source = classifier(diffusion)
    torch.save({"state_dict": source.state_dict()}, tmp_path / "classifier.ckpt")
    torch.manual_seed(5)
    path = str(tmp_path / "classifier.ckpt")
    model = NoisyLatentImageClassifier(str(diffusion[0]), 6, path, pool="adaptive", label_key="class_label")
    assert all(torch.equal(value, source.model.state_dict()[name]) for name, value in model.model.state_dict().items())
    with pytest.raises(UserError, match="belongs to another model"):
        classifier(diffusion, ckpt_path=str(diffusion[0] / "model.ckpt"))


def test_loss_and_accuracies_match_noised_latents(diffusion):
    model, batch = classifier(diffusion).eval(), label_batch()
    torch.manual_seed(2)
    loss, log = model.shared_step(batch)
    torch.manual_seed(2)
    z = model.diffusion_model.get_input({**batch, "caption": 4 * [""]}, "image")[0]
    t = torch.randint(100, (4,))
    logits = model.model(model.diffusion_model.q_sample(z, t, torch.randn_like(z)), t)
    assert torch.equal(loss, cross_entropy(logits, batch["class_label"]))
    hits = (logits.argsort(dim=1, descending=True)[:, :5] == batch["class_label"][:, None]).float()
    assert log == {"val/loss": loss, "val/acc@1": hits[:, 0].mean(), "val/acc@5": hits.any(1).float().mean()}
    assert set(model.train().shared_step(batch)[1]) == {"train/loss", "train/acc@1", "train/acc@5"}


def test_compute_top_k_counts_targets_among_most_likely_classes():
    logits = torch.tensor([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0], [3.0, 2.0, 1.0], [1.0, 2.0, 3.0]])
    targets = torch.tensor([0, 1, 2, 2])
    shares = [NoisyLatentImageClassifier.compute_top_k(None, logits, targets, k).item() for k in (1, 2, 5)]
    assert shares == [0.5, 0.75, 1.0]
    maps = logits.T.reshape(1, 3, 2, 2)
    assert NoisyLatentImageClassifier.compute_top_k(None, maps, targets.reshape(1, 2, 2), 1).item() == 0.5


def test_noise_accuracies_cover_log_steps_noise_levels(diffusion):
    model = classifier(diffusion, log_steps=4).eval()
    accuracies = model.noise_accuracies(label_batch())
    assert list(accuracies) == [f"val/acc@1_t{t:04}" for t in (0, 25, 50, 75)]


def test_validation_encodes_images_once_and_no_caption(diffusion, monkeypatch):
    model, passes, logged = classifier(diffusion, log_steps=4).eval(), [], {}
    encode = model.diffusion_model.first_stage_model.encode
    monkeypatch.setattr(model.diffusion_model.first_stage_model, "encode", lambda x: passes.append(x) or encode(x))
    monkeypatch.setattr(model.diffusion_model, "get_learned_conditioning", None)
    trained = lightning_module(model)
    monkeypatch.setattr(trained, "log_dict", lambda log, **how: logged.update(log))
    trained.validation_step(label_batch(), 0)
    assert len(passes) == 1
    assert {"val/loss", "val/acc@1_t0000", "val/acc@1_t0075"} < logged.keys()


def test_segmentation_targets_have_latent_size(diffusion):
    model = classifier(diffusion, label_key="segmentation")
    ids = torch.randint(0, 6, (2, 16, 16), generator=torch.Generator().manual_seed(0))
    one_hot = torch.nn.functional.one_hot(ids, 6).float()
    for maps in (ids, one_hot):
        targets = model.get_targets({"segmentation": maps}, (8, 8))
        assert torch.equal(targets, ids[:, ::2, ::2])
    loss, log = model.shared_step({**label_batch(2), "segmentation": ids})
    assert loss.item() == pytest.approx(math.log(6), abs=1.0)
    assert 0 <= log["train/acc@1"] <= log["train/acc@5"] <= 1


def test_log_images_returns_inputs_labels_and_predictions(diffusion):
    model = classifier(diffusion, log_steps=2).eval()
    batch = label_batch()
    images = model.log_images(batch, N=3)
    assert set(images) == {"inputs", "labels", "inputs@t0000", "pred@t0000", "inputs@t0050", "pred@t0050"}
    assert torch.equal(images["inputs"], batch["image"][:3].movedim(-1, 1))
    assert {tuple(image.shape) for image in images.values()} == {(3, 3, 16, 16)}


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"label_key": None}, 'cannot classify "caption"; set label_key to one of class_label, segmentation'),
        ({"label_key": "class_labels"}, 'did you mean "class_label"'),
        ({"pool": "mean"}, 'pool "mean" is unknown'),
        ({"diffusion_ckpt_path": "nowhere.ckpt"}, 'no checkpoint "nowhere.ckpt"'),
    ],
)
def test_wrong_parameters_raise_user_error(params, message, diffusion):
    with pytest.raises(UserError, match=message):
        classifier(diffusion, **params)


def test_folder_without_diffusion_model_raises_user_error(tmp_path):
    with pytest.raises(UserError, match="no model"):
        classifier((tmp_path / "nowhere", None))
    OmegaConf.save({"model": text_config()["params"]["first_stage_config"]}, tmp_path / "config.yaml")
    (tmp_path / "model.ckpt").touch()
    with pytest.raises(UserError, match="no unet_config"):
        classifier((tmp_path, None))


@pytest.mark.parametrize("params", [{}, {"params": None}, {"params": {"in_channels": 3}}])
def test_network_without_out_channels_raises_user_error(params, tmp_path):
    write_model(tmp_path, text_config(unet_config={"target": "torch.nn.Identity", **params}))
    with pytest.raises(UserError, match="its unet_config has no out_channels"):
        classifier((tmp_path, None))


def test_classifier_trains_from_yaml(diffusion, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    params = {"diffusion_path": str(diffusion[0]), "num_classes": 1366, "label_key": "class_label", "log_steps": 2}
    schedule = {"warm_up_steps": [1], "cycle_lengths": [9], "f_start": [0.1], "f_max": [1.0], "f_min": [1.0]}
    params["scheduler_config"] = {"target": "ldm.lr_scheduler.LambdaLinearScheduler", "params": schedule}
    names = {split: f"ldm.data.emoji.Emoji{split.title()}" for split in ("train", "validation")}
    sets = {split: {"target": name, "params": {"size": 16}} for split, name in names.items()}
    config = {
        "model": {"base_learning_rate": 1e-3, "target": TARGET, "params": {**params, "pool": "adaptive"}},
        "data": {"target": "main.DataModuleFromConfig", "params": {"batch_size": 2, "num_workers": 0, **sets}},
        "lightning": {"trainer": {"max_steps": 2, "limit_train_batches": 2, "limit_val_batches": 1}},
    }
    OmegaConf.save(config, "classifier.yaml")
    trainer_options = ["--enable_progress_bar", "false", "--enable_model_summary", "false"]
    assert main.main(["-b", "classifier.yaml", "-t", "--no-test", *trainer_options]) == 0
    (run,) = (tmp_path / "logs").iterdir()
    assert (run / "images" / "train" / "pred@t0050_gs-000001_e-000000_b-000000.png").is_file()
    best = torch.load(run / "checkpoints" / "epoch=000000.ckpt", weights_only=True)
    assert any("val/loss" in str(state) for state in best["callbacks"].values())
    weights = read_state_dict(run / "checkpoints" / "last.ckpt")
    source = {f"diffusion_model.{name}": value for name, value in diffusion[1].state_dict().items()}
    assert all(torch.equal(weights[name], value) for name, value in source.items())
    assert weights["model.out.3.weight"].abs().max() > 0, "the last layer starts at zero, so it was trained"


# -- guidance --------------------------------------------------------------------------------------------------


class Mixture:
    """Exact denoiser of an equal mixture of N(-mean, std²) and N(mean, std²), independently in every pixel."""

    parameterization = "eps"
    device = torch.device("cpu")
    num_timesteps = 1000

    def __init__(self, mean=0.6, std=0.3):
        self.mean, self.std = mean, std
        tables = diffusion_tables(make_beta_schedule("linear", 1000, 0.0015, 0.0195))
        self.alphas_cumprod = torch.tensor(tables["alphas_cumprod"])

    def q_sample(self, x_start, t):
        raise NotImplementedError

    def centres(self, x, t):
        """Return the means (2, B, 1, 1, 1) of the noised classes, and their common variance."""
        alpha = extract_into_tensor(self.alphas_cumprod, t, x.shape)
        return torch.stack([-alpha.sqrt(), alpha.sqrt()]) * self.mean, alpha * self.std**2 + 1 - alpha

    def log_densities(self, x, t):
        """Return log p(x_t | y) up to a constant for both classes, (B, 2): the logits of the exact classifier."""
        centres, variance = self.centres(x, t)
        return -((x - centres).square() / (2 * variance)).sum(dim=(2, 3, 4)).T

    def conditional(self, x, t, y):
        """Return the noise prediction for class y, -√(1 - ᾱ) ∇ log p(x_t | y)."""
        centres, variance = self.centres(x, t)
        alpha = extract_into_tensor(self.alphas_cumprod, t, x.shape)
        return (1 - alpha).sqrt() * (x - centres[y]) / variance

    def apply_model(self, x, t, cond):
        shares = self.log_densities(x, t).softmax(dim=1)
        return sum(shares[:, y, None, None, None] * self.conditional(x, t, y) for y in (0, 1))


def test_gradient_of_linear_classifier_matches_closed_form():
    """∇ log p(y|x) = w_y - Σ_k p_k w_k."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(5, 12, generator=generator)
    x, y = torch.randn(3, 3, 2, 2, generator=generator), torch.tensor([0, 4, 2])
    logits = x.flatten(1) @ weights.T
    guidance = ClassifierGuidance(lambda x, t: x.flatten(1) @ weights.T, y)
    expected = weights[y] - logits.softmax(dim=1) @ weights
    with torch.no_grad():
        assert_close(guidance.gradient(x, torch.zeros(3)), expected.reshape(x.shape), 1e-5)


def test_gradient_of_segmentation_sums_over_pixels():
    x, y = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)), torch.ones(2, 4, 4, dtype=torch.long)
    gradient = ClassifierGuidance(lambda x, t: x, y).gradient(x, torch.zeros(2))
    assert_close(gradient, torch.eye(3)[y].movedim(-1, 1) - x.softmax(dim=1), 1e-5)


@pytest.mark.parametrize("step", [1, 300, 999])
def test_exact_classifier_makes_prediction_conditional(step):
    """Bayes: ∇ log p(x) + ∇ log p(y|x) = ∇ log p(x|y)."""
    model = Mixture()
    x = torch.randn(4, 1, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t, y = torch.full((4,), step), torch.tensor([0, 1, 1, 0])
    unconditional = model.apply_model(x, t, None)
    expected = torch.cat([model.conditional(x[i : i + 1], t[i : i + 1], y[i]) for i in range(4)])
    corrected = ClassifierGuidance(model.log_densities, y).modify_score(model, unconditional, x, t, None)
    assert_close(corrected, expected, 1e-9)
    twice = ClassifierGuidance(model.log_densities, y, 2.0).modify_score(model, unconditional, x, t, None)
    assert_close(twice - unconditional, 2 * (corrected - unconditional), 1e-9)
    assert torch.equal(ClassifierGuidance(model.log_densities, y, 0.0).modify_score(model, x, x, t, None), x)


def test_guided_samples_belong_to_their_class():
    model = Mixture()
    y = torch.tensor([0, 1] * 32)
    torch.manual_seed(0)
    x, _ = DDIMSampler(model).sample(
        50, 64, (1, 2, 2), eta=0.0, score_corrector=ClassifierGuidance(model.log_densities, y), verbose=False
    )
    signs = 2.0 * y - 1
    pixels = x * signs[:, None, None, None]
    # 256 pixels of N(0.6, 0.3²): the standard error is 0.019 for the mean and 0.013 for the standard deviation.
    assert pixels.mean().item() == pytest.approx(0.6, abs=0.06)
    assert pixels.std().item() == pytest.approx(0.3, abs=0.05)


def test_classifier_guides_its_diffusion_model(diffusion):
    """A DDIM step is linear in the noise prediction, so the contribution of the gradient is known."""
    model = classifier(diffusion).eval()
    sampler, c = DDIMSampler(model.diffusion_model), model.diffusion_model.get_learned_conditioning(["", ""])
    x_T, y = torch.ones(2, 3, 8, 8), torch.tensor([2, 5])
    guidance = ClassifierGuidance(model, y, scale=1e4)
    plain, guided = (
        sampler.sample(1, 2, (3, 8, 8), c, x_T=x_T, verbose=False, **options)[0]
        for options in ({}, {"score_corrector": guidance})
    )
    alpha, alpha_prev = (float(table[0]) for table in (sampler.ddim_alphas, sampler.ddim_alphas_prev))
    t = torch.full((2,), int(sampler.ddim_timesteps[0]))
    eps = -math.sqrt(1 - alpha) * 1e4 * guidance.gradient(x_T, t)
    slope = math.sqrt(1 - alpha_prev) - math.sqrt(alpha_prev * (1 - alpha) / alpha)
    assert_close(guided - plain, slope * eps, 1e-4)


def test_published_methods_read_entries_and_targets(diffusion):
    model = classifier(diffusion)
    batch = label_batch()
    assert torch.equal(model.get_conditioning(batch), batch["class_label"]) and model.numd == 1
    assert model.get_input(batch, "image").shape == (4, 3, 16, 16)
    assert (model.use_scheduler, model.log_steps) == (False, 10) and "unet_config" in model.diffusion_config["params"]
    maps = classifier(diffusion, label_key="segmentation")
    targets = maps.get_conditioning({"segmentation": torch.eye(6)[torch.randint(6, (2, 16, 16))]})
    assert targets.shape == (2, 6, 8, 8) and targets.sum(dim=1).eq(1).all()


def test_top_k_of_each_item():
    logits, labels = torch.eye(4), torch.tensor([0, 1, 3, 3])
    compute = NoisyLatentImageClassifier.compute_top_k
    assert compute(None, logits, labels, k=1, reduction="none").tolist() == [1.0, 1.0, 0.0, 1.0]
    assert compute(None, logits, labels, 1, "mean").item() == 0.75


def test_overridden_builders_are_called(diffusion):
    calls = []

    class Client(NoisyLatentImageClassifier):
        def load_diffusion(self):
            calls.append("diffusion")
            super().load_diffusion()

        def load_classifier(self, ckpt_path, pool):
            calls.append((ckpt_path, pool))
            super().load_classifier(ckpt_path, "adaptive")

    assert Client(str(diffusion[0]), 6, label_key="class_label").model.pool == "adaptive"
    assert calls == ["diffusion", (None, "attention")]
