"""Which files for other programs training writes beside each LoRA."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from mpp.lora.adapters import Adapter, adapter_state, inject, part_state
from mpp.lora.export import FORMATS, PROGRAMS, by_program
from mpp.lora.metadata import Metadata
from mpp.models.contract import Architecture
from mpp.models.experts import parts_of


@dataclass(frozen=True)
class Exports:
    """Files for other programs, `lora_comfyui.safetensors` beside `lora.safetensors`, at each save.

    Args:
        formats: `comfyui`, `kohya`, both, or []; None: comfyui, where it can say the adapter.
        metadata: What all files say of the LoRA.

    Raises:
        ValueError: An unknown format.
    """

    formats: Sequence[Literal["comfyui", "kohya"]] | None = None
    metadata: Metadata = field(default_factory=Metadata)

    def __post_init__(self) -> None:
        """Refuse unknown formats."""
        for format in self.formats or ():
            if format not in FORMATS:
                raise ValueError(
                    f"export.formats may hold {' and '.join(FORMATS)}, got {format!r}; lora.safetensors is for "
                    "diffusers, and python -m mpp.export makes the others"
                )

    def chosen(self, architecture: Architecture, adapter: Adapter) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The formats that are written, and why others are not; nothing is loaded to know it.

        Raises:
            ValueError: One that is asked for cannot say the adapter.
        """
        skeleton = architecture.skeleton()
        inject(skeleton, adapter, architecture.lora_targets, seed=0)
        found, left_out = [], []
        for format in ("comfyui",) if self.formats is None else self.formats:
            try:
                for part, transformer in parts_of(skeleton):
                    by_program(format, transformer, part_state(adapter_state(skeleton), part), architecture)
            except ValueError as error:
                if self.formats is not None:
                    raise ValueError(f"export.formats: {format}: {error}") from error
                left_out.append(f"there will be no LoRA file for {PROGRAMS[format]}: {error}")
            else:
                found.append(format)
        return tuple(found), tuple(left_out)
