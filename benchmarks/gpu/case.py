"""A row on a device, and the seconds that something takes there."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from benchmarks.gpu import model
from benchmarks.gpu.model import Drawn, Trainee
from benchmarks.gpu.rows import Row
from mpp.batching.batch import Batch
from mpp.memory.settings import Memory

Found = dict[str, Any]
GIB = 2**30


@dataclass(frozen=True)
class Case:
    """A row on a device.

    Attributes:
        row: What is asked.
        device: `cuda` or `cpu`.
        tiny: Tiny sizes instead of the row's.
        layers: Of the model; 0: as its size has them.
    """

    row: Row
    device: str
    tiny: bool
    layers: int = 0

    @property
    def size(self) -> model.Size:
        """Of the model."""
        size = model.SIZES[self.row.size]
        if self.tiny:
            size = model.TINY_QWEN if isinstance(size, model.QwenSize) else model.TINY
        return replace(size, layers=self.layers or size.layers)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of the latents."""
        return model.TINY_SHAPE if self.tiny else model.SHAPES[self.row.shape]

    def architecture(self, *, waits: bool = False) -> Drawn:
        """The model's family, whose blocks may wait in the CPU's memory."""
        return self.size.family(self.device, waits=waits)

    def memory(self) -> Memory:
        """Of the row, with all blocks resident."""
        return Memory(base=self.row.base, activations=self.row.activations, resident="all")

    def trainee(
        self, *, activations: str | None = None, compiled: bool = False, resident: int | None = None
    ) -> Trainee:
        """What trains it; with the row's activations unless told otherwise, and all blocks resident."""
        memory = replace(self.memory(), resident=resident or "all")
        if activations:
            memory = replace(memory, activations=activations)
        architecture = self.architecture(waits=resident is not None)
        return Trainee.of(model.module(architecture, memory, compiled=compiled))

    def batch(self, **settings: int) -> Batch:
        """A batch for it."""
        return model.batch(self.size, self.shape, self.device, **settings)


def seconds_of(action: Callable[[], None], device: str) -> float:
    """Seconds of an action on a device: by CUDA events, or of process time on the CPU."""
    if device == "cpu":
        start = time.process_time()
        action()
        return time.process_time() - start
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    before.record()
    action()
    after.record()
    after.synchronize()
    return before.elapsed_time(after) / 1000
