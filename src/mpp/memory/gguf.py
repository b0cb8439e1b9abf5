"""Frozen linear layers whose weight is as a GGUF file packs it, unpacked by diffusers.

Its own `GGUFLinear` keeps the unpacked weight for the backward pass.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mpp.memory.linear import QuantisedLinear, Unpack


class GgufLinear(QuantisedLinear):
    """A linear layer whose weight is packed as one of GGUF's types says, scales among the numbers.

    Args:
        weight: A `GGUFParameter` of diffusers, (out, in) once unpacked.
        bias: (out,) in `dtype`, or None.
        dtype: Of the weight in computations outside autocast.
    """

    def __init__(self, weight: Any, bias: Tensor | None, dtype: torch.dtype) -> None:  # noqa: ANN401
        super().__init__(
            weight.as_tensor().detach().view(torch.int8),
            torch.empty(0),
            bias,
            features=tuple(weight.quant_shape),
            dtype=dtype,
        )
        self.quant_type = weight.quant_type

    def unpacked(self) -> Unpack:
        """As `QuantisedLinear` says."""
        return partial(_unpack, self.quant_type)


def _unpack(quant_type: Any, weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:  # noqa: ANN401
    from diffusers.quantizers.gguf.utils import GGUFParameter  # noqa: PLC0415 (needs the package gguf, an extra)

    del scale
    return unpacked(GGUFParameter(weight.view(torch.uint8), quant_type=quant_type), dtype)


def unpacked(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A `GGUFParameter` as numbers."""
    from diffusers.quantizers.gguf.utils import dequantize_gguf_tensor  # noqa: PLC0415 (as above)

    return dequantize_gguf_tensor(weight).to(dtype)


def packed(linear: nn.Linear, weight: Tensor, dtype: torch.dtype) -> GgufLinear:
    """A linear layer that keeps a `GGUFParameter`.

    Args:
        linear: On the meta device; its bias goes over.
        weight: The parameter.
        dtype: That it computes in.
    """
    return GgufLinear(weight, linear.bias, dtype)
