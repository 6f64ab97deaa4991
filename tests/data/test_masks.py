"""Random masks for in-painting: the kinds of LaMa, and halves."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from ldm.data.masks import LAMA, LAMA_COVERAGE, MASKS, find_masks, random_mask
from ldm.errors import UserError


def masks(kind: str, height: int, width: int, count: int = 100) -> np.ndarray:
    generate = find_masks(kind)
    return np.array([generate(height, width, np.random.default_rng(i))[..., 0] > 0 for i in range(count)])


def widest(mask: np.ndarray) -> float:
    """Return the diameter of the largest disc in a mask, beyond whose borders nothing is masked."""
    return 2 * cv2.distanceTransform(np.pad(mask, 1).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE).max()


def regions(mask: np.ndarray) -> list[tuple[slice, slice]]:
    """Return the bounding boxes of the connected parts of a mask."""
    _, _, boxes, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=4)
    return [(slice(y, y + height), slice(x, x + width)) for x, y, width, height, _ in boxes[1:].tolist()]


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize(("height", "width"), [(64, 64), (48, 96), (7, 5), (2, 2)])
def test_masks_have_the_size_and_two_values(kind, height, width):
    for seed in range(5):
        mask = find_masks(kind)(height, width, np.random.default_rng(seed))
        assert mask.shape == (height, width, 1) and mask.dtype == np.float32
        assert set(np.unique(mask)) == {-1, 1}


@pytest.mark.parametrize("kind", LAMA)
def test_masks_of_lama_cover_at_most_half(kind):
    coverage = masks(kind, 64, 64).mean(axis=(1, 2))
    assert coverage.min() > 0 and coverage.max() <= LAMA_COVERAGE
    assert 0.15 < coverage.mean() < 0.4 and coverage.std() > 0.05


def test_strokes_become_wider_from_thin_to_thick():
    widths = {kind: np.median([widest(mask) for mask in masks(kind, 128, 128, 60)]) for kind in LAMA}
    assert widths["thin"] < widths["medium"] < widths["thick"], widths
    parts = {kind: np.mean([len(regions(mask)) for mask in masks(kind, 128, 128, 60)]) for kind in LAMA}
    assert parts["thin"] > 2 * parts["medium"] > 2 * parts["thick"]


def test_masks_scale_with_the_image():
    small, large = (masks("thick", side, side, 60) for side in (64, 256))
    assert small.mean() == pytest.approx(large.mean(), abs=0.02)
    ratio = np.median([widest(mask) for mask in large]) / np.median([widest(mask) for mask in small])
    assert ratio == pytest.approx(4, rel=0.15)


def test_boxes_are_rectangles_within_the_published_bounds():
    found = masks("box", 256, 256)
    assert not found[:, :10].any() and not found[:, :, -10:].any(), "boxes keep a margin of 10 of 256 pixels"
    single = [box for mask in found for box in regions(mask) if mask[box].all()]
    sides = np.array([[part.stop - part.start for part in box] for box in single])
    assert len(single) > 50 and sides.min() >= 30 and sides.max() < 150
    assert {len(regions(mask)) for mask in found} == {1, 2, 3}


def test_halves_are_exact():
    found = masks("half", 8, 6, 60)
    halves = {mask.tobytes() for mask in found}
    expected = []
    for part in (np.s_[:4], np.s_[4:], np.s_[:, :3], np.s_[:, 3:]):
        mask = np.zeros((8, 6), bool)
        mask[part] = True
        expected.append(mask.tobytes())
    assert halves == {*expected}
    assert {mask.sum() for mask in masks("half", 5, 5)} == {10}


def test_random_masks_are_the_default_kind():
    for seed in range(20):
        expected = random_mask(24, 40, np.random.default_rng(seed))
        assert np.array_equal(find_masks("random")(24, 40, np.random.default_rng(seed)), expected)


def test_unknown_kind_raises_user_error():
    with pytest.raises(UserError, match=r'there are no masks "thik" \(did you mean "thick"\?\); choose one of random'):
        find_masks("thik")
