"""Catalogue of the published weights, and their download. Needs no torch."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from ldm.config.assets import ROOT, downloads_root
from ldm.config.model_files import WEIGHTS
from ldm.errors import UserError, did_you_mean
from ldm.io.archives import BadArchive, unpack_folders, unpack_weights
from ldm.io.download import PartialFile, check_link, fetch
from ldm.io.files import locked, write_new

logger = logging.getLogger(__name__)

HOME = "https://ommer-lab.com/files"
HEIBOX = "https://heibox.uni-heidelberg.de/f"
GROUPS = {
    "first-stages": "the nine autoencoders",
    "models": "the diffusion models whose configuration is in models/ldm",
    "large": "the large checkpoints, published without an archive",
    "retrieval": "databases and indices of retrieval-augmented diffusion",
}
_STYLES = (
    "art_nouveau baroque expressionism impressionism post_impressionism realism renaissance romanticism surrealism "
    "ukiyo_e"
)
ARTBENCH = tuple(f"artbench-{style}" for style in _STYLES.split())


@dataclass(frozen=True)
class Download:
    """One published file.

    Attributes:
        name: name for users.
        group: one of `GROUPS`.
        path: path below `HOME` and its mirrors.
        folder: target folder relative to the repository; starts with `models` or `data`.
        file: file name of the weights there; empty for an archive of folders.
        folders: the folders in such an archive.
        link: the address, if the file is not at `HOME`.
        gigabytes: the published size.
    """

    name: str
    group: str
    path: str
    folder: str
    file: str = "model.ckpt"
    folders: tuple[str, ...] = ()
    link: str | None = None
    gigabytes: float | None = None

    @property
    def is_archive(self) -> bool:
        """True if the file must be unpacked."""
        return self.path.endswith(".zip")

    def url(self, base_url: str | None = None) -> str:
        """Return the address of the file, or of its copy at `base_url`, a mirror of `HOME`."""
        return f"{base_url.rstrip('/')}/{self.path}" if base_url else self.link or f"{HOME}/{self.path}"


def _first_stage(name: str, link: str | None = None) -> Download:
    folder = f"models/first_stage_models/{name}"
    return Download(name, "first-stages", f"latent-diffusion/{name}.zip", folder, link=link)


def _model(name: str, archive: str) -> Download:
    return Download(name, "models", f"latent-diffusion/{archive}.zip", f"models/ldm/{name}")


def _retrieval(name: str, archive: str, folder: str, folders: tuple[str, ...], size: float | None = None) -> Download:
    return Download(name, "retrieval", f"rdm/{archive}.zip", f"data/rdm/{folder}", "", folders, gigabytes=size)


CATALOGUE = (
    _first_stage("kl-f4"),
    _first_stage("kl-f8"),
    _first_stage("kl-f16"),
    _first_stage("kl-f32"),
    _first_stage("vq-f4"),
    _first_stage("vq-f4-noattn", f"{HEIBOX}/9c6681f64bb94338a069/?dl=1"),
    _first_stage("vq-f8"),
    _first_stage("vq-f8-n256"),
    _first_stage("vq-f16", f"{HEIBOX}/0e42b04e2e904890a9b6/?dl=1"),
    _model("celeba256", "celeba"),
    _model("ffhq256", "ffhq"),
    _model("lsun_churches256", "lsun_churches"),
    _model("lsun_beds256", "lsun_bedrooms"),
    _model("cin256", "cin"),
    _model("text2img256", "text2img"),
    _model("bsr_sr", "sr_bsr"),
    _model("layout2img-openimages256", "layout2img_model"),
    _model("semantic_synthesis256", "semantic_synthesis256"),
    _model("semantic_synthesis512", "semantic_synthesis"),
    Download(
        "inpainting_big",
        "models",
        "latent-diffusion/inpainting_big/last.ckpt",
        "models/ldm/inpainting_big",
        "last.ckpt",
        link=f"{HEIBOX}/4d9ac7ea40c64582b7c9/?dl=1",
    ),
    Download(
        "text2img-large",
        "large",
        "latent-diffusion/nitro/txt2img-f8-large/model.ckpt",
        "models/ldm/text2img-large",
        gigabytes=5.7,
    ),
    Download("cin256-v2", "large", "latent-diffusion/nitro/cin/model.ckpt", "models/ldm/cin256-v2"),
    Download("rdm768x768", "large", "rdm/model.ckpt", "models/rdm/rdm768x768"),
    _retrieval("artbench-databases", "artbench_databases", "retrieval_databases", ARTBENCH),
    _retrieval("openimages-database", "openimages_database", "retrieval_databases", ("openimages",), 11.0),
    _retrieval("artbench-searchers", "artbench_searchers", "searchers", ARTBENCH),
)


def select(words: Sequence[str]) -> list[Download]:
    """Return the downloads with these names or in these groups, each once, in the order of the catalogue.

    Raises:
        UserError: a word is neither a name nor a group.
    """
    names = {download.name for download in CATALOGUE}
    for word in words:
        if word not in {*names, *GROUPS}:
            raise UserError(f'there is no download "{word}"{did_you_mean(word, [*GROUPS, *names])}; --list shows all')
    return [download for download in CATALOGUE if {download.name, download.group} & {*words}]


@dataclass(frozen=True)
class TargetFolders:
    """Folders that receive the downloads for `models` and `data`."""

    models: Path = field(default_factory=lambda: downloads_root() / "models")
    data: Path = field(default_factory=lambda: downloads_root() / "data")

    def folder(self, download: Download) -> Path:
        """Return the target folder of a download."""
        first, _, rest = download.folder.partition("/")
        return {"models": self.models, "data": self.data}[first] / rest

    def is_present(self, download: Download) -> bool:
        """Return whether a download is complete; empty files, which other tools leave on failure, do not count."""
        folder = self.folder(download)
        if download.folders:
            return all((folder / name).is_dir() for name in download.folders)
        files = (folder / name for name in WEIGHTS)
        return any(file.is_file() and file.stat().st_size for file in files)

    def file(self, download: Download) -> Path:
        """Return the path of the downloaded file, which may be an archive."""
        name = Path(download.path).name if download.is_archive else download.file
        return self.folder(download) / name

    def received_bytes(self, download: Download) -> int:
        """Return how many bytes of the file an interrupted run has left."""
        file = self.file(download)
        return file.stat().st_size if download.is_archive and file.is_file() else PartialFile(file).size


def fetch_weights(download: Download, folders: TargetFolders, base_url: str | None = None) -> None:
    """Download one file and unpack it, unless it is present.

    Configurations in archives are ignored, because those of this repository belong to its code. If the target folder
    has no configuration, that of the repository is copied there.

    Raises:
        UserError: the file cannot be downloaded or written, or is not the expected one; or another process is
            downloading it.
    """
    folder, file = folders.folder(download), folders.file(download)
    if folders.is_present(download):
        logger.info("%s: already in %s", download.name, folder)
        return
    lock = file.with_name(f"{file.name}.lock.part")
    with locked(lock, f"another process is downloading {download.name}; wait for it to finish"):
        if not folders.is_present(download):  # it may have been finished since
            _fetch_weights(download, folders, base_url)
        _copy_config(download, folder)
    logger.info("%s: done, in %s", download.name, folder)


def _fetch_weights(download: Download, folders: TargetFolders, base_url: str | None) -> None:
    """Download and unpack the weights themselves."""
    folder, file = folders.folder(download), folders.file(download)
    url = check_link(download.url(base_url))
    if not (download.is_archive and file.is_file()):
        logger.info("%s: downloading %s", download.name, url)
        fetch(url, file, download.name)
    if download.is_archive:
        logger.info("%s: unpacking", download.name)
        _unpack(download, file, folder)


def _unpack(download: Download, archive: Path, folder: Path) -> None:
    try:
        if download.folders:
            unpack_folders(archive, folder, download.folders)
        else:
            unpack_weights(archive, folder / download.file)
    except BadArchive:
        archive.unlink()
        raise
    archive.unlink()


def _copy_config(download: Download, folder: Path) -> None:
    shipped, target = ROOT / download.folder / "config.yaml", folder / "config.yaml"
    if download.file and shipped.is_file():
        with suppress(FileExistsError):
            write_new([target], lambda temporary: shutil.copyfile(shipped, temporary))


def fetch_all(downloads: Sequence[Download], folders: TargetFolders, base_url: str | None = None) -> dict[str, str]:
    """Download each of `downloads` even if others fail, and return the errors of those that failed, by name."""
    failures = {}
    for download in downloads:
        try:
            fetch_weights(download, folders, base_url)
        except UserError as error:
            failures[download.name] = str(error)
            logger.error("%s: %s", download.name, error)
        except KeyboardInterrupt:
            logger.warning("%s: stopped; the received part is kept, and the same command resumes", download.name)
            raise
    return failures
