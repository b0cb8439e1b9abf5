"""Softer, wider or narrower masks."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import ndimage

from mpp.masking.sequences import FrameSequence
from mpp.masking.tools import Tool, one_of
from mpp.media.mask import Mask

_REACH = 4.0  # sigmas: what is left outside is below 1/255


@dataclass(frozen=True)
class Feather(Tool):
    """Grow or shrink masks, then soften their edges. What touches the image's border goes on beyond it.

    Args:
        sigma: Of the Gaussian, in pixels, >= 0; 0 leaves edges hard.
        grow: Pixels by which bright areas grow over darker ones before that; negative shrinks them.
        side: Where edges become soft: `both` sides, only `out` (nothing gets darker) or only `in` (nothing gets
            brighter).

    Raises:
        ValueError: A setting out of range, or both 0.
    """

    sigma: float = 0.0
    grow: int = 0
    side: Literal["both", "out", "in"] = "both"

    def __post_init__(self) -> None:
        """Refuse what cannot be, or does nothing."""
        if not (self.sigma >= 0 and math.isfinite(self.sigma)):
            raise ValueError(f"tool.sigma must be at least 0, in pixels, got {self.sigma}")
        if self.sigma == 0 and self.grow == 0:
            raise ValueError("tool.sigma=0 and tool.grow=0 change nothing; set one of them")
        one_of("tool.side", self.side, ("both", "out", "in"))

    def apply(self, clip: FrameSequence, other: FrameSequence | None) -> Iterator[Mask]:
        """The softened masks."""
        del other
        return (Mask(self._softened(mask.values), mask.bits) for mask in clip.masks())

    def _softened(self, values: np.ndarray) -> np.ndarray:
        grown = grow(values, self.grow) if self.grow >= 0 else 1 - grow(1 - values, -self.grow)
        soft = blur(grown, self.sigma)
        if self.side == "both":
            return soft
        return np.maximum(soft, grown) if self.side == "out" else np.minimum(soft, grown)


def grow(values: np.ndarray, radius: int) -> np.ndarray:
    """The greatest value within `radius` pixels (Euclidean) of each, `(height, width)`; outside is nothing.

    A distance transform would be needed for each grey level, 0.09 s at 1920 x 1080: for a soft mask of 256 levels 23 s,
    where this takes 0.2 s (radius 30).
    """
    height, width = values.shape
    padded = np.pad(values, radius, constant_values=-1)
    rows = padded[:, radius : radius + width].copy()  # the greatest value within `reach` to the left and right
    grown = values.copy()
    for reach in range(radius + 1):
        for start in (radius - reach, radius + reach):
            np.maximum(rows, padded[:, start : start + width], out=rows)
        for away in range(-radius, radius + 1):
            if math.isqrt(radius**2 - away**2) == reach:
                np.maximum(grown, rows[radius + away : radius + away + height], out=grown)
    return grown


def blur(values: np.ndarray, sigma: float) -> np.ndarray:
    """Gaussian of `(height, width)` float32 in [0, 1], borders repeated."""
    if sigma == 0:
        return values
    return ndimage.gaussian_filter(values, sigma, mode="nearest", radius=max(1, math.ceil(_REACH * sigma))).clip(0, 1)
