import dataclasses
import hashlib
import itertools
import json

import numpy as np
import pytest
import torch
from PIL import ImageFont
from torch.utils.data import DataLoader

from ldm.data.base import Txt2ImgIterableBaseDataset
from ldm.data.emoji import (
    BACKGROUNDS,
    COLOURS,
    DEFAULT_ROOT,
    EmojiTrain,
    EmojiValidation,
    caption,
    compose,
    held_out_colour,
    is_held_out,
    join_sheet,
    load_drawings,
    split_sheet,
)
from ldm.errors import UserError

COUNT = 1366


@pytest.fixture(scope="module")
def build_script(load_script):
    return load_script("build_emoji_data")


def class_of(name):
    return load_drawings(64).cldr_names.index(name)


# --- the data folder ---


@pytest.mark.parametrize("size", [64, 128])
def test_pixels_match_recorded_checksums(size):
    drawings = load_drawings(size)
    recorded = json.loads((DEFAULT_ROOT / "checksums.json").read_text())
    assert drawings.rgba.shape == (COUNT, size, size, 4) and len(drawings) == recorded["drawings"] == COUNT
    digest = hashlib.sha256(drawings.rgba.tobytes()).hexdigest()
    assert digest == recorded["sha256_of_pixels"][f"drawings-{size}.webp"]


def test_every_drawing_is_visible_and_distinct():
    rgba = load_drawings(64).rgba
    assert (rgba[..., 3] > 128).sum((1, 2)).min() > 50
    assert len({drawing.tobytes() for drawing in rgba}) == COUNT
    assert not rgba[rgba[..., 3] == 0].any()


def test_names_are_unique_and_lower_case():
    drawings = load_drawings(64)
    assert list(drawings.codepoints) == sorted(set(drawings.codepoints))
    assert len(set(drawings.unicode_names)) == len(set(drawings.cldr_names)) == COUNT
    rocket, wink, pizza = (drawings.codepoints.index(ord(c)) for c in "🚀😉🍕")
    assert drawings.cldr_names[rocket] == drawings.unicode_names[rocket] == "rocket"
    assert drawings.unicode_names[wink] == "winking face"
    assert (drawings.unicode_names[pizza], drawings.cldr_names[pizza]) == ("slice of pizza", "pizza")
    for name in drawings.unicode_names + drawings.cldr_names:
        assert name == name.lower().strip() and not set(name) & set("_:’")


def test_data_folder_is_below_10_mb():
    assert sum(path.stat().st_size for path in DEFAULT_ROOT.iterdir()) < 10e6


def test_data_folder_contains_licences():
    assert "SIL OPEN FONT LICENSE Version 1.1" in (DEFAULT_ROOT / "LICENSE-OFL-1.1.txt").read_text()
    assert "Apache License" in (DEFAULT_ROOT / "LICENSE-APACHE-2.0.txt").read_text()


def test_contact_sheet_round_trip():
    rgba = np.random.default_rng(0).integers(0, 256, (43, 3, 3, 4), np.uint8)
    sheet = join_sheet(rgba)
    assert sheet.shape == (2 * 3, 40 * 3, 4)
    assert np.array_equal(sheet[:3, 3:6], rgba[1]) and np.array_equal(sheet[3:, 6:9], rgba[42])
    assert np.array_equal(split_sheet(sheet, 43, 3), rgba)
    with pytest.raises(UserError, match="does not fit"):
        split_sheet(sheet, 30, 3)


def test_missing_data_raises_user_error(tmp_path):
    with pytest.raises(UserError, match=r"names\.tsv is missing"):
        EmojiTrain(root=tmp_path / "nowhere")
    (tmp_path / "names.tsv").write_text("header\nU+1F680\trocket\trocket\n")
    with pytest.raises(UserError, match=r"drawings-64\.webp"):
        load_drawings(64, tmp_path)
    with pytest.raises(UserError, match="64 and 128"):
        load_drawings(65)


# --- building the data ---


def test_small_drawings_are_weighted_means_of_large_ones(build_script):
    large, small = load_drawings(128).rgba, load_drawings(64).rgba
    assert np.array_equal(build_script.halve(large), small)
    pixels = large[:200].astype(np.float64).reshape(200, 64, 2, 64, 2, 4)
    alpha = pixels[..., 3:].mean((2, 4))
    premultiplied = (pixels[..., :3] * pixels[..., 3:]).mean((2, 4))
    assert np.abs(small[:200, ..., 3:] - alpha).max() <= 0.5
    solid = alpha[..., 0] >= 1
    expected = premultiplied[solid] / alpha[solid]
    assert np.abs(small[:200, ..., :3][solid] - expected).max() <= 0.5


def test_vocabulary_matches_names(build_script):
    tokens = (DEFAULT_ROOT / "vocab.txt").read_text(encoding="utf-8").splitlines()
    drawings = load_drawings(64)
    names = list(zip(drawings.codepoints, drawings.unicode_names, drawings.cldr_names, strict=True))
    assert tokens == build_script.vocabulary(names)
    assert tokens[:5] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert len(set(tokens)) == len(tokens)


def test_text_files_match_names(build_script):
    drawings = load_drawings(64)
    names = list(zip(drawings.codepoints, drawings.unicode_names, drawings.cldr_names, strict=True))
    texts = build_script.texts(names, {size: load_drawings(size).rgba for size in (64, 128)})
    assert set(texts) == {"names.tsv", "class_names.txt", "vocab.txt", "checksums.json"}
    for name, text in texts.items():
        assert (DEFAULT_ROOT / name).read_text(encoding="utf-8") == text, name


def test_font_renders_shipped_drawings(build_script):
    pytest.importorskip("emoji")
    if not build_script.FONT.is_file():
        pytest.skip("fonts-noto-color-emoji is not installed")
    font = ImageFont.truetype(str(build_script.FONT), build_script.STRIKE)
    drawings = load_drawings(128)
    names = build_script.single_emoji()
    for index in range(0, COUNT, 50):
        codepoint = drawings.codepoints[index]
        assert names[codepoint] == drawings.cldr_names[index]
        assert np.array_equal(build_script.render(font, chr(codepoint)), drawings.rgba[index])


def test_vocabulary_tokenizes_captions_and_unknown_words(build_script):
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.BertWordPieceTokenizer(str(DEFAULT_ROOT / "vocab.txt"), lowercase=True)
    drawings = load_drawings(64)
    for name in drawings.unicode_names + drawings.cldr_names:
        text = caption(name, "blue")
        tokens = tokenizer.encode(text, add_special_tokens=False).tokens
        assert tokens == build_script.words(text) and "[UNK]" not in tokens
    assert tokenizer.encode("zyqx", add_special_tokens=False).tokens == ["z", "##y", "##q", "##x"]
    assert tokenizer.encode("rocket").tokens == ["[CLS]", "rocket", "[SEP]"]
    assert tokenizer.token_to_id("[PAD]") == 0


# --- held-out pairs ---


def test_a_tenth_of_pairs_is_held_out_evenly():
    pairs = [(i, colour) for i in range(COUNT) for colour in COLOURS if is_held_out(i, colour)]
    assert abs(len(pairs) / (COUNT * len(COLOURS)) - 0.1) < 1e-3
    assert max(sum(is_held_out(i, c) for c in COLOURS) for i in range(COUNT)) == 1
    per_colour = [sum(c == colour for _, c in pairs) for colour in COLOURS]
    assert min(per_colour) > 0.7 * len(pairs) / 8 and max(per_colour) < 1.3 * len(pairs) / 8


def test_held_out_pairs_are_fixed():
    # Trained models have not seen these pairs; another choice would invalidate their evaluation.
    choice = ",".join(str(held_out_colour(i)) for i in range(COUNT))
    digest = hashlib.sha256(choice.encode()).hexdigest()
    assert digest == "4f49666664ed124d4801d4004b2f7c92d8b085fe4de709b5a68ee7a25231f2c2"


def test_training_contains_no_held_out_pair():
    train, held_out, seen = EmojiTrain(), EmojiValidation(), EmojiValidation(split="seen")
    assert not set(train.pairs) & set(held_out.pairs)
    assert train.pairs == seen.pairs and len(seen) + len(held_out) == COUNT * len(COLOURS)
    for position in (0, len(train) // 2, len(train) - 1):
        item = train[position]
        assert (item["class_label"], item["background"]) == train.pairs[position]


# --- compositing ---


def test_backgrounds_have_distinct_colours():
    for a, b in itertools.combinations(BACKGROUNDS.values(), 2):
        assert np.linalg.norm(np.subtract(a, b)) > 100


@pytest.mark.parametrize("colour", COLOURS)
def test_unscaled_composition_is_alpha_compositing(colour):
    rgba = load_drawings(64).rgba[class_of("rocket")]
    alpha = rgba[..., 3:] / 255
    expected = (rgba[..., :3] * alpha + np.array(BACKGROUNDS[colour]) * (1 - alpha)) / 127.5 - 1
    image = compose(rgba, colour)
    assert image.dtype == np.float32 and image.shape == (64, 64, 3)
    np.testing.assert_allclose(image, expected, atol=1e-6)
    assert image.min() >= -1 and image.max() <= 1


def test_background_fills_transparent_pixels():
    validation = EmojiValidation()
    for position in range(0, len(validation), 37):
        item = validation[position]
        clear = load_drawings(64).rgba[item["class_label"], ..., 3] == 0
        expected = np.array(BACKGROUNDS[item["background"]]) / 127.5 - 1
        assert np.allclose(item["image"][clear], expected, atol=1e-6)


@pytest.mark.parametrize("scale", [0.5, 0.86, 0.93, 1.7])
def test_scaling_leaves_no_fringe(scale):
    """A drawing in the colour of its background is invisible at every scale."""
    rgba = np.zeros((64, 64, 4), np.uint8)
    y, x = np.mgrid[:64, :64]
    rgba[..., 3] = np.clip(255 * (20 - np.hypot(x - 32, y - 32)), 0, 255)
    rgba[..., :3][rgba[..., 3] > 0] = BACKGROUNDS["yellow"]
    image = compose(rgba, "yellow", scale, 0.01, -0.03)
    # Premultiplied 8-bit values have an error of at most one.
    np.testing.assert_allclose(image, np.broadcast_to(image[0, 0], image.shape), atol=2.01 / 127.5)


def test_shift_moves_whole_pixels_right_and_down():
    rgba = load_drawings(64).rgba[class_of("rocket")]
    centred, moved = compose(rgba, "green"), compose(rgba, "green", shift_x=4 / 64, shift_y=-3 / 64)
    np.testing.assert_array_equal(moved[:-3, 4:], centred[3:, :-4])
    np.testing.assert_allclose(moved[-3:], np.broadcast_to(moved[-1, 0], moved[-3:].shape))
    outside = compose(rgba, "green", shift_x=3.0)
    assert (outside == outside[0, 0]).all()


def test_scale_keeps_the_drawing_centred():
    rgba = np.zeros((64, 64, 4), np.uint8)
    rgba[16:48, 16:48] = 255
    image = compose(rgba, "black", scale=0.5, size=64)
    white = np.argwhere(image[..., 0] > 0)
    assert white.min() == 24 and white.max() == 39


# --- data sets ---


def test_train_item_entries():
    item = EmojiTrain()[17]
    assert item["image"].shape == (64, 64, 3) and item["image"].dtype == np.float32
    assert item["mask"].shape == (64, 64, 1) and set(np.unique(item["mask"])) == {0.0, 1.0}
    assert item["background"] == COLOURS[item["background_label"]]
    assert item["human_label"] == load_drawings(64).cldr_names[item["class_label"]]


def test_train_captions_use_both_names_and_sometimes_the_name_alone():
    torch.manual_seed(0)
    train = EmojiTrain(name_only_prob=0.25)
    pizza = train.pairs.index((class_of("pizza"), "black"))
    captions = [train[pizza]["caption"] for _ in range(400)]
    with_background = {"pizza on a black background", "slice of pizza on a black background"}
    assert set(captions) == with_background | {"pizza", "slice of pizza"}
    assert 0.18 < sum(c in ("pizza", "slice of pizza") for c in captions) / 400 < 0.32
    assert all("background" in EmojiTrain(name_only_prob=0.0)[i]["caption"] for i in range(50))


def test_train_items_depend_on_the_seed():
    train = EmojiTrain()
    torch.manual_seed(3)
    first, second = train[5], train[5]
    torch.manual_seed(3)
    again = train[5]
    assert np.array_equal(first["image"], again["image"]) and first["caption"] == again["caption"]
    assert not np.array_equal(first["image"], second["image"])


def test_train_never_cuts_a_drawing_off():
    train = EmojiTrain(scale=(0.5, 1.0), shift=0.5)
    train.drawings = dataclasses.replace(train.drawings, rgba=np.full((COUNT, 64, 64, 4), 255, np.uint8))
    sides, corners = set(), set()
    for position in range(200):
        covered = np.argwhere(train[position]["mask"][..., 0])
        height, width = np.ptp(covered, axis=0) + 1
        assert height == width and len(covered) == height * width
        sides.add(height)
        corners.add(tuple(covered[0]))
    assert min(sides) >= 32 and max(sides) <= 64 and len(sides) > 25 and len(corners) > 100


@pytest.mark.parametrize(("size", "crop"), [(64, 32), (128, 64), (64, 64)])
def test_train_crop(size, crop):
    item = EmojiTrain(size=size, crop=crop)[100]
    assert item["image"].shape == (crop, crop, 3) and item["mask"].shape == (crop, crop, 1)


@pytest.mark.parametrize("size", [32, 64, 96, 128])
def test_validation_is_deterministic(size):
    one, two = EmojiValidation(size=size), EmojiValidation(size=size)
    a, b = one[7], two[7]
    assert a["image"].shape == (size, size, 3) and np.array_equal(a["image"], b["image"])
    assert a["caption"] == caption(a["human_label"], a["background"])


def test_batches_have_the_published_keys():
    torch.manual_seed(0)
    batch = next(iter(DataLoader(EmojiTrain(), batch_size=4, shuffle=True)))
    assert batch["image"].shape == (4, 64, 64, 3) and batch["image"].dtype == torch.float32
    assert batch["class_label"].dtype == torch.int64
    assert all(isinstance(text, str) for key in ("caption", "human_label") for text in batch[key])


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"crop": 65}, "crop"),
        ({"scale": (1.0, 0.5)}, "scale"),
        ({"name_only_prob": 2}, "name_only_prob"),
        ({"size": 0}, "size"),
    ],
)
def test_invalid_parameter_raises_user_error(parameters, message):
    with pytest.raises(UserError, match=message):
        EmojiTrain(**parameters)


def test_unknown_split_raises_user_error():
    with pytest.raises(UserError, match="held_out"):
        EmojiValidation(split="test")


# --- the base class of streams ---


def test_iterable_base_class():
    class Squares(Txt2ImgIterableBaseDataset):
        def __iter__(self):
            return ({"image": i * i} for i in self.sample_ids)

    records = Squares(num_records=3, valid_ids=[1, 2, 3])
    assert len(records) == 3 and records.size == 256 and records.sample_ids == records.valid_ids == [1, 2, 3]
    assert [r["image"] for r in records + Squares(1, [4])] == [1, 4, 9, 16]
    with pytest.raises(TypeError, match="abstract"):
        Txt2ImgIterableBaseDataset()
