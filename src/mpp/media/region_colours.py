"""How regions are shown, wherever they are: learned is vermillion, preserved is hatched blue, over the image in grey.

Both colours are from Okabe and Ito's set, which people with any colour vision tell apart; the hatching tells them
apart without colour, and the grey below leaves no colour to the image, so that none of it can be taken for a region.
A cell between shows both colours by its weights; the less it weighs in all, the more of the grey image shows. The page
of `mpp.report` does the same in its `regions.js`, with the numbers here.
"""

from collections.abc import Callable

import numpy as np
from PIL import Image

from mpp.media.lettering import PAPER, font, line_height, write_line

Colour = tuple[int, int, int]
Weights = tuple[np.ndarray, np.ndarray]  # of the target and of the prior, each float in [0, 1]

LEARNED: Colour = (213, 94, 0)
PRESERVED: Colour = (0, 114, 178)
HATCHING: Colour = (150, 205, 245)  # lines on the latter
OPACITY = 0.5  # of a weight of 1
_LINES = 64  # of the hatching along the longer side
_LEAST_PERIOD = 6  # pixels
_LINE = 0.25  # of the period
_GREY = 128
_WIDE = (2, 4, 2)  # swatches of the legend, in heights of its font
_SMALLEST = 11  # pixels of its font


WORDS = ("learned", "between", "preserved")


def region_overlay(image: Image.Image, learned: np.ndarray, preserved: np.ndarray) -> Image.Image:
    """An image in grey with its regions over it in their colours, RGB of the image's size.

    Args:
        image: RGB.
        learned: Weights of the target `(h, w)` in [0, 1], in cells or pixels.
        preserved: Weights of the prior, of the same shape.
    """
    size = image.size
    learn, keep = (_enlarged(field, size)[..., None] for field in (learned, preserved))
    rows, columns = np.indices((size[1], size[0]))
    period = max(_LEAST_PERIOD, max(size) // _LINES)
    hatched = ((rows + columns) % period < _LINE * period)[..., None]
    colours = learn * np.array(LEARNED) + keep * np.where(hatched, HATCHING, PRESERVED)
    grey = np.asarray(image.convert("L"), dtype=np.float32)[..., None]
    mixed = grey * (1 - OPACITY * (learn + keep)) + OPACITY * colours
    return Image.fromarray(mixed.clip(0, 255).round().astype(np.uint8))


def field_image(field: np.ndarray, size: tuple[int, int], colour: Colour) -> Image.Image:
    """Weights by themselves, RGB: black where they are 0, the colour where they are 1.

    Args:
        field: `(h, w)` in [0, 1].
        size: Width and height of the result; cells stay sharp.
        colour: Of a weight of 1.
    """
    return Image.fromarray((_enlarged(field, size)[..., None] * np.array(colour)).round().astype(np.uint8))


def plain_weights(mask: np.ndarray) -> Weights:
    """Of a mask without a loss: what is not learned is preserved."""
    return mask, 1 - mask


def legend(width: int, size: int, weights: Callable[[np.ndarray], Weights] = plain_weights) -> Image.Image:
    """What the colours mean, on one line, RGB: each word beside its colour; between lie all masks from white to black.

    Args:
        width: Of the line in pixels.
        size: Of the font in pixels; a smaller one where the line is too short for it.
        weights: From raw mask values `(1, n)` to the weights that are shown of them.
    """
    while size > _SMALLEST and _length(size) > width:
        size -= 1
    high, gap = line_height(size), size // 2
    none, full = np.zeros((1, 1), np.float32), np.ones((1, 1), np.float32)
    ramp = np.linspace(1, 0, _WIDE[1] * size, dtype=np.float32)[None]
    sheet, left = Image.new("RGB", (width, high), PAPER), 0
    for word, wide, fields in zip(WORDS, _WIDE, ((full, none), weights(ramp), (none, full)), strict=True):
        swatch = region_overlay(Image.new("RGB", (wide * size, size), (_GREY,) * 3), *fields)
        sheet.paste(swatch, (left, (high - size) // 2))
        write_line(sheet, (left + swatch.width + gap, 0), word, size, width)
        left += _room(word, wide, size) + 2 * gap
    return sheet


def _room(word: str, wide: int, size: int) -> int:
    """Pixels that a word and its swatch take."""
    return wide * size + size // 2 + int(font(size).getlength(word)) + 1


def _length(size: int) -> int:
    """Pixels that the legend takes."""
    return sum(_room(word, wide, size) for word, wide in zip(WORDS, _WIDE, strict=True)) + 4 * (size // 2)


def with_legend(image: Image.Image, size: int) -> Image.Image:
    """An image of regions above its legend, RGB of the same width."""
    line = legend(image.width - size, size)
    sheet = Image.new("RGB", (image.width, image.height + line.height), PAPER)
    sheet.paste(image, (0, 0))
    sheet.paste(line, (size // 2, image.height))
    return sheet


def _enlarged(field: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Cells as pixels, float32, without smoothing."""
    cells = Image.fromarray(np.asarray(field, dtype=np.float32))
    return np.asarray(cells.resize(size, Image.Resampling.NEAREST))
