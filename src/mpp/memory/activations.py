"""What the backward pass needs of the forward pass: kept, computed again, or moved to the CPU until then."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.weak import WeakTensorKeyDictionary

Activations = Literal["keep", "checkpoint", "offload"]
ACTIVATIONS = ("keep", "checkpoint", "offload")


def check_activations(activations: str, setting: str) -> None:
    """Refuse what is no choice.

    Args:
        activations: One of `ACTIVATIONS`.
        setting: Name of the setting, for errors.

    Raises:
        ValueError: As above.
    """
    if activations not in ACTIVATIONS:
        raise ValueError(f"{setting} must be one of {', '.join(ACTIVATIONS)}, got {activations!r}")


class Host:
    """Where what is saved waits: the CPU's memory, pinned where a GPU reads it."""

    def away(self, tensor: Tensor) -> Tensor:
        """A copy that waits there."""
        copy = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
        return copy.copy_(tensor)

    def back(self, copy: Tensor, device: torch.device) -> Tensor:
        """What waits there, on its device again."""
        return copy.to(device, non_blocking=True)


@contextmanager
def on_the_cpu(module: nn.Module, host: Host) -> Iterator[None]:
    """Inside, what autograd saves moves to the CPU, and comes back when it is used.

    The weights of the module stay, as whatever shares their memory. What several blocks save, such as rotary
    embeddings, is moved once.

    Args:
        module: Whose pass takes place.
        host: Where it waits.
    """
    own = {tensor.untyped_storage() for tensor in (*module.parameters(), *module.buffers())}
    moved = WeakTensorKeyDictionary()  # a tensor's version and copy, for as long as the tensor lives

    def pack(tensor: Tensor) -> Tensor | tuple[torch.device, Tensor]:
        if tensor.untyped_storage() in own:
            return tensor
        version, copy = moved.get(tensor, (None, None))
        if version != tensor._version:  # noqa: SLF001
            copy = host.away(tensor)
            moved[tensor] = tensor._version, copy  # noqa: SLF001
        return tensor.device, copy

    def unpack(packed: Tensor | tuple[torch.device, Tensor]) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        device, copy = packed
        return host.back(copy, device)

    with saved_tensors_hooks(pack, unpack):
        yield
