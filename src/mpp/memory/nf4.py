"""Frozen linear layers in 4 bits: NF4 of Dettmers et al. 2023 (QLoRA, arXiv 2305.14314), by bitsandbytes' kernels.

Its own `Linear4bit` is not used: it keeps scales where nothing that moves a model finds them, computes
in another precision than autocast's, and on some CPUs repacks the weight for inference so that no gradient passes it.
"""

from functools import partial

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from mpp.memory.linear import QuantisedLinear, Unpack

BLOCK = 64  # weights with a scale of their own
_ROWS = 4 * BLOCK  # quantised at once, so that they end with a block: on the CPU it makes 16 copies of them


class Nf4Linear(QuantisedLinear):
    """A linear layer whose weight is 4-bit numbers, each standing for one of 16, and a scale for every 64 of them.

    Args:
        packed: Two numbers a byte.
        scale: (out * in / 64,) float32, largest magnitude of each 64 numbers in a row-major weight.
        bias: (out,) in `dtype`, or None.
        features: Output and input features.
        dtype: Of the weight in computations outside autocast.
    """

    def unpacked(self) -> Unpack:
        """As `QuantisedLinear` says."""
        return partial(_dequantise, (self.out_features, self.in_features))


def _dequantise(features: tuple[int, int], weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    if weight.is_meta or isinstance(weight, FakeTensor):  # whose bytes are counted, perhaps without the package
        return torch.empty(features, dtype=dtype, device=weight.device)
    operation = torch.ops.bitsandbytes.dequantize_4bit.default
    return operation(weight.view(torch.uint8), scale, BLOCK, "nf4", features, dtype)


def quantised(linear: nn.Linear) -> Nf4Linear:
    """A linear layer's weight in NF4.

    Args:
        linear: In float32, bfloat16 or float16; may lie on the meta device.
    """
    weight, features = linear.weight.detach().contiguous(), (linear.out_features, linear.in_features)
    packed, scale = _quantise(weight)
    bias = None if linear.bias is None else linear.bias.detach()
    return Nf4Linear(packed.view(torch.int8), scale, bias, features=features, dtype=weight.dtype)


def _quantise(weight: Tensor) -> tuple[Tensor, Tensor]:
    if weight.is_meta:
        packed = weight.new_empty((weight.numel() + 1) // 2, 1, dtype=torch.uint8)
        return packed, weight.new_empty(-(-weight.numel() // BLOCK), dtype=torch.float32)
    import bitsandbytes  # noqa: F401, PLC0415 (an extra; it registers the operations)

    operation = torch.ops.bitsandbytes.quantize_4bit.default
    parts = [operation(rows, BLOCK, "nf4", torch.uint8) for rows in weight.split(_ROWS)]
    return torch.cat([part for part, _ in parts]), torch.cat([scale for _, scale in parts])
