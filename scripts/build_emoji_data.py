"""Rebuild `data/emoji` from the Noto Color Emoji font: drawings, names, vocabulary, checksums.

    python scripts/build_emoji_data.py            # write data/emoji
    python scripts/build_emoji_data.py --check    # rebuild in memory and compare with data/emoji

Needs the extra `data` (the `emoji` package) and the font (Debian: fonts-noto-color-emoji).
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

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a bare clone too

from ldm.cli.command import Parser, command
from ldm.errors import UserError
from ldm.io.files import atomic_path

if TYPE_CHECKING:  # numpy, PIL and what the data sets need take seconds to import; mistakes are told before
    import numpy as np
    from PIL import ImageFont

log = logging.getLogger("build_emoji_data")

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
STRIKE = 109  # the font's only bitmap size; its glyphs are 136 x 128 pixels
GLYPH_WIDTH, GLYPH_HEIGHT = 136, 128
# Newer Unicode tables name a few more drawings; stopping here gives the same data on every Python from 3.11.
LAST_EMOJI_VERSION = 14
SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789"


def single_emoji() -> dict[int, str]:
    """Code point -> CLDR short name of every emoji that is one code point and has a Unicode name."""
    try:
        import emoji
    except ImportError:
        raise UserError('rebuilding needs the "emoji" package: pip install -e ".[data]"') from None
    names = {}
    for text, entry in emoji.EMOJI_DATA.items():
        if len(text) == 1 and entry["E"] <= LAST_EMOJI_VERSION and unicodedata.name(text, None):
            names[ord(text)] = entry["en"].strip(":").replace("_", " ").replace("’", "'").lower()
    return dict(sorted(names.items()))


def render(font: ImageFont.FreeTypeFont, character: str) -> np.ndarray | None:
    """The drawing of one character, (128, 128, 4) uint8, exactly as stored in the font; None if it has none.

    No drawing touches the four columns at either side of its glyph, so that squaring the canvas cuts nothing off.
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
        raise UserError(f"the drawing of U+{ord(character):04X} is wider than 128 px: not the font this was made for")
    pixels = pixels[:, margin:-margin]
    pixels[pixels[..., 3] == 0] = 0
    return pixels


def halve(rgba: np.ndarray) -> np.ndarray:
    """(N, 2S, 2S, 4) -> (N, S, S, 4) by averaging 2 x 2 pixels, each colour weighted by its alpha.

    Unweighted means would mix the black of invisible pixels into the edges. Integers keep it exact.
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


def draw_all(font_path: Path) -> tuple[list[tuple[int, str, str]], dict[int, np.ndarray]]:
    """Names (code point, Unicode name, CLDR short name) and, by size, drawings (N, S, S, 4)."""
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
    """Every caption that the data sets can give."""
    from ldm.data.emoji import COLOURS, caption

    for _, *both in names:
        for name in dict.fromkeys(both):
            yield caption(name)
            for colour in COLOURS:
                yield caption(name, colour)


def words(text: str) -> list[str]:
    """Split as BERT's uncased pre-tokenizer does: no accents, and every punctuation mark by itself."""
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
    """WordPiece tokens: special ones, letters and digits to spell any word, then the captions' words by frequency."""
    counts = Counter(word for text in all_captions(names) for word in words(text))
    marks = sorted(word for word in counts if not word.isalnum())
    tokens = [*SPECIAL_TOKENS, *CHARACTERS, *(f"##{c}" for c in CHARACTERS), *marks]
    tokens += [word for word, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))]
    return list(dict.fromkeys(tokens))


def texts(names: list[tuple[int, str, str]], drawings: dict[int, np.ndarray]) -> dict[str, str]:
    """The text files of the data folder, by name."""
    from ldm.data.emoji import SIZES

    table = ["code point\tunicode name\tcldr short name"]
    table += [f"U+{codepoint:04X}\t{unicode_name}\t{cldr_name}" for codepoint, unicode_name, cldr_name in names]
    checksums = {f"drawings-{size}.webp": hashlib.sha256(drawings[size].tobytes()).hexdigest() for size in SIZES}
    return {
        "names.tsv": "\n".join(table) + "\n",
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
    log.info("wrote %d drawings to %s", len(names), out)


def check(out: Path, names: list[tuple[int, str, str]], drawings: dict[int, np.ndarray]) -> None:
    """Compare a rebuild with the data folder.

    Raises:
        UserError: something differs.
    """
    import numpy as np

    from ldm.data.emoji import SIZES, load_drawings, read_names

    for name, text in texts(names, drawings).items():
        if not (out / name).is_file() or (out / name).read_text(encoding="utf-8") != text:
            raise UserError(f'"{out / name}" differs from a rebuild')
    for size in SIZES:
        if len(read_names(out)) != len(names) or not np.array_equal(load_drawings(size, out).rgba, drawings[size]):
            raise UserError(f'the pixels of "{out / f"drawings-{size}.webp"}" differ from a rebuild')
    log.info("%s is what a rebuild gives (%d drawings)", out, len(names))


@command
def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    parser = Parser(description="Draw the emoji training data again.")
    parser.add_argument("--font", type=Path, default=FONT, help=f"NotoColorEmoji.ttf (default: {FONT})")
    parser.add_argument("--out", type=Path, help="the data folder (default: data/emoji)")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the folder differs from a rebuild")
    options = parser.parse_args(argv)
    drawn = draw_all(options.font)

    from ldm.data.emoji import DEFAULT_ROOT

    (check if options.check else write)(DEFAULT_ROOT if options.out is None else options.out, *drawn)


if __name__ == "__main__":
    sys.exit(main())
