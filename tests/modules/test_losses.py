"""Tests of the first-stage losses: recorded values, closed forms and a comparison of LPIPS with torchmetrics."""

from __future__ import annotations

import gzip
import json
import math

import pytest
import torch
from parity_cases import PARITY, build, load_case, weights_module
from parity_replay import adversarial_step, assert_replayed, grad_norm
from torch import nn

from ldm.errors import UserError
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.modules.losses import LPIPSWithDiscriminator
from ldm.modules.losses.adversarial import (
    adopt_weight,
    hinge_d_loss,
    hinge_d_loss_with_exemplar_weights,
    l1,
    l2,
    vanilla_d_loss,
)
from ldm.modules.losses.contperceptual import DummyLoss
from ldm.modules.losses.discriminator import ActNorm, NLayerDiscriminator, weights_init
from ldm.modules.losses.lpips import LPIPS, VGG16Features, channel_weights
from ldm.modules.losses.vqperceptual import VQLPIPSWithDiscriminator, measure_perplexity

# Sum of each tensor in the published file of channel weights.
PUBLISHED_SUMS = {
    "lin0.model.1.weight": 6.925991700962186,
    "lin1.model.1.weight": 8.858334008604288,
    "lin2.model.1.weight": 17.5150060467422,
    "lin3.model.1.weight": 51.521323032677174,
    "lin4.model.1.weight": 47.03485375829041,
}
# Options without networks, for closed forms of the loss.
BARE = {"perceptual_weight": 0.0, "disc_factor": 0.0}


def images(seed: int = 0, size: int = 24) -> torch.Tensor:
    return torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def posterior(seed: int = 1) -> DiagonalGaussianDistribution:
    return DiagonalGaussianDistribution(torch.randn(2, 6, 4, 4, generator=torch.Generator().manual_seed(seed)))


# Recorded values


@pytest.mark.parametrize("name", ["kl_loss_with_discriminator", "vq_loss_with_discriminator"])
def test_losses_match_the_recorded_values(name):
    assert_replayed(name)


@pytest.mark.parametrize("name", ["kl_loss_with_discriminator", "vq_loss_with_discriminator"])
def test_discriminator_loss_has_no_gradient_for_the_autoencoder(name):
    case = load_case(name)
    model = build(case).train()
    adversarial_step(model, case.inputs["x"], step=10)
    assert all(parameter.grad is None for part in (model.encoder, model.decoder) for parameter in part.parameters())
    assert all(parameter.grad is not None for parameter in model.loss.discriminator.parameters())


def test_state_dict_names_match_the_recorded_ones():
    with gzip.open(PARITY / "state_dicts.json.gz", "rt") as file:
        recorded = json.load(file)["loss_modules"]
    with torch.device("meta"):
        losses = {
            "LPIPSWithDiscriminator": LPIPSWithDiscriminator(disc_start=0),
            "VQLPIPSWithDiscriminator (disc_num_layers=2)": VQLPIPSWithDiscriminator(disc_start=0, disc_num_layers=2),
        }
    for name, loss in losses.items():
        assert {f"loss.{key}": list(entry.shape) for key, entry in loss.state_dict().items()} == recorded[name]


# Functions


def test_discriminator_losses_match_their_formulas():
    real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-2.0, 0.5])
    assert float(hinge_d_loss(real, fake)) == pytest.approx(0.5 * (0.25 + 0.75))
    cross_entropy = nn.functional.binary_cross_entropy_with_logits
    expected = 0.5 * (cross_entropy(real, torch.ones(2)) + cross_entropy(fake, torch.zeros(2)))
    torch.testing.assert_close(vanilla_d_loss(real, fake), expected)


def test_exemplar_weights():
    real, fake = torch.randn(2, 3, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    equal = hinge_d_loss_with_exemplar_weights(real, fake, torch.full((3,), 0.3))
    torch.testing.assert_close(equal, hinge_d_loss(real, fake))
    only_second = hinge_d_loss_with_exemplar_weights(real, fake, torch.tensor([0.0, 2.0, 0.0]))
    torch.testing.assert_close(only_second, hinge_d_loss(real[1], fake[1]))
    with pytest.raises(ValueError, match="batch size"):
        hinge_d_loss_with_exemplar_weights(real, fake, torch.ones(2))


def test_adopt_weight_and_pixel_losses():
    assert [adopt_weight(0.7, step, threshold=3) for step in (2, 3, 4)] == [0.0, 0.7, 0.7]
    assert adopt_weight(0.7, 0, threshold=3, value=0.1) == 0.1
    x, y = torch.tensor([1.0, -2.0]), torch.tensor([3.0, 1.0])
    assert l1(x, y).tolist() == [2.0, 3.0]
    assert l2(x, y).tolist() == [4.0, 9.0]


def test_perplexity():
    perplexity, used = measure_perplexity(torch.tensor([[0, 1], [2, 3]]), 8)
    assert float(perplexity) == pytest.approx(4.0, rel=1e-5)
    assert int(used) == 4
    perplexity, used = measure_perplexity(torch.tensor([5, 5, 5]), 8)
    assert float(perplexity) == pytest.approx(1.0, rel=1e-5)
    assert int(used) == 1


# Losses without networks


def test_kl_loss_matches_its_closed_form():
    loss = LPIPSWithDiscriminator(disc_start=0, logvar_init=0.5, kl_weight=0.1, pixelloss_weight=2.0, **BARE)
    x, y, p = images(1), images(2), posterior()
    value, log = loss(x, y, p, 0, global_step=3, split="val")
    nll = (2 * (x - y).abs() / math.exp(0.5) + 0.5).sum() / 2
    torch.testing.assert_close(value, nll + 0.1 * p.kl().mean())
    torch.testing.assert_close(log["val/rec_loss"], 2 * (x - y).abs().mean())
    torch.testing.assert_close(log["val/kl_loss"], p.kl().mean())
    torch.testing.assert_close(log["val/nll_loss"], nll)
    assert not any(entry.requires_grad for entry in log.values())
    assert log["val/disc_factor"] == log["val/d_weight"] == log["val/g_loss"] == 0


def test_weights_of_the_kl_loss_apply_to_the_likelihood_only():
    loss = LPIPSWithDiscriminator(disc_start=0, kl_weight=0.1, **BARE)
    x, y, p = images(1), images(2), posterior()
    value, log = loss(x, y, p, 0, global_step=0, weights=torch.tensor([1.0, 0.0]).view(2, 1, 1, 1))
    torch.testing.assert_close(value, (x - y)[0].abs().sum() / 2 + 0.1 * p.kl().mean())
    torch.testing.assert_close(log["train/nll_loss"], (x - y).abs().sum() / 2)


@pytest.mark.parametrize("kind", ["l1", "l2"])
def test_vq_loss_matches_its_closed_form(kind):
    loss = VQLPIPSWithDiscriminator(disc_start=0, codebook_weight=0.5, pixelloss_weight=3.0, pixel_loss=kind, **BARE)
    x, y = images(1), images(2)
    value, log = loss(torch.tensor([0.2, 0.4]), x, y, 0, global_step=0, predicted_indices=torch.arange(4))
    error = (x - y).abs() if kind == "l1" else (x - y).square()
    torch.testing.assert_close(value, 3 * error.mean() + 0.5 * 0.3)
    assert log["train/p_loss"] == 0
    assert "train/perplexity" not in log  # the size of the codebook is unknown


def test_vq_loss_logs_the_codebook_perplexity():
    loss = VQLPIPSWithDiscriminator(disc_start=0, n_classes=8, **BARE)
    _, log = loss(torch.tensor(0.0), images(), images(), 0, 0, predicted_indices=torch.arange(4))
    assert float(log["train/perplexity"]) == pytest.approx(4.0, rel=1e-5)
    assert int(log["train/cluster_usage"]) == 4


@pytest.mark.parametrize("cls", [LPIPSWithDiscriminator, VQLPIPSWithDiscriminator])
def test_networks_with_weight_zero_are_omitted(cls):
    loss = cls(disc_start=0, **BARE)
    assert loss.perceptual_loss is None
    assert loss.discriminator is None
    loss.prepare()  # no download
    with pytest.raises(ValueError, match="disc_factor is 0"):
        loss(posterior(), images(), images(), 1, 0) if cls is VQLPIPSWithDiscriminator else loss(
            images(), images(), posterior(), 1, 0
        )


def test_unknown_options_raise_user_error():
    with pytest.raises(UserError, match=r'disc_loss "wasserstein".*hinge, vanilla'):
        LPIPSWithDiscriminator(disc_start=0, disc_loss="wasserstein")
    with pytest.raises(UserError, match="perceptual_loss"):
        VQLPIPSWithDiscriminator(disc_start=0, perceptual_loss="dists")
    with pytest.raises(UserError, match="pixel_loss"):
        VQLPIPSWithDiscriminator(disc_start=0, pixel_loss="l3")


def test_dummy_loss_has_no_state():
    assert not DummyLoss().state_dict()


# Adversarial term


def adversarial(**options) -> LPIPSWithDiscriminator:
    torch.manual_seed(0)
    return LPIPSWithDiscriminator(**{"disc_start": 5, "perceptual_weight": 0.0, "kl_weight": 0.0, **options})


def test_adaptive_weight_is_the_ratio_of_gradients():
    loss = adversarial(disc_weight=0.5)
    layer = torch.tensor([3.0, 4.0], requires_grad=True)
    weight = loss.calculate_adaptive_weight(6 * layer.sum(), 2 * layer.sum(), layer)
    assert float(weight) == pytest.approx(0.5 * 3.0, rel=1e-4)
    assert not weight.requires_grad
    clamped = loss.calculate_adaptive_weight(1e12 * layer.sum(), layer.sum(), layer)
    assert float(clamped) == 0.5e4


def test_adversarial_term_starts_at_disc_start():
    loss = adversarial()
    layer = torch.tensor(0.9, requires_grad=True)
    x = images()
    before, log = loss(x, layer * x, posterior(), 0, global_step=4, last_layer=layer)
    torch.testing.assert_close(before, log["train/nll_loss"])
    after, log = loss(x, layer * x, posterior(), 0, global_step=5, last_layer=layer)
    torch.testing.assert_close(after, log["train/nll_loss"] + log["train/d_weight"] * log["train/g_loss"])
    assert log["train/d_weight"] > 0
    torch.testing.assert_close(log["train/g_loss"], -loss.discriminator(layer * x).mean().detach())


def test_discriminator_is_trained_on_detached_images():
    loss = adversarial(disc_start=0, disc_loss="vanilla", disc_factor=0.5).eval()
    layer = torch.tensor(0.9, requires_grad=True)
    x = images()
    value, log = loss(x, layer * x, posterior(), 1, global_step=0)
    expected = 0.5 * vanilla_d_loss(loss.discriminator(x), loss.discriminator(0.9 * x))
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(log["train/disc_loss"], expected.detach())
    value.backward()
    assert layer.grad is None
    assert grad_norm(loss.discriminator) > 0


def test_validation_needs_no_gradients():
    loss = adversarial(disc_start=0).eval()
    with torch.no_grad():
        value, log = loss(images(1), images(2), posterior(), 0, global_step=9, split="val")
    torch.testing.assert_close(value, log["val/nll_loss"])
    assert log["val/d_weight"] == 0
    assert log["val/g_loss"] != 0


def test_training_without_last_layer_raises_value_error():
    x = images().requires_grad_()
    with pytest.raises(ValueError, match="last_layer"):
        adversarial()(x, x * 0.5, posterior(), 0, global_step=0)


def test_conditional_discriminator():
    loss = adversarial(disc_conditional=True, disc_in_channels=4, disc_start=0)
    cond = torch.ones(2, 1, 24, 24)
    value, _ = loss(images(1), images(2), posterior(), 1, global_step=0, cond=cond)
    assert value.isfinite()
    with pytest.raises(ValueError, match="needs cond"):
        loss(images(1), images(2), posterior(), 1, global_step=0)
    with pytest.raises(ValueError, match="takes no cond"):
        adversarial()(images(1), images(2), posterior(), 1, global_step=0, cond=cond)


def test_discriminator_layers():
    discriminator = NLayerDiscriminator(input_nc=1, ndf=2, n_layers=5)
    convolutions = [layer for layer in discriminator.main if isinstance(layer, nn.Conv2d)]
    assert [c.out_channels for c in convolutions] == [2, 4, 8, 16, 16, 16, 1]
    assert [c.stride[0] for c in convolutions] == [2, 2, 2, 2, 2, 1, 1]
    assert [c.bias is None for c in convolutions] == [False, True, True, True, True, True, False]
    assert NLayerDiscriminator()(torch.zeros(1, 3, 64, 64)).shape == (1, 1, 6, 6)


def test_images_too_small_for_the_discriminator_raise_user_error():
    assert NLayerDiscriminator(ndf=2)(torch.zeros(1, 3, 24, 31)).shape == (1, 1, 1, 1)
    with pytest.raises(UserError, match=r"23 x 64.*needs 24.*disc_num_layers"):
        NLayerDiscriminator(ndf=2)(torch.zeros(1, 3, 23, 64))


def test_receptive_field_of_each_logit_is_70_pixels(seed):
    x = torch.randn(1, 3, 128, 128, requires_grad=True)
    NLayerDiscriminator(ndf=4).eval()(x)[0, 0, 7, 7].backward()
    rows = x.grad.abs().sum((0, 1, 3)).nonzero().flatten()
    assert int(rows[-1] - rows[0]) + 1 == 70


def test_weights_init_has_the_published_statistics(seed):
    discriminator = NLayerDiscriminator().apply(weights_init)
    convolution, norm = discriminator.main[5], discriminator.main[6]
    assert float(convolution.weight.detach().std()) == pytest.approx(0.02, rel=0.05)
    assert float(norm.weight.detach().mean()) == pytest.approx(1.0, abs=0.01)
    assert norm.bias.abs().sum() == 0


def test_actnorm_discriminator_has_biases():
    state = NLayerDiscriminator(use_actnorm=True).state_dict()
    assert {"main.2.bias", "main.3.loc", "main.3.scale", "main.3.initialized"} <= set(state)


# ActNorm


def test_actnorm_is_initialised_from_the_first_batch(seed):
    norm, x = ActNorm(3), 5 + 2 * torch.randn(4, 3, 8, 8)
    first = norm(x)
    torch.testing.assert_close(first.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(first.std((0, 2, 3)), torch.ones(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(norm(2 * x), norm.scale * (2 * x + norm.loc))  # the second batch has no effect
    torch.testing.assert_close(norm(first, reverse=False), norm.scale * (first + norm.loc))
    torch.testing.assert_close(norm(norm(x), reverse=True), x, rtol=1e-4, atol=1e-4)


def test_actnorm_is_not_initialised_from_values_that_are_not_finite(seed):
    norm, bad, good = ActNorm(3), torch.randn(4, 3, 8, 8), torch.randn(4, 3, 8, 8)
    bad[1, 2, 3, 4] = float("nan")
    norm(bad)
    assert not norm.initialized and norm.loc.isfinite().all()
    norm(good)
    assert norm.initialized
    torch.testing.assert_close(norm(good).mean(dim=(0, 2, 3)), torch.zeros(3), rtol=0, atol=1e-5)


def test_actnorm_is_not_initialised_in_evaluation_mode(seed):
    x = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(ActNorm(3).eval()(x), x)


def test_actnorm_determinant_and_vectors(seed):
    norm = ActNorm(3, logdet=True).eval()
    with torch.no_grad():
        norm.scale.copy_(torch.tensor([2.0, -3.0, 0.5]).view(1, 3, 1, 1))
    output, logdet = norm(torch.randn(2, 3, 4, 5))
    assert output.shape == (2, 3, 4, 5)
    torch.testing.assert_close(logdet, torch.full((2,), 20 * math.log(3.0)))
    output, logdet = norm(torch.randn(2, 3))
    assert output.shape == (2, 3)
    torch.testing.assert_close(logdet, torch.full((2,), math.log(3.0)))


def test_actnorm_initialisation_by_reverse(seed):
    x = torch.randn(2, 3, 4, 4)
    with pytest.raises(RuntimeError, match="allow_reverse_init"):
        ActNorm(3)(x, reverse=True)
    norm = ActNorm(3, allow_reverse_init=True)
    norm(x, reverse=True)
    assert norm.initialized == 1
    with pytest.raises(ValueError, match="affine"):
        ActNorm(3, affine=False)


# LPIPS


@pytest.fixture(scope="module")
def filled_lpips() -> LPIPS:
    return weights_module().fill(LPIPS(), 3)


def test_features_match_torchvision(filled_lpips):
    from torchvision.models.vgg import cfgs, make_layers

    layers = make_layers(cfgs["D"])
    state = filled_lpips.net.state_dict()
    layers.load_state_dict({name.partition(".")[2]: value for name, value in state.items()})
    ends, h, expected = {3, 8, 15, 22, 29}, images(size=32), []
    for i, layer in enumerate(layers):
        h = layer(h)
        if i in ends:
            expected.append(h.clone())
    for actual, reference in zip(filled_lpips.net(images(size=32)), expected, strict=True):
        torch.testing.assert_close(actual, reference)


def test_distance_matches_torchmetrics(filled_lpips, monkeypatch):
    import torchvision
    from torchmetrics.functional.image.lpips import _LPIPS as Reference
    from torchvision.models.vgg import cfgs, make_layers

    # torchmetrics builds a complete VGG16 and uses only its convolutions.
    bare = nn.Module()
    bare.features = make_layers(cfgs["D"])
    monkeypatch.setattr(torchvision.models, "vgg16", lambda *args, **kwargs: bare)
    reference = Reference(net="vgg", pretrained=False, pnet_rand=True).eval()
    report = reference.load_state_dict(filled_lpips.state_dict(), strict=False)
    assert all(name.startswith("lins.") for name in report.missing_keys)
    x, y = images(1, size=32), images(2, size=32)
    with torch.no_grad():
        torch.testing.assert_close(filled_lpips(x, y), reference(x, y), rtol=1e-5, atol=1e-6)


def test_distance_of_an_image_to_itself_is_zero(filled_lpips):
    assert filled_lpips(images(), images()).abs().max() == 0
    assert filled_lpips(images(), images()).shape == (2, 1, 1, 1)


def test_gradient_is_finite_where_all_features_are_zero(filled_lpips):
    lpips = LPIPS()
    lpips.load_state_dict(filled_lpips.state_dict())
    for name, weight in lpips.net.named_parameters():
        if name.endswith("bias"):
            weight.fill_(-100.0)
    x = images().requires_grad_()
    lpips(x, images(3)).sum().backward()
    assert x.grad.isfinite().all()


def test_lpips_is_frozen_and_stays_in_evaluation_mode(filled_lpips):
    assert not any(p.requires_grad for p in filled_lpips.parameters())
    assert not any(module.training for module in nn.Sequential(filled_lpips).train()[0].modules())


def test_weights_from_a_checkpoint_need_no_download(filled_lpips, monkeypatch):
    monkeypatch.setattr("ldm.modules.losses.lpips.pretrained_weights", lambda: pytest.fail("downloaded weights"))
    lpips = LPIPS()
    lpips.load_state_dict(filled_lpips.state_dict())
    lpips.prepare()
    x, y = images(1), images(2)
    torch.testing.assert_close(lpips(x, y), filled_lpips(x, y))


def test_pretrained_weights(filled_lpips, tmp_path, monkeypatch):
    """Load the channel weights from torchmetrics and the features from torchvision's file."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    features = {f"features.{name.partition('.')[2]}": w for name, w in filled_lpips.net.state_dict().items()}
    torch.save(features, tmp_path / "checkpoints" / "vgg16-397923af.pth")
    lpips = LPIPS()
    lpips.prepare()
    assert not any(weight.isnan().any() for weight in lpips.parameters())
    torch.testing.assert_close(lpips.net.slice3[1].weight, filled_lpips.net.slice3[1].weight)
    channel_weights = lpips.lin0.model[1].weight
    assert (channel_weights >= 0).all()
    assert channel_weights.sum() > 0


def test_channel_weights_are_the_published_ones():
    """Compare the sums of the weights with those of vgg.pth in version 0.1.4 of the package lpips."""
    sums = {name: weight.double().sum().item() for name, weight in channel_weights().items()}
    assert sums == pytest.approx(PUBLISHED_SUMS, rel=1e-12)


def test_weights_that_cannot_be_downloaded_raise_user_error(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    loss = LPIPSWithDiscriminator(disc_start=0)
    with pytest.raises(UserError) as caught:
        loss.prepare()
    message = str(caught.value)
    assert "\n" not in message
    assert str(tmp_path / "checkpoints" / "vgg16-397923af.pth") in message
    assert "perceptual_weight: 0" in message
    with pytest.raises(UserError):
        loss(images(), images(), posterior(), 0, 0)  # the first forward pass also loads the weights


def test_damaged_weights_file_raises_user_error(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "vgg16-397923af.pth").write_bytes(b"<html>not found</html>")
    with pytest.raises(UserError, match=r"vgg16-397923af.pth"):
        LPIPS().prepare()


def test_missing_torchmetrics_raises_user_error(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'the package "torchmetrics" is not installed \(pip install '):
        channel_weights()


def test_feature_names_match_the_file():
    names = [name.partition(".")[2] for name, _ in VGG16Features().named_parameters()]
    assert names[:4] == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert names[-1] == "28.bias"


def test_taming_names_are_the_same_classes():
    from taming.modules.discriminator.model import NLayerDiscriminator as Discriminator
    from taming.modules.losses import DummyLoss as Dummy
    from taming.modules.losses.lpips import LPIPS as Perceptual
    from taming.modules.losses.vqperceptual import VQLPIPSWithDiscriminator as VQLoss
    from taming.modules.util import ActNorm as Norm

    assert (Discriminator, Dummy, Perceptual) == (NLayerDiscriminator, DummyLoss, LPIPS)
    assert (VQLoss, Norm) == (VQLPIPSWithDiscriminator, ActNorm)
