"""Images a second."""

import types

import pytest
import torch

from ldm.training import throughput
from ldm.training.throughput import IMAGES_PER_SECOND, Throughput


def test_latest_batches_of_all_processes_count_without_validation(monkeypatch):
    clock = iter([0.0, 0.0, 10.0, 12.0, 15.0, 100.0, 102.0])
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: next(clock))
    logged = []
    module = types.SimpleNamespace(log=lambda name, value, **options: logged.append((name, value)))
    trainer = types.SimpleNamespace(world_size=2)
    callback, batch = Throughput(), {"caption": ["a"] * 4, "image": torch.zeros(4, 2, 2, 3)}
    callback.on_train_start(trainer, module)
    for _ in range(3):
        callback.on_train_batch_end(trainer, module, None, batch, 0)
    callback.on_validation_end(trainer, module)
    callback.on_train_batch_end(trainer, module, None, batch, 0)
    assert {name for name, _ in logged} == {IMAGES_PER_SECOND}
    assert [value for _, value in logged] == pytest.approx([8 / 10, 8 / 2, 16 / 5, 24 / 7])
