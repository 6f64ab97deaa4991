"""Download models in the form of diffusers from the Hugging Face hub."""

from __future__ import annotations

import logging
from contextlib import suppress
from pathlib import Path

from ldm.errors import UserError
from ldm.io.diffusers import files

logger = logging.getLogger(__name__)


def download_model(name: str) -> Path:
    """Return the local folder of a model on the Hugging Face hub; only the files that it needs are downloaded.

    Without a network the files that were downloaded before are used.

    Args:
        name: owner and model, such as "CompVis/ldm-celebahq-256".

    Raises:
        UserError: there is no such model, it is not in the form of diffusers, or the hub cannot be reached.
    """
    import huggingface_hub

    try:
        listed = huggingface_hub.HfApi().model_info(name).siblings or []
    except Exception as error:  # the types depend on the client's version, and on its package for HTTP
        return _downloaded_before(name, error)
    needed = files.needed(file.rfilename for file in listed)
    if files.INDEX not in needed and files.CONFIG not in needed:
        raise UserError(
            f'"{name}" on the Hugging Face hub is not a model in the form of diffusers; '
            "download its checkpoint, and give the file with --ckpt"
        )
    logger.info('loading "%s" from the Hugging Face hub: %d files', name, len(needed))
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=needed))
    except Exception as error:
        raise _unavailable(name, error) from None


def _downloaded_before(name: str, error: Exception) -> Path:
    import huggingface_hub

    with suppress(ValueError):  # the hub does not allow such a name
        for file in (files.INDEX, files.CONFIG):
            cached = huggingface_hub.try_to_load_from_cache(name, file)
            if isinstance(cached, str):
                return Path(cached).parent
    raise _unavailable(name, error)


def _unavailable(name: str, error: Exception) -> UserError:
    logger.debug("%s: %s", name, error)
    reason = str(error).strip().partition("\n")[0].strip() or type(error).__name__
    return UserError(
        f'there is no model "{name}" here, and it cannot be downloaded from the Hugging Face hub ({reason}); '
        "check the name, go online once, or give the folder of a model"
    )
