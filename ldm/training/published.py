"""Published functions of `main.py` that training here does not use."""

from __future__ import annotations

import argparse
import inspect
from typing import Any, cast

import numpy as np
from pytorch_lightning import Trainer
from torch.utils.data import get_worker_info

from ldm.data.base import Txt2ImgIterableBaseDataset


def nondefault_trainer_args(opt: argparse.Namespace) -> list[str]:
    """Return the sorted names of the Trainer's arguments that `opt` has with another value than the default."""
    defaults = {name: parameter.default for name, parameter in inspect.signature(Trainer).parameters.items()}
    return sorted(name for name, value in vars(opt).items() if name in defaults and value != defaults[name])


def worker_init_fn(_: int) -> None:
    """Seed NumPy in a worker of a data loader; a worker of a stream gets its own share of the records."""
    info = get_worker_info()
    if info is None:
        raise RuntimeError("worker_init_fn runs in a worker of a data loader")
    dataset, state = info.dataset, cast(tuple[Any, ...], np.random.get_state())[1]
    seed = state[0]
    if isinstance(dataset, Txt2ImgIterableBaseDataset):
        share = dataset.num_records // info.num_workers
        dataset.sample_ids = (dataset.valid_ids or [])[info.id * share : (info.id + 1) * share]
        seed = np.random.choice(state)
    np.random.seed((int(seed) + info.id) % 2**32)
