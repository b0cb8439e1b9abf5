"""Linear layers in 4 bits by bitsandbytes: NF4 of Dettmers et al. 2023 (QLoRA, arXiv 2305.14314), blocks of 64."""

import torch
from torch import Tensor, nn


def quantised(linear: nn.Linear) -> nn.Linear:
    """A linear layer as bitsandbytes' `Linear4bit`, quantised where its weight lies.

    Args:
        linear: In float32, bfloat16 or float16, in which it computes.
    """
    from bitsandbytes.nn import Linear4bit, Params4bit  # noqa: PLC0415 (an extra)

    weight, bias = linear.weight.detach(), linear.bias
    with torch.device("meta"):
        made = Linear4bit(
            linear.in_features,
            linear.out_features,
            bias=bias is not None,
            compute_dtype=weight.dtype,
            compress_statistics=False,
            quant_type="nf4",
        )
    made.weight = Params4bit(weight, requires_grad=False, quant_type="nf4", compress_statistics=False, module=made)
    if bias is not None:
        made.bias = nn.Parameter(bias.detach(), requires_grad=False)
    made.weight = made.weight.to(weight.device)  # which quantises it
    return made


def dequantised(linear: nn.Linear) -> Tensor:
    """The weight of such a layer, (out, in), in the precision that it computes in."""
    from bitsandbytes.functional import dequantize_4bit  # noqa: PLC0415 (an extra)

    return dequantize_4bit(linear.weight.data, linear.weight.quant_state)
