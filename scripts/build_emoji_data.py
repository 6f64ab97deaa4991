"""Build `data/emoji` from the font Noto Color Emoji: drawings, names, vocabulary, checksums.

    python scripts/build_emoji_data.py            # write data/emoji
    python scripts/build_emoji_data.py --check    # build in memory and compare with data/emoji

The script needs the extra `data` (the package `emoji`) and the font (Debian: fonts-noto-color-emoji).
"""

from __future__ import annotations

import hashlib
import json
import logging
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import _checkout  # noqa: F401 (imports the code beside this script)

from ldm.cli.command import Parser, command, example
from ldm.config.distribution import install_hint
from ldm.errors import UserError
from ldm.io.files import atomic_path

if TYPE_CHECKING:
    import numpy as np
    from PIL import ImageFont

logger = logging.getLogger("ldm")

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
STRIKE = 109  # the only bitmap size of the font; its glyphs are 136 × 128 pixels
GLYPH_WIDTH, GLYPH_HEIGHT = 136, 128
# Newer Unicode tables name more drawings. This limit makes the data the same on every Python from 3.11.
LAST_EMOJI_VERSION = 14
SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789"


def single_emoji() -> dict[int, str]:
    """Return the CLDR short name of every emoji that is one code point and has a Unicode name, by code point.

    Raises:
        UserError: The package `emoji` is not installed.
    """
    try:
        import emoji
    except ImportError:
        raise UserError(f'rebuilding needs the package "emoji"; install it with {install_hint("data")}') from None
    names = {}
    for text, entry in emoji.EMOJI_DATA.items():
        if len(text) == 1 and entry["E"] <= LAST_EMOJI_VERSION and unicodedata.name(text, None):
            names[ord(text)] = entry["en"].strip(":").replace("_", " ").replace("’", "'").lower()
    return dict(sorted(names.items()))


def render(font: ImageFont.FreeTypeFont, character: str) -> np.ndarray | None:
    """Render one character with the exact pixels of the font, (128, 128, 4) uint8; None if it has no drawing.

    No drawing touches the four outer columns of its glyph on either side, so the square crop loses nothing.

    Raises:
        UserError: A drawing does; this is another font.
    """
    import numpy as np
    from PIL import Image, ImageDraw

    left, top, right, bottom = font.getbbox(character)
    if right <= left or bottom <= top:
        return None
    canvas = Image.new("RGBA", (GLYPH_WIDTH, GLYPH_HEIGHT))
    ImageDraw.Draw(canvas).text((0, 0), character, font=font, embedded_color=True)
    margin = (GLYPH_WIDTH - GLYPH_HEIGHT) // 2
    pixels = np.array(canvas)
    if pixels[:, :margin, 3].any() or pixels[:, -margin:, 3].any():
        raise UserError(f"the drawing of U+{ord(character):04X} exceeds 128 px; give --font Noto Color Emoji 2.042")
    pixels = pixels[:, margin:-margin]
    pixels[pixels[..., 3] == 0] = 0
    return pixels


def halve(rgba: np.ndarray) -> np.ndarray:
    """Halve the sides of drawings (N, 2S, 2S, 4): means of 2 × 2 pixels, with colours weighted by their alpha.

    Unweighted means would mix the black of invisible pixels into the edges. Integers make the result exact.
    """
    import numpy as np

    count, size = rgba.shape[0], rgba.shape[1] // 2
    blocks = rgba.reshape(count, size, 2, size, 2, 4).astype(np.uint32)
    alpha = blocks[..., 3:]
    total = alpha.sum((2, 4))
    colour = (blocks[..., :3] * alpha).sum((2, 4))
    colour = (colour + total // 2) // np.maximum(total, 1)
    out = np.concatenate([colour, (total + 2) // 4], axis=-1).astype(np.uint8)
    out[out[..., 3] == 0] = 0
    return out


def render_all(font_path: Path) -> tuple[list[tuple[int, str, str]], dict[int, np.ndarray]]:
    """Return names (code point, Unicode name, CLDR short name) and, by size, drawings (N, S, S, 4).

    Raises:
        UserError: The font or the package `emoji` is missing.
    """
    if not font_path.is_file():
        raise UserError(f'no font at "{font_path}"; install fonts-noto-color-emoji or give --font')

    import numpy as np
    from PIL import ImageFont

    font = ImageFont.truetype(str(font_path), STRIKE, layout_engine=ImageFont.Layout.BASIC)
    names, drawings = [], []
    for codepoint, cldr_name in single_emoji().items():
        drawing = render(font, chr(codepoint))
        if drawing is not None:
            names.append((codepoint, unicodedata.name(chr(codepoint)).lower(), cldr_name))
            drawings.append(drawing)
    large = np.stack(drawings)
    return names, {128: large, 64: halve(large)}


def all_captions(names: list[tuple[int, str, str]]) -> Iterator[str]:
    """Yield every caption of the data sets."""
    from ldm.data.emoji import COLOURS, caption

    for _, *both in names:
        for name in dict.fromkeys(both):
            yield caption(name)
            for colour in COLOURS:
                yield caption(name, colour)


def words(text: str) -> list[str]:
    """Split a text like the uncased pre-tokenizer of BERT: without accents, each punctuation mark alone."""
    text = unicodedata.normalize("NFD", text.lower())
    spaced = ""
    for character in text:
        if unicodedata.category(character) == "Mn":
            continue
        is_ascii_mark = character.isascii() and not character.isalnum() and not character.isspace()
        is_mark = is_ascii_mark or unicodedata.category(character).startswith("P")
        spaced += f" {character} " if is_mark else character
    return spaced.split()


def vocabulary(names: list[tuple[int, str, str]]) -> list[str]:
    """Return WordPiece tokens: special tokens, characters to spell any word, the words of captions by frequency."""
    counts = Counter(word for text in all_captions(names) for word in words(text))
    marks = sorted(word for word in counts if not word.isalnum())
    tokens = [*SPECIAL_TOKENS, *CHARACTERS, *(f"##{c}" for c in CHARACTERS), *marks]
    tokens += [word for word, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))]
    return list(dict.fromkeys(tokens))


def texts(names: list[tuple[int, str, str]], drawings: dict[int, np.ndarray]) -> dict[str, str]:
    """Return the text files of the data folder, by name."""
    from ldm.data.emoji import SIZES

    table = ["code point\tunicode name\tcldr short name"]
    table += [f"U+{codepoint:04X}\t{unicode_name}\t{cldr_name}" for codepoint, unicode_name, cldr_name in names]
    class_names = [f"{cldr_name}\t{unicode_name}" for _, unicode_name, cldr_name in names]
    checksums = {f"drawings-{size}.webp": hashlib.sha256(drawings[size].tobytes()).hexdigest() for size in SIZES}
    return {
        "names.tsv": "\n".join(table) + "\n",
        "class_names.txt": "\n".join(class_names) + "\n",
        "vocab.txt": "\n".join(vocabulary(names)) + "\n",
        "checksums.json": json.dumps({"drawings": len(names), "sha256_of_pixels": checksums}, indent=2) + "\n",
    }


def write(out: Path, names: list[tuple[int, str, str]], drawings: dict[int, np.ndarray]) -> None:
    """Write every generated file of the data folder."""
    from PIL import Image

    from ldm.data.emoji import SIZES, join_sheet

    for name, text in texts(names, drawings).items():
        with atomic_path(out / name) as temporary:
            temporary.write_text(text, encoding="utf-8", newline="\n")
    for size in SIZES:
        with atomic_path(out / f"drawings-{size}.webp") as temporary:
            sheet = Image.fromarray(join_sheet(drawings[size]))
            sheet.save(temporary, format="WEBP", lossless=True, exact=True)
    logger.info("wrote %d drawings to %s", len(names), out)


def check(out: Path, names: list[tuple[int, str, str]], drawings: dict[int, np.ndarray]) -> None:
    """Compare a new build with the data folder.

    Raises:
        UserError: A file differs.
    """
    import numpy as np

    from ldm.data.emoji import SIZES, load_drawings, read_names

    for name, text in texts(names, drawings).items():
        if not (out / name).is_file() or (out / name).read_text(encoding="utf-8") != text:
            raise UserError(f'"{out / name}" differs from a new build')
    for size in SIZES:
        if len(read_names(out)) != len(names) or not np.array_equal(load_drawings(size, out).rgba, drawings[size]):
            raise UserError(f'the pixels of "{out / f"drawings-{size}.webp"}" differ from a new build')
    logger.info("%s equals a new build (%d drawings)", out, len(names))


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = Parser(description="Build the emoji training data again.", epilog=example("build_emoji_data", "--check"))
    parser.add_argument("--font", type=Path, default=FONT, help=f"NotoColorEmoji.ttf (default: {FONT})")
    parser.add_argument("--out", type=Path, help="data folder (default: data/emoji)")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a file differs from a new build")
    args = parser.parse_args(argv)
    rendered = render_all(args.font)

    from ldm.data.emoji import DEFAULT_ROOT

    (check if args.check else write)(DEFAULT_ROOT if args.out is None else args.out, *rendered)


if __name__ == "__main__":
    sys.exit(main())
