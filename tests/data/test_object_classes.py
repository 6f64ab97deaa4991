"""Classes of boxes: selection, numbering and merging."""

from __future__ import annotations

import pytest

from ldm.data.object_classes import TopClasses, choose_classes, load_mapping, load_selection, merged_ids
from ldm.errors import UserError
from taming.data.open_images_helper import (
    open_images_unify_categories_for_coco,
    top_300_classes_plus_coco_compatibility,
)

KNOWN = {"/m/c": "Cat", "/m/b": "Bird", "/m/01s55n": "Suitcase", "/m/a": "Ant"}


def test_classes_are_numbered_in_the_order_of_their_ids():
    classes = choose_classes(KNOWN, None, {}, "x")
    assert classes.ids == ("/m/a", "/m/b", "/m/c", "/m/01s55n"), "the published order has the suitcase last"
    assert classes.names == ("Ant", "Bird", "Cat", "Suitcase") and classes.number_of["/m/c"] == 2
    assert classes.numbers(["/m/b", "/m/x", "/m/c"], {"/m/b": "/m/a"}).tolist() == [0, -1, 2]


def test_allowed_and_merged_classes():
    classes = choose_classes(KNOWN, ["Cat", "Ant", "Bird"], {"/m/a": "/m/c"}, "x")
    assert classes.names == ("Bird", "Cat")
    with pytest.raises(UserError, match="x: the selection leaves no class"):
        choose_classes(KNOWN, ["Ant"], {"/m/a": "/m/c"}, "x")
    with pytest.raises(UserError, match=r'x has no class "Bat" \(did you mean "Cat"\?\) \(2 names are unknown\)'):
        choose_classes(KNOWN, ["Bat", "Zebra"], {}, "x")


def test_selections_are_lists_files_and_dotted_paths(tmp_path):
    file = tmp_path / "names.txt"
    file.write_text("Cat\nAnt\n")
    assert load_selection(str(file)) == load_selection(["Cat", "Ant"]) == ["Cat", "Ant"]
    assert load_selection([("Cat", 10), ("Ant", 5)]) == ["Cat", "Ant"], "published lists have counts"
    assert load_selection("") is None and load_selection([]) is None
    assert load_selection("ldm.data.coco_stuff.LABELS")[0] == "person"
    target = "taming.data.open_images_helper.top_300_classes_plus_coco_compatibility"
    assert load_selection(target) is top_300_classes_plus_coco_compatibility
    with pytest.raises(UserError, match="must name classes"):
        load_selection([1, 2])


def test_mappings_are_dictionaries_files_and_dotted_paths(tmp_path):
    file = tmp_path / "merge.csv"
    file.write_text("/m/a,/m/b\n\n/m/c,/m/b\n")
    assert load_mapping(str(file)) == {"/m/a": "/m/b", "/m/c": "/m/b"}
    target = "taming.data.open_images_helper.open_images_unify_categories_for_coco"
    assert load_mapping(target) == open_images_unify_categories_for_coco
    assert load_mapping("") == load_mapping({}) == {}
    file.write_text("/m/a\n")
    with pytest.raises(UserError, match='has the line "/m/a"; write FROM,TO'):
        load_mapping(str(file))


def test_most_frequent_classes_and_further_ones():
    counts = {"Man": 9, "Dog": 3, "Tree": 5, "Television": 1, "Axe": 3}
    assert TopClasses(2, ("television", "Zebra")).choose(counts) == [("Man", 9), ("Tree", 5), ("Television", 1)]
    assert [name for name, _ in TopClasses(4).choose(counts)] == ["Man", "Tree", "Axe", "Dog"]


def test_classes_below_an_ancestor_are_merged_into_the_nearest_one():
    parents = {"dog": "animal", "puppy": "dog", "cat": "animal", "animal": "entity", "car": "entity"}
    assert merged_ids(parents, ["animal", "dog"]) == {"puppy": "dog", "cat": "animal"}


def test_published_mapping_leaves_no_chain():
    targets = set(open_images_unify_categories_for_coco.values())
    assert not targets & set(open_images_unify_categories_for_coco) and len(targets) == 7


def test_names_of_coco_have_their_counterparts():
    names = top_300_classes_plus_coco_compatibility.also
    assert len(names) == len({name.casefold() for name in names}) == 80
    assert {"Television", "Cattle", "dog"} <= set(names) and "tv" not in names
