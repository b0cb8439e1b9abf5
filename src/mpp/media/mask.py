"""What a mask says, and what is none: the one rule for images, videos and folders of frames, whoever reads them.

White is learned (1), black is kept (0), greys are between: a value is the grey over the file's white, at the depth of
the file. Refused is what means something else than its grey:

- an alpha channel that is not opaque everywhere: grey or alpha may be meant;
- colours more than 32 of 255 apart: less is what lossy formats do to greys;
- numbers of labels: the brightest value of the whole mask is above 0 and at most 1/255 of white, as where classes 0
  and 1 are saved as such, or up to 255 of them with 16 bits. Next to nothing would learn. All frames of a clip count
  together: some may be dark, and wholly black masks are ordinary. Lossy formats are left out: they do that to black;
- numbers below 0 or above white, where a file can hold such.

Files with several images (animations, pages) are refused before, as for images. An alpha channel that serves as the
mask is taken as it is.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from mpp.media.paths import MediaPath

_GREY_TOLERANCE = 32 / 255
_DARKEST = 1.001 / 255  # float32 rounds
_LUMA = np.array([19595, 38470, 7471], np.uint32)  # BT.601 as Pillow has it; of 65536, so greys stay what they are


@dataclass(frozen=True)
class Mask:
    """A mask of one frame.

    Attributes:
        values: `(height, width)` float32 in [0, 1]; 1 = learn.
        bits: 8 or 16 per pixel, of its file.
    """

    values: np.ndarray
    bits: int = 8

    @property
    def size(self) -> tuple[int, int]:
        """Width and height."""
        return self.values.shape[1], self.values.shape[0]

    def levels(self) -> np.ndarray:
        """As whole numbers from 0 to 255 or 65535; exact for what was read from a file of that depth."""
        top = 2**self.bits - 1
        return np.rint(self.values.clip(0, 1).astype(np.float64) * top).astype(
            np.uint8 if self.bits == 8 else np.uint16
        )


@dataclass(frozen=True)
class RawMask:
    """One frame as its file has it, before it is asked what it means.

    Attributes:
        path: The file.
        colours: Greys `(height, width)`, or red, green and blue `(3, height, width)`.
        white: The number that means 1: 255, 1023, ..., 65535; 1 in files of floating point.
        alpha: `(height, width)` float32 in [0, 1], or None where the file has none.
        lossy: Whether its format changes numbers.
    """

    path: MediaPath
    colours: np.ndarray
    white: int
    alpha: np.ndarray | None = None
    lossy: bool = False

    @property
    def top(self) -> float:
        """The greatest of its numbers."""
        return float(self.colours.max())

    def mask(self) -> Mask:
        """What it says, if it is a frame of a mask at all; label numbers show in all frames only, see `Judge`.

        Raises:
            ValueError: It has an alpha channel that is not opaque, colours, or numbers out of range.
        """
        if self.alpha is not None and self.alpha.min() < 1:
            raise ValueError(
                f"{self.path}: this mask has a transparent alpha channel, so it is unclear whether its grey or its "
                "alpha is meant; save it as plain greyscale, or let `python -m mpp.masks tool=from_alpha` "
                "make masks of its alpha"
            )
        values = grey(self.colours, self.white, self.path)
        if self.colours.ndim == 3 and np.ptp(self.colours, axis=0).max() > _GREY_TOLERANCE * self.white:
            raise ValueError(
                f"{self.path}: this mask has colours, as maps of labels have, and it is unclear which are to be "
                "learned; save it as plain greyscale: white is learned, black is kept. `python -m mpp.masks` makes "
                "masks of colours (tool=from_color) and of palettes' indices (tool=tiers tool.values=index)"
            )
        return Mask(values, 8 if self.white == 255 else 16)


class Judge:
    """Sees all frames of one mask, an image's only one or those of a clip, and says at the end whether it is one.

    Args:
        labels: Whether numbers of labels are wanted.
    """

    def __init__(self, *, labels: bool = False) -> None:
        self._labels, self._dark, self._shown = labels, None, False

    def mask(self, raw: RawMask) -> Mask:
        """The next frame.

        Raises:
            ValueError: It is none of a mask, see `RawMask.mask`.
        """
        mask = raw.mask()
        brightest = float(mask.values.max())
        self._shown = self._shown or brightest > _DARKEST
        if not raw.lossy and 0 < brightest <= _DARKEST and (self._dark is None or self._dark.top < raw.top):
            self._dark = raw
        return mask

    def close(self) -> None:
        """After the last frame.

        Raises:
            ValueError: All of them together hold numbers of labels.
        """
        dark = self._dark
        if dark is not None and not self._shown and not self._labels:
            raise ValueError(
                f"{dark.path}: the brightest value of this mask is {dark.top:g} of {dark.white}, as in maps of labels; "
                f"save it so that what is learned is white ({dark.white}), or give its numbers their values with "
                "`python -m mpp.masks tool=tiers`"
            )


def judged(frames: Iterable[RawMask], *, labels: bool = False) -> Iterator[Mask]:
    """The masks of an image or of all frames of a clip, the last one when all of them are known to be a mask.

    Args:
        frames: All of them, in order.
        labels: As in `Judge`.

    Raises:
        ValueError: They are no mask; frames before that were given.
    """
    judge, last = Judge(labels=labels), None
    for raw in frames:
        if last is not None:
            yield last
        last = judge.mask(raw)
    judge.close()
    if last is not None:
        yield last


def grey(colours: np.ndarray, white: int, path: MediaPath) -> np.ndarray:
    """Luminance `(height, width)` float32 in [0, 1] of greys or of red, green and blue.

    Args:
        colours: As in `RawMask`.
        white: The number that means 1.
        path: For the error.

    Raises:
        ValueError: Numbers are out of range.
    """
    if colours.dtype.kind != "u":
        low, high = colours.min(), colours.max()
        if not (low >= 0 and high <= white):  # NaN is neither
            raise ValueError(
                f"{path} has values from {low:g} to {high:g}, and those of its kind go from 0 to {white}; save it with "
                "8 or 16 bits"
            )
    if colours.ndim == 3:
        red, green, blue = (plane * factor for plane, factor in zip(colours, _LUMA, strict=True))
        colours = (red + green + blue + 0x8000) >> 16
    return colours.astype(np.float32) / white
