"""Tests of `ldm.io.checkpoint.embeddings`: files of textual inversions in the common forms."""

from __future__ import annotations

import re

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from ldm.errors import UserError
from ldm.io.checkpoint.embeddings import read_embeddings, save_embedding

VECTORS = torch.arange(8.0).reshape(2, 4)
A1111 = {"name": "my cat", "step": 500, "sd_checkpoint": None, "sd_checkpoint_name": "v1"}
FORMS = {
    "diffusers": ({"<cat>": VECTORS}, "<cat>"),
    "diffusers, one vector without a dimension": ({"<cat>": VECTORS[0]}, "<cat>"),
    "published": (
        {
            "string_to_token": {"*": torch.tensor(265)},
            "string_to_param": nn.ParameterDict({"*": nn.Parameter(VECTORS)}),
        },
        "*",
    ),
    "published, a dict": ({"string_to_token": {"*": 265}, "string_to_param": {"*": VECTORS}}, "*"),
    "web interface": (
        {"string_to_token": {"*": 265}, "string_to_param": {"*": VECTORS.clone().requires_grad_()}, **A1111},
        "my cat",
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_written_by_torch(form, tmp_path):
    content, token = FORMS[form]
    torch.save(content, tmp_path / "x.pt")
    ((found, vectors),) = read_embeddings(tmp_path / "x.pt").items()
    assert found == token and vectors.dtype == torch.float32 and not vectors.requires_grad
    assert torch.equal(vectors, VECTORS[:1] if "one vector" in form else VECTORS)


def test_several_tokens(tmp_path):
    torch.save({"string_to_token": {}, "string_to_param": {"*": VECTORS, "@": VECTORS + 1}}, tmp_path / "x.pt")
    found = read_embeddings(tmp_path / "x.pt")
    assert list(found) == ["*", "@"] and torch.equal(found["@"], VECTORS + 1)


def test_safetensors_of_a_web_interface_have_the_name_of_the_file(tmp_path):
    save_file({"emb_params": VECTORS.half()}, tmp_path / "easycat.safetensors")
    ((token, vectors),) = read_embeddings(tmp_path / "easycat.safetensors").items()
    assert token == "easycat" and torch.equal(vectors, VECTORS)


def test_written_files_are_read_back(tmp_path):
    save_embedding(tmp_path / "x.safetensors", "<cat>", VECTORS.half(), {"step": 3})
    ((token, vectors),) = read_embeddings(tmp_path / "x.safetensors").items()
    assert token == "<cat>" and torch.equal(vectors, VECTORS)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"clip_l": VECTORS, "clip_g": VECTORS},
            "is an embedding for Stable Diffusion XL, which this package does not",
        ),
        (
            {"lora_unet_x.lora_down.weight": VECTORS},
            "is a LoRA, not an embedding; give the file of a textual inversion",
        ),
        ({"conv.weight": torch.zeros(1, 2, 3, 3)}, "is not an embedding: it holds no vectors by token; give the file"),
        ({"string_to_param": {}}, "is not an embedding: it holds no vectors by token"),
        ({"<cat>": VECTORS * torch.nan}, 'is damaged: the vectors of "<cat>" are empty or not finite'),
        ({"<cat>": VECTORS[:0]}, 'is damaged: the vectors of "<cat>" are empty or not finite'),
        ({}, "is not an embedding"),
    ],
    ids=str,
)
def test_other_files_raise_user_error(content, message, tmp_path):
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(UserError, match=re.escape(f'"{tmp_path / "x.pt"}" {message}')) as error:
        read_embeddings(tmp_path / "x.pt")
    assert "\n" not in str(error.value)


def test_a_parameter_dict_runs_no_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return (print, ("code has run",))

    torch.save({"string_to_param": nn.ParameterDict({"*": nn.Parameter(VECTORS)}), "x": Evil()}, tmp_path / "x.pt")
    with pytest.raises(UserError, match="is refused"):
        read_embeddings(tmp_path / "x.pt")
