"""Text in images that are made for looking: one font, its size by that of the image, and panels side by side."""

from collections.abc import Sequence
from functools import lru_cache

from PIL import Image, ImageDraw, ImageFont, features

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

INK, PAPER = (29, 32, 35), (255, 255, 255)
_LEAST, _MOST = 13, 28  # pixels of the font: below no letter can be read, above it takes room from the images
_PER_FONT = 22  # a panel is so many times as wide as its font is high


@lru_cache(maxsize=32)
def font(size: int) -> Font:
    """Pillow's own font at a height in pixels; without FreeType its bitmap letters, which have one size."""
    return ImageFont.load_default(size) if features.check("freetype2") else ImageFont.load_default()


def font_size(width: int) -> int:
    """Height in pixels of the font for an image of a width in pixels."""
    return max(_LEAST, min(_MOST, width // _PER_FONT))


def line_height(size: int) -> int:
    """Pixels from one line of text to the next, for a font of a size in pixels."""
    return size + size // 2


def fitted(text: str, size: int, width: int) -> str:
    """A text on one line that is at most `width` pixels long: what is left out of its end is shown as "..."."""
    letters, text = font(size), " ".join(text.split())
    if not features.check("freetype2"):
        text = text.encode("latin-1", "replace").decode("latin-1")  # the bitmap font has no others
    if letters.getlength(text) <= width:
        return text
    low, high = 0, len(text)  # the longest beginning that fits
    while low < high:
        middle = (low + high + 1) // 2
        fits = letters.getlength(f"{text[:middle].rstrip()}...") <= width
        low, high = (middle, high) if fits else (low, middle - 1)
    return f"{text[:low].rstrip()}..." if low else ""


def write_line(sheet: Image.Image, at: tuple[int, int], text: str, size: int, width: int) -> None:
    """Write one line of text into an RGB image.

    Args:
        sheet: The image.
        at: Left and top in pixels of the line's room, which is `line_height(size)` high.
        text: What is written, as far as it fits.
        size: Of the font in pixels.
        width: Of the room in pixels.
    """
    middle = at[0], at[1] + line_height(size) // 2
    said, letters = fitted(text, size, width), font(size)
    draw = ImageDraw.Draw(sheet)
    if isinstance(letters, ImageFont.FreeTypeFont):
        draw.text(middle, said, fill=INK, font=letters, anchor="lm")
    else:
        draw.text(at, said, fill=INK, font=letters)


def panels(parts: Sequence[tuple[str, Image.Image]], size: int) -> Image.Image:
    """RGB images of one size side by side with gaps between them, each below its label.

    Args:
        parts: Labels and images, at least one. A label that is longer than its image is wide widens the columns.
        size: Of the font in pixels.
    """
    width, height = parts[0][1].size
    column = max(width, *(int(font(size).getlength(label)) + 1 for label, _ in parts))
    gap, header = size // 2, line_height(size)
    sheet = Image.new("RGB", (len(parts) * (column + gap) - gap, header + height), PAPER)
    for number, (label, image) in enumerate(parts):
        left = number * (column + gap)
        write_line(sheet, (left, 0), label, size, column)
        sheet.paste(image, (left, header))
    return sheet


def below_each_other(rows: Sequence[Image.Image], gap: int, margin: int = 0) -> Image.Image:
    """RGB images below each other on white, with a gap in pixels between them, and a margin around all."""
    width, height = max(row.width for row in rows), sum(row.height + gap for row in rows) - gap
    sheet = Image.new("RGB", (width + 2 * margin, height + 2 * margin), PAPER)
    top = margin
    for row in rows:
        sheet.paste(row, (margin, top))
        top += row.height + gap
    return sheet


def headed(text: str, image: Image.Image, size: int) -> Image.Image:
    """An RGB image below a line of text, as far as that fits, in a font of a size in pixels."""
    line = Image.new("RGB", (image.width, line_height(size)), PAPER)
    write_line(line, (0, 0), text, size, image.width)
    return below_each_other([line, image], 0)
