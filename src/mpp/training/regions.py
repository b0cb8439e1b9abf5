"""The regions of a few samples as images: what a loss learns and preserves of them, cell by cell."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from mpp.cache.index import Entry
from mpp.cache.reader import Reader
from mpp.core.loss import MaskedPriorLoss
from mpp.core.masks import MaskWeights
from mpp.media.lettering import below_each_other, font_size, headed, panels
from mpp.media.region_colours import LEARNED, PRESERVED, WORDS, Weights, field_image, legend, region_overlay
from mpp.models.frame_axis import FrameAxis

_PANELS = 5  # side by side
_SIDES = 256, 512  # of the longer side of an image: smaller ones are enlarged, larger ones made smaller


def region_sheet(rows: Sequence[Image.Image], loss: MaskedPriorLoss) -> Image.Image:
    """Strips of `region_strip` below each other, the legend below them."""

    def weights(values: np.ndarray) -> Weights:
        found = loss.weights(torch.from_numpy(values)[None, None])
        return found.target[0, 0, 0].numpy(), found.prior[0, 0, 0].numpy()

    width = max(row.width for row in rows)
    size = font_size(width // _PANELS)
    line = legend(width, size, weights)
    return below_each_other([*rows, line], size, size)


def region_strip(cache: Reader, entry: Entry, loss: MaskedPriorLoss, axis: FrameAxis, given: int = 0) -> Image.Image:
    """Image, regions, mask, target weights and prior weights of one sample side by side; layers below each other.

    Args:
        cache: The cache.
        entry: The sample.
        loss: Whose regions are shown.
        axis: What its frames are: all layers are shown, and of a clip the first frame.
        given: Leading frames that the model is given, which are not shown.
    """
    weights = loss.weights(cache.mask(entry)[None, :, given:])
    rows, size = [], 0
    for number in axis.compared(entry.shape[1], given):
        with Image.open(cache.preview(entry.key, axis.suffix(number))) as opened:
            image = _scaled(opened.convert("RGB"))
        size = font_size(max(image.size))
        row = panels(_parts(image, weights, max(0, number - given)), size)
        words = entry.key, axis.name(number, entry.shape[1])
        rows.append(headed(", ".join(word for word in words if word), row, size))
    return below_each_other(rows, size)


def _parts(image: Image.Image, weights: MaskWeights, frame: int) -> list[tuple[str, Image.Image]]:
    """Labels and images of one frame."""
    learned, _, preserved = WORDS
    mask, target, prior = (field[0, 0, frame].numpy() for field in (weights.raw, weights.target, weights.prior))
    fields = (("mask", mask, (255, 255, 255)), (learned, target, LEARNED), (preserved, prior, PRESERVED))
    alone = [(f"{word} {field.mean():.0%}", field_image(field, image.size, colour)) for word, field, colour in fields]
    return [("image", image), ("regions", region_overlay(image, target, prior)), *alone]


def _scaled(image: Image.Image) -> Image.Image:
    least, most = _SIDES
    scale = min(most, max(least, *image.size)) / max(image.size)
    size = tuple(max(1, round(side * scale)) for side in image.size)
    return image if size == image.size else image.resize(size, Image.Resampling.LANCZOS)
