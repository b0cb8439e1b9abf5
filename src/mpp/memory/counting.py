"""Counting bytes and FLOPs of code that runs, with numbers or with shapes alone."""

import logging
import math
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

aten = torch.ops.aten


def _attention(query: Any, key: Any, value: Any, *_: Any, out_val: Any = None, **__: Any) -> int:  # noqa: ANN401
    del out_val
    return sdpa_flop_count(query.shape, key.shape, value.shape)


def _attention_backward(
    gradient: Any,  # noqa: ANN401
    query: Any,  # noqa: ANN401
    key: Any,  # noqa: ANN401
    value: Any,  # noqa: ANN401
    *_: Any,  # noqa: ANN401
    out_val: Any = None,  # noqa: ANN401
    **__: Any,  # noqa: ANN401
) -> int:
    del out_val
    return sdpa_backward_flop_count(gradient.shape, query.shape, key.shape, value.shape)


_FORMULAS: Mapping[Any, Callable[..., int]] = {  # torch has none for flash attention on the CPU and counts it as zero
    **flop_registry,
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,  # noqa: SLF001
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,  # noqa: SLF001
}


_NEW = {
    aten.new_zeros.default: torch.zeros,
    aten.new_ones.default: torch.ones,
    aten.zeros.default: torch.zeros,
    aten.ones.default: torch.ones,
}
_LARGE = 2**22  # elements that are not computed any more
_SMALL = 2**16  # elements; what is so small has numbers in the forward pass, as models ask some of it what to do


def _is_small(shape: Sequence[int]) -> bool:
    return math.prod(shape) <= _SMALL and torch._C._current_graph_task_id() == -1  # noqa: SLF001


def _is_large(function: Any, args: Any, given: Sequence[Tensor]) -> bool:  # noqa: ANN401
    """Whether an operation on what has numbers makes more of them than anybody asks for, such as masks of all pairs."""
    if function is aten.repeat.default:
        return math.prod(args[1]) * given[0].numel() > _LARGE
    if torch.Tag.pointwise in function.tags:
        return math.prod(torch.broadcast_shapes(*(tensor.shape for tensor in given))) > _LARGE
    return False


def _positions(index: Tensor | None) -> Tensor | None:
    """Where a mask with numbers is true, which tells how much it picks also of what has none."""
    if index is None or index.dtype != torch.bool or index.ndim != 1 or isinstance(index, FakeTensor):
        return index
    with _disable_current_modes():
        return index.nonzero()[:, 0]


class Meter(TorchDispatchMode):
    """Counts, while it is entered, FLOPs and the bytes of all storages that come and go.

    A storage counts from when an operation returns it until nobody holds it. What an operation needs within itself is
    not seen.

    Attributes:
        live: Bytes that are there now of what came since it was first entered.
        flops: Of matrix products, convolutions and attention, by the first name that `part` gave.
        peaks: The most bytes that were live while each part ran, by all names that `part` gave it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live, self.flops = 0, Counter[Any]()
        self.peaks: dict[Any, int] = {}
        self._parts: tuple[Any, ...] = ("",)
        self._blind = False
        self._seen: weakref.WeakKeyDictionary[torch.UntypedStorage, int] = weakref.WeakKeyDictionary()

    def part(self, *names: Any) -> None:  # noqa: ANN401
        """From here on count for a part of the code that has these names."""
        self._parts = names
        self._look()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401
        """Run an operation and count it; one on numbers alone is computed also where others are not."""
        del types
        kwargs = kwargs or {}
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if function is aten.index.Tensor:
            args = args[0], [_positions(index) for index in args[1]]
        if (
            given
            and not any(isinstance(tensor, FakeTensor) for tensor in given)
            and not _is_large(function, args, given)
        ):
            with _disable_current_modes():
                made = function(*args, **kwargs)
        elif function in _NEW and _is_small(args[-1]):
            dtype = kwargs.get("dtype") or (given[0].dtype if given else None)
            with _disable_current_modes():
                made = _NEW[function](args[-1], dtype=dtype)
        else:
            made = function(*args, **kwargs)
        formula = _FORMULAS.get(function.overloadpacket)
        if formula is not None:
            self.flops[self._parts[0]] += formula(*args, **kwargs, out_val=made)
        for leaf in tree_leaves(made):
            if isinstance(leaf, Tensor):
                self._add(leaf.untyped_storage())
        return made

    def _add(self, storage: torch.UntypedStorage) -> None:
        if storage in self._seen:
            return
        size = self._seen[storage] = 0 if self._blind else storage.nbytes()
        self.live += size
        weakref.finalize(storage, self._drop, size)
        self._look()

    def _drop(self, size: int) -> None:
        self.live -= size

    def known(self, tensors: Iterable[Tensor]) -> None:
        """Leave out what was there before, which views would bring in."""
        for tensor in tensors:
            self._seen[tensor.untyped_storage()] = 0

    def unseen(self, make: Callable[[], Tensor]) -> Tensor:
        """What `make` gives, as if it were elsewhere."""
        self._blind = True
        try:
            return make()
        finally:
            self._blind = False

    def _look(self) -> None:
        for name in self._parts:
            self.peaks[name] = max(self.peaks.get(name, 0), self.live)


@contextmanager
def without_numbers() -> Iterator[None]:
    """Inside, tensors have shapes and no memory; those made before keep their numbers, and may be mixed in."""
    log = logging.getLogger("torch._subclasses.fake_tensor")  # which tells a mistake's whole way to the console
    before, log.disabled = log.disabled, True
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            yield
    finally:
        log.disabled = before


def weightless(module: nn.Module) -> nn.Module:
    """Turn what lies on the meta device into weights of the CPU, without memory: to be called inside the above."""
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            if parameter.is_meta:
                empty = torch.empty(parameter.shape, dtype=parameter.dtype)
                part.register_parameter(name, nn.Parameter(empty, requires_grad=parameter.requires_grad))
        for name, buffer in part.named_buffers(recurse=False):
            if buffer.is_meta:
                setattr(part, name, torch.empty(buffer.shape, dtype=buffer.dtype))
    return module


def bytes_of(tensors: Any) -> int:  # noqa: ANN401
    """Bytes of what tensors lie in, each storage once."""
    storages = {tensor.untyped_storage() for tensor in tensors}
    return sum(storage.nbytes() for storage in storages)
