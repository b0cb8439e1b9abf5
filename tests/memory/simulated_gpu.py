"""A GPU's streams on the CPU: what is computed at once, and whether every order that a GPU may choose gives the same.

Each stream does its operations in order; those of two are in order only where an event or the host says so. Vector
clocks (for each stream, how many of its operations come before) find two operations that touch the same memory, one of
them writing, in no order. Without such a pair the order in which they were given is as good as any other.
"""

import weakref
from collections import Counter
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Stream:
    def __init__(self, gpu):
        self.gpu, self.clock = gpu, Counter()

    def record_event(self):
        return Counter(self.clock)

    def wait_event(self, event):
        self.clock |= event

    def wait_stream(self, other):
        self.wait_event(other.record_event())

    def synchronize(self):
        self.gpu.host.clock |= self.clock


class Region:
    """Memory, and who touched it last."""

    def __init__(self, *, pinned):
        self.pinned, self.writes, self.reads = pinned, Counter(), Counter()

    def unsafe(self, clock, *, writing):
        before = self.writes | self.reads if writing else self.writes
        return any(clock[stream] < number for stream, number in before.items())


class Gpu(TorchDispatchMode):
    """Inside, operations on memory of slots are a GPU's, on the current stream.

    Attributes:
        races: What went wrong.
        copied: Bytes of each copy from pinned memory to a slot.
    """

    def __init__(self, fails_at=None):
        super().__init__()
        self.host, self.default = Stream(self), Stream(self)
        self.current, self.regions = self.default, {}
        self.races, self.copied, self.fails_at = [], [], fails_at

    def install(self, monkeypatch):
        """Stand for the parts of `torch.cuda` that a link uses."""
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream(self))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: self.current)
        monkeypatch.setattr(torch.cuda, "stream", self.on)
        monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
        monkeypatch.setattr(
            torch.cuda,
            "cudart",
            lambda: SimpleNamespace(cudaHostRegister=self.register, cudaHostUnregister=self.unregister),
        )
        return self

    @contextmanager
    def on(self, stream):
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    def register(self, address, size, flags):
        pinned = sum(region.pinned for region in self.regions.values())
        if size == 0 or flags != 0 or pinned == self.fails_at:
            return 1
        self.regions[address] = Region(pinned=True)
        return 0

    def unregister(self, address):
        if self.regions.pop(address).unsafe(self.host.clock, writing=True):
            self.races.append("memory is unpinned while a copy reads it")
        return 0

    def given_back(self, address):
        if self.regions.pop(address).unsafe(self.default.clock, writing=True):
            self.races.append("a slot's memory has another owner while a copy writes it")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        schema = func._schema
        views = any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns)
        if not views and func is not torch.ops.aten._has_compatible_shallow_copy_type.default:
            self.touched(func, schema, args, kwargs or {})
        made = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.empty.memory_format and made.dtype == torch.uint8 and made.numel():
            storage = made.untyped_storage()
            self.regions[storage.data_ptr()] = Region(pinned=False)
            weakref.finalize(storage, self.given_back, storage.data_ptr()).atexit = False
        return made

    def touched(self, func, schema, args, kwargs):
        found = []
        for number, argument in enumerate(schema.arguments):
            value = args[number] if number < len(args) else kwargs.get(argument.name)
            writing = argument.alias_info is not None and argument.alias_info.is_write
            for tensor in (leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor) and leaf.numel()):
                region = self.regions.get(tensor.untyped_storage().data_ptr())
                if region is not None:
                    found.append((region, writing, tensor.nbytes))
        if not found:
            return
        moved = [size for region, writing, size in found if region.pinned and not writing]
        at_slot = any(not region.pinned for region, *_ in found)
        copies = func is torch.ops.aten.copy_.default
        if moved and not copies:
            self.races.append(f"{func} computes with weights that wait in the CPU's memory")
        if moved and at_slot:
            self.copied += moved
            if not (args[2:] or [kwargs.get("non_blocking")])[0]:
                self.races.append("the CPU waits for a copy")
        self.give(func, self.current if at_slot else self.host, found)

    def give(self, func, stream, found):
        stream.clock |= self.host.clock
        stream.clock[stream] += 1
        for region, writing, _ in found:
            if region.unsafe(stream.clock, writing=writing):
                self.races.append(f"{func} {'writes' if writing else 'reads'} what another stream may be using")
            last = region.writes if writing else region.reads
            last[stream] = stream.clock[stream]
