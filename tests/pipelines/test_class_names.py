"""Tests of `ldm.pipelines.class_names`."""

from __future__ import annotations

import pytest
from tiny_models import EMOJI_CLASSES, class_config, pixel_config, text_config, unconditional_config

from ldm.cli.class2img import Class2Img
from ldm.config.model_config import read_config
from ldm.config.model_info import ModelInfo
from ldm.errors import UserError
from ldm.pipelines.class_names import Classes, read_class_names

DRAWINGS_FILE = str(EMOJI_CLASSES)
IMAGENET = Classes("cin", 1000, True, "imagenet")
DRAWINGS = Classes("emoji64", 1366, True, DRAWINGS_FILE)
NUMBERS = Classes("mine", 10, False)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (class_config(11), (11, False)),
        (class_config(11, cond_dropout=0.1), (10, True)),
        (class_config(1001, class_names="imagenet"), (1000, True)),
        (class_config(1000, class_names="imagenet"), (1000, False)),
        (class_config(1367, class_names=DRAWINGS_FILE), (1366, True)),
        (class_config(1, cond_dropout=0.1), (1, False)),
        (class_config(3, class_names=["cat", "dog"]), (2, True)),
        (class_config(2, class_names=["cat", "dog"]), (2, False)),
        (text_config(class_names=DRAWINGS_FILE), (1366, True)),
        (text_config(class_names=["cat", "dog"]), (2, True)),
    ],
)
def test_number_of_classes_and_null_class(config, expected):
    classes = Classes.of(ModelInfo("x", config))
    assert (classes.count, classes.guidable) == expected


@pytest.mark.parametrize("labels", [1000, 1001, 1366, 1367])
def test_numbers_of_labels_do_not_imply_names_or_a_null_class(labels):
    classes = Classes.of(ModelInfo("x", class_config(labels)))
    assert (classes.count, classes.guidable, classes.names) == (labels, False, [])
    assert classes.name(25) == "25"
    dropped = Classes.of(ModelInfo("x", class_config(labels, cond_dropout=0.1)))
    assert (dropped.count, dropped.guidable, dropped.names) == (labels - 1, True, [])


def test_text_model_without_class_names_has_no_classes():
    with pytest.raises(UserError, match='"caption", not on classes; choose a class-conditional model'):
        Classes.of(ModelInfo("x", text_config()))


def test_class_names_are_a_list_or_a_file(tmp_path):
    (tmp_path / "names.txt").write_text("cat\tkitty\n\n dog \n", encoding="utf-8-sig")
    assert read_class_names(["cat", "dog"]) == [("cat",), ("dog",)]
    assert read_class_names(str(tmp_path / "names.txt")) == [("cat", "kitty"), ("dog",)]
    classes = Classes.of(ModelInfo("x", class_config(3, class_names=str(tmp_path / "names.txt"))))
    assert classes.parse(["Kitty", "dog"]) == [0, 1] and classes.name(0) == "cat"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_classes_are_split_at_line_ends_only(tmp_path, encoding):
    (tmp_path / "names.txt").write_bytes("a\u2028b\tc\x85d\r\ne\vf\rg\n".encode(encoding))
    assert read_class_names(str(tmp_path / "names.txt")) == [("a\u2028b", "c\x85d"), ("e\vf",), ("g",)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no file of class names"),
        (b"\xff", r"cannot read the file of class names .* line 1 \(byte 0\) is not valid UTF-8"),
        (b"a\n\0", "line 2 contains a NUL character"),
        (b" \n\n", "is empty"),
    ],
)
def test_invalid_file_of_class_names_is_one_line(tmp_path, content, message):
    path = tmp_path / "names.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message) as raised:
        read_class_names(str(path))
    assert str(path) in str(raised.value) and "\n" not in str(raised.value)


def test_labels_that_the_network_embeds_are_classes():
    config = class_config(cond_stage_config={"target": "ldm.modules.encoders.modules.IdentityEncoder"})
    config["params"]["unet_config"]["params"]["num_classes"] = 7
    assert Classes.of(ModelInfo("x", config)).count == 7


@pytest.mark.parametrize("config", [unconditional_config(), pixel_config()])
def test_unconditional_model_has_no_classes(config):
    assert Classes.of(ModelInfo("x", config)) is None


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("configs/latent-diffusion/cin256-v2.yaml", (1000, True)),
        ("models/ldm/cin256/config.yaml", (1000, False)),
        ("configs/latent-diffusion/cin-ldm-vq-f8.yaml", (1000, False)),
        ("models/ldm/emoji64/config.yaml", (1366, True)),
        ("models/ldm/celeba256/config.yaml", None),
        ("models/ldm/ffhq256/config.yaml", None),
        ("models/ldm/lsun_beds256/config.yaml", None),
        ("models/ldm/lsun_churches256/config.yaml", None),
    ],
)
def test_classes_of_the_published_models(repo_root, path, expected):
    classes = Classes.of(ModelInfo("x", read_config(repo_root / path)))
    assert (classes and (classes.count, classes.guidable)) == expected


@pytest.mark.parametrize("path", ["configs/latent-diffusion/txt2img-1p4B-eval.yaml", "models/ldm/bsr_sr/config.yaml"])
def test_models_of_other_conditioning_are_an_error(repo_root, path):
    with pytest.raises(UserError, match="choose a class-conditional model"):
        Classes.of(ModelInfo("x", read_config(repo_root / path)))


@pytest.mark.parametrize(
    ("classes", "words", "labels"),
    [
        (IMAGENET, ["25", "187", "448", "992"], [25, 187, 448, 992]),
        (IMAGENET, ["european fire salamander", "Yorkshire Terrier", "BIRDHOUSE", "agaric"], [25, 187, 448, 992]),
        (IMAGENET, ["yorkshire", "fire  salamander"], [187, 25]),
        (IMAGENET, ["0-2,999", "7"], [0, 1, 2, 999, 7]),
        (IMAGENET, ["goldfish, 3 ,tench,"], [1, 3, 0]),
        (DRAWINGS, ["red heart", "HEAVY  black heart"], [150, 150]),
        (DRAWINGS, ["grinning face with smiling eyes"], [843]),
        (DRAWINGS, ["1st place medal"], [1093]),
        (NUMBERS, ["3", "0-1"], [3, 0, 1]),
    ],
)
def test_words_select_by_name_number_range_and_list(classes, words, labels):
    assert classes.parse(words) == labels


@pytest.mark.parametrize(
    ("classes", "word", "message"),
    [
        (IMAGENET, "gold fish", 'there is no class "gold fish" (did you mean "goldfish"?)'),
        (
            IMAGENET,
            "salamander",
            "ambiguous: European fire salamander (25), spotted salamander (28); give a whole name",
        ),
        (IMAGENET, "terrier", "and 1"),
        (IMAGENET, "1000", "are 0 to 999"),
        (IMAGENET, "5-3", "from the smaller number to the larger"),
        (IMAGENET, ",", "no class is named"),
        (IMAGENET, 5000 * "9", "are 0 to 999"),
        (DRAWINGS, "-1", "are 0 to 1365"),
        (IMAGENET, "0-99999999999999999999", "are 0 to 999"),
        (IMAGENET, "", "there is no class"),
        (IMAGENET, "-1", "are 0 to 999"),
        (IMAGENET, "1.5", "there is no class"),
        (NUMBERS, "fox", "has no names; give numbers, 0 to 9"),
        (NUMBERS, "10", "are 0 to 9"),
    ],
)
def test_word_that_selects_no_class_is_one_line(classes, word, message):
    with pytest.raises(UserError) as raised:
        classes.parse([word])
    assert message in str(raised.value) and "\n" not in str(raised.value)


def test_class_without_a_name_is_called_by_its_number():
    assert IMAGENET.name(25) == "European fire salamander"
    assert NUMBERS.name(3) == "3"


def test_inputs_of_a_class_are_its_label_and_its_name():
    task = Class2Img()
    assert task.class_inputs(IMAGENET, 25) == {"class_label": 25, "class": "European fire salamander"}
    assert task.class_inputs(NUMBERS, 3) == {"class_label": 3, "class": "3"}


def test_guidance_needs_a_null_class():
    IMAGENET.check_scale(3)
    NUMBERS.check_scale(1)
    with pytest.raises(UserError, match="no null class"):
        NUMBERS.check_scale(3)
