"""The way of frozen weights between the CPU's memory and the device that computes."""

import logging
import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

log = logging.getLogger("mpp")

_ALIGNED = 256  # bytes, at which kernels and copies are as fast as they can be


@dataclass(eq=False)
class Slot:
    """Memory on the device that holds the weights of one block at a time.

    Attributes:
        size: Bytes of the largest that it takes.
        memory: Its bytes; None until something is fetched into it.
        arrived: When the device has them.
    """

    size: int
    memory: Tensor | None = None
    arrived: "torch.cuda.Event | None" = None


class Link:
    """That of a device whose memory is the CPU's: nothing moves.

    A link keeps tensors in the CPU's memory (`keep`), says what stands for them while they are not on the device
    (`waiting`), brings them (`fetch`), makes the device wait for them (`wait`), and lets go of them (`leave`, `free`).
    """

    def keep(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """One block's tensors as they wait in the CPU's memory."""
        return [tensor.detach() for tensor in tensors]

    def waiting(self, kept: Sequence[Tensor]) -> list[Tensor]:
        """What stands for them while they are not on the device."""
        return list(kept)

    def fetch(self, kept: Sequence[Tensor], slot: Slot) -> list[Tensor]:
        """Start to bring them into a slot, after all that the device was given to do so far."""
        del slot
        return list(kept)

    def wait(self, slot: Slot) -> None:
        """Nothing that the device is given from here on begins before they are there."""

    def leave(self, slot: Slot) -> None:
        """What lies in a slot is not needed any more."""

    def free(self, slot: Slot) -> None:
        """Give a slot's memory back."""


class GpuLink(Link):
    """That of a GPU: pinned memory, and copies on a stream of their own.

    Args:
        device: The GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)

    def keep(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Them in one piece of pinned memory, so that one copy brings them."""
        memory = pinned(layout_bytes(tensors))
        kept = views(memory, tensors)
        for copy, tensor in zip(kept, tensors, strict=True):
            copy.copy_(tensor.detach())
        return kept

    def fetch(self, kept: Sequence[Tensor], slot: Slot) -> list[Tensor]:
        """Copy the whole piece behind what the device is doing."""
        if slot.memory is None:
            slot.memory = torch.empty(slot.size, dtype=torch.uint8, device=self.device)
        count = layout_bytes(kept)
        whole = torch.empty(0, dtype=torch.uint8).set_(kept[0].untyped_storage(), 0, (count,))
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            slot.memory[:count].copy_(whole, non_blocking=True)
            slot.arrived = self.stream.record_event()
        return views(slot.memory, kept)

    def wait(self, slot: Slot) -> None:
        """The current stream waits, the CPU does not."""
        torch.cuda.current_stream(self.device).wait_event(slot.arrived)

    def free(self, slot: Slot) -> None:
        """Once what is on its way has arrived: the memory's next owner would find it written over."""
        if slot.memory is not None:
            self.wait(slot)
        slot.memory = slot.arrived = None


def link_to(device: torch.device) -> Link:
    """The link to a device."""
    return GpuLink(device) if device.type == "cuda" else Link()


def layout_bytes(tensors: Sequence[Tensor]) -> int:
    """Bytes of tensors one behind the other, each aligned."""
    return sum(-(-tensor.nbytes // _ALIGNED) * _ALIGNED for tensor in tensors)


def views(memory: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Tensors in a piece of memory, of the shapes and dtypes of others, one behind the other.

    Args:
        memory: Bytes, uint8.
        like: Contiguous in what becomes of them.
    """
    made, start = [], 0
    for tensor in like:
        made.append(memory[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape))
        start += layout_bytes([tensor])
    return made


def pinned(size: int) -> Tensor:
    """So many bytes of pinned memory, and no more.

    Torch's own allocator rounds up to powers of two, which would be half as much again for most blocks.

    Args:
        size: In bytes.
    """
    memory = torch.empty(size, dtype=torch.uint8)
    runtime = torch.cuda.cudart()
    failed = int(runtime.cudaHostRegister(memory.data_ptr(), size, 0))
    if failed:
        log.warning(
            "%.2f GiB of CPU memory could not be pinned (CUDA error %d): copies to the GPU will hold it up",
            size / 2**30,
            failed,
        )
    else:
        weakref.finalize(memory.untyped_storage(), runtime.cudaHostUnregister, memory.data_ptr())
    return memory
