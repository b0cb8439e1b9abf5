"""One geometry for an image and its mask: buckets, crops, and masks in latent cells."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

ASPECT_TOLERANCE = 0.01
MUCH_CROPPED = 0.2  # share of an image that its bucket leaves out, above which it is named


@dataclass(frozen=True)
class Geometry:
    """How an image becomes its bucket: scaled to cover it, the overhang cropped evenly, perhaps mirrored.

    The same record serves image and mask, each at its own resolution.

    Attributes:
        source: Width and height of the upright image in pixels.
        size: Width and height of the bucket in pixels.
        flip: Mirrored left to right.
    """

    source: tuple[int, int]
    size: tuple[int, int]
    flip: bool = False

    @property
    def scale(self) -> float:
        """Bucket pixels per source pixel; above 1 the image is enlarged."""
        return max(self.size[0] / self.source[0], self.size[1] / self.source[1])

    @property
    def cropped(self) -> float:
        """Share of the image's area that the bucket leaves out, in [0, 1)."""
        return 1 - min(self._aspects()) / max(self._aspects())

    def box(self, width: int, height: int) -> tuple[float, float, float, float]:
        """The crop (left, top, right, bottom) in an image of `width` by `height` that shows the whole source.

        It lies inside the image without any rounding: Pillow refuses an edge at -1e-13.
        """
        wide, high = self._aspects()
        left, top = max(0.0, 1 - wide / high) / 2 * width, max(0.0, 1 - high / wide) / 2 * height
        return left, top, width - left, height - top

    def _aspects(self) -> tuple[int, int]:
        """The bucket's aspect ratio and the source's, as whole numbers of one scale."""
        return self.size[0] * self.source[1], self.size[1] * self.source[0]


@dataclass(frozen=True)
class Buckets:
    """Sizes that images are brought to: about `resolution`^2 pixels at many aspect ratios.

    Args:
        resolution: Side of the square bucket in pixels; other buckets have at most its area.
        step: Sides are multiples of this.
        max_aspect: Longest side over shortest, >= 1.

    Raises:
        ValueError: The resolution is below one step, or the aspect below 1 or infinite.
    """

    resolution: int
    step: int
    max_aspect: float = 2.0

    def __post_init__(self) -> None:
        """Refuse settings out of range."""
        if self.resolution < self.step:
            raise ValueError(f"data.resolution must be at least {self.step} for this model, got {self.resolution}")
        if not 1 <= self.max_aspect < math.inf:
            raise ValueError(f"data.max_aspect must be at least 1 and finite, got {self.max_aspect}")

    def sizes(self) -> list[tuple[int, int]]:
        """All buckets as (width, height), each as large as the area allows for one of its sides; at least a square."""
        area = self.resolution**2
        found = set()
        for units in range(1, int(self.resolution * self.max_aspect) // self.step + 1):
            side = units * self.step
            other = area // side // self.step * self.step
            if other >= self.step and max(side / other, other / side) <= self.max_aspect:
                found |= {(side, other), (other, side)}
        square = self.resolution // self.step * self.step
        return sorted(found) or [(square, square)]

    def choose(self, width: int, height: int) -> tuple[int, int]:
        """The bucket whose aspect ratio is nearest (by its logarithm), the larger one where two are equally near."""
        aspect = math.log(width / height)
        return min(self.sizes(), key=lambda s: (round(abs(math.log(s[0] / s[1]) - aspect), 9), -s[0] * s[1]))


def check_aspect(mask: tuple[int, int], image: tuple[int, int], name: str) -> None:
    """Refuse a mask of another shape than its image; a smaller or larger one of the same shape is fine.

    Raises:
        ValueError: The aspect ratios differ by more than 1 %.
    """
    ratio = (mask[0] * image[1]) / (mask[1] * image[0])
    if max(ratio, 1 / ratio) > 1 + ASPECT_TOLERANCE:
        raise ValueError(
            f"{name}: the mask is {mask[0]}x{mask[1]}, its image {image[0]}x{image[1]}: another aspect ratio; "
            "export the mask at the image's shape"
        )


def crop_image(original: Image.Image, geometry: Geometry) -> Image.Image:
    """The image in its bucket (Lanczos)."""
    box = geometry.box(*original.size)
    image = original.resize(geometry.size, Image.Resampling.LANCZOS, box=box)
    return ImageOps.mirror(image) if geometry.flip else image


def image_tensor(image: Image.Image) -> Tensor:
    """RGB in [-1, 1], `(3, 1, height, width)` float32: a clip of one frame."""
    pixels = torch.from_numpy(np.asarray(image, dtype=np.float32).copy())
    return (pixels / 127.5 - 1).permute(2, 0, 1).unsqueeze(1)


def latent_mask(mask: np.ndarray, geometry: Geometry, cells: tuple[int, int]) -> Tensor:
    """Area average of a mask over each latent cell, `(1, 1, h, w)` float32.

    Every pixel counts with the part of it that lies in the cell, so no size needs to divide another.

    Args:
        mask: `(height, width)` at any resolution of the image's shape.
        geometry: The image's.
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
