"""Frozen linear layers whose weight is 8-bit numbers times scales."""

from functools import partial

import torch
from torch import Tensor, nn

from mpp.memory.linear import QuantisedLinear, Unpack

FP8, INT8 = torch.float8_e4m3fn, torch.int8
_ROWS = 512  # quantised at once, so that float32 copies stay small
_ROUNDED = {FP8: torch.finfo(FP8).max, INT8: 127.0}  # what the largest number of a row becomes


class ScaledLinear(QuantisedLinear):
    """A linear layer whose weight is `numbers * scale`, multiplied in float32 where the scale is that exact.

    Args:
        numbers: (out, in), `float8_e4m3fn`, `float8_e5m2` or `int8`.
        scale: One for the whole weight, of no dimension, or (out, 1), one for each output row.
        bias: (out,) in `dtype`, or None.
        dtype: Of the weight in computations outside autocast.
    """

    def __init__(self, numbers: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__(numbers.view(torch.int8), scale, bias, features=tuple(numbers.shape), dtype=dtype)
        self.format = numbers.dtype

    def unpacked(self) -> Unpack:
        """As `QuantisedLinear` says."""
        return partial(_unpack, self.format)

    def extra_repr(self) -> str:
        """With the format of the numbers."""
        return f"{super().extra_repr()}, format={self.format}"


def dequantized(numbers: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """A weight, `numbers * scale`: multiplied in float32 where the scale is that exact, and rounded once to `dtype`.

    Args:
        numbers: (out, ...), 8-bit numbers, which every `dtype` holds exactly.
        scale: One for all, or one for each `out` in any shape.
        dtype: Of the weight.
    """
    by_row = scale.reshape(-1, *[1] * (numbers.dim() - 1))  # never of no dimension, which torch rounds on a GPU
    return (numbers.to(dtype) * by_row).to(dtype)


def _unpack(format: torch.dtype, weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return dequantized(weight.view(format), scale, dtype)


def scaled(linear: nn.Linear, format: torch.dtype) -> ScaledLinear:
    """A linear layer's weight as 8-bit numbers, each row scaled so that its largest has the format's largest magnitude.

    `scale = max |w| / m` per output row with m = 448 for e4m3 (its largest number) or 127 for int8, in the weight's own
    precision; 1 for rows of zeros.

    Args:
        linear: In float32, bfloat16 or float16; may lie on the meta device.
        format: `FP8` or `INT8`.
    """
    weight, most = linear.weight.detach(), _ROUNDED[format]
    numbers, scales = torch.empty_like(weight, dtype=format), []
    for rows, kept in zip(weight.split(_ROWS), numbers.split(_ROWS), strict=True):
        scale = (rows.abs().amax(dim=1, keepdim=True).float() / most).to(weight.dtype)
        scales.append(torch.where(scale > 0, scale, 1))
        fractions = (rows.float() / scales[-1].float()).clamp_(-most, most)
        kept.copy_(fractions.round_() if format == INT8 else fractions)
    bias = None if linear.bias is None else linear.bias.detach()
    return ScaledLinear(numbers, torch.cat(scales), bias, weight.dtype)
