"""`parallel_data_prefetch`: results in the order of the data, in every form, from processes and threads."""

from __future__ import annotations

import logging
import os

import numpy as np
import pytest

from ldm.util import parallel_data_prefetch


@pytest.mark.parametrize("cpu_intensive", [True, False])
def test_results_are_in_the_order_of_the_data(cpu_intensive):
    data = np.arange(10).reshape(5, 2)
    doubled = parallel_data_prefetch(lambda part: part * 2, data, 3, cpu_intensive=cpu_intensive)
    assert np.array_equal(doubled, data * 2)
    names = [f"{n}.png" for n in range(7)]
    stems = parallel_data_prefetch(
        lambda part: [name[:-4] for name in part], names, 3, target_data_type="list", cpu_intensive=cpu_intensive
    )
    assert stems == [str(n) for n in range(7)]


def test_every_other_form_returns_the_parts():
    parts = parallel_data_prefetch(len, list(range(7)), 3, target_data_type="dict", cpu_intensive=False)
    assert parts == [3, 3, 1]
    values = parallel_data_prefetch(list, {"a": 1, "b": 2}, 1, target_data_type="list", cpu_intensive=False)
    assert values == [1, 2]


def test_processes_are_other_processes_and_know_their_number():
    pids = parallel_data_prefetch(
        lambda part, worker_id: [(worker_id, os.getpid())], [0, 1], 2, target_data_type="list", use_worker_id=True
    )
    assert [number for number, _ in pids] == [0, 1]
    assert os.getpid() not in {pid for _, pid in pids} and len({pid for _, pid in pids}) == 2


@pytest.mark.parametrize("cpu_intensive", [True, False])
def test_failure_of_a_worker_is_an_error(cpu_intensive, caplog):
    caplog.set_level(logging.DEBUG, "ldm")
    with pytest.raises(RuntimeError, match="worker 1 failed: ZeroDivisionError: "):
        parallel_data_prefetch(
            lambda part: [1 // n for n in part], [1, 0], 2, target_data_type="list", cpu_intensive=cpu_intensive
        )


def test_killed_worker_is_an_error():
    with pytest.raises(RuntimeError, match="ended without a result"):
        parallel_data_prefetch(lambda part: os._exit(1), [1], 1, target_data_type="list")


def test_forms_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match='for the target_data_type "list"; give a list'):
        parallel_data_prefetch(len, np.zeros(3), 1, target_data_type="list")
    with pytest.raises(TypeError, match="a list, a dict or an array, not a int"):
        parallel_data_prefetch(len, 3, 1)
