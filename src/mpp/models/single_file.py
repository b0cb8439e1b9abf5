"""Original-format files of a transformer: what they hold, and how they become diffusers' state."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import ModelMixin
from torch import Tensor, nn

from mpp.models import fp8_file, gguf_file
from mpp.models.contract import Ready
from mpp.models.filling import fill, lay_out
from mpp.models.weights import GGUF, say

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
        shapes = gguf_file.read_shapes(file) if file.suffix == GGUF else fp8_file.safetensors_header(file).shapes
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
        config, option = self.describe(file, kind.__name__), f"model.pretrained={file}"
        with init_empty_weights():
            transformer = kind.from_config(config)
        if file.suffix == GGUF:
            state, kept = gguf_file.read_gguf(file, self._converted), True
        else:
            header, kept = fp8_file.safetensors_header(file), ready is not None
            state = fp8_file.read_safetensors(file, header, self._converted)
            if header.fp8:
                say(f"{option} {_words(header, dtype, kept=kept)}")
        state = lay_out(transformer, state, dtype, option, blocks=blocks(transformer) if kept else ())
        return fill(transformer, state, dtype, option, blocks=blocks(transformer), ready=ready)

    def _converted(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return self.convert(state) if self.marker in state else state


def _words(header: fp8_file.SafetensorsHeader, dtype: torch.dtype, *, kept: bool) -> str:
    formats = " and ".join(sorted({str(format).removeprefix("torch.") for format in header.fp8.values()}))
    scales = "with scales" if header.scales else f"no scales: raw {formats}, taken as it is"
    plain = str(dtype).removeprefix("torch.")
    done = f"the blocks keep it, all else is {plain}" if kept else f"dequantised to {plain}; memory.base=fp8 keeps it"
    return f"holds {formats} ({scales}); {done}"


def count_blocks(shapes: Shapes, prefix: str) -> int:
    """How many numbered blocks `prefix0.`, `prefix1.`, ... a file has.

    Raises:
        KeyError: None.
    """
    found = {int(name[len(prefix) :].split(".")[0]) for name in shapes if name.startswith(prefix)}
    if not found:
        raise KeyError(f"{prefix}0")
    return max(found) + 1


def stored(file: Path) -> str | None:
    """What a single file keeps its weights in where that is no full precision: `fp8` or `gguf`.

    Raises:
        ValueError: As `fp8_file.safetensors_header`.
    """
    if file.suffix == GGUF:
        return "gguf"
    return "fp8" if fp8_file.safetensors_header(file).fp8 else None
