"""Find the files that the record of an image names, also from another folder than that of the run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.config.assets import locate, search_path
from ldm.errors import UserError
from ldm.io.files import sha256

if TYPE_CHECKING:
    from ldm.cli.metadata import Record

FOLDER_SETTINGS = ("database", "clip_type")  # settings that may name a folder


@dataclass(frozen=True)
class RecordedFiles:
    """Files of the record of one image.

    A relative path is looked up in the current folder, in those of the project, and in the folders above the image. The
    last ones include the folder of the run if the results are still inside it. Input files are also looked up beside
    the image and in `folders`. The recorded hash decides which file is meant.

    Args:
        image: the image.
        folders: other folders with input files.
    """

    image: Path
    folders: Sequence[Path] = ()

    def find(self, record: Record) -> Record:
        """Return the record with the paths at which its files are now; a model that is not found keeps its paths.

        Raises:
            UserError: An input file is missing, or its content has changed.
        """
        run = record.run
        settings = {
            name: self._above(value) if name in FOLDER_SETTINGS and isinstance(value, str) else value
            for name, value in run.settings.items()
        }
        config, checkpoint = self._model(run.config, run.checkpoint)
        vae = None if run.vae is None else self._above(run.vae)
        loras = [(self._above(path), factor) for path, factor in run.loras]
        words = [(self._above(path), token) for path, token in run.embeddings]
        model: dict[str, Any] = {
            "config": config,
            "checkpoint": checkpoint,
            "vae": vae,
            "loras": loras,
            "embeddings": words,
        }
        run = replace(run, settings=settings, **model)
        return replace(record, run=run, inputs=self.find_inputs(record.inputs))

    def find_inputs(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Return the inputs of an image with the paths of the files that have the recorded hashes.

        Raises:
            UserError: A file is missing, or its content has changed.
        """
        found = dict(inputs)
        for key, name in inputs.items():
            recorded = inputs.get(f"{key}_sha256")
            if isinstance(name, str) and isinstance(recorded, str):
                found[key] = str(self._input(Path(name), recorded))
        return found

    def _input(self, name: Path, recorded: str) -> Path:
        for path in self._candidates(name):
            if _hash(path) == recorded:
                return path
        if name.is_file():
            raise UserError(
                f'"{name}" has changed since the image was sampled, or is another file; restore the old file, or name '
                "its folder with --input-dir"
            )
        places = ["at its place"] if name.is_absolute() else ["in the current folder", "in a folder above the image"]
        places += ["beside the image", *(f'in "{folder}"' for folder in self.folders)]
        raise UserError(
            f'the input "{name}" of "{self.image}" is neither {" nor ".join(places)}; name its folder with --input-dir'
        )

    def _candidates(self, name: Path) -> Iterator[Path]:
        """Yield the files that an input called `name` may be: first those with its name, then all of `folders`."""
        yield name
        if not name.is_absolute():
            yield from (folder / name for folder in (*search_path(), *self._parents()))
        yield self.image.parent / name.name
        parts = name.parts[1:] if name.is_absolute() else name.parts
        for folder in self.folders:
            yield from (folder.joinpath(*parts[first:]) for first in range(len(parts)))
        for folder in self.folders:
            yield from sorted(folder.iterdir())

    def _parents(self) -> Sequence[Path]:
        return self.image.absolute().parents

    def _model(self, config: str, checkpoint: str) -> tuple[str, str]:
        """Return the paths of the files of the model: both in the same folder of a run if possible."""
        if not Path(config).is_absolute() and not Path(checkpoint).is_absolute():
            for folder in (*search_path(), *self._parents()):
                if (folder / config).is_file() and (folder / checkpoint).is_file():
                    return str(folder / config), str(folder / checkpoint)
        return self._above(config), self._above(checkpoint)

    def _above(self, name: str) -> str:
        """Return the path of a file or folder; one that is missing is looked up in the folders above the image."""
        if not name or locate(name).exists():
            return name
        return next((str(path) for folder in self._parents() if (path := folder / name).exists()), name)


def _hash(path: Path) -> str | None:
    """Return the SHA-256 of a file, or None for anything else."""
    try:
        if not path.is_file():
            return None
        state = path.stat()
        return _hash_of_state(path, state.st_mtime_ns, state.st_size)
    except (OSError, ValueError):  # no permission, or a null character in the name
        return None


@cache
def _hash_of_state(path: Path, modified: int, size: int) -> str:
    """Return the SHA-256 of a file, computed once for many images while the file stays the same."""
    return sha256(path)


def check_folders(option: str, names: Sequence[str]) -> list[Path]:
    """Return the folders that an option names.

    Raises:
        UserError: One does not exist.
    """
    for name in names:
        if not Path(name).is_dir():
            raise UserError(f'{option} "{name}": there is no such folder; check the path')
    return [Path(name) for name in names]
