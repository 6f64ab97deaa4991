"""What the trainer reads and writes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ldm.errors import UserError
from ldm.training.storage import SafeCheckpointIO, check_resumable

MODEL = nn.Linear(1, 1)
RUN = {
    "state_dict": MODEL.state_dict(),
    "optimizer_states": [],
    "lr_schedulers": [],
    "loops": {},
    "global_step": 3,
}


def test_a_run_that_is_not_over_can_be_continued(tmp_path):
    torch.save(RUN, tmp_path / "last.ckpt")
    check_resumable(tmp_path / "last.ckpt", MODEL, 4)
    with pytest.raises(UserError, match="has done 3 steps"):
        check_resumable(tmp_path / "last.ckpt", MODEL, 3)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"state_dict": 3}, "holds no weights"),
        ({"state_dict": {"w": 3}}, "holds no weights"),
        ({"state_dict": {**MODEL.state_dict(), "bias": 3}}, 'differ in "bias"'),
        ({"state_dict": {**MODEL.state_dict(), "a\nb": 3}}, r'differ in "a\\nb"'),
        ({"state_dict": {**MODEL.state_dict(), 3: 3}}, 'differ in "3"'),
        ({"global_step": "3"}, "its global_step cannot be used"),
        ({"global_step": None}, "its global_step cannot be used"),
        ({"optimizer_states": 3}, "its optimizer_states cannot be used"),
        ({"loops": []}, "its loops cannot be used"),
    ],
    ids=str,
)
def test_a_strange_checkpoint_is_told_in_one_line(tmp_path, change, said):
    torch.save({**RUN, **change}, tmp_path / "last.ckpt")
    with pytest.raises(UserError, match=said) as error:
        check_resumable(tmp_path / "last.ckpt", MODEL, 4)
    assert "\n" not in str(error.value)


def full_disk(content, path):
    path.write_bytes(b"half")
    raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    storage, path = SafeCheckpointIO(), tmp_path / "last.ckpt"
    storage.save_checkpoint(RUN, path)
    before = path.read_bytes()
    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(UserError, match=r"cannot write .*file write failed"):
        storage.save_checkpoint(RUN, path)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1
