"""Reading of data by several workers, under its published name."""

from __future__ import annotations

import logging
import multiprocessing
import queue
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

logger = logging.getLogger(__name__)


def parallel_data_prefetch(
    func: Callable[..., Any],
    data: Iterable[Any],
    n_proc: int,
    target_data_type: str = "ndarray",
    cpu_intensive: bool = True,
    use_worker_id: bool = False,
) -> Any:
    """Apply `func` to `n_proc` parts of the data in parallel, and join the results in the order of the data.

    Args:
        func: maps a part, an array or a list, to its result.
        data: the items; of a dict its values.
        n_proc: number of workers.
        target_data_type: "ndarray" splits an array and concatenates the results; "list" splits a list and joins the
            results to one list; any other word returns the list of the results, one for each part.
        cpu_intensive: run processes; else threads.
        use_worker_id: pass the number of the part as `worker_id`.

    Raises:
        ValueError: an array is given for the target "list".
        TypeError: the data cannot be iterated over.
        RuntimeError: a worker failed or ended without a result.
    """
    parts = _split(data, n_proc, target_data_type)
    results = _run(func, parts, cpu_intensive, use_worker_id)
    if target_data_type == "ndarray":
        return np.concatenate([np.asarray(result) for result in results], axis=0)
    return [item for result in results for item in result] if target_data_type == "list" else results


def _split(data: Iterable[Any], n_proc: int, form: str) -> list[Any]:
    if isinstance(data, np.ndarray):
        if form == "list":
            raise ValueError('an array cannot be split for the target_data_type "list"; give a list')
        return np.array_split(data, n_proc)
    if not isinstance(data, Iterable):
        raise TypeError(f"the data must be a list, a dict or an array, not a {type(data).__name__}")
    items = list(data.values() if isinstance(data, Mapping) else data)
    if form == "ndarray":
        return np.array_split(np.asarray(items), n_proc)
    step = max(1, -(-len(items) // n_proc))
    return [items[start : start + step] for start in range(0, len(items), step)]


def _run(func: Callable[..., Any], parts: Sequence[Any], cpu_intensive: bool, use_worker_id: bool) -> list[Any]:
    """Return the result of every part."""
    # A forked process inherits `func`, so that a function that cannot be pickled works too.
    forks = "fork" in multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("fork" if forks else None)
    results: Any = context.Queue() if cpu_intensive else queue.Queue()
    worker: Any = context.Process if cpu_intensive else threading.Thread
    workers = [
        worker(target=_work, args=(func, part, number, use_worker_id, results), daemon=True)
        for number, part in enumerate(parts)
    ]
    for started in workers:
        started.start()
    try:
        found: dict[int, Any] = {}
        while len(found) < len(parts):
            number, result, failure = _next_result(results, workers)
            if failure is not None:
                raise RuntimeError(f"worker {number} failed: {failure}")
            found[number] = result
    finally:
        for started in workers if cpu_intensive else ():
            started.terminate()
            started.join()
    return [found[number] for number in range(len(parts))]


def _work(func: Callable[..., Any], part: Any, number: int, use_worker_id: bool, results: Any) -> None:
    """Put the number of the part, its result, and the reason of a failure into the queue."""
    try:
        result = func(part, worker_id=number) if use_worker_id else func(part)
        results.put((number, result, None))
    except Exception as error:
        logger.debug("worker %d failed", number, exc_info=error)
        results.put((number, None, f"{type(error).__name__}: {error}"))


def _next_result(results: Any, workers: Sequence[Any]) -> tuple[int, Any, str | None]:
    """Return the next entry of the queue; fail if every worker has ended without one."""
    while True:
        ended = not any(worker.is_alive() for worker in workers)
        try:
            return results.get(timeout=1.0)
        except queue.Empty:
            if ended:
                raise RuntimeError("a worker ended without a result") from None
