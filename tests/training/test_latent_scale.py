"""Mean and deviation of the latents at the start of a run, and the scale that follows from them."""

import types

import pytest
import torch
from tiny_models import randomise, text_config, unconditional_config

from ldm.config.instantiate import instantiate_from_config
from ldm.errors import UserError
from ldm.training.latent_scale import LatentStatistics, check_latents


def model_of(**params):
    torch.manual_seed(0)
    return randomise(instantiate_from_config(unconditional_config(**params)))


def batch_of(seed, count=2):
    images = torch.rand(count, 16, 16, 3, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return {"image": images}


class Trainer:
    """Stand-in for the Trainer of one of several processes. The others have the sums `others`."""

    is_global_zero = True

    def __init__(self, batches=(), others=(), loggers=()):
        self.datamodule = types.SimpleNamespace(train_dataloader=lambda: batches)
        self.others, self.loggers, self.world_size = others, list(loggers), 1 + len(others)
        self.strategy = types.SimpleNamespace(root_device=torch.device("cpu"), reduce=self.reduce)

    def reduce(self, value, reduce_op):
        assert reduce_op == "sum"
        return value + sum(self.others)


class Logger:
    def __init__(self):
        self.metrics = {}

    def log_metrics(self, metrics, step):
        self.metrics.update(metrics)


def lines(caplog, level="INFO"):
    return [
        record.getMessage()
        for record in caplog.records
        if record.name == "ldm.training.latent_scale" and record.levelname == level
    ]


def latents(seed, shape=(5, 3, 4, 4)):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 3 + 1


def test_statistics_of_several_batches_are_those_of_all_their_values():
    parts = [latents(0), latents(1, (2, 3, 4, 4)), latents(2, (1, 3, 8, 8))]
    statistics = LatentStatistics.of(parts, Trainer())
    channels = torch.cat([part.transpose(0, 1).flatten(1) for part in parts], dim=1).double()
    assert statistics.means == pytest.approx(channels.mean(dim=1).tolist())
    assert statistics.deviations == pytest.approx(channels.std(dim=1).tolist())
    assert statistics.deviation == pytest.approx(channels.std().item())
    scaled = statistics.scaled(0.5)
    assert scaled.means == pytest.approx((channels.mean(dim=1) / 2).tolist())
    assert scaled.deviation == pytest.approx(channels.std().item() / 2)


def test_statistics_cover_all_processes():
    others = LatentStatistics.of([latents(1)], Trainer())._sums
    statistics = LatentStatistics.of([latents(0)], Trainer(others=[others]))
    assert statistics.deviation == pytest.approx(torch.cat([latents(0), latents(1)]).double().std().item())


def test_scale_is_measured_in_several_batches():
    batches = [batch_of(seed) for seed in range(5)]
    reference, model = model_of(), model_of(scale_by_std={"batches": 4})
    assert model.scale_by_std is True
    model.before_training_batch(batch_of(9), is_first=True)
    state = torch.get_rng_state()
    check_latents(model, batch_of(9), Trainer(batches))
    assert torch.equal(torch.get_rng_state(), state), "the random numbers of training stay unchanged"
    many = torch.cat([reference.get_x_start(batch) for batch in batches[:4] * 8])
    assert model.scale_factor.item() == pytest.approx(1 / many.std().item(), rel=0.02)
    assert "scale_factor" in model.state_dict()


def test_scale_of_one_batch_is_that_of_the_published_code(caplog):
    model = model_of(scale_by_std=True)
    torch.manual_seed(3)
    model.before_training_batch(batch_of(0), is_first=True)
    before = model.scale_factor.clone()
    with caplog.at_level("INFO"):
        check_latents(model, batch_of(0), Trainer())
    assert torch.equal(model.scale_factor, before)
    assert lines(caplog)[0].startswith(f"latents of the first batch, times {before.item():.4g}: standard deviation ")


def test_scale_of_several_processes_is_that_of_their_batches_together():
    batch, other = batch_of(0, 4), batch_of(1, 4)
    model = model_of(scale_by_std=True)
    first, second = model.get_x_start(batch), model.get_x_start(other) * 3
    model.before_training_batch(batch, is_first=True)
    check_latents(model, batch, Trainer(others=[LatentStatistics.of([second], Trainer())._sums]))
    assert model.scale_factor.item() == pytest.approx(1 / torch.cat([first, second]).std().item(), rel=0.02)


@pytest.mark.parametrize(
    ("params", "advice"),
    [
        ({"scale_factor": 0.01}, "and set model.params.scale_factor to "),
        ({"scale_factor": 100.0}, "and set model.params.scale_factor to "),
        ({}, None),
    ],
)
def test_unusual_deviation_is_reported_with_the_scale_to_set(params, advice, caplog):
    logger = Logger()
    model = model_of()
    with torch.no_grad():  # latents with a deviation of one
        model.scale_factor = 1 / model.get_x_start(batch_of(0, 8)).std().item()
    unit = model.scale_factor
    model.scale_factor *= params.get("scale_factor", 1.0)
    check_latents(model, batch_of(0, 8), Trainer(loggers=[logger]))
    found = lines(caplog, "WARNING")
    assert len(found) == (advice is not None)
    if advice is not None:
        assert float(found[0].split(advice)[1].split()[0]) == pytest.approx(unit, rel=0.05)
    assert logger.metrics["latents/scale_factor"] == pytest.approx(model.scale_factor)
    assert {"latents/std", "latents/mean_0", "latents/std_2"} <= logger.metrics.keys()


def test_fine_tuning_keeps_the_scale_of_its_weights(caplog):
    model = model_of(scale_factor=0.001)
    model.restarted_from_ckpt = True
    check_latents(model, batch_of(0), Trainer())
    (line,) = lines(caplog, "WARNING")
    assert line.endswith("far from 1; check that model.params.first_stage_config loads its weights")


def test_constant_latents_raise_user_error():
    model = model_of(scale_by_std={"batches": 2})
    model.get_x_start = lambda batch: torch.zeros(2, 3, 4, 4)
    with pytest.raises(UserError, match="scale_by_std: the latents of the first batches are constant or not finite"):
        check_latents(model, batch_of(0), Trainer([batch_of(0)] * 2))


@pytest.mark.parametrize(
    "value", [{"batches": 0}, {"batches": 1.5}, {"batches": True}, {"batch": 3}, {"batches": 2, "x": 1}]
)
def test_invalid_number_of_batches_raises_user_error(value):
    with pytest.raises(UserError, match=r"scale_by_std must be true, false or {batches: N}"):
        model_of(scale_by_std=value)


def test_models_that_read_batches_themselves_are_left_out(caplog):
    from ldm.models.diffusion.ddpm import LatentDiffusion

    class Own(LatentDiffusion):
        def get_input(self, batch, k, **options):
            raise AssertionError

    Own.__module__ = "mymodels"
    with caplog.at_level("INFO"):
        check_latents(Own(**text_config()["params"]), {"other": 1}, Trainer())
    assert lines(caplog) == []
