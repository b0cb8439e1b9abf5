"""Quantised bases: which there are, and linear layers replaced by quantised ones."""

import importlib.util
from collections.abc import Iterable, Sequence
from typing import Literal

from torch import Tensor, nn

from mpp.memory import nf4, scaled
from mpp.memory.linear import QuantisedLinear

Base = Literal["bf16", "fp8", "int8", "nf4"]
QUANTISED = ("fp8", "int8", "nf4")


def check_base(base: str, setting: str, more: Sequence[str] = ()) -> None:
    """Refuse a base that is unknown, or that needs a package which is not here.

    Args:
        base: Its name, `bf16` for weights as `model.dtype` has them.
        setting: Name of the setting, for errors.
        more: What else it may be.

    Raises:
        ValueError: As above.
    """
    if base not in ("bf16", *QUANTISED):
        raise ValueError(f"{setting} must be one of {', '.join(('bf16', *QUANTISED, *more))}, got {base!r}")
    if base == "nf4" and importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError(f"{setting}=nf4 needs the package bitsandbytes; pip install 'mpp[nf4]', or take fp8 or int8")


def quantise(module: nn.Module, names: Iterable[str], base: str) -> None:
    """Replace linear layers by quantised ones, one after the other, so that no more than one is there twice.

    Args:
        module: That holds them.
        names: Of the layers in it.
        base: One of `QUANTISED`.
    """
    for name in names:
        parent, _, last = name.rpartition(".")
        owner, linear = module.get_submodule(parent), module.get_submodule(name)
        setattr(owner, last, _quantised(linear, base).train(linear.training))


def _quantised(linear: nn.Linear, base: str) -> nn.Linear:
    if base == "nf4":
        return nf4.quantised(linear)
    return scaled.scaled(linear, scaled.FP8 if base == "fp8" else scaled.INT8)


def dequantise(linear: nn.Linear) -> Tensor:
    """A linear layer's weight, (out, in), in the precision that it computes in; as it is where it is not quantised."""
    return linear.dequantize() if isinstance(linear, QuantisedLinear) else linear.weight.detach()


def is_quantised(linear: nn.Module) -> bool:
    """Whether a layer is one that `quantise` makes."""
    return isinstance(linear, QuantisedLinear)
