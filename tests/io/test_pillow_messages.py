"""Tests of `ldm.io.pillow_messages`."""

from __future__ import annotations

import logging
import subprocess
import sys
import warnings

import numpy as np
import pytest
from PIL import Image

from ldm.errors import UserError
from ldm.io.images import open_image
from ldm.io.pillow_messages import hidden


def warn(module: str) -> None:
    warnings.warn_explicit("a flaw", UserWarning, f"{module}.py", 1, module)


def test_only_messages_of_pillow_are_hidden(recwarn, caplog):
    with hidden():
        warn("PIL.TiffImagePlugin")
        logging.getLogger("PIL.TiffImagePlugin").error("a flaw")
        warn("PILLOW")
        logging.getLogger("other").error("other")
    assert [warning.filename for warning in recwarn.list] == ["PILLOW.py"] and caplog.messages == ["other"]
    warn("PIL.TiffImagePlugin")
    logging.getLogger("PIL.TiffImagePlugin").error("later")
    assert len(recwarn.list) == 2 and caplog.messages == ["other", "later"]


def test_overlapping_blocks_of_threads_restore_the_filters():
    before, propagate = list(warnings.filters), logging.getLogger("PIL").propagate
    first, second = hidden(), hidden()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert list(warnings.filters) != before, "the second block is still open"
    second.__exit__(None, None, None)
    assert list(warnings.filters) == before and logging.getLogger("PIL").propagate == propagate


def test_filters_that_were_reset_inside_a_block_stay_so():
    with warnings.catch_warnings(), hidden():
        warnings.resetwarnings()
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        warn("PIL.Image")
    assert len(found) == 1


def test_warnings_that_are_errors_do_not_stop_the_reading(tmp_path, monkeypatch):
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "x.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 63)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert open_image(tmp_path / "x.png").size == (8, 8)


@pytest.mark.parametrize("setup", ["", "import logging; logging.basicConfig()"])
def test_nothing_is_printed_about_a_flawed_file(tmp_path, setup):
    samples = 2**16 - 1  # Pillow logs an error about as many samples a pixel
    Image.new("RGB", (4, 4)).save(tmp_path / "x.tif")
    data = (tmp_path / "x.tif").read_bytes()
    entry = (277).to_bytes(2, "little") + (3).to_bytes(2, "little") + (1).to_bytes(4, "little")
    place = data.index(entry) + len(entry)
    (tmp_path / "x.tif").write_bytes(data[:place] + samples.to_bytes(2, "little") + data[place + 2 :])
    with pytest.raises(UserError):
        open_image(tmp_path / "x.tif")
    code = f"""{setup}
from ldm.errors import UserError
from ldm.io.images import open_image
try:
    open_image({str(tmp_path / "x.tif")!r})
except UserError:
    pass
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == run.stderr == ""
