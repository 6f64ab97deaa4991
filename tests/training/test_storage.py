"""Checkpoints of the trainer."""

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


def test_unfinished_run_can_be_resumed(tmp_path):
    torch.save(RUN, tmp_path / "last.ckpt")
    check_resumable(tmp_path / "last.ckpt", MODEL, 4)
    with pytest.raises(UserError, match="is already at step 3"):
        check_resumable(tmp_path / "last.ckpt", MODEL, 3)


def test_model_with_names_like_those_of_a_wrapper_can_be_resumed(tmp_path):
    model = nn.ModuleDict({"module": MODEL})
    torch.save({**RUN, "state_dict": model.state_dict()}, tmp_path / "last.ckpt")
    check_resumable(tmp_path / "last.ckpt", model, 4)
    with pytest.raises(UserError, match=r'differs from it in "module\.weight"'):
        check_resumable(tmp_path / "last.ckpt", MODEL, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"state_dict": 3, "model": MODEL.state_dict()}, "contains no weights"),
        ({"state_dict": {}, "model": MODEL.state_dict()}, "contains no weights"),
        ({"state_dict": 3}, "contains no weights"),
        ({"state_dict": {"w": 3}}, "contains no weights"),
        ({"state_dict": {**MODEL.state_dict(), "bias": 3}}, 'differs from it in "bias"'),
        ({"state_dict": {**MODEL.state_dict(), "a\nb": 3}}, r'differs from it in "a\\nb"'),
        ({"state_dict": {**MODEL.state_dict(), 3: 3}}, 'differs from it in "3"'),
        ({"global_step": "3"}, 'its entry "global_step" is damaged'),
        ({"global_step": None}, 'its entry "global_step" is damaged'),
        ({"optimizer_states": 3}, 'its entry "optimizer_states" is damaged'),
        ({"loops": []}, 'its entry "loops" is damaged'),
    ],
    ids=[
        "no weights",
        "empty",
        "number",
        "no tensor",
        "bias",
        "escape",
        "key",
        "step",
        "no step",
        "optimizer",
        "loops",
    ],
)
def test_invalid_checkpoint_raises_one_line_user_error(tmp_path, change, message):
    torch.save({**RUN, **change}, tmp_path / "last.ckpt")
    with pytest.raises(UserError, match=message) as error:
        check_resumable(tmp_path / "last.ckpt", MODEL, 4)
    assert "\n" not in str(error.value)


def full_disk(content, path):
    path.write_bytes(b"half")
    raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")


def test_full_disk_keeps_old_checkpoint(tmp_path, monkeypatch):
    storage, path = SafeCheckpointIO(), tmp_path / "last.ckpt"
    storage.save_checkpoint(RUN, path)
    before = path.read_bytes()
    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(UserError, match=r"cannot write .*file write failed"):
        storage.save_checkpoint(RUN, path)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1
