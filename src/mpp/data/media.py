"""Pictures and masks to tensors, through one geometry for both."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from mpp.data.mask import grey, judged
from mpp.data.picture_files import (
    decode,
    is_deep,
    open_picture,
    orientation,
    read_deep,
    read_raw_mask,
    reading,
    white_of,
    with_alpha,
)
from mpp.data.places import Place

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif"})
VIDEO_SUFFIXES = frozenset({".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v", ".mpg", ".mpeg", ".ts", ".wmv", ".flv"})
ASPECT_TOLERANCE = 0.01


@dataclass(frozen=True)
class Picture:
    """A picture upright as its EXIF orientation says.

    Attributes:
        rgb: 8-bit RGB. Pixels under a transparent alpha keep their colour: nothing is composited.
        alpha: `(height, width)` float32 in [0, 1], or None where the file has no alpha.
    """

    rgb: Image.Image
    alpha: np.ndarray | None


@dataclass(frozen=True)
class Geometry:
    """How a picture becomes its bucket: scaled to cover it, the overhang cropped evenly, perhaps mirrored.

    The same record serves picture and mask, each at its own resolution.

    Attributes:
        source: Width and height of the upright picture in pixels.
        size: Width and height of the bucket in pixels.
        flip: Mirrored left to right.
    """

    source: tuple[int, int]
    size: tuple[int, int]
    flip: bool = False

    @property
    def scale(self) -> float:
        """Bucket pixels per source pixel; above 1 the picture is enlarged."""
        return max(self.size[0] / self.source[0], self.size[1] / self.source[1])

    def box(self, width: int, height: int) -> tuple[float, float, float, float]:
        """The crop (left, top, right, bottom) in an image of `width` by `height` that shows the whole source."""
        kept_x = self.size[0] / (self.source[0] * self.scale)
        kept_y = self.size[1] / (self.source[1] * self.scale)
        left, top = (1 - kept_x) / 2 * width, (1 - kept_y) / 2 * height
        return left, top, left + kept_x * width, top + kept_y * height


@dataclass(frozen=True)
class Buckets:
    """Sizes that pictures are brought to: about `resolution`^2 pixels at many aspect ratios.

    Args:
        resolution: Side of the square bucket in pixels; other buckets have at most its area.
        step: Sides are multiples of this.
        max_aspect: Longest side over shortest, >= 1.

    Raises:
        ValueError: The resolution is below one step, or the aspect below 1.
    """

    resolution: int
    step: int
    max_aspect: float = 2.0

    def __post_init__(self) -> None:
        """Refuse settings out of range."""
        if self.resolution < self.step:
            raise ValueError(f"data.resolution must be at least {self.step} for this model, got {self.resolution}")
        if not self.max_aspect >= 1:
            raise ValueError(f"data.max_aspect must be at least 1, got {self.max_aspect}")

    def sizes(self) -> list[tuple[int, int]]:
        """All buckets as (width, height), each as large as the area allows for one of its sides."""
        area = self.resolution**2
        found = set()
        for units in range(1, int(self.resolution * self.max_aspect) // self.step + 1):
            side = units * self.step
            other = area // side // self.step * self.step
            if other >= self.step and max(side / other, other / side) <= self.max_aspect:
                found |= {(side, other), (other, side)}
        return sorted(found)

    def choose(self, width: int, height: int) -> tuple[int, int]:
        """The bucket whose aspect ratio is nearest (by its logarithm), the larger one where two are equally near."""
        aspect = math.log(width / height)
        return min(self.sizes(), key=lambda s: (round(abs(math.log(s[0] / s[1]) - aspect), 9), -s[0] * s[1]))


def is_video(path: Place) -> bool:
    """Whether a path is a clip: a video by its suffix, or a folder of frames."""
    suffix = path.suffix.lower()
    return suffix in VIDEO_SUFFIXES or (suffix not in SUFFIXES and path.is_dir())


def picture_size(path: Place) -> tuple[int, int]:
    """Width and height of the upright picture, without decoding it.

    Raises:
        ValueError: The file is no readable picture, or holds several.
    """
    with reading(path, "not a readable picture") as handle:
        image = open_picture(handle, path)
        turned = orientation(image) in (5, 6, 7, 8)
        return (image.height, image.width) if turned else (image.width, image.height)


def read_picture(path: Place) -> Picture:
    """Decode a picture whole.

    Raises:
        ValueError: The file is no readable picture, is truncated or damaged, holds several pictures, or numbers out of
            range.
    """
    with reading(path, "not a readable picture, or truncated") as handle:
        image, alpha = with_alpha(decode(handle, path))
        deep = read_deep(handle, path)
    if is_deep(image):
        values = grey(np.asarray(image), white_of(image), path)
        return Picture(Image.fromarray((values * 255).round().astype(np.uint8)).convert("RGB"), alpha)
    if alpha is None:
        return Picture(image.convert("RGB"), None)
    if deep is not None and deep.shape[2] in (2, 4):
        alpha = (deep[..., -1] / 65535).astype(np.float32)
    return Picture(Image.merge("RGB", image.split()[:3]), alpha)


def read_mask(path: Place) -> np.ndarray:
    """Decode a mask to `(height, width)` float32 in [0, 1]; 1 = learn.

    Raises:
        ValueError: The file is no readable picture, is truncated or damaged, holds several pictures, or is no mask by
            the rule in `mpp.data.mask`.
    """
    return next(judged([read_raw_mask(path)])).values


def check_aspect(mask: tuple[int, int], picture: tuple[int, int], name: str) -> None:
    """Refuse a mask of another shape than its picture; a smaller or larger one of the same shape is fine.

    Raises:
        ValueError: The aspect ratios differ by more than 1 %.
    """
    ratio = (mask[0] * picture[1]) / (mask[1] * picture[0])
    if max(ratio, 1 / ratio) > 1 + ASPECT_TOLERANCE:
        raise ValueError(
            f"{name}: the mask is {mask[0]}x{mask[1]}, its picture {picture[0]}x{picture[1]}: another aspect ratio; "
            "export the mask at the picture's shape"
        )


def crop_picture(picture: Image.Image, geometry: Geometry) -> Image.Image:
    """The picture in its bucket (Lanczos)."""
    box = geometry.box(*picture.size)
    image = picture.resize(geometry.size, Image.Resampling.LANCZOS, box=box)
    return ImageOps.mirror(image) if geometry.flip else image


def picture_tensor(image: Image.Image) -> Tensor:
    """RGB in [-1, 1], `(3, 1, height, width)` float32: a clip of one frame."""
    pixels = torch.from_numpy(np.asarray(image, dtype=np.float32).copy())
    return (pixels / 127.5 - 1).permute(2, 0, 1).unsqueeze(1)


def latent_mask(mask: np.ndarray, geometry: Geometry, cells: tuple[int, int]) -> Tensor:
    """Area average of a mask over each latent cell, `(1, 1, h, w)` float32.

    Every pixel counts with the part of it that lies in the cell, so no size needs to divide another.

    Args:
        mask: `(height, width)` at any resolution of the picture's shape.
        geometry: The picture's.
        cells: Latent height and width.
    """
    height, width = mask.shape
    left, top, right, bottom = geometry.box(width, height)
    rows = overlaps(top, bottom, cells[0], height)
    columns = overlaps(left, right, cells[1], width)
    average = torch.from_numpy((rows @ mask.astype(np.float64) @ columns.T).astype(np.float32)).clamp(0, 1)
    return (average.flip(1) if geometry.flip else average)[None, None]


def overlaps(start: float, stop: float, cells: int, pixels: int) -> np.ndarray:
    """Share of each pixel in each of `cells` equal cells from `start` to `stop`: `(cells, pixels)`; rows sum to 1.

    A pixel that a cell touches by rounding alone has no share, so that no cell beside an area takes a trace of it.
    """
    edges = np.linspace(start, stop, cells + 1)
    pixel = np.arange(pixels)
    inside = np.minimum(edges[1:, None], pixel + 1) - np.maximum(edges[:-1, None], pixel)
    covered = np.where(inside > 1e-9, inside, 0)
    return covered / covered.sum(1, keepdims=True)
