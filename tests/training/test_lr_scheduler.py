"""Learning-rate schedules: recorded factors, and steps after the last cycle."""

import pytest
from parity_replay import CYCLES, assert_replayed

from ldm.training.lr_scheduler import LambdaLinearScheduler, LambdaWarmUpCosineScheduler, LambdaWarmUpCosineScheduler2


@pytest.mark.parametrize("name", ["lr_warmup_cosine", "lr_warmup_cosine2", "lr_linear"])
def test_factors_match_published_values(name):
    assert_replayed("schedules", name)


def test_published_warm_up_of_churches_model():
    scheduler = LambdaLinearScheduler([10000], [1.0], [1.0], [1e-6], [10**13])
    assert scheduler(0) == pytest.approx(1e-6)
    assert scheduler(5000) == pytest.approx(0.5, abs=1e-5)
    assert scheduler(10000) == scheduler(10**6) == 1.0


@pytest.mark.parametrize("kind", [LambdaWarmUpCosineScheduler2, LambdaLinearScheduler])
def test_factor_stays_at_minimum_after_last_cycle(kind):
    scheduler = kind(**CYCLES)
    assert scheduler(50) == pytest.approx(0.2)
    assert scheduler(5000) == pytest.approx(0.2)


def test_lists_of_different_length_raise_value_error():
    with pytest.raises(ValueError, match="one entry for each cycle"):
        LambdaLinearScheduler([1, 2], [0.1], [1.0], [0.0], [10])


def test_verbosity_interval_logs_factors(caplog):
    scheduler = LambdaWarmUpCosineScheduler(10, 0.1, 1.0, 0.0, 30, verbosity_interval=5)
    with caplog.at_level("INFO", logger="ldm.training.lr_scheduler"):
        for n in range(10):
            scheduler(n)
    assert [record.args[0] for record in caplog.records] == [0, 5]
