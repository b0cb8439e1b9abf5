"""How many bytes of tensors a computation holds at once, counted without doing it."""

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """While it is entered, counts the storages of all tensors that operations make; on the meta device nothing is done.

    What operations take for themselves while they run is not seen, nor tensors that were there before.

    Attributes:
        now: Bytes that are there.
        peak: The most that were there at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401
        """Do it, and see what came out."""
        del types
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self._see(tensor.untyped_storage())
        return made

    def _see(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()  # torch gives all its tensors one object
        if key in self._known:
            return

        def gone(_: object) -> None:
            del self._known[key]
            self.now -= size

        self._known[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors that share nothing."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
