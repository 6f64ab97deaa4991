"""Learning-rate multipliers against the recorded ones, and beyond their last step."""

import pytest
from parity_replay import CYCLES, assert_replayed

from ldm.training.lr_scheduler import LambdaLinearScheduler, LambdaWarmUpCosineScheduler, LambdaWarmUpCosineScheduler2


@pytest.mark.parametrize("name", ["lr_warmup_cosine", "lr_warmup_cosine2", "lr_linear"])
def test_multipliers_are_the_published_ones(name):
    assert_replayed("schedules", name)


def test_the_published_warm_up_of_the_churches_model_reaches_one_and_stays():
    scheduler = LambdaLinearScheduler([10000], [1.0], [1.0], [1e-6], [10**13])
    assert scheduler(0) == pytest.approx(1e-6)
    assert scheduler(5000) == pytest.approx(0.5, abs=1e-5)
    assert scheduler(10000) == scheduler(10**6) == 1.0


@pytest.mark.parametrize("kind", [LambdaWarmUpCosineScheduler2, LambdaLinearScheduler])
def test_after_the_last_cycle_the_factor_stays_at_its_minimum(kind):
    scheduler = kind(**CYCLES)
    assert scheduler(50) == pytest.approx(0.2)
    assert scheduler(5000) == pytest.approx(0.2)


def test_cycles_need_one_entry_each():
    with pytest.raises(ValueError, match="one entry for each cycle"):
        LambdaLinearScheduler([1, 2], [0.1], [1.0], [0.0], [10])


def test_the_interval_of_verbosity_is_logged(caplog):
    scheduler = LambdaWarmUpCosineScheduler(10, 0.1, 1.0, 0.0, 30, verbosity_interval=5)
    with caplog.at_level("INFO", logger="ldm.training.lr_scheduler"):
        for n in range(10):
            scheduler(n)
    assert [record.args[0] for record in caplog.records] == [0, 5]
