"""Frozen linear layers whose weight is 8-bit numbers times scales."""

from typing import Any

import torch
from jaxtyping import Float, Int8
from torch import Tensor, nn
from torch.nn import functional

FP8, INT8 = torch.float8_e4m3fn, torch.int8
_ROUNDED = {FP8: torch.finfo(FP8).max, INT8: 127.0}  # what the largest number of a row becomes


class ScaledLinear(nn.Linear):
    """A linear layer that keeps its frozen weight as 8-bit numbers with scales and dequantises it in each pass.

    The weight is `numbers * scale`, multiplied in float32 where the scale is that exact, and rounded once to `dtype`.
    Nothing dequantised outlives a pass: the backward pass dequantises again. Of an adapter's base, the gradient is that
    of a linear layer with the dequantised weight.

    Args:
        numbers: (out, in), `float8_e4m3fn`, `float8_e5m2` or `int8`.
        scale: One for the whole weight, of no dimension, or (out, 1), one for each output row.
        bias: (out,) in `dtype`, or None.
        dtype: Of the weight in computations outside autocast.

    Attributes:
        weight: The numbers' bytes, as int8 whatever they are: integers are cast by nobody who moves or casts a model,
            and PEFT and transformers leave them alone.
    """

    def __init__(self, numbers: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)  # nn.Linear's would make a weight of full size
        self.out_features, self.in_features = numbers.shape
        self.format, self.dtype = numbers.dtype, dtype
        self.weight = nn.Parameter(numbers.view(torch.int8), requires_grad=False)
        self.register_buffer("scale", scale)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    @property
    def W_q(self) -> Int8[Tensor, "out in"]:  # noqa: N802
        """The weight, by the name by which PEFT asks `dequantize` for it (`dequantize_module_weight`)."""
        return self.weight

    def dequantize(self, dtype: torch.dtype | None = None) -> Float[Tensor, "out in"]:
        """The weight in `dtype`, by default the layer's own."""
        return _dequantize(self.weight, self.scale, self.format, dtype or self.dtype)

    def forward(self, input: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        """As `nn.Linear` with the dequantised weight."""
        kind, dtype, bias = input.device.type, self.dtype, self.bias
        if kind != "meta" and torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
            input, bias = input.to(dtype), None if bias is None else bias.to(dtype)
        return _Product.apply(input, self.weight, self.scale, bias, self.format, dtype)

    def extra_repr(self) -> str:
        """With the format of the numbers."""
        return f"{super().extra_repr()}, format={self.format}"


def _dequantize(weight: Tensor, scale: Tensor, format: torch.dtype, dtype: torch.dtype) -> Tensor:
    return (weight.view(format).to(dtype) * scale).to(dtype)


class _Product(torch.autograd.Function):
    """`linear` that keeps the 8-bit weight for the backward pass, not the dequantised one."""

    @staticmethod
    def forward(  # noqa: PLR0917
        ctx: Any,  # noqa: ANN401
        input: Tensor,
        weight: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        format: torch.dtype,
        dtype: torch.dtype,
    ) -> Tensor:
        ctx.save_for_backward(weight, scale)
        ctx.format, ctx.dtype = format, dtype
        return functional.linear(input, _dequantize(weight, scale, format, dtype), bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        weight, scale = ctx.saved_tensors
        needed = gradient.matmul(_dequantize(weight, scale, ctx.format, ctx.dtype)) if ctx.needs_input_grad[0] else None
        return needed, None, None, None, None, None


def scaled(linear: nn.Linear, format: torch.dtype) -> ScaledLinear:
    """A linear layer's weight as 8-bit numbers, each row scaled so that its largest has the format's largest magnitude.

    `scale = max |w| / m` per output row with m = 448 for e4m3 (its largest number) or 127 for int8, in the weight's own
    precision; 1 for rows of zeros.

    Args:
        linear: In float32, bfloat16 or float16; may lie on the meta device.
        format: `FP8` or `INT8`.
    """
    weight, most = linear.weight.detach(), _ROUNDED[format]
    scale = (weight.abs().amax(dim=1, keepdim=True).float() / most).to(weight.dtype)
    scale = torch.where(scale > 0, scale, 1)
    numbers = (weight.float() / scale.float()).clamp(-most, most)
    numbers = numbers.round() if format == INT8 else numbers
    bias = None if linear.bias is None else linear.bias.detach()
    return ScaledLinear(numbers.to(format), scale, bias, weight.dtype)
