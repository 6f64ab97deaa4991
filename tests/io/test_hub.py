"""Tests of `ldm.io.hub` against a local server that answers as the Hugging Face hub does."""

from __future__ import annotations

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import ClassVar
from urllib.parse import unquote

import huggingface_hub
import pytest
import torch
from diffusers_folders import write_unconditional

import ldm
from ldm.cli.main import main
from ldm.config.model_files import find_model
from ldm.errors import UserError
from ldm.io.diffusers import files

NAME = "CompVis/ldm-celebahq-256"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """Server of one repository."""

    folder = None
    requests: ClassVar[list[str]] = []

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = unquote(self.path.partition("?")[0])
        names = sorted(str(each.relative_to(self.folder)) for each in self.folder.rglob("*") if each.is_file())
        if path.startswith(f"/api/models/{NAME}"):
            siblings = [{"rfilename": name} for name in names]
            if "/tree/" in path:
                tree = [self.entry(name) for name in names]
                self.answer(json.dumps(tree).encode(), "application/json")
            else:
                self.answer(json.dumps({"id": NAME, "sha": COMMIT, "siblings": siblings}).encode(), "application/json")
            return
        name = next((name for name in names if path == f"/{NAME}/resolve/{COMMIT}/{name}"), None)
        if name is None:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if self.command == "GET":
            self.requests.append(name)
        self.answer((self.folder / name).read_bytes(), "application/octet-stream")

    def entry(self, name):
        content = (self.folder / name).read_bytes()
        return {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}

    def answer(self, content, kind):
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *args):
        pass


def use_endpoint(monkeypatch, cache, port):
    """Let the client ask a port of this machine, and store its downloads in `cache`."""
    constants, endpoint = huggingface_hub.constants, f"http://127.0.0.1:{port}"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Serve a model with some files that it does not need; the cache of downloads is empty."""
    folder = tmp_path / "served"
    pipeline = write_unconditional(folder)
    (folder / "README.md").write_text("a model")
    (folder / "unet/diffusion_pytorch_model.bin").write_bytes(b"the same weights")
    (folder / "unet/diffusion_pytorch_model.fp16.safetensors").write_bytes(b"half of them")
    handler = type("Handler", (Hub,), {"folder": folder, "requests": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    monkeypatch.chdir(tmp_path)
    use_endpoint(monkeypatch, tmp_path / "cache", server.server_port)
    yield SimpleNamespace(requests=handler.requests, pipeline=pipeline, server=server)
    server.shutdown()
    server.server_close()


@torch.no_grad()
def test_only_the_needed_files_are_downloaded_and_used_without_a_network(hub, tmp_path, monkeypatch):
    model = ldm.load(NAME, device="cpu")
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([1, 500])
    torch.testing.assert_close(model.model.diffusion_model(x, t), hub.pipeline.unet(x, t).sample, rtol=0, atol=1e-5)
    assert model.name == "ldm-celebahq-256"
    parts = ("unet", "vqvae")
    weights = [f"{part}/{name}" for part in parts for name in ("config.json", "diffusion_pytorch_model.safetensors")]
    assert sorted(set(hub.requests)) == sorted(["model_index.json", "scheduler/scheduler_config.json", *weights])
    hub.requests.clear()
    use_endpoint(monkeypatch, tmp_path / "cache", 9)
    assert ldm.load(NAME, device="cpu").name == "ldm-celebahq-256"
    assert not hub.requests


@pytest.mark.parametrize("name", ["CompVis/none", "CompVis/a--b"])
def test_unknown_name_raises_user_error_of_one_line(hub, name):
    message = (
        f'no model "{name}" here, and it cannot be downloaded from the Hugging Face hub .*; check the name, go online'
    )
    with pytest.raises(UserError, match=message) as caught:
        ldm.load(name)
    assert "\n" not in str(caught.value)


def test_command_without_a_network_prints_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    use_endpoint(monkeypatch, tmp_path / "cache", 9)
    assert main(["txt2img", "--model", "owner/model"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(
        'error: there is no model "owner/model" here, and it cannot be downloaded from the Hugging Face hub ('
    )
    assert "go online once, or give the folder" in line


def test_repository_without_a_folder_of_diffusers_raises_user_error(hub, monkeypatch):
    monkeypatch.setattr(files, "needed", lambda names: [])
    with pytest.raises(UserError, match="is not a model in the form of diffusers; download its checkpoint"):
        ldm.load(NAME)


def test_missing_folder_below_an_existing_one_is_not_looked_up(hub):
    with pytest.raises(UserError, match='there is no model "served/mine" in'):
        find_model("served/mine")


def test_names_of_needed_files():
    names = [
        "model_index.json",
        "scheduler/scheduler_config.json",
        "tokenizer/vocab.json",
        "tokenizer/merges.txt",
        "tokenizer/flax.msgpack",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors.index.json",
        "unet/diffusion_pytorch_model-00001-of-00002.safetensors",
        "unet/diffusion_pytorch_model-00002-of-00002.safetensors",
        "unet/diffusion_pytorch_model.bin",
        "unet/diffusion_pytorch_model.non_ema.safetensors",
        "vae/config.json",
        "vae/diffusion_pytorch_model.bin",
        "vae/diffusion_flax_model.msgpack",
        "text_encoder/config.json",
        "text_encoder/pytorch_model.bin",
        "text_encoder/model.fp16.safetensors",
        "safety_checker/model.safetensors",
        "v1-5-pruned.ckpt",
        "README.md",
    ]
    assert set(names) - set(files.needed(names)) == {
        "tokenizer/flax.msgpack",
        "unet/diffusion_pytorch_model.bin",
        "unet/diffusion_pytorch_model.non_ema.safetensors",
        "vae/diffusion_flax_model.msgpack",
        "text_encoder/pytorch_model.bin",
        "safety_checker/model.safetensors",
        "v1-5-pruned.ckpt",
        "README.md",
    }
    alone = ["config.json", "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"]
    assert set(files.needed(alone)) == set(alone[:2])
