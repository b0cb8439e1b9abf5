"""GGUF files of a transformer, which diffusers reads."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.models.model_loading_utils import load_gguf_checkpoint
from torch import Tensor, nn

from mpp.memory import gguf
from mpp.memory.bases import check_base
from mpp.models.fp8_file import strip_prefix
from mpp.wording import few


@dataclass(frozen=True)
class Gguf:
    """A tensor as a GGUF file packs it: diffusers' `GGUFParameter`."""

    weight: Tensor

    @property
    def shape(self) -> Sequence[int]:
        """Of the numbers that are packed."""
        return self.weight.quant_shape

    def plain(self, dtype: torch.dtype) -> Tensor:
        """The tensor in `dtype`."""
        return gguf.unpacked(self.weight, dtype)

    def layer(self, linear: nn.Linear, dtype: torch.dtype) -> nn.Linear:
        """A layer that keeps it, in place of one on the meta device."""
        return gguf.packed(linear, self.weight, dtype)


def read_shapes(file: Path) -> dict[str, list[int]]:
    """Tensor shapes by their names without prefixes, off the header.

    Raises:
        ValueError: An incomplete file, types that diffusers cannot unpack, or the package gguf is not installed.
    """
    check_base("gguf", "memory.base")
    from diffusers.quantizers.gguf.utils import SUPPORTED_GGUF_QUANT_TYPES as SUPPORTED  # noqa: PLC0415 (as below)
    from gguf import GGUFReader  # noqa: PLC0415 (an extra)

    tensors = _reader(GGUFReader, file).tensors
    known = {kind.name for kind in SUPPORTED} | {"F32", "F16"}
    odd = {strip_prefix(t.name): t.tensor_type.name for t in tensors if t.tensor_type.name not in known}
    if odd:
        raise ValueError(
            f"model.pretrained={file} holds weights in {', '.join(sorted(set(odd.values())))}, which diffusers cannot "
            f"unpack (it can: {', '.join(sorted(known))}); choose another file. These are {', '.join(few(sorted(odd)))}"
        )
    return {strip_prefix(tensor.name): [int(size) for size in reversed(tensor.shape)] for tensor in tensors}


def _reader(kind: Callable[[Path], Any], file: Path) -> Any:  # noqa: ANN401
    try:
        return kind(file)
    except Exception as error:  # the package raises whatever it meets
        raise ValueError(f"model.pretrained={file} is not a complete .gguf file ({error})") from error


def read_gguf(file: Path, convert: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> dict[str, Tensor | Gguf]:
    """The tensors of a file under diffusers' names.

    Args:
        file: A `.gguf`.
        convert: Original state to diffusers' state.
    """
    state = {strip_prefix(name): tensor for name, tensor in load_gguf_checkpoint(str(file)).items()}
    return {name: Gguf(t) if hasattr(t, "quant_type") else t for name, t in convert(state).items()}
