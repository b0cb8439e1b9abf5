"""Quantised bases: which there are, and linear layers replaced by quantised ones."""

import importlib.util
from collections.abc import Iterable, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from mpp.memory import nf4, scaled
from mpp.memory.linear import QuantisedLinear

Base = Literal["bf16", "fp8", "int8", "nf4", "gguf"]
QUANTISED = ("fp8", "int8", "nf4")  # that weights are brought to here; GGUF files are there already
_PACKAGES = {"nf4": "bitsandbytes", "gguf": "gguf"}


def check_base(base: str, setting: str, known: Sequence[str] = get_args(Base)) -> None:
    """Refuse a base that is unknown, or that needs a package which is not here.

    Args:
        base: Its name, `bf16` for weights as `model.dtype` has them.
        setting: Name of the setting, for errors.
        known: What it may be.

    Raises:
        ValueError: As above.
    """
    if base not in known:
        raise ValueError(f"{setting} must be one of {', '.join(known)}, got {base!r}")
    package = _PACKAGES.get(base)
    if package is not None and importlib.util.find_spec(package) is None:
        otherwise = "or take fp8 or int8" if base == "nf4" else "or give model.pretrained=FILE.safetensors"
        raise ValueError(f"{setting}={base} needs the package {package}; pip install 'mpp[{base}]', {otherwise}")


def check_device(base: str, device: torch.device | str) -> None:
    """Refuse a base whose numbers a device cannot unpack.

    Args:
        base: As `check_base` takes it.
        device: That it is to lie on.

    Raises:
        ValueError: As above, with what works there.
    """
    if torch.device(device).type == "mps" and base in ("fp8", "nf4"):
        why = "has no 8-bit floats" if base == "fp8" else "is none that bitsandbytes is tested on"
        raise ValueError(f"memory.base={base} does not work on this device (mps), which {why}; take memory.base=int8")


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


def restore(module: nn.Module, names: Iterable[str]) -> list[str]:
    """Replace quantised layers by plain ones with their weights in the precision that they compute in.

    Args:
        module: That holds them.
        names: Of modules in it, not all of which need be quantised.

    Returns:
        The names of those that were.
    """
    found = [name for name in names if is_quantised(module.get_submodule(name))]
    for name in found:
        parent, _, last = name.rpartition(".")
        setattr(module.get_submodule(parent), last, dequantised_layer(module.get_submodule(name)))
    return found


def dequantised_layer(layer: nn.Linear) -> nn.Linear:
    """A quantised layer as a plain one with its weight in the precision that it computes in."""
    weight = dequantise(layer)
    with torch.device("meta"):
        made = nn.Linear(layer.in_features, layer.out_features, bias=False)
    made.weight = nn.Parameter(weight, requires_grad=False)
    made.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach(), requires_grad=False)
    return made.train(layer.training)


def _quantised(linear: nn.Linear, base: str) -> nn.Linear:
    if base == "nf4":
        return nf4.quantised(linear)
    return scaled.scaled(linear, scaled.FP8 if base == "fp8" else scaled.INT8)


def dequantise(linear: nn.Linear) -> Tensor:
    """A linear layer's weight, (out, in), in the precision that it computes in; as it is where it is not quantised."""
    return linear.dequantize() if isinstance(linear, QuantisedLinear) else linear.weight.detach()


def is_quantised(layer: nn.Module) -> bool:
    """Whether a layer's weight is kept in fewer bits."""
    return isinstance(layer, QuantisedLinear)
