"""Masks and alpha channels, and masks over their images for looking."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image

from mpp.masking.pixels import Pixels, enlarge, fit_mask, read_rgb
from mpp.masking.sequences import FrameSequence
from mpp.masking.tools import Tool, needs_masks, one_of, together
from mpp.media.geometry import check_aspect
from mpp.media.lettering import font_size
from mpp.media.mask import Mask
from mpp.media.region_colours import LEARNED, PRESERVED, plain_weights, region_overlay, with_legend

_LEAST_LEGEND = 280  # pixels of width: below that its words cannot be read


@dataclass(frozen=True)
class FromAlpha(Tool):
    """Masks from the alpha channel of images and videos: opaque is learned.

    Args:
        missing: Images without an alpha channel: `fail`, or `white`: learn all of them.

    Raises:
        ValueError: An unknown word.
    """

    missing: Literal["fail", "white"] = "fail"

    reads = "image"

    def __post_init__(self) -> None:
        """Refuse unknown words."""
        one_of("tool.missing", self.missing, ("fail", "white"))

    def apply(self, clip: FrameSequence, other: FrameSequence | None) -> Iterator[Mask]:
        """The alpha channels, exactly."""
        del other
        for number, alpha in enumerate(clip.alphas()):
            if alpha is None and self.missing == "fail":
                where = clip.path if clip.is_video else clip.files[number]
                raise ValueError(f"{where} has no alpha channel; set tool.missing=white to learn all of it")
            yield alpha or _white(clip)

    def settings(self, key: str) -> dict[str, object]:
        """Nothing: where `missing` matters, the image says so."""
        return {}


def _white(clip: FrameSequence) -> Mask:
    image = next(clip.images())
    return Mask(np.ones((image.rgb.height, image.rgb.width), np.float32))


@dataclass(frozen=True)
class ToAlpha(Tool):
    """Images with their masks as alpha channel. Colours stay exactly as they are, also where alpha is 0.

    Args:
        masks: Folder of masks, matched by path and name, or one mask for all.
        resize: Bring masks to the image's size; else other sizes are errors.
        missing: Images without a mask: `fail`, or `white`: make them opaque, so that all of them is learned.

    Raises:
        ValueError: A setting is missing or unknown.
    """

    masks: str | None = None
    resize: bool = False
    missing: Literal["fail", "white"] = "fail"

    reads = "image"
    writes = "image"

    def __post_init__(self) -> None:
        """Refuse what is missing or unknown."""
        needs_masks(self.masks)
        one_of("tool.missing", self.missing, ("fail", "white"))

    def apply(self, clip: FrameSequence, other: FrameSequence | None) -> Iterator[Pixels]:
        """RGBA, 16 bits deep where image or mask is."""
        colours = map(read_rgb, clip.files)
        if clip.is_video:
            colours = (Pixels(np.asarray(frame.rgb)) for frame in clip.images())
        if other is None:
            for pixels in colours:
                yield _with_alpha(pixels, Mask(np.ones(pixels.array.shape[:2], np.float32)))
            return
        what = f"{other.path} and {clip.path}"
        for pixels, mask in together(clip, colours, other, other.masks()):
            size = pixels.array.shape[1], pixels.array.shape[0]
            yield _with_alpha(pixels, fit_mask(mask, size, what, resize=self.resize))


def _with_alpha(pixels: Pixels, mask: Mask) -> Pixels:
    rgb, deep = pixels.array, pixels.array.dtype == np.uint16 or mask.bits == 16
    if deep and rgb.dtype == np.uint8:
        rgb = rgb.astype(np.uint16) * 257  # the same colour: 255 becomes 65535
    alpha = Mask(mask.values, 16 if deep else 8).levels()
    return Pixels(np.concatenate([rgb, alpha[..., None]], axis=2), pixels.icc)


@dataclass(frozen=True)
class Preview(Tool):
    """Images in grey with their masks over them, for looking: orange is learned, hatched blue is preserved.

    Below images that are wide enough stands the legend.

    Args:
        masks: Folder of masks, matched by path and name, or one mask for all.
        side: Longest side of the result in pixels; smaller images stay as they are.
        missing: Images without a mask: `fail`, or `white`: show all of it as learned.

    Raises:
        ValueError: A setting is missing, unknown or out of range.
    """

    masks: str | None = None
    side: int = 1024
    missing: Literal["fail", "white"] = "fail"

    reads = "image"
    writes = "image"
    video_suffix = ".mp4"

    def __post_init__(self) -> None:
        """Refuse what is missing, unknown or out of range."""
        needs_masks(self.masks)
        one_of("tool.missing", self.missing, ("fail", "white"))
        if self.side < 16:
            raise ValueError(f"tool.side must be at least 16 pixels, got {self.side}")

    def apply(self, clip: FrameSequence, other: FrameSequence | None) -> Iterator[Pixels]:
        """RGB, 8 bits."""
        if other is None:
            for image in clip.images():
                yield self._shown(image.rgb, _white(clip))
            return
        for image, mask in together(clip, clip.images(), other, other.masks()):
            check_aspect(mask.size, image.rgb.size, f"{other.path} and {clip.path}")
            yield self._shown(image.rgb, mask)

    def settings(self, key: str) -> dict[str, object]:
        """And that the colours are these: before, what is preserved was red."""
        return {**super().settings(key), "colours": [LEARNED, PRESERVED]}

    def _shown(self, image: Image.Image, mask: Mask) -> Pixels:
        small = self._small(image)
        shown = region_overlay(small, *plain_weights(enlarge(mask.values, small.size)))
        return Pixels(np.asarray(with_legend(shown, font_size(shown.width)) if shown.width >= _LEAST_LEGEND else shown))

    def _small(self, image: Image.Image) -> Image.Image:
        shrink = min(1.0, self.side / max(image.size))
        size = max(1, round(image.width * shrink)), max(1, round(image.height * shrink))
        return image if size == image.size else image.resize(size, Image.Resampling.LANCZOS)
