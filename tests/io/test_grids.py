"""Contact sheets show the images of a run in bounded memory."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from ldm.io import grids
from ldm.io.grids import ContactSheet, make_grid, make_sheet


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*shape, 3), dtype=np.uint8)


def collected(groups, columns: int = 1) -> np.ndarray:
    sheet = ContactSheet(len(groups), columns)
    for group in groups:
        sheet.add(group)
    return sheet.image()


def test_images_of_one_size_form_the_same_sheet_and_grid():
    images = noise(7, 5, 4)
    grid = make_grid(images, 3)
    assert grid.shape == (3 * 7 + 2, 3 * 6 + 2, 3)
    assert (make_sheet([[image] for image in images], 3) == grid).all()
    for index, image in enumerate(images):
        top, left = 2 + index // 3 * 7, 2 + index % 3 * 6
        assert (grid[top : top + 5, left : left + 4] == image).all()


@pytest.mark.parametrize("sizes", [[(6, 6), (4, 9)], [(3, 3), (3, 3)], [(700, 2), (1, 800)]])
def test_small_sheets_show_all_pixels(sizes):
    groups = [[noise(*sizes[0], seed=i), noise(*sizes[1], seed=9 + i)] for i in range(5)]
    assert (collected(groups, 2) == make_sheet(groups, 2)).all()


def test_one_image_is_shown_without_a_border():
    assert (collected([[noise(6, 5)]]) == noise(6, 5)).all()


@pytest.mark.parametrize(
    "sizes", [[(64, 64)], [(64, 64), (64, 64)], [(100, 20)], [(2, 900)], [(10, 10), (200, 10)], [(90, 8), (30, 60)]]
)
@pytest.mark.parametrize("columns", [1, 4, 200])
def test_large_sheets_have_a_bounded_number_of_pixels(monkeypatch, sizes, columns):
    monkeypatch.setattr(grids, "SHEET_PIXELS", 20_000)
    groups = [[noise(*size, seed=i) for size in sizes] for i in range(17)]
    height, width, _ = collected(groups, columns).shape
    assert 5_000 < (height - 2) * (width - 2) <= 20_000


def test_size_is_chosen_for_the_expected_number_of_images(monkeypatch):
    """The images of a run that is interrupted are as large as those of the whole run."""
    monkeypatch.setattr(grids, "SHEET_PIXELS", 2_000)
    sheet = ContactSheet(16)
    sheet.add([np.full((40, 40, 3), 77, np.uint8)])
    image = sheet.image()
    assert image.shape == (9, 9, 3) and (image == 77).all()  # 16 (9 + 2)² = 1936


def test_memory_of_a_sheet_is_bounded(monkeypatch):
    monkeypatch.setattr(grids, "SHEET_PIXELS", 1_000_000)
    image = noise(600, 600)
    tracemalloc.start()
    collected([[image.copy()] for _ in range(4)])  # imports what it needs
    tracemalloc.reset_peak()
    sheet = ContactSheet(100, 10)
    for _ in range(100):
        sheet.add([image.copy()])
    sheet.image()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 12_000_000, "the panels and the sheet have 3 MB each, the images 108 MB together"


def test_groups_beyond_the_limit_are_left_out(monkeypatch):
    monkeypatch.setattr(grids, "SHEET_GROUPS", 3)
    groups = [[noise(4, 4, seed=i)] for i in range(5)]
    assert (collected(groups, 2) == make_sheet(groups[:3], 2)).all()
