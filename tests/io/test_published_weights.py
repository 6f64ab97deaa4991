"""The catalogue of the published weights, and their download."""

from __future__ import annotations

import io
import zipfile
from types import SimpleNamespace

import pytest
from file_server import Answer, running

from ldm.config.assets import ROOT
from ldm.errors import UserError
from ldm.io import download as downloading
from ldm.io import published_weights
from ldm.io.published_weights import ARTBENCH, CATALOGUE, GROUPS, TargetFolders, fetch_all, fetch_weights, select

BY_NAME = {download.name: download for download in CATALOGUE}


def zipped(**entries):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name.replace("__", "/").replace("_ckpt", ".ckpt").replace("_yaml", ".yaml"), content)
    return buffer.getvalue()


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(downloading, "time", SimpleNamespace(sleep=lambda seconds: None))
    with running() as server:
        yield server


@pytest.fixture
def folders(tmp_path):
    return TargetFolders(tmp_path / "models", tmp_path / "data")


def test_the_catalogue_lists_the_published_files():
    assert len(BY_NAME) == len(CATALOGUE) and {download.group for download in CATALOGUE} == {*GROUPS}
    assert not {*BY_NAME} & {*GROUPS}
    stages = {folder.name for folder in (ROOT / "models/first_stage_models").iterdir()}
    assert stages == {download.name for download in select(["first-stages"])} and len(stages) == 9
    models = {file.parent.name for file in (ROOT / "models/ldm").glob("*/config.yaml")}
    bundled = {"emoji64", "emoji64-inpaint", "emoji64-superres"}
    assert models - bundled == {download.name for download in select(["models"])}
    for download in CATALOGUE:
        assert download.url().startswith("https://") and download.is_archive != download.path.endswith(".ckpt")
        assert download.url("http://mirror/x/") == f"http://mirror/x/{download.path}"
        assert bool(download.file) != bool(download.folders)
    assert BY_NAME["kl-f8"].url() == "https://ommer-lab.com/files/latent-diffusion/kl-f8.zip"
    assert len({download.path for download in CATALOGUE}) == len(CATALOGUE)


def test_names_select_each_download_once_and_unknown_ones_raise_user_error():
    assert [d.name for d in select(["vq-f4", "kl-f4", "kl-f4"])] == ["kl-f4", "vq-f4"]
    assert len(select(["models", "celeba256"])) == 11
    with pytest.raises(UserError, match=r'no download "kl-f9" \(did you mean "kl-f'):
        select(["kl-f9"])


def test_the_configuration_in_an_archive_is_ignored(server, folders):
    server.files["/latent-diffusion/kl-f8.zip"] = zipped(model_ckpt=b"w", config_yaml=b"other")
    download = BY_NAME["kl-f8"]
    folder = folders.folder(download)
    assert folder == folders.models / "first_stage_models" / "kl-f8" and not folders.is_present(download)
    fetch_weights(download, folders, server.url)
    assert (folder / "model.ckpt").read_bytes() == b"w" and folders.is_present(download)
    assert sorted(file.name for file in folder.iterdir()) == ["config.yaml", "model.ckpt"]
    shipped = ROOT / "models/first_stage_models/kl-f8/config.yaml"
    assert (folder / "config.yaml").read_bytes() == shipped.read_bytes()


def test_an_existing_configuration_is_kept(server, folders):
    server.files["/latent-diffusion/celeba.zip"] = zipped(celeba256__model_ckpt=b"w", celeba256__config_yaml=b"other")
    download = BY_NAME["celeba256"]
    folders.folder(download).mkdir(parents=True)
    (folders.folder(download) / "config.yaml").write_text("own")
    fetch_weights(download, folders, server.url)
    assert (folders.folder(download) / "config.yaml").read_text() == "own"


def test_weights_that_are_published_without_an_archive(server, folders):
    for name in ("inpainting_big", "text2img-large", "rdm768x768"):
        server.files[f"/{BY_NAME[name].path}"] = name.encode()
        fetch_weights(BY_NAME[name], folders, server.url)
    assert (folders.models / "ldm/inpainting_big/last.ckpt").read_bytes() == b"inpainting_big"
    assert (folders.models / "ldm/text2img-large/model.ckpt").read_bytes() == b"text2img-large"
    assert (folders.models / "rdm/rdm768x768/model.ckpt").read_bytes() == b"rdm768x768"


def test_archives_of_retrieval_data(server, folders):
    server.files["/rdm/openimages_database.zip"] = zipped(openimages__1=b"a")
    server.files["/rdm/artbench_databases.zip"] = zipped(**{f"{name}__1": b"b" for name in ARTBENCH})
    assert not fetch_all(select(["openimages-database", "artbench-databases"]), folders, server.url)
    folder = folders.data / "rdm" / "retrieval_databases"
    assert sorted(each.name for each in folder.iterdir()) == sorted([*ARTBENCH, "openimages"])
    assert (folder / "openimages" / "1").read_bytes() == b"a"
    requests = len(server.requests)
    assert not fetch_all(select(["openimages-database", "artbench-databases"]), folders, server.url)
    assert len(server.requests) == requests, "present files are not downloaded again"


@pytest.mark.parametrize(
    ("name", "present"), [("model.ckpt", True), ("model.safetensors", True), ("empty.ckpt", False)]
)
def test_present_weights_are_skipped(server, folders, name, present):
    folder = folders.folder(BY_NAME["kl-f8"])
    folder.mkdir(parents=True)
    (folder / name.replace("empty", "model")).write_bytes(b"" if "empty" in name else b"own")
    assert folders.is_present(BY_NAME["kl-f8"]) is present
    failures = fetch_all([BY_NAME["kl-f8"]], folders, server.url)
    assert bool(failures) != present and bool(server.requests) != present


def test_one_failure_does_not_stop_the_rest(server, folders):
    server.files["/latent-diffusion/kl-f8.zip"] = zipped(model_ckpt=b"w")
    server.files["/latent-diffusion/kl-f16.zip"] = zipped(**{"..__evil_ckpt": b"w"})
    failures = fetch_all(select(["kl-f4", "kl-f16", "kl-f8"]), folders, server.url)
    assert (
        {*failures} == {"kl-f4", "kl-f16"} and "404" in failures["kl-f4"] and "leaves the folder" in failures["kl-f16"]
    )
    assert folders.is_present(BY_NAME["kl-f8"])
    assert not list(folders.models.rglob("evil*")) and not list(folders.folder(BY_NAME["kl-f16"]).iterdir())


def test_the_next_run_downloads_a_damaged_archive_again(server, folders):
    good = zipped(model_ckpt=bytes(range(256)) * 100)
    server.answers = [Answer(body=good[:-30])]
    server.files["/latent-diffusion/kl-f8.zip"] = good
    assert "damaged" in fetch_all([BY_NAME["kl-f8"]], folders, server.url)["kl-f8"]
    assert not fetch_all([BY_NAME["kl-f8"]], folders, server.url)


def test_one_process_downloads_a_file_at_a_time(server, folders):
    """A second process would append to the part that the first one receives."""
    server.files["/latent-diffusion/kl-f8.zip"] = zipped(model_ckpt=b"w")
    download = BY_NAME["kl-f8"]
    refused = {"kl-f8": "another process is downloading kl-f8; wait for it to finish"}
    seen = []

    def fetch_twice(*args):
        seen.append(fetch_all([download], folders, server.url))
        downloading.fetch(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(published_weights, "fetch", fetch_twice)
        assert not fetch_all([download], folders, server.url)
    assert seen == [refused] and len(server.requests) == 1
    assert [path.name for path in folders.folder(download).iterdir() if path.suffix != ".yaml"] == ["model.ckpt"]


def test_an_archive_that_could_not_be_unpacked_is_kept(server, folders, monkeypatch):
    server.files["/latent-diffusion/kl-f8.zip"] = zipped(model_ckpt=b"w")

    def full(*args):
        raise UserError("cannot write: No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(published_weights, "unpack_weights", full)
        assert "No space" in fetch_all([BY_NAME["kl-f8"]], folders, server.url)["kl-f8"]
    assert folders.received_bytes(BY_NAME["kl-f8"]) == len(server.files["/latent-diffusion/kl-f8.zip"])
    assert not fetch_all([BY_NAME["kl-f8"]], folders, server.url)
    assert len(server.requests) == 1
