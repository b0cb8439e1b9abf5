"""A transformer without weights, filled from files block by block, so that no two copies of it are ever there."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from diffusers import ModelMixin
from safetensors.torch import load_file
from torch import Tensor, nn

from mpp.models.contract import Ready

_NAME = "diffusion_pytorch_model.safetensors"


def folder_state(folder: Path, option: str) -> dict[str, Tensor]:
    """The tensors of a component's folder as diffusers saves it; they stay in the files until somebody reads them.

    Args:
        folder: With one safetensors file, or several and their index.
        option: What it was set by, for errors: `model.pretrained=...`.

    Raises:
        ValueError: It has none.
    """
    index = folder / f"{_NAME}.index.json"
    files = sorted(set(json.loads(index.read_bytes())["weight_map"].values())) if index.is_file() else [_NAME]
    missing = [name for name in files if not (folder / name).is_file()]
    if missing:
        raise ValueError(
            f"{option} has no {missing[0]} in {folder.name}: to quantise it block by block, its weights must be "
            "safetensors as diffusers names them; save it so by save_pretrained, or set memory.base=bf16"
        )
    return {key: tensor for name in files for key, tensor in load_file(folder / name).items()}


@runtime_checkable
class Packed(Protocol):
    """A quantised tensor of a file."""

    @property
    def shape(self) -> Sequence[int]:
        """Of what it holds, however it is packed."""
        ...

    def plain(self, dtype: torch.dtype) -> Tensor:
        """The tensor in `dtype`."""
        ...

    def layer(self, linear: nn.Linear, dtype: torch.dtype) -> nn.Linear:
        """A layer that keeps it, in place of one on the meta device."""
        ...


def lay_out(
    transformer: ModelMixin,
    state: Mapping[str, Tensor | Packed],
    dtype: torch.dtype,
    option: str,
    *,
    blocks: Iterable[tuple[str, nn.Module]],
) -> dict[str, Tensor]:
    """Make a skeleton ready for quantised tensors.

    Args:
        transformer: On the meta device; its linear layers in the blocks are replaced by such as keep their weights.
        state: Its tensors.
        dtype: That these compute in, and of all other quantised tensors, which become plain ones.
        option: What it was set by, for errors: `model.pretrained=...`.
        blocks: In whose layers they are kept. Elsewhere families and diffusers ask weights what precision they want.

    Returns:
        The tensors, as `fill` takes them.

    Raises:
        ValueError: A quantised tensor is of another shape than the layer.
    """
    kept = {f"{name}.{path}": m for name, b in blocks for path, m in b.named_modules() if isinstance(m, nn.Linear)}
    tensors: dict[str, Tensor] = {}
    for name, tensor in state.items():
        precision = _precision(name, dtype, _exact(transformer))
        path = name.removesuffix(".weight")
        if isinstance(tensor, Tensor):
            tensors[name] = tensor
        elif path != name and path in kept:
            wanted = kept[path].weight.shape
            if tuple(tensor.shape) != tuple(wanted):
                raise ValueError(f"{option} has {name} in the shape {list(tensor.shape)}, the model in {list(wanted)}")
            layer = tensor.layer(kept[path], precision)
            parent, _, last = path.rpartition(".")
            setattr(transformer.get_submodule(parent), last, layer)
            held = layer.state_dict(prefix=f"{path}.", keep_vars=True)
            tensors |= {held_name: held for held_name, held in held.items() if not held.is_meta}
        else:
            tensors[name] = tensor.plain(precision)
    return tensors


def fill(
    transformer: ModelMixin,
    state: Mapping[str, Tensor],
    dtype: torch.dtype,
    option: str,
    *,
    blocks: Iterable[tuple[str, nn.Module]],
    ready: Ready | None,
) -> ModelMixin:
    """Give a skeleton its weights, in `dtype` but for those that diffusers keeps in float32.

    Args:
        transformer: On the meta device.
        state: Its tensors, which may still lie in files.
        dtype: Of the weights.
        option: What it was set by, for errors: `model.pretrained=...`.
        blocks: Its blocks with their names, in order.
        ready: As `Architecture.load_transformer` takes it.

    Raises:
        ValueError: Tensors are missing, or there are others.
    """
    missing, extra = transformer.load_state_dict(state, strict=False, assign=True)
    extra = [name for name in extra if not any(re.search(pattern, name) for pattern in _needless(transformer))]
    if missing or extra:
        raise ValueError(
            f"{option} lacks {len(missing)} tensors of a {type(transformer).__name__} and has {len(extra)} others, "
            f"such as {(missing + extra)[0]}"
        )
    for name, block in blocks:
        _cast(block, f"{name}.", dtype, _exact(transformer))
        if ready is not None:
            ready(name, block)
    return in_precision(transformer, dtype).eval()


def in_precision(transformer: ModelMixin, dtype: torch.dtype) -> ModelMixin:
    """Its weights in `dtype`, but for those that diffusers keeps in float32; perhaps on the meta device."""
    _cast(transformer, "", dtype, _exact(transformer))
    return transformer


def _cast(module: nn.Module, prefix: str, dtype: torch.dtype, exact: Sequence[str]) -> None:
    for name, parameter in module.named_parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(_precision(prefix + name, dtype, exact))


def _precision(name: str, dtype: torch.dtype, exact: Sequence[str]) -> torch.dtype:
    return torch.float32 if any(part in name for part in exact) else dtype


def _needless(transformer: ModelMixin) -> Sequence[str]:
    """Patterns of tensors that diffusers' `from_pretrained` passes over."""
    return transformer._keys_to_ignore_on_load_unexpected or ()  # noqa: SLF001


def _exact(transformer: ModelMixin) -> Sequence[str]:
    """Parts of names of tensors that diffusers' `from_pretrained` keeps in float32."""
    return transformer._keep_in_fp32_modules or ()  # noqa: SLF001
