"""Frozen linear layers that keep their weight in fewer bits."""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int8
from torch import Tensor, nn
from torch.nn import functional

Unpack = Callable[[Tensor, Tensor, torch.dtype], Tensor]


class QuantisedLinear(nn.Linear):
    """A linear layer that keeps its frozen weight as packed numbers with scales and dequantises it in each pass.

    Nothing dequantised outlives a pass: the backward pass dequantises again. Output and gradients are those of a linear
    layer with the dequantised weight, under autocast too.

    Args:
        packed: The numbers' bytes, as int8 whatever they are: integers are cast by nobody who moves or casts a model,
            and PEFT and transformers leave them alone.
        scale: Of the numbers.
        bias: (out,) in `dtype`, or None.
        features: Output and input features.
        dtype: Of the weight in computations outside autocast.
    """

    def __init__(
        self,
        packed: Int8[Tensor, "..."],
        scale: Tensor,
        bias: Tensor | None,
        *,
        features: tuple[int, int],
        dtype: torch.dtype,
    ) -> None:
        nn.Module.__init__(self)  # nn.Linear's would make a weight of full size
        self.out_features, self.in_features = features
        self.dtype = dtype
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.register_buffer("scale", scale)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    @abstractmethod
    def unpacked(self) -> Unpack:
        """A function of `weight`, `scale` and a dtype that gives the weight, (out, in), in that dtype."""

    @property
    def W_q(self) -> Int8[Tensor, "..."]:  # noqa: N802
        """The packed weight, by the name that makes PEFT ask `dequantize` for it (its `dequantize_module_weight`)."""
        return self.weight

    def dequantize(self, dtype: torch.dtype | None = None) -> Float[Tensor, "out in"]:
        """The weight in `dtype`, by default the layer's own."""
        return self.unpacked()(self.weight, self.scale, dtype or self.dtype)

    def forward(self, input: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        """As `nn.Linear` with the dequantised weight."""
        kind, dtype, bias = input.device.type, self.dtype, self.bias
        if kind != "meta" and torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
            input, bias = input.to(dtype), None if bias is None else bias.to(dtype)
        return _Product.apply(input, self.weight, self.scale, bias, self.unpacked(), dtype)


class _Product(torch.autograd.Function):
    """`linear` that keeps the packed weight for the backward pass, not the dequantised one."""

    @staticmethod
    def forward(  # noqa: PLR0917
        ctx: Any,  # noqa: ANN401
        input: Tensor,
        weight: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        unpack: Unpack,
        dtype: torch.dtype,
    ) -> Tensor:
        ctx.save_for_backward(weight, scale)
        ctx.unpack, ctx.dtype = unpack, dtype
        return functional.linear(input, unpack(weight, scale, dtype), bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        needed = gradient.matmul(ctx.unpack(*ctx.saved_tensors, ctx.dtype)) if ctx.needs_input_grad[0] else None
        return needed, None, None, None, None, None
