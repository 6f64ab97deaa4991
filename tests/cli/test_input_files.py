"""Input files of commands, names of results, and folders that results may go to."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from ldm.cli.input_files import check_apart, images_in, named_files, read_prompts, result_names
from ldm.errors import UserError

IMAGES = ["a.png", "b.JFIF", "c.gif", "d.jpe", "e.ppm", "f.tga", "g.tif"]


@pytest.fixture
def folder(tmp_path):
    """Return a folder of images, hidden files, files of file managers, and other files."""
    others = ["._a.png", ".DS_Store", "Thumbs.db", ".thumbnails/x.png", "notes.txt", "deep/x.png", "v.mp4"]
    for name in [*reversed(IMAGES), *others]:
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return tmp_path / "in"


def test_every_image_of_a_folder_is_listed_and_other_files_are_counted(folder, caplog):
    caplog.set_level("INFO", "ldm")
    assert [path.name for path in images_in(folder)] == IMAGES
    assert caplog.messages == [f'passed over 2 files in "{folder}" besides the images: notes.txt, v.mp4']


def test_folders_stand_for_their_files(folder):
    single = folder / "v.mp4"
    found = named_files("--image", [str(single), str(folder)], (".png", ".tif"), "images")
    assert found == [single, folder / "a.png", folder / "g.tif"]
    with pytest.raises(UserError, match=r'--image ".*" holds no layouts; name a file, or another folder'):
        named_files("--image", [str(folder)], (".json",), "layouts")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_prompts_are_split_at_line_ends_only(tmp_path, encoding):
    path = tmp_path / "prompts.txt"
    path.write_bytes("red\u2028heart\r\n\r\n fox\x85and\x1chen \rrainbow\vor sun\n".encode(encoding))
    assert read_prompts(str(path)) == ["red\u2028heart", "fox\x85and\x1chen", "rainbow\vor sun"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"fox\n\xff\n", r"line 2 \(byte 4\) is not valid UTF-8; give UTF-8 text"),
        (b"fox\0", "line 1 contains a NUL character"),
        (b"\n \n", "is empty; write one prompt a line"),
    ],
)
def test_invalid_prompt_files_raise_user_error(tmp_path, content, message):
    path = tmp_path / "prompts.txt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_prompts(str(path))


def names(*paths: str) -> list[str]:
    return result_names([Path(path) for path in paths])


@pytest.mark.parametrize(
    ("paths", "expected"),
    [
        (["a.png", "b.jpg"], ["a", "b"]),
        (["a.png", "a.png.png"], ["a", "a.png"]),
        (["x.png", "x.webp"], ["x.png", "x.webp"]),
        (["a.jpg", "a.png", "a.png.png"], ["a.jpg", "a.png", "a.png.png"]),
        (["A.png", "a.png"], ["A.png", "a.png-2"]),
        (["one/x.png", "two/x.png", "three/x.png"], ["x.png", "x.png-2", "x.png-3"]),
        (["one/x.png", "two/x.png", "x.png-2.png"], ["x.png", "x.png-3", "x.png-2"]),
        (["é.png", "e\u0301.png"], ["é.png", "e\u0301.png-2"]),
        ([], []),
    ],
)
def test_each_input_has_a_result_of_its_own(paths, expected):
    assert names(*paths) == expected


def test_names_of_results_are_unique_where_case_is_ignored():
    stems = ["a", "A", "a.png", "a.PNG", "b", "a-2", "a.png-2"]
    inputs = [f"{stem}{suffix}" for stem in stems for suffix in (".png", ".jpg", ".PNG")]
    for chosen in itertools.combinations(inputs, 4):
        found = names(*chosen)
        assert len({name.lower() for name in found}) == 4, chosen


def test_results_may_not_go_to_the_folder_of_an_input_or_of_the_file_that_it_links_to(tmp_path):
    for name in ("in", "out"):
        (tmp_path / name).mkdir()
    (tmp_path / "in" / "x.png").touch()
    (tmp_path / "out" / "y.png").touch()
    (tmp_path / "in" / "y.png").symlink_to(tmp_path / "out" / "y.png")
    (tmp_path / "link").symlink_to(tmp_path / "in")
    check_apart(str(tmp_path / "out"), [tmp_path / "in" / "x.png"])
    check_apart(str(tmp_path / "new"), [tmp_path / "in" / "y.png"])
    for outdir, image in (("in", "in/x.png"), ("link", "in/x.png"), ("in", "link/x.png"), ("out", "in/y.png")):
        with pytest.raises(UserError, match=r'is the folder of the input ".\.png"; name another'):
            check_apart(str(tmp_path / outdir), [tmp_path / image])
