"""The catalogue of published weights, and getting each where it belongs."""

from __future__ import annotations

import io
import zipfile
from types import SimpleNamespace

import pytest
from file_server import Answer, running

from ldm.config.assets import ROOT
from ldm.errors import UserError
from ldm.io import download as transfer
from ldm.io import published_weights as downloads
from ldm.io.published_weights import ARTBENCH, CATALOGUE, GROUPS, Destinations, chosen, obtain, obtain_all

BY_NAME = {download.name: download for download in CATALOGUE}


def zipped(**entries):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name.replace("__", "/").replace("_ckpt", ".ckpt").replace("_yaml", ".yaml"), content)
    return buffer.getvalue()


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(transfer, "time", SimpleNamespace(sleep=lambda seconds: None))
    with running() as server:
        yield server


@pytest.fixture
def places(tmp_path):
    return Destinations(tmp_path / "models", tmp_path / "data")


def test_the_catalogue_has_what_was_published():
    assert len(BY_NAME) == len(CATALOGUE) and {download.group for download in CATALOGUE} == {*GROUPS}
    assert not {*BY_NAME} & {*GROUPS}
    stages = {folder.name for folder in (ROOT / "models/first_stage_models").iterdir()}
    assert stages == {download.name for download in chosen(["first-stages"])} and len(stages) == 9
    models = {file.parent.name for file in (ROOT / "models/ldm").glob("*/config.yaml")}
    bundled = {"emoji64", "emoji64-inpaint", "emoji64-superres"}
    assert models - bundled == {download.name for download in chosen(["models"])}
    for download in CATALOGUE:
        assert download.url().startswith("https://") and download.is_archive != download.path.endswith(".ckpt")
        assert download.url("http://mirror/x/") == f"http://mirror/x/{download.path}"
        assert bool(download.file) != bool(download.folders)
    assert BY_NAME["kl-f8"].url() == "https://ommer-lab.com/files/latent-diffusion/kl-f8.zip"
    assert len({download.path for download in CATALOGUE}) == len(CATALOGUE)


def test_words_choose_each_once_and_unknown_ones_are_told():
    assert [d.name for d in chosen(["vq-f4", "kl-f4", "kl-f4"])] == ["kl-f4", "vq-f4"]
    assert len(chosen(["models", "celeba256"])) == 11
    with pytest.raises(UserError, match=r'no download "kl-f9" \(did you mean "kl-f'):
        chosen(["kl-f9"])


def test_weights_of_an_archive_come_without_its_configuration(server, places):
    server.files["/latent-diffusion/kl-f8.zip"] = zipped(model_ckpt=b"w", config_yaml=b"theirs")
    download = BY_NAME["kl-f8"]
    folder = places.folder(download)
    assert folder == places.models / "first_stage_models" / "kl-f8" and not places.is_there(download)
    obtain(download, places, server.url)
    assert (folder / "model.ckpt").read_bytes() == b"w" and places.is_there(download)
    assert sorted(file.name for file in folder.iterdir()) == ["config.yaml", "model.ckpt"]
    shipped = ROOT / "models/first_stage_models/kl-f8/config.yaml"
    assert (folder / "config.yaml").read_bytes() == shipped.read_bytes()


def test_a_configuration_that_is_there_stays(server, places):
    server.files["/latent-diffusion/celeba.zip"] = zipped(celeba256__model_ckpt=b"w", celeba256__config_yaml=b"theirs")
    download = BY_NAME["celeba256"]
    places.folder(download).mkdir(parents=True)
    (places.folder(download) / "config.yaml").write_text("mine")
    obtain(download, places, server.url)
    assert (places.folder(download) / "config.yaml").read_text() == "mine"


def test_weights_without_an_archive(server, places):
    for name in ("inpainting_big", "text2img-large", "rdm768x768"):
        server.files[f"/{BY_NAME[name].path}"] = name.encode()
        obtain(BY_NAME[name], places, server.url)
    assert (places.models / "ldm/inpainting_big/last.ckpt").read_bytes() == b"inpainting_big"
    assert (places.models / "ldm/text2img-large/model.ckpt").read_bytes() == b"text2img-large"
    assert (places.models / "rdm/rdm768x768/model.ckpt").read_bytes() == b"rdm768x768"


def test_retrieval_data(server, places):
    server.files["/rdm/openimages_database.zip"] = zipped(openimages__1=b"a")
    server.files["/rdm/artbench_databases.zip"] = zipped(**{f"{name}__1": b"b" for name in ARTBENCH})
    assert not obtain_all(chosen(["openimages-database", "artbench-databases"]), places, server.url)
    folder = places.data / "rdm" / "retrieval_databases"
    assert sorted(each.name for each in folder.iterdir()) == sorted([*ARTBENCH, "openimages"])
    assert (folder / "openimages" / "1").read_bytes() == b"a"
    requests = len(server.requests)
    assert not obtain_all(chosen(["openimages-database", "artbench-databases"]), places, server.url)
    assert len(server.requests) == requests, "what is there is not fetched again"


@pytest.mark.parametrize(("name", "there"), [("model.ckpt", True), ("model.safetensors", True), ("empty.ckpt", False)])
def test_what_is_there_is_skipped(server, places, name, there):
    folder = places.folder(BY_NAME["kl-f8"])
    folder.mkdir(parents=True)
    (folder / name.replace("empty", "model")).write_bytes(b"" if "empty" in name else b"mine")
    assert places.is_there(BY_NAME["kl-f8"]) is there
    failures = obtain_all([BY_NAME["kl-f8"]], places, server.url)
    assert bool(failures) != there and bool(server.requests) != there


def test_one_failure_does_not_stop_the_rest(server, places):
    server.files["/latent-diffusion/kl-f8.zip"] = zipped(model_ckpt=b"w")
    server.files["/latent-diffusion/kl-f16.zip"] = zipped(**{"..__evil_ckpt": b"w"})
    failures = obtain_all(chosen(["kl-f4", "kl-f16", "kl-f8"]), places, server.url)
    assert (
        {*failures} == {"kl-f4", "kl-f16"} and "404" in failures["kl-f4"] and "leaves the folder" in failures["kl-f16"]
    )
    assert places.is_there(BY_NAME["kl-f8"])
    assert not list(places.models.rglob("evil*")) and not list(places.folder(BY_NAME["kl-f16"]).iterdir())


def test_a_damaged_archive_is_fetched_again_by_the_next_run(server, places):
    good = zipped(model_ckpt=bytes(range(256)) * 100)
    server.answers = [Answer(body=good[:-30])]
    server.files["/latent-diffusion/kl-f8.zip"] = good
    assert "damaged" in obtain_all([BY_NAME["kl-f8"]], places, server.url)["kl-f8"]
    assert not obtain_all([BY_NAME["kl-f8"]], places, server.url)


def test_an_archive_that_could_not_be_unpacked_is_kept(server, places, monkeypatch):
    server.files["/latent-diffusion/kl-f8.zip"] = zipped(model_ckpt=b"w")

    def full(*args):
        raise UserError("cannot write: No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(downloads, "unpack_weights", full)
        assert "No space" in obtain_all([BY_NAME["kl-f8"]], places, server.url)["kl-f8"]
    assert places.bytes_there(BY_NAME["kl-f8"]) == len(server.files["/latent-diffusion/kl-f8.zip"])
    assert not obtain_all([BY_NAME["kl-f8"]], places, server.url)
    assert len(server.requests) == 1
