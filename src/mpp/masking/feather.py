"""Softer, wider or narrower masks."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from mpp.data.mask import Mask
from mpp.masking.clips import Clip
from mpp.masking.tools import Tool, one_of

_REACH = 4.0  # sigmas: what is left outside is below 1/255


@dataclass(frozen=True)
class Feather(Tool):
    """Grow or shrink masks, then soften their edges. What touches the picture's border goes on beyond it.

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

    def apply(self, clip: Clip, other: Clip | None) -> Iterator[Mask]:
        """The softened masks."""
        del other
        for mask in clip.masks():
            yield Mask(self._softened(torch.from_numpy(mask.values)).numpy(), mask.bits)

    def _softened(self, values: Tensor) -> Tensor:
        grown = grow(values, self.grow) if self.grow >= 0 else 1 - grow(1 - values, -self.grow)
        soft = blur(grown, self.sigma)
        if self.side == "both":
            return soft
        return torch.maximum(soft, grown) if self.side == "out" else torch.minimum(soft, grown)


def grow(values: Tensor, radius: int) -> Tensor:
    """The greatest value within `radius` pixels (Euclidean) of each, `(height, width)`; outside is nothing."""
    if radius == 0:
        return values
    height, width = values.shape
    padded = functional.pad(values[None, None], (radius,) * 4, value=-1.0)[0, 0]
    rows = padded[:, radius : radius + width]  # the greatest value within `reach` to the left and right
    grown = values
    for reach in range(radius + 1):
        for start in (radius - reach, radius + reach):
            rows = torch.maximum(rows, padded[:, start : start + width])
        for away in range(-radius, radius + 1):
            if math.isqrt(radius**2 - away**2) == reach:
                grown = torch.maximum(grown, rows[radius + away : radius + away + height])
    return grown


def blur(values: Tensor, sigma: float) -> Tensor:
    """Gaussian of `(height, width)` float32 in [0, 1], borders repeated."""
    if sigma == 0:
        return values
    reach = max(1, math.ceil(_REACH * sigma))
    offset = torch.arange(-reach, reach + 1, dtype=torch.float64)
    kernel = torch.exp(-(offset**2) / (2 * sigma**2))
    kernel = (kernel / kernel.sum()).to(values.dtype)
    padded = functional.pad(values[None, None], (reach, reach, reach, reach), mode="replicate")
    soft = functional.conv2d(functional.conv2d(padded, kernel.view(1, 1, 1, -1)), kernel.view(1, 1, -1, 1))
    return soft[0, 0].clamp(0, 1)
