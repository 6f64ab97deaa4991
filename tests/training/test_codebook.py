"""Use of the codebook of a first stage."""

import types

import pytest
import torch
from pytorch_lightning import LightningModule, Trainer
from tiny_models import text_config

from ldm.config.instantiate import instantiate_from_config
from ldm.training.codebook import CodebookUse, codebook_size
from ldm.training.loader import ResumableLoader
from ldm.training.modules import ManualOptimization, lightning_module
from ldm.training.rng import preserved_rng

QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
}


class Codes(LightningModule):
    """Module whose batches are the codebook indices that it uses."""

    def __init__(self):
        super().__init__()
        self.net = torch.nn.Linear(1, 1)
        self.codes = {}
        self.seen = []

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def training_step(self, batch, batch_idx):
        self.codes["train"] = batch
        return self.net(torch.ones(1)).square().mean()

    def validation_step(self, batch, batch_idx):
        self.codes["val"] = batch

    def on_train_batch_end(self, *args):
        metrics = self.trainer.callback_metrics
        self.seen.append(tuple(metrics[f"train/codebook_{name}"].item() for name in ("use", "perplexity") if metrics))


def fit(size, train, validation=None, **options):
    callback, module = CodebookUse(size), Codes()
    trainer = Trainer(max_epochs=1, callbacks=[callback], **QUIET, **options)
    loader = torch.utils.data.DataLoader(torch.tensor(train), batch_size=None)
    other = None if validation is None else torch.utils.data.DataLoader(torch.tensor(validation), batch_size=None)
    trainer.fit(module, loader, other)
    return module, trainer, callback


def warnings(caplog):
    return [record.getMessage() for record in caplog.records if record.name == "ldm.training.codebook"]


def test_use_and_perplexity_are_those_of_a_window():
    """Four entries need 40 vectors: two batches of 20."""
    first, second = [0] * 10 + [1] * 10, [2] * 20
    module, _, _ = fit(4, [first, second, [3] * 20, [3] * 20, first])
    expected = torch.tensor([0.25, 0.25, 0.5])
    perplexity = torch.exp(-(expected * expected.log()).sum()).item()
    assert module.seen[0] == ()
    assert module.seen[1] == pytest.approx((0.75, perplexity))
    assert module.seen[3] == module.seen[4] == pytest.approx((0.25, 1.0))


def test_values_of_a_validation_cover_all_of_its_batches():
    _, trainer, _ = fit(4, [[0] * 20], [[0, 0], [1, 1], [2, 2]])
    assert trainer.callback_metrics["val/codebook_use"].item() == pytest.approx(0.75)
    assert trainer.callback_metrics["val/codebook_perplexity"].item() == pytest.approx(3.0)


@pytest.mark.parametrize(
    ("size", "codes", "collapses"),
    [
        (4, [0] * 40, True),
        (4, [0, 1] * 20, False),
        (200, list(range(3)) * 1000, True),
        (200, list(range(4)) * 1000, False),
        (1, [0] * 40, False),
    ],
)
def test_collapse_of_three_windows_is_reported_once(size, codes, collapses, caplog):
    fit(size, [codes] * 2)
    assert warnings(caplog) == []
    fit(size, [codes] * 6)
    assert len(warnings(caplog)) == (1 if collapses else 0)
    if collapses:
        used = len(set(codes))
        assert warnings(caplog)[0].startswith(
            f"the codebook has collapsed: {used} of its {size} entries are used at step 3, after 3 windows in a row"
        )


def test_window_continues_from_a_checkpoint():
    _, _, whole = fit(4, [[0] * 10, [1] * 10, [2] * 10])
    _, _, before = fit(4, [[0] * 10, [1] * 10])
    after = CodebookUse(4)
    after.load_state_dict(before.state_dict())
    trainer = types.SimpleNamespace(world_size=1)
    module = types.SimpleNamespace(codes={"train": torch.tensor([2] * 10)})
    after.on_train_batch_end(trainer, module, None, None, 2)
    assert torch.equal(after.state_dict()["counts"], whole.state_dict()["counts"])
    assert after.state_dict()["batches"] == whole.state_dict()["batches"] == 3
    other = CodebookUse(8)
    other.load_state_dict(before.state_dict())
    assert other.state_dict()["counts"] is None


def test_first_stage_reports_its_codes():
    ddconfig = text_config()["params"]["first_stage_config"]["params"]["ddconfig"] | {"double_z": False}
    loss = {"disc_start": 0, "perceptual_weight": 0.0, "disc_num_layers": 1}
    lossconfig = {"target": "ldm.modules.losses.vqperceptual.VQLPIPSWithDiscriminator", "params": loss}
    params = {"embed_dim": 3, "n_embed": 8, "ddconfig": ddconfig, "lossconfig": lossconfig, "use_ema": True}
    with preserved_rng():
        torch.manual_seed(0)
        model = instantiate_from_config({"target": "ldm.models.autoencoder.VQModel", "params": params})
    assert codebook_size(model) == 8
    assert codebook_size(model.encoder) is None
    data = ResumableLoader([{"image": torch.rand(16, 16, 3) * 2 - 1} for _ in range(4)], 2)
    trainer = Trainer(max_epochs=1, callbacks=[CodebookUse(8)], **QUIET)
    trainer.fit(lightning_module(model, ManualOptimization()), data, data)
    for split in ("train", "val"):
        assert 1 / 8 <= trainer.callback_metrics[f"{split}/codebook_use"] <= 1
        assert 1 <= trainer.callback_metrics[f"{split}/codebook_perplexity"] <= 8.001
