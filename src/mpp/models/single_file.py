"""Original-format files of a transformer: what they hold, and how they become diffusers' state."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import ModelMixin
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from mpp.models.contract import Ready
from mpp.models.filling import fill

PREFIXES = ("model.diffusion_model.", "diffusion_model.", "transformer.")
_SCALES = ("scale_weight", "weight_scale", "scaled_fp8")

Shapes = Mapping[str, Sequence[int]]


@dataclass(frozen=True)
class SingleFile:
    """How one original-format file becomes the diffusers transformer.

    Attributes:
        marker: Name of a tensor that only files with original names have.
        config: Constructor arguments of the transformer, from the tensors' shapes by name (prefixes stripped) and
            whether the names are the original's. Raises KeyError for a tensor that is not there.
        convert: Original state to diffusers' state: diffusers' own function.
    """

    marker: str
    config: Callable[[Shapes, bool], dict[str, Any]]
    convert: Callable[[dict[str, Tensor]], dict[str, Tensor]]

    def describe(self, file: Path, kind: str) -> dict[str, Any]:
        """Configuration of the transformer, whose class is called `kind`, from a file's header.

        Raises:
            ValueError: The file holds no such transformer.
        """
        shapes = read_shapes(file)
        try:
            config = self.config(shapes, self.marker in shapes)
        except KeyError as error:
            raise ValueError(f"model.pretrained={file} is no {kind}: it has no {error.args[0]}") from error
        except ValueError as error:
            raise ValueError(f"model.pretrained={file}: {error}") from error
        return {"_class_name": kind, **config}

    def load(
        self,
        file: Path,
        kind: type[ModelMixin],
        dtype: torch.dtype,
        *,
        blocks: Callable[[nn.Module], Iterable[tuple[str, nn.Module]]] = lambda _: (),
        ready: Ready | None = None,
    ) -> ModelMixin:
        """The transformer with a file's weights in `dtype`, as `from_pretrained` would give it.

        Args:
            file: Of original or diffusers' names.
            kind: The transformer's class.
            dtype: Of the weights.
            blocks: Gives its blocks and their names.
            ready: As `Architecture.load_transformer` takes it.

        Raises:
            ValueError: The file holds no such transformer, or lacks tensors, or has others.
        """
        config = self.describe(file, kind.__name__)
        state = {strip_prefix(key): tensor for key, tensor in load_file(file).items()}
        if self.marker in state:
            state = self.convert(state)
        with init_empty_weights():
            transformer = kind.from_config(config)
        return fill(transformer, state, dtype, f"model.pretrained={file}", blocks=blocks(transformer), ready=ready)


def count_blocks(shapes: Shapes, prefix: str) -> int:
    """How many numbered blocks `prefix0.`, `prefix1.`, ... a file has.

    Raises:
        KeyError: None.
    """
    found = {int(name[len(prefix) :].split(".")[0]) for name in shapes if name.startswith(prefix)}
    if not found:
        raise KeyError(f"{prefix}0")
    return max(found) + 1


def read_shapes(file: Path) -> dict[str, list[int]]:
    """Tensor shapes of a single file by their names without ComfyUI's prefixes; reads the header only.

    Raises:
        ValueError: An incomplete file, or one of scaled fp8 weights.
    """
    try:
        with safe_open(file, "pt") as handle:
            shapes = {key: handle.get_slice(key).get_shape() for key in handle.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"model.pretrained={file} is not a complete .safetensors file ({error})") from error
    if any(mark in key for key in shapes for mark in _SCALES):
        raise ValueError(
            f"model.pretrained={file} is a ComfyUI fp8_scaled file: its weights mean nothing without their scales, "
            "which no loader here applies; use the bf16 or fp16 file"
        )
    return {strip_prefix(key): shape for key, shape in shapes.items()}


def strip_prefix(key: str) -> str:
    """A tensor's name without the prefixes that other programs put before it."""
    for prefix in PREFIXES:
        key = key.removeprefix(prefix)
    return key
