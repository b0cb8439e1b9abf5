"""A transformer without weights, filled from files block by block, so that no two copies of it are ever there."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

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
    _cast(transformer, "", dtype, _exact(transformer))
    return transformer.eval()


def _cast(module: nn.Module, prefix: str, dtype: torch.dtype, exact: Sequence[str]) -> None:
    for name, parameter in module.named_parameters():
        if parameter.is_floating_point():
            kept = any(part in prefix + name for part in exact)
            parameter.data = parameter.data.to(torch.float32 if kept else dtype)


def _needless(transformer: ModelMixin) -> Sequence[str]:
    """Patterns of tensors that diffusers' `from_pretrained` passes over."""
    return transformer._keys_to_ignore_on_load_unexpected or ()  # noqa: SLF001


def _exact(transformer: ModelMixin) -> Sequence[str]:
    """Parts of names of tensors that diffusers' `from_pretrained` keeps in float32."""
    return transformer._keep_in_fp32_modules or ()  # noqa: SLF001
