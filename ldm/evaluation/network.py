"""The feature network: Inception-v3 of the FID paper from torch-fidelity, or a TorchScript module."""

from __future__ import annotations

import io
import logging
import re
import warnings
import zipfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ldm.errors import UserError
from ldm.evaluation.libraries import check_installed
from ldm.io import download
from ldm.io.checkpoint.reading import read_state_dict
from ldm.io.files import sha256

logger = logging.getLogger(__name__)

INCEPTION = "inception-v3-compat"  # torch-fidelity's name
INCEPTION_RESIZE = "bilinear as in TensorFlow 1, to 299 px, in the network"
PROBE = 64  # side in pixels of an image that counts the features
LAYERS = ("2048", "logits_unbiased")


class Features(NamedTuple):
    """Outputs of the network for a batch: `features` (B, D) and `logits` (B, C), or None without logits; float32."""

    features: np.ndarray
    logits: np.ndarray | None


@dataclass(frozen=True)
class FeatureNetwork:
    """Network from images to features.

    Attributes:
        module: maps (B, 3, H, W) uint8 to a tuple of features (B, D) and logits (B, C), or to features alone.
        name: name of the network.
        resize: filter that resizes the images for the network.
        sha256: hash of the file with its weights.
        device: device that computes it.
    """

    module: Any
    name: str
    resize: str
    sha256: str
    device: torch.device

    def protocol(self) -> dict[str, str]:
        """Return the facts that a figure depends on."""
        return {"network": self.name, "sha256": self.sha256, "resize": self.resize}

    @cached_property
    def dimension(self) -> int | None:
        """Number of features of an image; None if the network cannot compute those of a small image."""
        try:
            return self(np.zeros((1, PROBE, PROBE, 3), np.uint8)).features.shape[1]
        except UserError:
            return None

    def __call__(self, images: np.ndarray) -> Features:
        """Return the outputs for images (B, H, W, 3) uint8.

        Raises:
            UserError: the network returns something else than features, or a value that is not finite.
        """
        batch = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))).to(self.device)
        with torch.inference_mode():
            try:
                output = self.module(batch)
            except (RuntimeError, TypeError) as error:
                if not isinstance(self.module, torch.jit.ScriptModule):
                    raise
                reason = str(error).strip().splitlines()[-1]
                raise UserError(f"--features: the module fails for a batch of images: {reason}") from None
        features, *rest = output if isinstance(output, tuple | list) else (output,)
        return Features(self._checked(features, len(images)), self._checked(rest[0], len(images)) if rest else None)

    def _checked(self, values: object, count: int) -> np.ndarray:
        if not isinstance(values, Tensor) or values.dim() != 2 or len(values) != count:
            raise UserError(
                "--features: the module must map (B, 3, H, W) uint8 to features (B, D), or to features and logits"
            )
        array = values.float().cpu().numpy()
        if not np.isfinite(array).all():
            raise UserError("the feature network returns values that are not finite; check --features")
        return array


def load_network(path: str | Path | None = None, device: torch.device | str = "cpu") -> FeatureNetwork:
    """Load the feature network.

    Args:
        path: weights of torch-fidelity's Inception-v3, or a TorchScript module. Default: torch-fidelity's weights,
            which are downloaded on first use.
        device: where the network goes.

    Raises:
        UserError: torch-fidelity is missing, or the file is missing, damaged, or cannot be downloaded.
    """
    check_installed()
    file = _own_weights() if path is None else Path(path)
    if not file.is_file():
        raise UserError(f'there is no file "{file}"; check --features')
    target = torch.device(device)
    if _is_script(file):
        return FeatureNetwork(_load_script(file, target), "TorchScript", "none", sha256(file), target)
    return FeatureNetwork(_load_inception(file, target), INCEPTION, INCEPTION_RESIZE, sha256(file), target)


def _is_script(path: Path) -> bool:
    """Return whether a file is a TorchScript module."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.count("/") >= 2 and name.split("/")[1] == "code" for name in archive.namelist())


def _load_script(path: Path, device: torch.device) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch recommends torch.export for new programs
            return torch.jit.load(path, map_location=device).eval()
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f'cannot read the TorchScript module "{path}": {reason}; check --features') from None


def _load_inception(path: Path, device: torch.device) -> Any:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    # torch-fidelity unpickles a file with code. It gets a copy of the tensors instead, which were read without code.
    copy = io.BytesIO()
    torch.save(read_state_dict(path), copy)
    copy.seek(0)
    try:
        return FeatureExtractorInceptionV3(INCEPTION, list(LAYERS), feature_extractor_weights_path=copy).to(device)
    except RuntimeError as error:
        lines = str(error).strip().splitlines()
        reason = f"{lines[1].strip()[:120]} …" if len(lines) > 1 else lines[0]
        raise UserError(
            f'"{path}" has no weights of torch-fidelity\'s Inception-v3 ({reason}); check --features'
        ) from None


def _own_weights() -> Path:
    """Return the file of torch-fidelity's weights, in the folder in which torch-fidelity keeps it; download it once.

    Raises:
        UserError: it cannot be downloaded, or has another hash.
    """
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    path = Path(torch.hub.get_dir()) / "checkpoints" / URL_INCEPTION_V3.rpartition("/")[2]
    if not path.is_file():
        logger.info("downloading the feature network, %s, to %s", URL_INCEPTION_V3, path)
        try:
            download.fetch(URL_INCEPTION_V3, path, path.name)
        except UserError as error:
            reason = re.sub(rf"^{re.escape(URL_INCEPTION_V3)}: ", "", str(error))
            raise UserError(
                f"the feature network {URL_INCEPTION_V3} cannot be downloaded ({reason}); name a copy of the file "
                "with --features"
            ) from None
    expected = path.stem.rpartition("-")[2]
    if not sha256(path).startswith(expected):
        raise UserError(f'"{path}" is damaged: its SHA-256 does not begin with {expected}; delete it')
    return path
