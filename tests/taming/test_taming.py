"""Published names of taming-transformers that programs of latent diffusion use."""

from __future__ import annotations

import hashlib
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from images_on_disk import values, write
from tiny_models import text_config
from torch import nn

from ldm.errors import UserError
from taming import util
from taming.data import base, custom, imagenet, utils
from taming.models.dummy_cond_stage import DummyCondStage
from taming.models.vqgan import EMAVQ, GumbelVQ, VQModel
from taming.modules.losses import lpips
from taming.modules.losses.segmentation import BCELoss, BCELossWithQuant
from taming.modules.misc.coord import CoordStage
from taming.modules.util import Labelator, SOSProvider
from taming.modules.vqvae.quantize import EMAVectorQuantizer, EmbeddingEMA, GumbelQuantize

DDCONFIG = {**text_config()["params"]["first_stage_config"]["params"]["ddconfig"], "double_z": False, "z_channels": 4}
VQ = {"ddconfig": DDCONFIG, "lossconfig": {"target": "torch.nn.Identity"}, "n_embed": 16, "embed_dim": 4}


def test_everything_of_the_losses_is_imported():
    names: dict = {}
    exec("from taming.modules.losses.vqperceptual import *", names)
    wanted = "LPIPS NLayerDiscriminator weights_init adopt_weight hinge_d_loss vanilla_d_loss DummyLoss torch nn F"
    assert set(wanted.split()) <= set(names)
    assert names["adopt_weight"](2.0, 3, threshold=5) == 0.0 and names["nn"] is nn


# -- quantizers and models -------------------------------------------------------------------------------------


def test_gumbel_quantizer_returns_entries_and_gradients():
    torch.manual_seed(0)
    quantizer = GumbelQuantize(8, 4, 6, kl_weight=0.5)
    z = torch.randn(2, 8, 3, 3, requires_grad=True)
    z_q, loss, (_, _, indices) = quantizer(z)
    torch.testing.assert_close(z_q, quantizer.get_codebook_entry(indices.flatten(), (2, 3, 3, 4)))
    p = quantizer.proj(z).softmax(dim=1)
    torch.testing.assert_close(loss, 0.5 * (p * torch.log(p * 6 + 1e-10)).sum(dim=1).mean())
    (z_q.sum() + loss).backward()
    assert z.grad.abs().sum() > 0 and quantizer(z, temp=0.1, return_logits=True)[3].shape == (2, 6, 3, 3)
    soft = GumbelQuantize(8, 4, 6, straight_through=False, use_vqinterface=False)
    mixed, _, ids = soft(z)
    assert not torch.allclose(mixed, soft.get_codebook_entry(ids, (2, 3, 3, 4))) and ids.shape == (2, 3, 3)
    hard, _, ids = soft.eval()(z)
    torch.testing.assert_close(hard, soft.get_codebook_entry(ids, (2, 3, 3, 4)))


def test_gumbel_quantizer_uses_the_listed_entries_only(tmp_path):
    np.save(tmp_path / "used.npy", np.array([1, 4]))
    quantizer = GumbelQuantize(8, 4, 6, remap=str(tmp_path / "used.npy"))
    z_q, _, (_, _, positions) = quantizer(torch.randn(2, 8, 3, 3))
    assert set(positions.unique().tolist()) <= {0, 1}
    torch.testing.assert_close(z_q, quantizer.get_codebook_entry(positions, (2, 3, 3, 4)))


def test_codebook_of_averages_follows_the_vectors():
    torch.manual_seed(0)
    quantizer = EMAVectorQuantizer(2, 3, beta=0.25, decay=0.0)
    centres = torch.tensor([[5.0, 0.0, 0.0], [-5.0, 0.0, 0.0]])
    quantizer.embedding.weight.data.copy_(centres * 0.1)
    z = (centres.repeat(8, 1) + 0.1 * torch.randn(16, 3)).T.reshape(1, 3, 4, 4).requires_grad_()
    z_q, loss, (perplexity, codes, indices) = quantizer(z)
    assert indices.tolist() == [0, 1] * 8 and codes.sum(dim=0).tolist() == [8, 8]
    torch.testing.assert_close(perplexity, torch.tensor(2.0))
    torch.testing.assert_close(loss, 0.25 * (z_q - z).square().mean())
    rows = z.detach().reshape(3, -1).T
    means = torch.stack([rows[0::2].mean(dim=0), rows[1::2].mean(dim=0)])
    torch.testing.assert_close(quantizer.embedding.weight.data, means, rtol=1e-4, atol=1e-4)
    before = quantizer.embedding.weight.clone()
    quantizer.eval()(z)
    assert torch.equal(quantizer.embedding.weight, before)
    assert EmbeddingEMA(4, 3)(torch.tensor([[1]])).shape == (1, 1, 3)


def test_models_encode_and_decode():
    x = torch.randn(2, 3, 16, 16)
    model = VQModel(DDCONFIG, VQ["lossconfig"], 16, 4, None, [], "image", None, "val/loss", None, True)
    reconstruction, _, indices = model(x, return_pred_indices=True)
    assert reconstruction.shape == x.shape and indices.shape == (2, 8, 8) and model.monitor == "val/loss"
    torch.testing.assert_close(model.decode_code(indices), reconstruction, rtol=0, atol=1e-4)
    averaged = EMAVQ(**VQ)
    assert isinstance(averaged.quantize, EMAVectorQuantizer) and averaged(x)[0].shape == x.shape
    schedule = {"target": "ldm.lr_scheduler.LambdaWarmUpCosineScheduler"}
    schedule["params"] = {"warm_up_steps": 1, "lr_min": 0.1, "lr_max": 1.0, "lr_start": 1.0, "max_decay_steps": 10}
    sampled = GumbelVQ(**VQ, temperature_scheduler_config=schedule).eval()
    assert sampled.temperature_scheduler(10) == pytest.approx(0.1)
    quant, _, (_, _, ids) = sampled.encode(x)
    torch.testing.assert_close(sampled.decode_code(ids), sampled.decode(quant), rtol=0, atol=1e-4)


def test_temperature_follows_the_training_steps():
    loss = {"target": "taming.modules.losses.vqperceptual.VQLPIPSWithDiscriminator"}
    loss["params"] = {"disc_start": 10, "perceptual_weight": 0.0, "disc_num_layers": 1}
    schedule = {"target": "ldm.lr_scheduler.LambdaWarmUpCosineScheduler"}
    schedule["params"] = {"warm_up_steps": 4, "lr_min": 0.1, "lr_max": 0.0, "lr_start": 2.0, "max_decay_steps": 10}
    model = GumbelVQ(**{**VQ, "lossconfig": loss}, temperature_scheduler_config=schedule)
    temperatures = [model.quantize.temperature]
    for step in range(3):
        rec = model.reconstruct({"image": torch.rand(2, 16, 16, 3)})
        value, _ = model.adversarial_loss(rec, 0, step)
        model.adversarial_loss(rec, 0, 9, split="val")
        temperatures.append(model.quantize.temperature)
    assert temperatures == [2.0, 1.5, 1.0, 0.5] and value.requires_grad


def test_override_of_encode_and_decode_is_called():
    class Client(VQModel):
        def decode(self, quant):
            return 2 * super().decode(quant)

        def encode(self, x):
            return super().encode(-x)

    client, x = Client(**VQ), torch.randn(1, 3, 16, 16)
    plain = VQModel(**VQ)
    plain.load_state_dict(client.state_dict())
    torch.testing.assert_close(client(x)[0], 2 * plain(-x)[0])


# -- parts of the losses, and stages ---------------------------------------------------------------------------


def test_parts_of_the_perceptual_loss():
    x = torch.randn(2, 3, 32, 32)
    outputs = lpips.vgg16(pretrained=False)(x)
    assert outputs.relu1_2.shape == (2, 64, 32, 32) and outputs[4].shape == (2, 512, 2, 2)
    assert not any(weight.requires_grad for weight in lpips.vgg16(pretrained=False).parameters())
    assert lpips.normalize_tensor(x).norm(dim=1).sub(1).abs().max() < 1e-5
    assert lpips.spatial_average(x, keepdim=False).shape == (2, 3)
    names = [list(lpips.NetLinLayer(4, use_dropout=dropout).state_dict()) for dropout in (False, True)]
    assert names == [["model.0.weight"], ["model.1.weight"]]
    with pytest.raises(UserError, match='no weights "alex"; use "vgg_lpips"'):
        lpips.LPIPS.from_pretrained("alex")


def test_losses_of_segmentation():
    logits, target, quantized = torch.randn(2, 5, 4, 4), torch.rand(2, 5, 4, 4).round(), torch.tensor(3.0)
    expected = nn.functional.binary_cross_entropy_with_logits(logits, target)
    assert torch.equal(BCELoss()(logits, target)[0], expected)
    loss, log = BCELossWithQuant(0.5)(quantized, target, logits, "val")
    torch.testing.assert_close(loss, expected + 1.5)
    assert set(log) == {"val/total_loss", "val/bce_loss", "val/quant_loss"}


def test_stages_of_conditions():
    labels = torch.tensor([3, 1])
    tokens, _, (_, _, ids) = Labelator(10).encode(labels)
    assert tokens.tolist() == [[3], [1]] == ids.tolist() and Labelator(10, False).encode(labels).shape == (2, 1)
    assert SOSProvider(7).encode(torch.zeros(2, 3))[2][2].tolist() == [[7], [7]]
    c = torch.rand(2, 1, 8, 8)
    code, _, (_, _, levels) = CoordStage(100, 4).encode(c)
    torch.testing.assert_close(code, nn.functional.avg_pool2d(c, 4), rtol=0, atol=0.0051)
    assert levels.shape == (2, 4) and CoordStage(100, 4).decode(code).shape == c.shape
    assert DummyCondStage("image").eval().encode(c)[2][2] is c


# -- data ------------------------------------------------------------------------------------------------------


def test_lists_of_images_are_data_sets(tmp_path):
    paths = [tmp_path / f"{n}.png" for n in range(3)]
    arrays = [write(path, seed=n) for n, path in enumerate(paths)]
    dataset = base.ImagePaths([str(path) for path in paths], size=24, labels={"class": [5, 6, 7]})
    item = dataset[1]
    assert item["class"] == 6 and item["file_path_"] == str(paths[1]) and item["image"].shape == (24, 24, 3)
    assert np.array_equal(base.ImagePaths(paths)[2]["image"], values(arrays[2]))
    np.save(tmp_path / "a.npy", np.moveaxis(arrays[0], -1, 0)[None])
    assert np.array_equal(base.NumpyPaths([tmp_path / "a.npy"])[0]["image"], values(arrays[0]))
    (tmp_path / "list.txt").write_text("\n".join(map(str, paths)))
    train = custom.CustomTrain(24, str(tmp_path / "list.txt"))
    assert len(train) == 3 and np.array_equal(train[1]["image"], item["image"])
    joined = base.ConcatDatasetWithIndex([train, dataset])
    assert [joined[index][1] for index in (0, 2, 3, 5, -1)] == [0, 0, 1, 1, 1]


def test_unreadable_image_of_a_list_is_replaced(tmp_path, caplog):
    paths = [tmp_path / f"{n}.png" for n in range(3)]
    for n, path in enumerate(paths):
        write(path, seed=n)
    paths[1].write_bytes(b"no image")
    (tmp_path / "list.txt").write_text("\n".join(map(str, [*paths, tmp_path / "absent.png"])))
    dataset = custom.CustomTest(24, str(tmp_path / "list.txt"))
    assert [dataset[n]["file_path_"] for n in (1, 1, 3)] == [str(paths[2]), str(paths[2]), str(paths[0])]
    assert caplog.text.count("1.png") == 1 and caplog.text.count("absent.png") == 1
    with pytest.raises(UserError, match=r"ImagePaths: 2 of 4 images cannot be read"):
        custom.CustomTest(24, str(tmp_path / "list.txt")).data.check_files()


def test_override_of_preprocessing_is_called(tmp_path):
    class Client(base.ImagePaths):
        def preprocess_image(self, image_path):
            return super().preprocess_image(image_path) * 0

    write(tmp_path / "a.png")
    assert not Client([tmp_path / "a.png"], 8)[0]["image"].any()


def test_synsets_and_indices(tmp_path):
    from ldm.data.imagenet import synset2idx

    (tmp_path / "synsets.yaml").write_text("0: n01440764\n1: n01443537\n5: n03000001\n")
    assert imagenet.give_synsets_from_indices([5, 0], str(tmp_path / "synsets.yaml")) == ["n03000001", "n01440764"]
    assert synset2idx(str(tmp_path / "synsets.yaml"))["n03000001"] == 5
    assert imagenet.str_to_indices("3-5, 9, 1") == [1, 3, 4, 5, 9]
    (tmp_path / "text.yaml").write_text("no synsets")
    for name, message in (("text.yaml", "does not list synsets"), ("missing.yaml", "there is no file")):
        with pytest.raises(UserError, match=message):
            synset2idx(str(tmp_path / name))


def test_folders_are_prepared(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    root = utils.get_root("set")
    assert root == "data/set" and not utils.is_prepared(root)
    utils.mark_prepared(root)
    assert utils.is_prepared(root)
    (tmp_path / "a.txt").write_text("a")
    with tarfile.open("packed.tar.gz", "w:gz") as archive:
        archive.add("a.txt", "inner/a.txt")
    with zipfile.ZipFile("packed.zip", "w") as archive:
        archive.write("a.txt", "other/a.txt")
    utils.unpack(str(tmp_path / "packed.tar.gz"))
    utils.unpack(str(tmp_path / "packed.zip"))
    assert (tmp_path / "inner/a.txt").read_text() == (tmp_path / "other/a.txt").read_text() == "a"
    with pytest.raises(NotImplementedError, match=r'cannot unpack "x.rar"'):
        utils.unpack("x.rar")
    with tarfile.open("bad.tar", "w") as archive:
        archive.add("a.txt", "../outside.txt")
    with pytest.raises(tarfile.OutsideDestinationError):
        utils.unpack(str(tmp_path / "bad.tar"))


def test_missing_downloads_are_asked_for(tmp_path, monkeypatch):
    asked = []

    def answer(prompt):
        asked.append(prompt)
        (tmp_path / "set.zip").touch()

    monkeypatch.setattr("builtins.input", answer)
    assert utils.prompt_download("set.zip", "https://example.org", str(tmp_path)) == str(tmp_path / "set.zip")
    assert len(asked) == 1 and "https://example.org" in asked[0]

    def no_terminal(prompt):
        raise EOFError

    monkeypatch.setattr("builtins.input", no_terminal)
    with pytest.raises(UserError, match=r'"other.zip" is missing: download it from https://example.org'):
        utils.prompt_download("other.zip", "https://example.org", str(tmp_path))


def test_square_around_a_box():
    x = np.arange(100 * 80).reshape(100, 80, 1)
    assert np.array_equal(utils.quadratic_crop(x, (30, 40, 50, 50)), x[35:55, 30:50])
    assert utils.quadratic_crop(x, (0, 0, 20, 10), alpha=1.5).shape == (30, 30, 1)


# -- helpers ---------------------------------------------------------------------------------------------------


def test_nested_entries_are_found():
    config = {"model": {"params": [1, {"a": 2}]}, "lazy": lambda: {"b": 3}}
    assert util.retrieve(config, "model/params/1/a") == 2
    assert util.retrieve(config, "lazy/b") == 3
    assert util.retrieve(config, "model.none", splitval=".", default=7, pass_success=True) == (7, False)
    assert util.retrieve(config, "model/params/0", pass_success=True) == (1, True)
    with pytest.raises(util.KeyNotFoundError, match="none") as raised:
        util.retrieve(config, "model/none/x")
    assert raised.value.visited == ["model"]
    with pytest.raises(util.KeyNotFoundError):
        util.retrieve(config, "lazy/b", expand=False)


def test_weights_are_downloaded_once_and_checked(tmp_path, monkeypatch):
    links = []

    def fetch(url, path, label):
        links.append(url)
        path.write_bytes(b"weights")

    monkeypatch.setattr(util, "fetch", fetch)
    monkeypatch.setitem(util.MD5_MAP, "vgg_lpips", hashlib.md5(b"weights").hexdigest())
    for check in (False, True):
        path = util.get_ckpt_path("vgg_lpips", str(tmp_path), check=check)
    assert path == str(tmp_path / "vgg.pth") and links == [util.URL_MAP["vgg_lpips"]]
    monkeypatch.setitem(util.MD5_MAP, "vgg_lpips", "0" * 32)
    with pytest.raises(UserError, match="is not the published file; delete it and try again"):
        util.get_ckpt_path("vgg_lpips", str(tmp_path), check=True)
    assert util.md5_hash(path) == hashlib.md5(b"weights").hexdigest()
