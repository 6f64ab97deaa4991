"""Tables of boxes: grouping, filters, faults."""

from __future__ import annotations

import numpy as np
import pytest

from ldm.data.boxes import BoxTable, clipped
from ldm.data.faults import Faults


def table(image_of_box, labels=None, boxes=None, images="abc"):
    """Return a table of the images a, b and c; each box has its number as label, unless `labels` are given."""
    count = len(image_of_box)
    labels = np.arange(count) if labels is None else np.array(labels)
    boxes = np.tile([0.0, 0.0, 0.5, 0.5], (count, 1)) if boxes is None else np.array(boxes)
    columns = (labels.astype(np.int32), np.zeros(count, np.uint8), np.arange(count))
    return BoxTable.grouped(list(images), np.array(image_of_box, int), boxes, *columns)


def labels_of(boxes):
    """Return the labels of each image by its name."""
    return {str(name): boxes[i].labels.tolist() for i, name in enumerate(boxes.images)}


def test_boxes_are_grouped_by_image_in_their_order():
    assert labels_of(table([0, 1, 0, 2, 1])) == {"a": [0, 2], "b": [1, 4], "c": [3]}
    assert labels_of(table([0, 0, 2])) == {"a": [0, 1], "b": [], "c": [2]}
    assert labels_of(table([])) == {"a": [], "b": [], "c": []}


def test_selection_of_boxes_and_images():
    boxes = table([0, 0, 1, 2, 2, 2])
    assert labels_of(boxes.with_boxes(boxes.labels % 2 == 1)) == {"a": [1], "b": [], "c": [3, 5]}
    assert labels_of(boxes.with_images(np.array([True, False, True]))) == {"a": [0, 1], "c": [3, 4, 5]}
    assert labels_of(boxes.with_counts(2, 2)) == {"a": [0, 1]}


def test_relabelled_boxes():
    boxes = table([0, 0, 1], labels=[0, 1, 2])
    assert labels_of(boxes.relabelled(np.array([5, -1, 6]))) == {"a": [5], "b": [6], "c": []}


def test_duplicates_within_an_image_are_left_out():
    one, other = [0.0, 0.0, 0.5, 0.5], [0.0, 0.0, 0.5, 0.25]
    boxes = table([0, 0, 0, 0, 1], labels=[1, 1, 2, 1, 1], boxes=[one, other, one, one, one])
    found = boxes.without_duplicates()
    assert {str(name): found[i].ids.tolist() for i, name in enumerate(found.images)} == {
        "a": [0, 1, 2],
        "b": [4],
        "c": [],
    }
    assert len(table([]).without_duplicates().labels) == 0


def test_faulty_boxes_are_counted_and_rounding_is_clipped():
    boxes = np.array(
        [
            [0.1, 0.1, 0.2, 0.2],
            [-0.005, 0.0, 1.01, 1.0],
            [0.5, 0.5, 0.6, 0.1],
            [0.5, 0.5, 0.0, 0.1],
            [0.5, 0.5, float("nan"), 0.1],
        ]
    )
    faults = Faults("file")
    found = table([0, 0, 1, 1, 1], boxes=boxes).checked(faults, "row")
    assert labels_of(found) == {"a": [0, 1], "b": [], "c": []}
    assert faults.text() == "boxes outside their image: 2 (row 2, row 4); empty boxes: 1 (row 3)"
    assert found.boxes[0].tolist() == boxes[0].tolist() and found.boxes[1].tolist() == [0, 0, 1, 1]


def test_clipping_keeps_exact_values_of_other_boxes():
    boxes = np.random.default_rng(0).random((50, 4)) / 2
    result, outside, empty = clipped(boxes)
    assert result is boxes and not outside.any() and not empty.any()


def test_faults_are_logged_in_one_line_with_three_examples(caplog):
    faults = Faults("boxes.csv")
    faults.log()
    assert not caplog.records
    faults.add("empty boxes", ["row 1", "row 2"], 2)
    faults.add("empty boxes", [f"row {i}" for i in range(3, 9)], 6)
    faults.add("boxes of unknown classes", count=4)
    faults.add("never", [], 0)
    faults.log()
    (record,) = caplog.records
    assert record.getMessage() == (
        '"boxes.csv": left out empty boxes: 8 (row 1, row 2, row 3, …); boxes of unknown classes: 4'
    )


def test_a_million_boxes_are_filtered():
    rng = np.random.default_rng(0)
    count = 1_000_000
    image_of_box = np.sort(rng.integers(0, 100_000, count))
    boxes = BoxTable.grouped(
        [str(i) for i in range(100_000)],
        image_of_box,
        rng.random((count, 4)) / 2,
        rng.integers(0, 600, count).astype(np.int32),
        np.zeros(count, np.uint8),
        np.arange(count),
    )
    kept = boxes.without_duplicates()
    assert len(kept.labels) == count
    few = kept.with_boxes(kept.areas > 0.01).with_counts(2, 8)
    assert few.counts.min() >= 2 and few.counts.max() <= 8 and few.areas.min() > 0.01
    index = len(few) // 2
    original = image_of_box == int(few.images[index])
    expected = boxes.ids[original][boxes.areas[original] > 0.01]
    assert few[index].ids.tolist() == expected.tolist()


@pytest.mark.parametrize("labels", [[0, 0, 0], [2, 2, 2]])
def test_tables_without_boxes_after_relabelling(labels):
    assert labels_of(table([0, 1, 2], labels=labels).relabelled(np.array([-1, 0, -1]))) == {"a": [], "b": [], "c": []}
