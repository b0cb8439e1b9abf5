"""The way of frozen weights between the CPU's memory and the device that computes."""

import contextlib
import logging
import mmap
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
    """That of any device: copies that it waits for, and of the CPU's own memory none.

    A link keeps tensors in the CPU's memory (`keep`), says what stands for them while they are not on the device
    (`waiting`), brings them (`fetch`), makes the device wait for them (`wait`), and lets go of them (`leave`, `free`).

    Args:
        device: That computes.
    """

    def __init__(self, device: torch.device = torch.device("cpu")) -> None:  # noqa: B008 (it never changes)
        self.device = device

    def keep(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """One block's tensors as they wait in the CPU's memory."""
        return [tensor.detach().cpu() for tensor in tensors]

    def waiting(self, kept: Sequence[Tensor]) -> list[Tensor]:
        """What stands for them while they are not on the device."""
        return list(kept)

    @torch.inference_mode(mode=False)  # a validation's weights are the next step's
    def fetch(self, kept: Sequence[Tensor], slot: Slot) -> list[Tensor]:
        """Start to bring them into a slot, after all that the device was given to do so far."""
        del slot
        return [tensor.to(self.device) for tensor in kept]

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
        super().__init__(device)
        self.stream = torch.cuda.Stream(device)
        self._pinned: list[Tensor] = []
        self._pins = True
        weakref.finalize(self, _unpin, self.stream, self._pinned).atexit = False  # the end of the process does it

    @torch.inference_mode(mode=False)
    def keep(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Them in one piece of pinned memory, so that one copy brings them."""
        memory = _pages(layout_bytes(tensors))
        self._pin(memory)
        kept = views(memory, tensors)
        for copy, tensor in zip(kept, tensors, strict=True):
            copy.copy_(tensor.detach())
        return kept

    @torch.inference_mode(mode=False)
    def fetch(self, kept: Sequence[Tensor], slot: Slot) -> list[Tensor]:
        """Copy the whole piece behind what the device is doing."""
        if slot.memory is None:
            slot.memory = torch.empty(slot.size, dtype=torch.uint8, device=self.device)
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            if kept:
                whole = _bytes_of(kept)
                slot.memory[: len(whole)].copy_(whole, non_blocking=True)
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

    def _pin(self, memory: Tensor) -> None:
        if not self._pins or not len(memory):
            return
        with torch.cuda.device(self.device):  # or it would take memory of the first GPU
            failed = int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), len(memory), 0))
            if not failed:
                self._pinned.append(memory)
                return
            with contextlib.suppress(RuntimeError):  # CUDA tells it once more, to whatever is computed next
                torch.ones(1, device=self.device)
        self._pins = False
        log.warning(
            "the CPU's memory could not be pinned beyond %.1f GiB (CUDA error %d): copies from the rest of it hold the "
            "GPU up; close what else pins memory, or raise memory.resident",
            sum(map(len, self._pinned)) / 2**30,
            failed,
        )


def link_to(device: torch.device) -> Link:
    """The link to a device."""
    return GpuLink(device) if device.type == "cuda" else Link(device)


def check_link(resident: int | str, device: torch.device, setting: str = "resident", base: str = "base") -> None:
    """Refuse blocks that wait where waiting saves nothing.

    Args:
        resident: As `memory.resident`.
        device: That computes.
        setting: Name of the setting in `memory`, for errors.
        base: Of the one that says what they are kept in.

    Raises:
        ValueError: As above.
    """
    if isinstance(resident, int) and device.type not in ("cuda", "cpu"):
        raise ValueError(
            f"memory.{setting}={resident} is for CUDA GPUs, whose memory is not the CPU's; on this device "
            f"({device.type}) set memory.{setting}=all, and memory.{base}=int8 where it does not fit"
        )


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


def _bytes_of(kept: Sequence[Tensor]) -> Tensor:
    """The piece of memory that tensors lie in, one behind the other."""
    first = kept[0].storage_offset() * kept[0].itemsize
    return torch.empty(0, dtype=torch.uint8).set_(kept[0].untyped_storage(), first, (layout_bytes(kept),))


def _pages(size: int) -> Tensor:
    """So many bytes of the CPU's memory, and no more, in pages of their own.

    Torch's own pinned memory is rounded up to powers of two, which would be half as much again for most blocks. Forked
    processes, such as loaders' workers, share these pages: private ones that are pinned would be copied for each.
    """
    return torch.frombuffer(mmap.mmap(-1, size), dtype=torch.uint8) if size else torch.empty(0, dtype=torch.uint8)


def _unpin(stream: "torch.cuda.Stream", pinned: list[Tensor]) -> None:
    stream.synchronize()  # it may still read them
    for memory in pinned:
        torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())
